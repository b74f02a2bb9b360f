"""Decisions of the trial schedulers, without running trials."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from ray_platform.sweep.config import Choice, Range, SearchConfig
from ray_platform.sweep.search import HISTORY, MILESTONE, RUNG, TRIAL, Population, SuccessiveHalving, trial_name

CONTINUE, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP


def test_milestones_grow_by_the_reduction_with_asha_and_are_even_without():
    def fractions(scheduler, num_milestones, reduction=2):
        config = SearchConfig(
            space={"x": {"values": [1]}}, objectives={"accuracy": "max"}, search="grid", scheduler=scheduler,
            num_milestones=num_milestones, reduction=reduction,
        )  # fmt: skip
        return config.budget_fractions

    assert fractions("asha", 4) == (0.125, 0.25, 0.5, 1.0)
    assert fractions("asha", 3, 3) == pytest.approx((1 / 9, 1 / 3, 1.0))
    assert fractions("none", 4) == fractions("pbt", 4) == (0.25, 0.5, 0.75, 1.0)


def trial(number, history=()):
    mock = MagicMock(trial_id=f"id{number}", last_result={HISTORY: list(history)}, status=Trial.PAUSED, checkpoint=f"of {number}")
    mock.__str__.return_value = trial_name(number)
    mock.config = {TRIAL: {"number": number, "values": {"x": 0.9, "scheme": "b"}}}
    mock.is_finished.return_value = False
    mock.run_metadata.checkpoint_manager.checkpoint_config.num_to_keep = None
    mock.temporary_state.saving_to = None
    return mock


def report(scheduler, trial, rung, accuracy):
    return scheduler.on_trial_result(None, trial, {RUNG: rung, "accuracy": accuracy})


def test_asha_stops_the_lower_half_of_a_milestone_but_never_the_baseline():
    asha = SuccessiveHalving("accuracy", "max", 3, 2)
    trials = [trial(number) for number in range(5)]
    for one in trials:
        asha.on_trial_add(None, one)
    assert report(asha, trials[1], 1, 0.5) == CONTINUE, "the first to arrive"
    assert report(asha, trials[2], 1, 0.3) == STOP
    assert report(asha, trials[3], 1, 0.6) == CONTINUE
    assert report(asha, trials[0], 1, 0.1) == CONTINUE, "the baseline"
    assert report(asha, trials[1], 2, 0.7) == CONTINUE
    assert report(asha, trials[3], 2, 0.6) == STOP
    assert report(asha, trials[0], 4, 0.0) == CONTINUE, "it ends by itself"


def test_asha_of_a_resumed_sweep_knows_earlier_reports():
    history = [{RUNG: 1, "metrics": {"accuracy": 0.9}}, {RUNG: 2, "metrics": {"accuracy": 0.95}}]
    asha = SuccessiveHalving("accuracy", "max", 3, 2)
    asha.on_trial_add(None, trial(1, history))
    late = trial(2)
    asha.on_trial_add(None, late)
    assert report(asha, late, 1, 0.5) == STOP


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (4, 3, 2, 1, 0), (1, 0, 4, 2, 3)])
@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(("baseline", "cloned"), [(0.05, 4), (0.35, 4), (0.9, 0)])
def test_a_population_clones_the_best_trial_into_the_worst_but_never_into_the_baseline(order, mode, baseline, cloned):
    """Among the others, trial 1 is the lowest and trial 4 the highest; the baseline may be lowest, in between, or highest."""
    population = Population("accuracy", mode, {"x": Range(0.0, 1.0), "scheme": Choice(("a", "b"))}, 2)
    trials, scores = [trial(number) for number in range(5)], [baseline, 0.1, 0.3, 0.4, 0.5]
    controller = SimpleNamespace(search_alg=None, get_trials=lambda: trials, get_live_trials=lambda: trials)
    for one in trials:
        population.on_trial_add(controller, one)
    for number in order:
        score = scores[number] if mode == "max" else -scores[number]
        population.on_trial_result(controller, trials[number], {MILESTONE: 1, "accuracy": score})
    changed = [one for one in trials if one.set_config.called]
    assert trials[1] in changed
    assert trials[0] not in changed
    config = trials[1].set_config.call_args[0][0]
    assert 0 <= config[TRIAL]["values"]["x"] <= 1, "perturbed values stay in their range"
    latest = trials[1].run_metadata.checkpoint_manager._latest_checkpoint_result
    assert latest.checkpoint in (f"of {cloned}", "of 4")
    assert population.on_trial_result(controller, trials[1], {MILESTONE: 2, "accuracy": 0.0}) == CONTINUE, "its last milestone"
