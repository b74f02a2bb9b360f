"""A real Ray head: jobs run on it only with its token, and it leaves no processes or files behind, however it ends."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import ray

from ray_platform import local_head
from ray_platform.local_head import MARKER, HeadError, LocalHead, ensure_cluster, marked_processes, submit

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


@pytest.fixture(scope="module")
def head():
    with LocalHead(num_cpus=2) as head:
        yield head


@pytest.fixture
def project(tmp_path):
    """A small project with the repository's layout and a folder that must not be uploaded."""
    files = {
        "jobs/_bootstrap.py": (ROOT / "jobs" / "_bootstrap.py").read_text(),
        "jobs/look.py": JOB,
        "outside.py": "",
        "data/big.bin": "0" * 1000,
        # Other tests compile modules meanwhile. Ray hashes the folder twice, and does not find a package that changed in between.
        ".gitignore": "/data/\n__pycache__/\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    (tmp_path / "platform").mkdir()
    (tmp_path / "platform" / "ray_platform").symlink_to(ROOT / "platform" / "ray_platform")
    return tmp_path


def test_a_submitted_job_runs_with_its_packages_and_without_ignored_files(head, project, capfd):
    assert submit(head, ["python", "jobs/look.py", "0"], project, {"GREETING": "good day"}, project / "job.log") == 0
    shown, log = capfd.readouterr().out, (project / "job.log").read_text()
    assert "FROM A WORKER: good day False outside" in shown
    assert "ray job" in log
    assert "ray job" not in shown, "commands that cannot work after the head has ended"


@pytest.mark.slow
def test_a_job_that_fails_has_its_exit_code(head, project):
    assert submit(head, ["python", "-c", "raise SystemExit(3)"], project, {}, project / "job.log") == 1


@pytest.mark.slow
def test_a_driver_next_to_the_head_finds_it_by_its_environment(head):
    driver = "from ray_platform.connect import connect; connect(); import ray; r = ray.cluster_resources()"
    driver += "; print(r['CPU'], r['object_store_memory'] > 2**30)"
    printed = subprocess.check_output([sys.executable, "-c", driver], env=head.env | {"PYTHONPATH": PLATFORM}, text=True)
    assert printed.split() == ["2.0", "True"], "the object store has the size of the machine"


def test_the_head_is_reachable_from_this_machine_alone_and_with_its_token_alone(head):
    for headers in ({}, {"Authorization": "Bearer " + "0" * 64}):
        with pytest.raises(urllib.error.HTTPError) as rejected:
            urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/", headers=headers), timeout=10)
        assert rejected.value.code in (401, 403)
    connections = (c for process in marked_processes(head.env[MARKER]) for c in process.net_connections("inet"))
    assert {c.laddr.ip.removeprefix("::ffff:") for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}


def test_ray_still_has_the_setting_with_which_it_starts_no_workers_in_advance():
    """It is not documented, and an unknown one is ignored; so without it only time would be lost."""
    assert b"prestart_worker_first_driver" in (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").read_bytes()


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "print('no room\\nError: no more processes\\nsee the manual'); raise SystemExit(3)",
            r"^the Ray head exited with code 3 at its start; its output is in (?P<log>\S+): Error: no more processes$",
        ),
        ("import time; time.sleep(600)", "not ready"),
    ],
)
def test_a_start_that_fails_names_its_log_and_leaves_nothing_else(monkeypatch, tmp_path, program, message):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(LocalHead, "_command", lambda self: [sys.executable, "-c", program])
    monkeypatch.setattr(local_head, "_START_TIMEOUT_S", 1.5)
    head = LocalHead()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(HeadError, match=message) as raised, head:
        pass
    if (found := re.search(message, str(raised.value))).groupdict():
        assert Path(found["log"]).read_text() == "no room\nError: no more processes\nsee the manual\n"
    assert len(list(tmp_path.iterdir())) == 1, "the log"
    assert not marked_processes(head.env[MARKER])
    assert not head._folder.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_start_that_ray_gave_up_is_tried_once_more(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    starts = tmp_path / "starts"
    program = f"open({str(starts)!r}, 'a').write('x'); print('The current node timed out during startup.'); raise SystemExit(1)"
    monkeypatch.setattr(LocalHead, "_command", lambda self: [sys.executable, "-c", program])
    with pytest.raises(HeadError, match="timed out during startup"), LocalHead():
        pass
    assert starts.read_text() == "xx"


COMMAND = """
import os, sys, time
assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"
print("2026-11-30 01:00:00,123\\tINFO worker.py:2000 -- Connecting")
print("units 1/1")
print("table", sys.argv[1])
print("error: suite: no such set", file=sys.stderr)
sys.exit(1)
"""


class StartedHead:
    """Stands in for a head that runs already."""

    def __enter__(self):
        self.env = os.environ | {"RAY_ADDRESS": "127.0.0.1:1"}
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("folder", ["out", "s3://bucket/out"])
def test_a_command_without_a_cluster_shows_its_own_output_and_keeps_the_rest_in_a_log(monkeypatch, tmp_path, capfd, folder):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(local_head, "LocalHead", StartedHead)
    monkeypatch.setattr(local_head.tempfile, "mkdtemp", lambda prefix: str(tmp_path / "temporary"))
    (tmp_path / "command.py").write_text(COMMAND)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "command.py"), "of two"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # it is that of pytest
    output_dir = folder if "://" in folder else str(tmp_path / folder)
    with pytest.raises(SystemExit) as ended:
        ensure_cluster(output_dir)
    log = tmp_path / ("temporary" if "://" in folder else folder) / "job.log"
    shown = capfd.readouterr()
    assert (ended.value.code, shown.out) == (1, "units 1/1\ntable of two\n")
    assert shown.err == f"error: suite: no such set\nall messages of this command are in {log}\n"
    assert "INFO worker.py" in log.read_text()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_interrupted_command_ends_by_itself_and_says_how_to_continue(tmp_path, number, code):
    (tmp_path / "command.py").write_text("""
import signal, time
signal.signal(signal.SIGTERM, signal.default_int_handler)
print("started")
try:
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)  # saves
    raise SystemExit("stopped; the same command continues")
""")
    program = f"""
import os, signal, sys
from pathlib import Path
from ray_platform.local_head import run_filtered
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as LocalHead does
sys.exit(run_filtered([sys.executable, {str(tmp_path / "command.py")!r}], os.environ, Path({str(tmp_path / "log")!r})))
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": PLATFORM}, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        if number == signal.SIGINT:
            os.killpg(parent.pid, number)  # as a terminal does
        else:
            parent.terminate()
        assert parent.stdout.read() == "stopped; the same command continues\n"
    assert parent.returncode == code


def start_and_wait(program: str) -> tuple[subprocess.Popen, str, Path]:
    """Run a program that starts a head; return once it has printed its marker and folder."""
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


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
@pytest.mark.slow
def test_a_signal_ends_the_head_its_children_and_nothing_else(number, code):
    with subprocess.Popen(["sleep", "600"]) as bystander:
        # A child that ignores SIGTERM, like a worker in a long call.
        stubborn = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
        parent, marker, folder = start_and_wait(
            f"subprocess.Popen([sys.executable, '-c', {stubborn!r}], env=head.env); time.sleep(600)"
        )
        assert len(marked_processes(marker)) > 5
        parent.send_signal(number)
        assert parent.wait(timeout=30) == code
        assert not marked_processes(marker)
        assert not folder.exists()
        assert bystander.poll() is None
        bystander.kill()


@pytest.mark.slow
def test_an_interrupt_stops_the_job(tmp_path):
    started, stopped = tmp_path / "started", tmp_path / "stopped"
    (tmp_path / "job.py").write_text(f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(stopped)!r}).touch(), sys.exit(1)))
pathlib.Path({str(started)!r}).touch()
time.sleep(600)
""")
    parent, marker, _ = start_and_wait(
        f"submit(head, ['python', 'job.py'], Path({str(tmp_path)!r}), {{}}, Path({str(tmp_path / 'job.log')!r}))"
    )
    wait_until(started.exists)
    parent.send_signal(signal.SIGINT)
    parent.communicate(timeout=60)
    assert stopped.exists(), "the job was asked to stop, not killed"
    assert not marked_processes(marker)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel signals the head on Linux only")
def test_the_head_goes_when_its_parent_is_killed():
    parent, marker, folder = start_and_wait("time.sleep(600)")
    parent.kill()
    parent.wait()
    wait_until(lambda: not marked_processes(marker))
    shutil.rmtree(folder)  # no process was left to delete it


def wait_until(true) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
