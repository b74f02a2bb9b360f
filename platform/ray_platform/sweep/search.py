"""Search algorithms of a sweep, the Pareto front of their results, and trial schedulers.

The first trial, the baseline, always has the recipe's values. No scheduler stops or changes it.
"""

import itertools
import math
import statistics
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining, TrialScheduler
from ray.tune.search.optuna import OptunaSearch

from ray_platform.contracts import ConfigError
from ray_platform.metric_registry import Direction
from ray_platform.sweep.config import Choice, Dimension, FieldValues, Range, SearchConfig, Space

# Ray Tune's config of a trial is `{"trial": {"number": n, "values": {field: value}}}`.
TRIAL = "trial"
TrialConfig = dict[str, dict[str, Any]]

optuna.logging.set_verbosity(optuna.logging.WARNING)


def trial_points(config: SearchConfig, space: Space, baseline: FieldValues) -> list[FieldValues]:
    """Return the values of all trials of a grid or a random search, the baseline first.

    Raises:
        ConfigError: a range in the space of a grid, or a `num_trials` that is not the grid's number of points.
    """
    if config.search == "random":
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(config.seed))
        samples = (study.ask(_distributions(space)).params for _ in range(config.num_trials - 1))
        return [dict(baseline), *(_from_optuna(space, sample) for sample in samples)]
    if ranges := [field for field, dimension in space.items() if isinstance(dimension, Range)]:
        raise ConfigError(f"space.{ranges[0]}: a grid has values, not a range; give {{values: [...]}}")
    lists = [dimension.values for dimension in space.values() if isinstance(dimension, Choice)]
    combinations = [dict(zip(space, combination, strict=True)) for combination in itertools.product(*lists)]
    points: list[FieldValues] = [dict(baseline), *(point for point in combinations if point != baseline)]
    if config.num_trials not in (0, len(points)):
        raise ConfigError(f"num_trials: {config.num_trials}, but the grid has {len(points)} points; give 0")
    return points


class MultiObjectiveSearch(OptunaSearch):
    """Optuna's TPE sampler over all objectives; it learns the last metrics of trials that were stopped early.

    Adds to `OptunaSearch`: the baseline as the first trial, numbered trials, and choices of any type (lists, say).
    """

    def __init__(self, config: SearchConfig, space: Space, baseline: FieldValues) -> None:
        self.space = dict(space)
        for field, dimension in space.items():  # a choice must have the recipe's value
            if isinstance(dimension, Choice) and baseline[field] not in dimension.values:
                self.space[field] = Choice((*dimension.values, baseline[field]))
        self.num_suggested = 0
        # Optuna's default of ten random trials would be all trials of a small sweep.
        num_random = min(10, max(2, config.num_trials // 3))
        super().__init__(
            _distributions(self.space),
            list(config.objectives),
            list(config.objectives.values()),
            points_to_evaluate=[
                {f: d.values.index(baseline[f]) if isinstance(d, Choice) else baseline[f] for f, d in self.space.items()}
            ],
            sampler=optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=num_random),
        )

    def suggest(self, trial_id: str) -> TrialConfig:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the recipe's value may lie outside the range
            sample = super().suggest(trial_id)
        self.num_suggested += 1
        return {TRIAL: {"number": self.num_suggested - 1, "values": _from_optuna(self.space, sample)}}


def tune_domain(dimension: Dimension) -> Any:
    """Return the Ray Tune domain of a dimension; of a choice, the domain of its indices."""
    if isinstance(dimension, Choice):
        return tune.choice(range(len(dimension.values)))
    low, high = dimension.low, dimension.high
    if dimension.is_integer:  # the upper end of Tune's integer ranges is exclusive
        return (tune.lograndint if dimension.log else tune.randint)(int(low), int(high) + 1)
    return (tune.loguniform if dimension.log else tune.uniform)(low, high)


def pareto_front(points: Mapping[str, Mapping[str, float | None]], objectives: Mapping[str, Direction]) -> list[str]:
    """Return the names of the points that no other point dominates, the best by the first objective first.

    A point dominates another if it is at least as good in every objective and better in one. Points without a finite value for
    every objective are ignored.
    """
    study = optuna.create_study(directions=[f"{mode}imize" for mode in objectives.values()])
    for name, metrics in points.items():
        values = [value for metric in objectives if (value := metrics.get(metric)) is not None and math.isfinite(value)]
        if len(values) == len(objectives):
            study.add_trial(optuna.trial.create_trial(values=values, user_attrs={"name": name}))
    signs = [-1 if mode == "max" else 1 for mode in objectives.values()]
    front = sorted(study.best_trials, key=lambda trial: [sign * v for sign, v in zip(signs, trial.values, strict=True)])
    return [trial.user_attrs["name"] for trial in front]


def best_point(points: Mapping[str, Mapping[str, float | None]], metric: str, mode: Direction) -> str:
    """Return the name of the point with the best value, the first of equals. Raises ValueError if no point has the metric."""
    values = {name: value for name, metrics in points.items() if (value := metrics.get(metric)) is not None}
    return (max if mode == "max" else min)(values, key=lambda name: values[name])


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    distributions = OptunaSearch.convert_search_space({field: tune_domain(dimension) for field, dimension in space.items()})
    return {field: distributions[field] for field in space}  # samples depend on the order


def _from_optuna(space: Space, sample: FieldValues) -> FieldValues:
    """Replace the indices of choices by their values: Optuna's categories are scalars."""
    return {f: d.values[sample[f]] if isinstance(d, Choice) else sample[f] for f, d in space.items()}


# --- Trial schedulers, which decide at a milestone which trials continue --------------------------------------------------------

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
