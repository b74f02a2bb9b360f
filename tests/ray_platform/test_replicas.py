"""Units on replicas: equal rows on every replica, dead replicas, failing groups, stored results, and the order of units."""

import heapq
import random
import threading
import time
from dataclasses import replace
from datetime import datetime

import numpy as np
import psutil
import pytest

from ray_platform import placement, replicas
from ray_platform.contracts import ConfigError
from ray_platform.evaluate import result_cache
from ray_platform.evaluate.result_cache import ResultCache, cache_key
from ray_platform.replicas import MAX_DEATHS, PoolProgress, ReplicaPool, ReplicaSpec, WorkQueue, WorkUnit, join_rows
from ray_platform.terminal import ProgressBar
from tests.ray_platform.replica_work import Fail, Square, no_replica


def unit(work, group="squares", cost=1.0, runs_first=False):
    return WorkUnit(f"unit {work}", group, cache_key(work=repr(work)), cost, work, runs_first)


def squares(numbers, **fields):
    return [unit(Square(number, **fields)) for number in numbers]


def pool(folder, num_replicas=2, cpus=0.5):
    spec = ReplicaSpec(no_replica, num_replicas, cpus)
    return ReplicaPool(spec, ResultCache(str(folder), "git-1"), ProgressBar())


def run(units, *arguments):
    with pool(*arguments) as opened:
        return list(opened.run(units))


def values(results):
    return sorted(int(result.rows["squares"][0]) for result in results if result.rows)


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    return folder


@pytest.mark.usefixtures("ray_cluster")
class TestReplicaPool:
    def test_an_interrupted_run_resumes_and_a_damaged_file_is_computed_again(self, tmp_path, notes):
        units = squares(range(6), notes=str(notes))
        with pool(tmp_path / "cache", 1) as replicas:
            results = replicas.run(units)
            done = [next(results), next(results)]  # leave the block early, as after an exception or Ctrl-C in the driver
        assert 2 <= len(list(notes.iterdir())) < 6
        stored = tmp_path / "cache" / f"{done[0].unit.key}.npz"
        stored.write_bytes(stored.read_bytes()[:50])
        for _ in range(2):
            results = run(units, tmp_path / "cache")
            assert values(results) == [0, 1, 4, 9, 16, 25]
            numbers = [int(note.name.partition("-")[0]) for note in notes.iterdir()]
            assert numbers.count(done[0].unit.work.number) == 2
            assert numbers.count(done[1].unit.work.number) == 1
        assert {result.origin.code_version for result in results} == {"git-1"}, "every unit came from the cache"
        assert all(datetime.fromisoformat(result.origin.created) for result in results)

    def test_replicas_stay_for_the_next_run_and_end_with_the_block(self, tmp_path, notes):
        def processes(numbers, wait_for=1):
            list(replicas.run(squares(numbers, notes=str(notes), wait_for=wait_for)))
            names = [note.name.split("-") for note in notes.iterdir()]
            return {int(process) for number, process, _ in names if int(number) in numbers}

        with pool(tmp_path / "cache", 2) as replicas:
            first = processes(range(1))
            assert len(first) == 1, "no more replicas than units"
            second = processes(range(1, 9), wait_for=2)
            assert len(second) == 2
            assert first < second
            # Of two replicas with all four CPUs together, only one fits next to these. The other one never starts.
            with pool(tmp_path / "cache", 2, cpus=2.0) as others:
                assert values(others.run(squares(range(20, 24)))) == [400, 441, 484, 529]
            alive = [psutil.Process(process) for process in second]
        assert not psutil.wait_procs(alive, timeout=20)[1]

    def test_a_run_that_waits_for_other_work_says_so(self, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(placement, "NOTICE_SECONDS", 0.0)
        monkeypatch.setattr(replicas, "_POLL_SECONDS", 0.1)
        with pool(tmp_path / "cache", 1) as other:
            list(other.run(squares(range(1))))  # its replica holds half a CPU until the block ends

            def release_when_reported():
                while not caplog.messages:
                    time.sleep(0.05)
                other.__exit__()

            threading.Thread(target=release_when_reported, daemon=True).start()
            assert values(run(squares(range(2, 3)), tmp_path / "cache", 1, 4.0)) == [4]
        (message,) = caplog.messages
        assert "4 CPUs are needed" in message
        assert "3.5 of 4 CPUs" in message

    def test_a_killed_replica_is_replaced_and_nothing_is_lost(self, tmp_path, notes, capsys):
        deadly = [unit(Square(8, str(notes), deaths=1)), unit(Square(9, str(notes), deaths=2))]
        assert values(run([*squares(range(8)), *deadly], tmp_path / "cache")) == [n**2 for n in range(10)]
        last = capsys.readouterr().out.splitlines()[-1]
        assert last.startswith("units 10/10  100%")
        assert "workers lost" in last

    def test_a_unit_that_kills_every_replica_fails_its_group_and_no_other(self, tmp_path, notes):
        deadly = unit(Square(9, str(notes), deaths=99), group="deadly")
        results = run([deadly, *squares(range(4))], tmp_path / "cache", 1)
        assert values(results) == [0, 1, 4, 9]
        (error,) = [result.error for result in results if result.error]
        assert error.startswith(f"{deadly.name}: {MAX_DEATHS} workers died")

    def test_an_error_is_one_line_and_drops_the_rest_of_its_group(self, tmp_path, notes):
        bad = unit(Fail("cars: label 200 is out of range"), group="cars", cost=9.0)
        rest = [unit(Square(n, str(notes)), group="cars") for n in range(50, 90)]
        broken = unit(Fail(""), group="broken", cost=9.0)
        results = run([*rest, bad, broken, *squares(range(3))], tmp_path / "cache", 1)
        errors = {result.unit.group: result.error for result in results if result.error}
        assert errors["cars"] == "cars: label 200 is out of range"
        assert errors["broken"] == f"{broken.name}: ZeroDivisionError: integer division or modulo by zero"
        assert {0, 1, 4} <= set(values(results))
        assert len(list(notes.iterdir())) < 5, "units that had not started are dropped"

    def test_replicas_that_do_not_fit_on_the_cluster(self):
        with pytest.raises(ConfigError, match=r"num_workers: 9 workers .* do not fit .*\(4 CPUs, 0 GPUs\)"):
            ReplicaSpec(no_replica, 9).resolve_num_replicas()
        with pytest.raises(ConfigError, match=r"num_workers: 1 worker of 1 CPUs and 0\.5 GPUs"):
            ReplicaSpec(no_replica, gpus=0.5).resolve_num_replicas()


# --- The queue, in simulated time -----------------------------------------------------------------------------------------------


def queued(costs, group="g"):
    return [WorkUnit(f"u{i}", group, f"key{i}", cost, None) for i, cost in enumerate(costs)]


def assigned(queue, dropped=None):
    """Return the units that start now: (unit, replica, exclusive)."""
    started = []
    queue.assign(lambda *call: started.append(call), (dropped if dropped is not None else []).append)
    return started


def makespan(queue, num_replicas, seconds):
    """Return the time at which the last unit ends, if each replica runs its units sequentially."""
    for replica in range(num_replicas):
        queue.add_replica(replica)
    now, ends, free = 0.0, [], dict.fromkeys(range(num_replicas), 0.0)
    while True:
        for unit, replica, exclusive in assigned(queue):
            free[replica] = max(now, free[replica]) + seconds(unit)
            heapq.heappush(ends, (free[replica], replica, exclusive))
        if not ends:
            return now
        now, replica, exclusive = heapq.heappop(ends)
        queue.finish(replica, exclusive)


def test_replicas_end_together_though_costs_are_estimates():
    rng = random.Random(0)
    costs = [256 * rng.uniform(0.5, 1.0) for _ in range(900)]
    seconds = {f"key{i}": cost * rng.uniform(0.8, 1.2) for i, cost in enumerate(costs)}
    end = makespan(WorkQueue(queued(costs)), 64, lambda unit: seconds[unit.key])
    assert sum(seconds.values()) / 64 <= end <= 1.05 * sum(seconds.values()) / 64


def test_units_that_run_first_precede_the_most_expensive_ones():
    queue = WorkQueue([unit(None, cost=1.0), unit(None, cost=5.0), unit(None, cost=0.5, runs_first=True)])
    queue.add_replica(0)
    assert [unit.cost for unit, _, _ in assigned(queue)] == [0.5, 5.0]


def test_the_units_of_a_stage_precede_those_of_later_stages():
    units = [
        replace(unit(None, cost=cost, runs_first=first), stage=stage)
        for cost, first, stage in ((9.0, True, 1), (8.0, False, 1), (1.0, False, 0), (2.0, False, 0), (0.5, True, 0))
    ]
    assert [unit.cost for unit in WorkQueue(units).waiting] == [0.5, 2.0, 1.0, 9.0, 8.0]


def test_at_the_end_no_replica_holds_back_a_unit_that_another_could_start():
    queue = WorkQueue(queued([1.0] * 4))
    for replica in range(3):
        queue.add_replica(replica)
    assert sorted(replica for _, replica, _ in assigned(queue)) == [0, 1, 2], "the fourth unit waits for the first that ends"
    queue.finish(1, False)
    assert [replica for _, replica, _ in assigned(queue)] == [1]


def test_a_unit_whose_replica_died_is_retried_alone_and_fails_in_the_end():
    queue = WorkQueue(queued([2.0, 1.0, 1.0, 1.0]))
    queue.add_replica("a")
    started = assigned(queue)
    assert [exclusive for _, _, exclusive in started] == [False, False], "two in flight: either may be the cause"
    assert queue.remove_replica("a")
    assert not queue.remove_replica("a")
    assert all(queue.retry(unit, exclusive) for unit, _, exclusive in started)
    suspects = set()
    for number in range(MAX_DEATHS):
        queue.add_replica(number)
        ((unit, replica, exclusive),) = assigned(queue)
        assert exclusive
        suspects.add(unit.key)
        queue.remove_replica(replica)
        assert queue.retry(unit, exclusive) == (number < MAX_DEATHS - 1)
    assert len(suspects) == 1


def test_units_of_a_failed_group_are_dropped():
    queue, dropped = WorkQueue([*queued([3.0, 2.0], group="bad"), WorkUnit("good", "good", "k", 1.0, None)]), []
    queue.failed_groups.add("bad")
    queue.add_replica(0)
    assert [unit.group for unit, _, _ in assigned(queue, dropped)] == ["good"]
    assert [unit.group for unit in dropped] == ["bad", "bad"]


def test_stored_rows_are_read_a_few_files_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(result_cache, "_READS_AT_ONCE", 2)
    store = ResultCache(str(tmp_path), "git-1")
    for number in range(5):
        store.write(f"key{number}", {"squares": np.array([number**2])})
    stored = store.read([f"key{number}" for number in range(6)])
    assert [next(stored)[:2], next(stored)[:2]] == [("key0", {"squares": [0]}), ("key1", {"squares": [1]})]
    for number in (2, 4):
        (tmp_path / f"key{number}.npz").unlink()
    assert [key for key, _, _ in stored] == ["key3"], "the others were not read before"


def test_rows_are_joined_by_place_and_a_unit_without_rows_adds_none():
    rows = {2: {"x": np.array([[5.0, 6.0]]), "y": np.array([3])}, 0: {"x": np.array([[1.0, 2.0]])}, 1: {"y": np.array([2])}}
    joined = join_rows(rows)
    assert joined["x"].tolist() == [[1.0, 2.0], [5.0, 6.0]]
    assert joined["y"].tolist() == [2, 3]
    assert join_rows({0: {"x": np.array([])}})["x"].shape == (0,)


def test_the_progress_bar_counts_stored_rows_as_done_but_not_as_speed():
    progress = PoolProgress(10.0, 5)
    progress.add(unit(Square(1), cost=4.0), cached=True)
    assert progress.text() == "40%"
    progress.started -= 60
    progress.add(unit(Square(2), cost=0.1), cached=False)
    assert progress.text() == "41%", "a small unit does not tell how long the large ones take"
    progress.add(unit(Square(3), cost=1.9), cached=False)
    assert progress.text() == "60%  left 2.0 min"
