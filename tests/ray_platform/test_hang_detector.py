"""Which rank a hang is blamed on, and what is not a hang."""

from types import SimpleNamespace

import pytest

from ray_platform.train import hang_detector
from ray_platform.train.hang_detector import HangDetector, Heartbeat, HeartbeatThread


def beat(rank, number=4, phase="training", waits=True, slow=False, progress=0):
    stack_top = "stream.py:57 _next"
    return Heartbeat(rank, number, phase, stack_top, waits, slow, progress, "node-a", 100 + rank, "n" * 8, f"actor {rank}")


@pytest.fixture
def clock(monkeypatch):
    """Clock of the detector, which only `clock.wait(seconds)` advances."""
    now = [100.0]
    monkeypatch.setattr(hang_detector, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return SimpleNamespace(wait=lambda seconds: now.__setitem__(0, now[0] + seconds))


def test_the_rank_that_the_others_wait_for_is_named(clock):
    detector = HangDetector()
    for rank in range(3):
        detector.record(beat(rank, waits=rank != 1, phase="waiting for data" if rank == 1 else "training"))
    assert detector.find_hang(6.0) is None
    clock.wait(7)
    line, actors = detector.find_hang(6.0)
    assert "rank 1 (node-a, pid 101) in step 5 hangs while waiting for data, at stream.py:57 _next" in line
    assert "the other 2 of 3 ranks wait" in line
    assert actors == ["actor 0", "actor 1", "actor 2"]


def test_one_rank_that_moves_is_no_hang(clock):
    detector = HangDetector()
    detector.record(beat(0))
    detector.record(beat(1))
    clock.wait(7)
    detector.record(beat(1, number=5))
    assert detector.find_hang(6.0) is None


def test_a_rank_that_says_nothing_any_more_is_named_before_those_that_are_busy(clock):
    detector = HangDetector()
    detector.record(beat(0, waits=False))
    detector.record(beat(1))
    clock.wait(20)
    detector.record(beat(0, waits=False))
    line, _ = detector.find_hang(15.0)
    assert "rank 1 (node-a, pid 101) in step 5 sends no heartbeats" in line


def test_what_takes_long_is_waited_for_longer_and_not_for_ever(clock):
    exporting = {"phase": "exporting the model", "slow": True}
    exports, trains = HangDetector(), HangDetector()
    exports.record(beat(0, waits=False, **exporting))
    exports.record(beat(1, **exporting))
    trains.record(beat(0, waits=False))
    trains.record(beat(1))
    clock.wait(9)
    assert exports.find_hang(1.0) is None
    assert "rank 0" in trains.find_hang(1.0)[0]
    clock.wait(1)
    assert "rank 0 (node-a, pid 100) in step 5 hangs while exporting the model" in exports.find_hang(1.0)[0]


def test_who_says_nothing_any_more_is_not_waited_for_longer(clock):
    detector = HangDetector()
    exporting = {"phase": "exporting the model", "slow": True}
    detector.record(beat(0, waits=False, **exporting))
    detector.record(beat(1, **exporting))
    clock.wait(20)
    detector.record(beat(1, **exporting))
    assert "rank 0 (node-a, pid 100) in step 5 sends no heartbeats" in detector.find_hang(15.0)[0]


def test_an_upload_that_goes_on_is_no_hang(clock):
    detector = HangDetector()
    for progress in range(3):
        detector.record(beat(0, phase="saving a checkpoint", progress=progress))
        clock.wait(4)
        assert detector.find_hang(6.0) is None
        detector.record(beat(0, phase="saving a checkpoint", progress=progress))
    clock.wait(4)
    assert detector.find_hang(6.0)


def test_a_rank_that_left_is_not_waited_for(clock):
    detector = HangDetector()
    detector.record(beat(0))
    detector.record(beat(1))
    assert detector.num_alive() == 2
    detector.remove(0)
    assert detector.num_alive() == 1
    clock.wait(20)
    assert detector.num_alive() == 0, "it is dead"
    detector.remove(1)
    assert detector.find_hang(1.0) is None


def test_who_waits_for_the_others_says_so():
    """NCCL's calls return at once: their results are waited for in frames that look like any other."""
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


def test_orders_reach_every_rank_until_the_workers_are_gone():
    detector = HangDetector()
    assert detector.record(beat(0)) == ""
    detector.request_stop("stopped by SIGTERM")
    assert detector.record(beat(1)) == "stopped by SIGTERM"
    detector.reset()
    assert detector.record(beat(1)) == ""
