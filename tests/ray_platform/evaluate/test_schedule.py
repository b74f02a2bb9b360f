"""The order of units over workers, in simulated time."""

import heapq
import random

from ray_platform.evaluate.schedule import MAX_DEATHS, Schedule, Unit


def units(costs, **fields):
    return [Unit(f"u{i}", fields.get("group", "g"), f"key{i}", cost, None) for i, cost in enumerate(costs)]


def makespan(schedule, num_workers, seconds):
    """When the last unit is done; a worker does its units one after the other."""
    for worker in range(num_workers):
        schedule.add_worker(worker)
    now, ends, free = 0.0, [], dict.fromkeys(range(num_workers), 0.0)

    def begin(unit, worker, alone):
        free[worker] = max(now, free[worker]) + seconds(unit)
        heapq.heappush(ends, (free[worker], worker, alone))

    schedule.hand_out(begin, lambda unit: None)
    while ends:
        now, worker, alone = heapq.heappop(ends)
        schedule.done(worker, alone)
        schedule.hand_out(begin, lambda unit: None)
    return now


def test_workers_end_together_though_costs_are_estimates():
    rng = random.Random(0)
    costs = [256 * rng.uniform(0.5, 1.0) for _ in range(900)]
    took = {f"key{i}": cost * rng.uniform(0.8, 1.2) for i, cost in enumerate(costs)}
    found = makespan(Schedule(units(costs)), 64, lambda unit: took[unit.key])
    assert found <= 1.05 * sum(took.values()) / 64


def test_at_the_end_no_worker_holds_back_a_unit_that_another_could_begin():
    begun = []
    schedule = Schedule(units([1.0] * 4))
    for worker in range(3):
        schedule.add_worker(worker)
    schedule.hand_out(lambda unit, worker, alone: begun.append(worker), lambda unit: None)
    assert sorted(begun) == [0, 1, 2], "the fourth waits for whoever is done first"
    schedule.done(1, False)
    schedule.hand_out(lambda unit, worker, alone: begun.append(worker), lambda unit: None)
    assert begun[3] == 1


def test_a_unit_whose_worker_died_is_tried_alone_and_given_up_at_last():
    schedule = Schedule(units([2.0, 1.0, 1.0, 1.0]))
    schedule.add_worker("a")
    begun = []

    def begin(unit, worker, alone):
        begun.append((unit, worker, alone))

    schedule.hand_out(begin, lambda unit: None)
    assert [alone for _, _, alone in begun] == [False, False], "two in flight: either may be to blame"
    assert schedule.died("a")
    assert not schedule.died("a")
    assert all(schedule.again(unit, alone) for unit, _, alone in begun)
    suspect = None
    for number in range(MAX_DEATHS):
        begun.clear()
        schedule.add_worker(number)
        schedule.hand_out(begin, lambda unit: None)
        ((unit, worker, alone),) = begun
        assert alone
        assert suspect in (None, unit)
        suspect = unit
        schedule.died(worker)
        assert schedule.again(unit, alone) == (number < MAX_DEATHS - 1)


def test_units_of_a_failed_group_are_left_out():
    schedule = Schedule([*units([3.0, 2.0], group="bad"), Unit("good", "good", "k", 1.0, None)])
    schedule.failed.add("bad")
    schedule.add_worker(0)
    begun, out = [], []
    schedule.hand_out(lambda unit, worker, alone: begun.append(unit.group), lambda unit: out.append(unit.group))
    assert (begun, out) == (["good"], ["bad", "bad"])
