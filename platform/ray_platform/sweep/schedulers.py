"""Who goes on at a milestone. The first trial, which has the recipe's own values, always does: the others are measured by it."""

from collections.abc import Mapping
from typing import Any, Literal

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler

from ray_platform.sweep.search import TRIAL
from ray_platform.sweep.space import Choice, Dimension, Space

SchedulerName = Literal["asha", "pbt", "none"]

MILESTONE, RUNG, HISTORY = "milestone", "rung", "history"  # in what a trial reports


def milestones(scheduler: SchedulerName, num_milestones: int, reduction: int) -> tuple[float, ...]:
    """Where a trial is evaluated, as shares of its budget; the last one is 1. ASHA's grow by its reduction, the others evenly."""
    if scheduler == "asha":
        return tuple(1 / reduction ** (num_milestones - 1 - i) for i in range(num_milestones))
    return tuple((i + 1) / num_milestones for i in range(num_milestones))


def is_default(trial: Trial) -> bool:
    return trial.config[TRIAL]["number"] == 0


class SuccessiveHalving(ASHAScheduler):
    """ASHA: at a milestone a trial goes on if it is in the upper 1 / reduction of those that have been there."""

    def __init__(self, metric: str, mode: str, num_milestones: int, reduction: int) -> None:
        # Each milestone is one of its rungs.
        super().__init__(
            time_attr=RUNG,
            metric=metric,
            mode=mode,
            max_t=reduction ** (num_milestones - 1),
            grace_period=1,
            reduction_factor=reduction,
        )

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Tune does not save what a scheduler knows: in a sweep that goes on, it is learnt from the trials."""
        super().on_trial_add(tune_controller, trial)
        for entry in trial.last_result.get(HISTORY, ()):
            super().on_trial_result(tune_controller, trial, {RUNG: entry[RUNG], **entry["metrics"]})

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        decision = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if is_default(trial) else decision


class Population(PopulationBasedTraining):
    """At a milestone that all have reached, the lowest quarter takes over weights and values, perturbed, of the highest."""

    def __init__(self, metric: str, mode: str, space: Space, num_milestones: int) -> None:
        self.space, self.num_milestones = dict(space), num_milestones
        super().__init__(
            time_attr=MILESTONE,
            metric=metric,
            mode=mode,
            perturbation_interval=1,
            hyperparam_mutations={TRIAL: {"values": {field: _mutation(dimension) for field, dimension in space.items()}}},
            custom_explore_fn=self._inside,
            log_config=False,
            synch=True,  # so that only what has had the same budget is compared
        )

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result[MILESTONE] == self.num_milestones:
            return TrialScheduler.CONTINUE  # it is through, and keeps what it has
        return super().on_trial_result(tune_controller, trial, result)

    def _exploit(self, tune_controller: Any, trial: Trial, trial_to_clone: Trial) -> None:
        if not is_default(trial):
            super()._exploit(tune_controller, trial, trial_to_clone)

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], dict[str, Any]]:
        """Whatever it takes over, a trial stays itself."""
        config, operations = super()._get_new_config(trial, trial_to_clone)
        config[TRIAL]["number"] = trial.config[TRIAL]["number"]
        return config, operations

    def _inside(self, config: dict[str, Any]) -> dict[str, Any]:
        """Perturbed values may leave their range."""
        values = config[TRIAL]["values"]
        for field, dimension in self.space.items():
            if not isinstance(dimension, Choice):
                values[field] = dimension.clip(values[field])
        return config


def _mutation(dimension: Dimension) -> Any:
    if isinstance(dimension, Choice):
        return list(dimension.values)
    low, high, log = dimension.low, dimension.high, dimension.log
    if dimension.whole:
        return tune.lograndint(int(low), int(high) + 1) if log else tune.randint(int(low), int(high) + 1)
    return tune.loguniform(low, high) if log else tune.uniform(low, high)


def build_scheduler(
    name: SchedulerName, objectives: Mapping[str, str], space: Space, num_milestones: int, reduction: int
) -> TrialScheduler:
    """It goes by the first objective."""
    metric, mode = next(iter(objectives.items()))
    if name == "asha":
        return SuccessiveHalving(metric, mode, num_milestones, reduction)
    if name == "pbt":
        return Population(metric, mode, space, num_milestones)
    return FIFOScheduler()
