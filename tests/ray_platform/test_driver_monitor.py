"""How the driver watches the workers of a run."""

import errno
import itertools
import threading
from types import SimpleNamespace

import pytest

from ray_platform import placement
from ray_platform.train import fault_tolerance
from ray_platform.train.config import TrainConfig
from ray_platform.train.fault_tolerance import DriverMonitor


class Remote:
    """Stand-in for the handle of an actor: `detector.find_hang.remote()` calls `answers["find_hang"]`."""

    def __init__(self, **answers):
        self.answers = answers

    def __getattr__(self, name):
        return SimpleNamespace(remote=self.answers.get(name, lambda *_: None))


@pytest.fixture
def watch(monkeypatch):
    """Return watch(detector, poll, **train), a `DriverMonitor` that checks the workers all the time, without Ray."""
    monkeypatch.setattr(fault_tolerance.ray, "get", lambda answer, timeout: answer)
    monkeypatch.setattr(fault_tolerance, "draining_nodes", set)
    monkeypatch.setattr(fault_tolerance, "POLL_SECONDS", 0.001)
    monkeypatch.setattr(fault_tolerance, "_POLLS_PER_CHECK", 1)
    lease = SimpleNamespace(lost="")
    return lambda detector, poll, **train: DriverMonitor(detector, SimpleNamespace(poll=poll), TrainConfig(**train), lease)


def test_workers_are_watched_whatever_fails_meanwhile(watch, monkeypatch, caplog):
    """The disk is full to which the progress is printed, and later a node cannot be listed."""
    checked, steps = [], itertools.count()
    done = threading.Event()

    def find_hang(seconds):
        checked.append(seconds)
        if len(checked) == 5:
            done.set()

    def nodes():
        if len(checked) == 2 and not done.is_set():
            checked.append("failed")
            raise KeyError("node")
        return set()

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    detector = Remote(find_hang=find_hang, nodes=nodes, progress=lambda: (next(steps), {"train/samples_per_second": 1.0}))
    monkeypatch.setattr(fault_tolerance.ProgressBar, "update", fail)
    with watch(detector, lambda nodes: None, hang_seconds=7.0):
        assert done.wait(10)
    assert checked[:5] == [7.0, 7.0, "failed", 7.0, 7.0]
    assert [[word for word in ("No space", "KeyError") if word in line] for line in caplog.messages[:3]] == [
        ["No space"], ["KeyError"], ["No space"],
    ]  # fmt: skip


def test_without_hang_seconds_no_worker_is_killed(watch, monkeypatch):
    killed, checked = [], threading.Event()
    monkeypatch.setattr(fault_tolerance.ray, "kill", killed.append)
    detector = Remote(nodes=set, progress=lambda: (-1, {}), find_hang=lambda seconds: "hangs", actors=lambda: ["actor"])
    with watch(detector, lambda nodes: checked.set(), hang_seconds=0):
        assert checked.wait(10)
    assert not killed


def test_the_progress_is_that_of_the_launch(watch, monkeypatch):
    shown, done = [], threading.Event()
    detector = Remote(nodes=set, progress=lambda: (7, {"train/samples_per_second": 1.0}), find_hang=lambda seconds: "")
    monkeypatch.setattr(fault_tolerance.ProgressBar, "update", lambda bar, unit, *steps: shown.append(steps[:2]) or done.set())
    with watch(detector, lambda nodes: None, num_steps=100, stop_at_step=50):
        assert done.wait(10)
    assert shown == [(7, 50)]


@pytest.mark.parametrize("have_started", [False, True])
def test_workers_that_wait_for_resources_are_reported(watch, monkeypatch, caplog, have_started):
    """Those that have ended are not, although their resources may still be in use."""
    nodes, count, done = {"node"} if have_started else set(), itertools.count(), threading.Event()
    monkeypatch.setattr(placement, "NOTICE_SECONDS", 0.0)
    monkeypatch.setattr(fault_tolerance.ray, "available_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(fault_tolerance.ray, "cluster_resources", lambda: {"CPU": 8.0})
    detector = Remote(nodes=lambda: nodes, progress=lambda: (-1, {}), find_hang=lambda seconds: "")

    def poll(found):
        nodes.clear()
        if next(count) == 10:
            done.set()

    with watch(detector, poll, num_workers=4, cpus_per_worker=1.0):
        assert done.wait(10)
    expected = [] if have_started else ["4 CPUs are needed, and 3 of 8 CPUs are free"]
    assert [message.partition(": ")[2].partition(";")[0] for message in caplog.messages] == expected
