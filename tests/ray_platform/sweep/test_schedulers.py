"""Who goes on: the rules alone, without trials that run."""

from types import SimpleNamespace

import pytest
from ray.tune.schedulers import TrialScheduler

from ray_platform.sweep.schedulers import HISTORY, RUNG, SuccessiveHalving, milestones
from ray_platform.sweep.search import TRIAL


def test_milestones_grow_by_the_reduction_under_asha_and_evenly_without():
    assert milestones("asha", 4, 2) == (0.125, 0.25, 0.5, 1.0)
    assert milestones("asha", 3, 3) == pytest.approx((1 / 9, 1 / 3, 1.0))
    assert milestones("none", 4, 2) == milestones("pbt", 4, 2) == (0.25, 0.5, 0.75, 1.0)


def trial(number, history=()):
    return SimpleNamespace(
        trial_id=f"id{number}", config={TRIAL: {"number": number, "values": {}}}, last_result={HISTORY: list(history)}
    )


def report(scheduler, of, rung, accuracy):
    return scheduler.on_trial_result(None, of, {RUNG: rung, "accuracy": accuracy})


def test_the_lower_half_of_a_milestone_is_stopped_but_never_the_recipe():
    asha = SuccessiveHalving("accuracy", "max", 3, 2)
    trials = [trial(number) for number in range(5)]
    for one in trials:
        asha.on_trial_add(None, one)
    goes_on = TrialScheduler.CONTINUE
    assert report(asha, trials[1], 1, 0.5) == goes_on, "the first to arrive"
    assert report(asha, trials[2], 1, 0.3) == TrialScheduler.STOP
    assert report(asha, trials[3], 1, 0.6) == goes_on
    assert report(asha, trials[0], 1, 0.1) == goes_on, "the recipe's own values"
    assert report(asha, trials[1], 2, 0.7) == goes_on
    assert report(asha, trials[3], 2, 0.6) == TrialScheduler.STOP
    assert report(asha, trials[0], 4, 0.0) == goes_on, "it ends by itself"


def test_a_sweep_that_goes_on_knows_what_was_reported_before():
    history = [{RUNG: 1, "metrics": {"accuracy": 0.9}}, {RUNG: 2, "metrics": {"accuracy": 0.95}}]
    asha = SuccessiveHalving("accuracy", "max", 3, 2)
    asha.on_trial_add(None, trial(1, history))
    late = trial(2)
    asha.on_trial_add(None, late)
    assert report(asha, late, 1, 0.5) == TrialScheduler.STOP
