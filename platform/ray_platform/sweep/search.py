"""Search algorithms of a sweep, and the Pareto front of their results. The first trial always has the recipe's values."""

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from ray import tune
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
