"""A real Ray head: jobs run on it, only with its token, and nothing of it stays, however it ends."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from ray_platform import local_head
from ray_platform.local_head import MARKER, HeadError, LocalHead, submit

ROOT = Path(__file__).parents[2]
PLATFORM = str(ROOT / "platform")

JOB = """
import os, sys
import _bootstrap
import ray
from ray_platform.connect import connect

@ray.remote
def look():
    import ray_platform.contracts
    import outside
    return os.environ["GREETING"], os.path.exists("data"), outside.__name__

connect()
print("FROM A WORKER:", *ray.get(look.remote()))
sys.exit(int(sys.argv[1]))
"""

pytestmark = pytest.mark.ray


def marked(value: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARKER) == value:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def head():
    with LocalHead(num_cpus=2) as head:
        yield head


@pytest.fixture
def project(tmp_path):
    """A small project of the repository's shape, with a folder that must not be uploaded."""
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "ray_platform").symlink_to(ROOT / "platform" / "ray_platform")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "_bootstrap.py").write_text((ROOT / "jobs" / "_bootstrap.py").read_text())
    (tmp_path / "jobs" / "look.py").write_text(JOB)
    (tmp_path / "outside.py").write_text("")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big.bin").write_bytes(b"0" * 1000)
    (tmp_path / ".gitignore").write_text("/data/\n")
    return tmp_path


def test_a_submitted_job_runs_with_its_packages_and_without_ignored_files(head, project, capfd):
    assert submit(head, ["python", "jobs/look.py", "0"], project, {"GREETING": "good day"}) == 0
    assert "FROM A WORKER: good day False outside" in capfd.readouterr().out


@pytest.mark.slow
def test_a_job_that_fails_has_its_exit_code(head, project):
    assert submit(head, ["python", "-c", "raise SystemExit(3)"], project, {}) == 1


@pytest.mark.slow
def test_a_driver_beside_the_head_finds_it_by_its_environment(head):
    driver = "from ray_platform.connect import connect; connect(); import ray; print(ray.cluster_resources()['CPU'])"
    run = subprocess.run(
        [sys.executable, "-c", driver], env=head.env | {"PYTHONPATH": PLATFORM}, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["2.0"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer " + "0" * 64}])
def test_nobody_gets_in_without_the_token(head, headers):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/", headers=headers), timeout=10)
    assert refused.value.code in (401, 403)


def test_the_head_listens_on_loopback_alone(head):
    listening = {
        connection.laddr.ip.removeprefix("::ffff:")
        for process in head.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}


def test_a_start_that_fails_shows_the_log_and_leaves_nothing(monkeypatch):
    failing = [sys.executable, "-c", "print('no room for a head'); raise SystemExit(3)"]
    monkeypatch.setattr(LocalHead, "_command", lambda self: failing)
    head = LocalHead()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(HeadError, match=r"exited with code 3(.|\n)*no room for a head"), head:
        pass
    assert not head._folder.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_start_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(LocalHead, "_command", lambda self: [sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(local_head, "_START_TIMEOUT_S", 0.5)
    head = LocalHead()
    with pytest.raises(HeadError, match="not ready"), head:
        pass
    assert not head.processes()


def start_and_wait(program: str) -> tuple[subprocess.Popen, str, Path]:
    """Run a program that starts a head and prints its marker and folder; return once it did."""
    program = f"""
import signal, subprocess, sys, time
from pathlib import Path
from ray_platform.local_head import MARKER, LocalHead, submit
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
with LocalHead(num_cpus=1) as head:
    print(head.env[MARKER], head._folder, flush=True)
    {program}
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": PLATFORM}, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    marker, folder = parent.stdout.readline().split()
    return parent, marker, Path(folder)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, -signal.SIGINT), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
@pytest.mark.slow
def test_a_signal_ends_the_head_its_children_and_nothing_else(number, code):
    with subprocess.Popen(["sleep", "600"]) as bystander:
        # A child that ignores the first request to end, as a worker in a long call does.
        stubborn = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        parent, marker, folder = start_and_wait(
            f"subprocess.Popen([sys.executable, '-c', {stubborn!r}], env=head.env); time.sleep(600)"
        )
        assert len(marked(marker)) > 5
        parent.send_signal(number)
        assert parent.wait(timeout=30) == code
        assert not marked(marker)
        assert not folder.exists()
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.slow
def test_an_interrupt_stops_the_job(tmp_path):
    started, stopped = tmp_path / "started", tmp_path / "stopped"
    job = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(stopped)!r}).touch(), sys.exit(1)))
pathlib.Path({str(started)!r}).touch()
time.sleep(600)
"""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "job.py").write_text(job)
    parent, marker, _ = start_and_wait(f"submit(head, ['python', 'job.py'], Path({str(tmp_path / 'work')!r}), {{}})")
    wait_until(started.exists)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=60)
    assert stopped.exists(), "the job was asked to stop, not killed"
    assert not marked(marker)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells the head on Linux only")
def test_the_head_goes_when_its_parent_is_killed():
    parent, marker, folder = start_and_wait("time.sleep(600)")
    parent.kill()
    parent.wait()
    wait_until(lambda: not marked(marker))
    shutil.rmtree(folder)  # nobody was left to remove it


def wait_until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
