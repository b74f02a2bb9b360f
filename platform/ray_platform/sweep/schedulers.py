"""Trial schedulers, which decide at a milestone which trials continue. The baseline is never stopped or changed."""

import math
import statistics
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from ray_platform.metric_registry import Direction
from ray_platform.sweep.config import Choice, SearchConfig, Space
from ray_platform.sweep.search import TRIAL, TrialConfig, tune_domain

MILESTONE, RUNG, HISTORY = "milestone", "rung", "history"  # keys of a trial's report, next to its metrics
TrialReport = dict[str, Any]


def trial_name(number: int) -> str:
    """Return the name of a trial; trial 0 is the baseline."""
    return f"trial_{number:03d}"


def is_baseline(trial: Trial) -> bool:
    """Return whether the trial has the recipe's values."""
    return str(trial) == trial_name(0)


def build_scheduler(config: SearchConfig, space: Space) -> TrialScheduler:
    """Return the scheduler; it compares trials by the first objective."""
    metric, mode = next(iter(config.objectives.items()))
    if config.scheduler == "asha":
        return SuccessiveHalving(metric, mode, config.num_milestones, config.reduction)
    if config.scheduler == "pbt":
        return Population(metric, mode, space, config.num_milestones)
    return FIFOScheduler()


class SuccessiveHalving(ASHAScheduler):
    """ASHA whose rungs are the milestones: a trial continues if it is in the upper 1 / reduction of those that reached it."""

    def __init__(self, metric: str, mode: Direction, num_milestones: int, reduction: int) -> None:
        super().__init__(
            time_attr=RUNG,
            metric=metric,
            mode=mode,
            max_t=reduction ** (num_milestones - 1),
            grace_period=1,
            reduction_factor=reduction,
        )

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Replay the reports of a restored trial: Ray Tune does not save the state of schedulers."""
        super().on_trial_add(tune_controller, trial)
        for entry in trial.last_result.get(HISTORY, ()):
            super().on_trial_result(tune_controller, trial, {RUNG: entry[RUNG], **entry["metrics"]})

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: TrialReport) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if is_baseline(trial) else decision


class Population(PopulationBasedTraining):
    """Population-based training: at a milestone that all trials reached, the lowest quarter clones trials of the highest quarter.

    A clone continues from the other trial's weights with its values, perturbed. The baseline can be cloned, but never becomes a
    clone: PBT receives its score only while it is in the upper half of the population.
    """

    def __init__(self, metric: str, mode: Direction, space: Space, num_milestones: int) -> None:
        self._space, self._num_milestones, self._sign = dict(space), num_milestones, 1 if mode == "max" else -1
        self._reports: dict[Trial, TrialReport] = {}
        # A list makes PBT move to the neighboring value; it would treat a `tune.choice` as a continuous range.
        mutations = {f: list(d.values) if isinstance(d, Choice) else tune_domain(d) for f, d in space.items()}
        super().__init__(
            time_attr=MILESTONE,
            metric=metric,
            mode=mode,
            perturbation_interval=1,
            hyperparam_mutations={TRIAL: {"values": mutations}},
            custom_explore_fn=self._clip,
            log_config=False,
            synch=True,  # compare trials at equal budget only
        )

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: TrialReport) -> str:
        if result[MILESTONE] == self._num_milestones:
            return TrialScheduler.CONTINUE  # the trial ends here and keeps its values
        self._reports[trial] = result
        for other in self._reports:  # the half in which the baseline is changes with every report
            if is_baseline(other) and other is not trial and not other.is_finished():
                super().on_trial_result(tune_controller, other, self._visible_result(other))
        return super().on_trial_result(tune_controller, trial, self._visible_result(trial))

    def _visible_result(self, trial: Trial) -> TrialReport:
        """Return the trial's report; without a score if it is the baseline's and not in the upper half."""
        result = self._reports[trial]
        scores = [self._sign * report[self.metric] for other, report in self._reports.items() if not other.is_finished()]
        if is_baseline(trial) and self._sign * result[self.metric] <= statistics.median(scores):
            return result | {self.metric: math.nan}  # PBT ranks no trial whose score is NaN
        return result

    def _clip(self, config: TrialConfig) -> TrialConfig:
        """Move perturbed values back into their range."""
        values = config[TRIAL]["values"]
        for field, dimension in self._space.items():
            if not isinstance(dimension, Choice):
                values[field] = dimension.clip(values[field])
        return config
