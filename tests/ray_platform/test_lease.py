"""Only one launch has an output folder: when another one is rejected, and when it takes the lease over."""

import json
import os
import threading
from dataclasses import replace

import pytest

from ray_platform import lease, storage
from ray_platform.contracts import ConfigError
from ray_platform.formats import NewerFormatError
from ray_platform.lease import LEASE, Holder, Lease
from tests.support.messages import check_message

ELSEWHERE = replace(Holder.current("first"), host="gpu-3", pid=812, machine="another machine", ray_job="raysubmit_1")
NO_PID = 2**22 + 1  # above Linux' limit


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def output(request, tmp_path) -> str:
    if request.param == "folder":
        return str(tmp_path / "run[1]")
    return storage.join(request.getfixturevalue("s3_url"), "lease", request.node.name.partition("[")[0], "run[1]")


class Waiting:
    """Counts the seconds that a launch waits, and calls `action` each time."""

    def __init__(self, action=lambda: None):
        self.action, self.seconds = action, 0.0

    def __call__(self, seconds):
        self.seconds += seconds
        self.action()


def write(output, holder):
    storage.write_bytes(storage.join(str(output), LEASE), holder.to_bytes())


def read(output):
    return Holder.from_bytes(storage.read_bytes(storage.join(str(output), LEASE)), LEASE)


def test_a_lease_names_its_holder_and_is_released(output, monkeypatch):
    job = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_9"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    waiting = Waiting()
    with Lease(output, "first", waiting) as held:
        assert (read(output).launch, read(output).pid, read(output).ray_job) == ("first", os.getpid(), "raysubmit_9")
        assert json.loads(storage.read_bytes(storage.join(output, LEASE)))["format_version"] == 1
        held.renew()
        assert (read(output).renewals, held.lost) == (1, "")
        with pytest.raises(ConfigError, match=rf"^output_dir: .*in use by launch first \(host .*, pid {os.getpid()}, Ray job"):
            Lease(output, "second", waiting).__enter__()
    assert waiting.seconds == 0, "the process can be seen"
    assert not storage.exists(storage.join(output, LEASE))
    with pytest.raises(ZeroDivisionError), Lease(output, "second", waiting):
        raise ZeroDivisionError
    assert not storage.exists(storage.join(output, LEASE)), "a launch that fails releases its lease, too"


def test_a_lease_that_is_renewed_on_another_host_rejects_a_launch(output):
    """Whatever its clock says."""
    write(output, replace(ELSEWHERE, renewed_at="1999-01-01T00:00:00+00:00"))
    waiting = Waiting(lambda: waiting.seconds >= 10 and write(output, replace(ELSEWHERE, renewals=1)))
    with pytest.raises(ConfigError, match=r"in use by launch first \(host gpu-3, pid 812, Ray job raysubmit_1\)") as rejected:
        Lease(output, "second", waiting).__enter__()
    check_message("a second launch into an output folder in which a run trains", rejected.value, OUTPUT_DIR=output)
    assert waiting.seconds <= lease.RENEWAL_SECONDS
    assert read(output).launch == "first"


@pytest.mark.parametrize("content", [ELSEWHERE.to_bytes(), b"{", b""], ids=["stale", "damaged", "empty"])
def test_a_lease_that_stays_the_same_is_taken_over(tmp_path, caplog, content):
    storage.write_bytes(str(tmp_path / LEASE), content)
    waiting = Waiting()
    with Lease(str(tmp_path), "second", waiting):
        assert read(tmp_path).launch == "second"
    assert lease.STALE_SECONDS <= waiting.seconds < lease.STALE_SECONDS + lease.RENEWAL_SECONDS
    waited, taken = [record.getMessage() for record in caplog.records]
    assert "waiting up to 45 s" in waited
    assert "taking over" in taken
    if content == ELSEWHERE.to_bytes():
        check_message("a launch finds the lease of a driver on another host", waited, OUTPUT_DIR=tmp_path)
        check_message("that lease is not renewed, because its driver was killed", taken, OUTPUT_DIR=tmp_path)


@pytest.mark.parametrize("ended", [{"pid": NO_PID}, {"started": "1"}], ids=["no such process", "another process has its pid"])
def test_the_lease_of_a_process_that_has_ended_on_this_machine_is_taken_over_at_once(tmp_path, caplog, ended):
    write(tmp_path, replace(Holder.current("first"), **ended))
    waiting = Waiting()
    with Lease(str(tmp_path), "second", waiting):
        assert read(tmp_path).launch == "second"
    assert waiting.seconds < lease.RENEWAL_SECONDS
    (taken,) = caplog.messages
    if "pid" in ended:
        places = {"OUTPUT_DIR": tmp_path, "HOST": Holder.current("").host, "PID": NO_PID}
        check_message("a launch finds the lease of a driver that was killed on its own host", taken, **places)


def test_a_lease_that_is_released_meanwhile_is_taken(tmp_path):
    write(tmp_path, ELSEWHERE)
    with Lease(str(tmp_path), "second", Waiting(lambda: storage.delete(str(tmp_path / LEASE)))):
        assert read(tmp_path).launch == "second"


def test_one_of_two_launches_that_take_a_lease_over_is_rejected(tmp_path):
    write(tmp_path, replace(Holder.current("first"), pid=NO_PID))
    third = replace(ELSEWHERE, launch="third", token="3")
    with pytest.raises(ConfigError, match="in use by launch third"):
        Lease(str(tmp_path), "second", Waiting(lambda: write(tmp_path, third))).__enter__()
    assert read(tmp_path) == third


def test_a_launch_learns_that_it_lost_its_lease_and_leaves_it_alone(output):
    with Lease(output, "first") as held:
        write(output, replace(ELSEWHERE, launch="second", token="2"))
        held.renew()
        assert "taken over by launch second (host gpu-3" in held.lost
        check_message("another launch took the output folder over, while the driver did not answer", held.lost, OUTPUT_DIR=output)
    assert read(output).launch == "second"
    storage.delete(storage.join(output, LEASE))
    with Lease(output, "first") as held:
        storage.delete(storage.join(output, LEASE))
        held.renew()
        assert "missing" in held.lost
    with Lease(output, "first") as held:
        storage.write_bytes(storage.join(output, LEASE), json.dumps({"format_version": 2}).encode())
        held.renew()
        assert "newer version" in held.lost


def test_a_lease_is_renewed_again_after_any_error(tmp_path, monkeypatch, caplog):
    renewed, errors = threading.Event(), iter([ConfigError("AWS_CA_BUNDLE: no such file"), KeyError("renewals"), None])

    def renew(held):
        if error := next(errors, None):
            raise error
        renewed.set()

    monkeypatch.setattr(lease, "RENEWAL_SECONDS", 0.001)
    monkeypatch.setattr(Lease, "renew", renew)
    with Lease(str(tmp_path), "first"):
        assert renewed.wait(10)
    assert len(caplog.messages) == 1
    assert "AWS_CA_BUNDLE" in caplog.text


def test_a_lease_of_a_newer_version(tmp_path):
    (tmp_path / LEASE).write_text(json.dumps({"format_version": 2}))
    with pytest.raises(NewerFormatError, match=r"lease\.json: .*newer version") as newer:
        Lease(str(tmp_path), "second").__enter__()
    check_message("a file in the output folder was written by a newer version", newer.value, OUTPUT_DIR=tmp_path)
