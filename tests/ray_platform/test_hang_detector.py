"""Which rank is reported for a hang, and which situations are not hangs."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import ray

from ray_platform.placement import start_on_this_node
from ray_platform.train import hang_detector
from ray_platform.train.hang_detector import HangDetector, Heartbeat, HeartbeatThread
from tests.support.messages import check_message

EXPORTING = {"phase": "exporting the model", "slow": True}


def heartbeat(rank, step=4, phase="training", waits=True, slow=False, progress=0):
    stack_top = "stream.py:57 _next"
    return Heartbeat(rank, step, phase, stack_top, waits, slow, progress, "node-a", 100 + rank, "n" * 8, f"actor {rank}")


@pytest.fixture
def clock(monkeypatch):
    """Clock of the detector that only `clock.wait(seconds)` advances."""
    now = [100.0]
    monkeypatch.setattr(hang_detector, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return SimpleNamespace(wait=lambda seconds: now.__setitem__(0, now[0] + seconds))


def detector_of(*heartbeats):
    detector = HangDetector()
    for each in heartbeats:
        detector.record(each)
    return detector


def test_the_rank_that_the_others_wait_for_is_named(clock):
    reads = heartbeat(1, waits=False, phase="waiting for data")
    detector = detector_of(heartbeat(0), reads, heartbeat(2))
    assert detector.find_hang(6.0) == ""
    clock.wait(7)
    line = detector.find_hang(6.0)
    assert "rank 1 (node-a, pid 101) in step 5 hangs while waiting for data, at stream.py:57 _next" in line
    assert "the other 2 of 3 ranks wait" in line
    assert detector.actors() == ["actor 0", "actor 1", "actor 2"]
    detector.record(heartbeat(1, step=5))
    assert detector.find_hang(6.0) == "", "one rank makes progress"


def test_many_silent_ranks_are_not_compared_with_each_other(clock, monkeypatch):
    detector = detector_of(*(heartbeat(rank) for rank in range(50)))
    clock.wait(20)
    comparisons = []
    monkeypatch.setattr(Heartbeat, "__eq__", lambda *pair: comparisons.append(pair))
    line = detector.find_hang(6.0)
    assert "rank 7 " in line
    assert "rank 8 " not in line
    assert "42 more ranks" in line
    assert comparisons == []


@pytest.mark.parametrize("more", [{}, EXPORTING])
def test_a_silent_rank_is_named_before_busy_ones_and_has_no_more_time(clock, more):
    silent, busy = heartbeat(1, **more), heartbeat(0, waits=bool(more), **more)
    detector = detector_of(silent, busy)
    clock.wait(20)
    detector.record(busy)
    line = detector.find_hang(15.0)
    assert "rank 1 (node-a, pid 101) in step 5 sends no heartbeats" in line


def test_a_slow_phase_has_more_time_but_not_for_ever(clock):
    exports = detector_of(heartbeat(0, waits=False, **EXPORTING), heartbeat(1, **EXPORTING))
    trains = detector_of(heartbeat(0, waits=False), heartbeat(1))
    clock.wait(9)
    assert exports.find_hang(1.0) == ""
    assert "rank 0" in trains.find_hang(1.0)
    clock.wait(1)
    line = exports.find_hang(1.0)
    assert "rank 0 (node-a, pid 100) in step 5 hangs while exporting the model" in line
    assert " 10 s" in line, "the time without progress, not the limit of other phases"


def test_an_upload_that_makes_progress_is_not_a_hang(clock):
    detector = HangDetector()
    for progress in range(3):
        detector.record(heartbeat(0, phase="saving a checkpoint", progress=progress))
        clock.wait(4)
        assert detector.find_hang(6.0) == ""
        detector.record(heartbeat(0, phase="saving a checkpoint", progress=progress))
    clock.wait(4)
    assert detector.find_hang(6.0)


def test_dead_and_removed_ranks_are_not_waited_for(clock):
    detector = HangDetector()
    assert not detector.all_stopped(), "it was restarted, perhaps, and the ranks have not sent a heartbeat yet"
    clock.wait(20)
    for rank in (0, 1):
        detector.record(heartbeat(rank))
    detector.remove(0)
    assert not detector.all_stopped()
    clock.wait(20)
    assert detector.all_stopped(), "a rank without heartbeats has died"
    detector.record(heartbeat(1))
    assert not detector.all_stopped()
    detector.remove(1)
    assert detector.all_stopped()
    assert detector.find_hang(1.0) == ""


def test_a_rank_reports_that_it_waits_for_the_others():
    """NCCL calls return immediately; a rank waits for their results in frames that look like any other."""
    thread = HeartbeatThread(None, 0)
    assert thread.heartbeat().is_slow_phase, "it starts"
    thread.set_phase("training")
    assert not thread.heartbeat().waits_for_ranks
    with thread.waiting_for_ranks():
        with thread.waiting_for_ranks():
            pass
        sent = thread.heartbeat()
    assert (sent.waits_for_ranks, sent.phase, sent.is_slow_phase) == (True, "training", False)
    assert not thread.heartbeat().waits_for_ranks


def test_a_detector_whose_process_is_killed_is_restarted_and_judges_again(ray_cluster):
    detector = start_on_this_node(HangDetector)
    assert ray.get(detector.record.remote(heartbeat(0, waits=False))) == ""
    processes = [child for child in psutil.Process().children(recursive=True) if "HangDetector" in " ".join(child.cmdline())]
    process = max(processes, key=psutil.Process.create_time)  # that of an earlier run may not have ended yet
    process.kill()
    assert ray.get(detector.find_hang.remote(0.0)) == "", "it knows no rank yet"
    ray.get([detector.record.remote(heartbeat(0, waits=False)), detector.report_progress.remote(5, {"train/loss": 1.0})])
    assert ray.get(detector.find_hang.remote(0.0))
    assert ray.get(detector.progress.remote()) == (5, {"train/loss": 1.0})
    logs = [file.read_text() for file in Path(ray_cluster.address_info["session_dir"], "logs").glob("worker-*.err")]
    [line] = {
        line for log in logs for line in log.splitlines() if "hang detector died" in line
    }  # other tests may restart it, too
    check_message("the hang detector is killed", line)


def test_a_request_to_stop_reaches_every_rank_until_the_workers_are_gone():
    detector = HangDetector()
    assert detector.record(heartbeat(0)) == ""
    detector.request_stop("stopped by SIGTERM")
    assert detector.record(heartbeat(1)) == "stopped by SIGTERM"
    detector.reset()
    assert detector.record(heartbeat(1)) == ""
