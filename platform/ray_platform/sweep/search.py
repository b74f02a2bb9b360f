"""Which values the trials of a sweep have. The first trial always has the recipe's own."""

import itertools
import warnings
from collections.abc import Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from ray.tune.search.optuna import OptunaSearch

from ray_platform.contracts import ConfigError
from ray_platform.sweep.space import Choice, Dimension, Range, Space

TRIAL = "trial"  # what a trial is given, in Tune's configuration of it: {"number": n, "values": {field: value}}

optuna.logging.set_verbosity(optuna.logging.WARNING)


def given(number: int, values: Mapping[str, Any]) -> dict[str, Any]:
    """Tune's configuration of a trial."""
    return {TRIAL: {"number": number, "values": dict(values)}}


def grid(space: Space, default: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The recipe's own values, and every combination. Raises ConfigError for a range."""
    for field, dimension in space.items():
        if isinstance(dimension, Range):
            raise ConfigError(f"space.{field}: a grid has values, not a range; give {{values: [...]}}")
    lists = [dimension.values for dimension in space.values() if isinstance(dimension, Choice)]
    points = [dict(zip(space, combination, strict=True)) for combination in itertools.product(*lists)]
    return [dict(default), *(point for point in points if point != default)]


def random(space: Space, default: Mapping[str, Any], num_trials: int, seed: int) -> list[dict[str, Any]]:
    """The recipe's own values, and uniform draws."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
    draws = (study.ask(_distributions(space)).params for _ in range(num_trials - 1))
    return [dict(default), *(_decoded(space, drawn) for drawn in draws)]


class MultiObjective(OptunaSearch):
    """Tree-structured Parzen estimators on all objectives at once; of a stopped trial they see what it had reached."""

    def __init__(
        self, space: Space, default: Mapping[str, Any], objectives: Mapping[str, str], num_trials: int, seed: int
    ) -> None:
        self.space = {field: _with(dimension, default[field]) for field, dimension in space.items()}
        self.num_given = 0
        # Optuna's own ten random trials would be all that a small sweep has.
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, max(2, num_trials // 3)))
        super().__init__(
            _distributions(self.space),
            list(objectives),
            list(objectives.values()),
            points_to_evaluate=[_encoded(self.space, default)],
            sampler=sampler,
        )

    def suggest(self, trial_id: str) -> dict[str, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the recipe's own value may lie outside the range
            drawn = super().suggest(trial_id)
        self.num_given += 1
        return given(self.num_given - 1, _decoded(self.space, drawn))


def _with(dimension: Dimension, value: Any) -> Dimension:
    """A list of values has the recipe's own."""
    if isinstance(dimension, Range) or value in dimension.values:
        return dimension
    return Choice((*dimension.values, value))


def _distributions(space: Space) -> dict[str, BaseDistribution]:
    return {field: _distribution(dimension) for field, dimension in space.items()}


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, Choice):
        return CategoricalDistribution(tuple(range(len(dimension.values))))  # their places: values may be of any type
    if dimension.whole:
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _encoded(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f: d.values.index(values[f]) if isinstance(d, Choice) else values[f] for f, d in space.items()}


def _decoded(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    return {f: d.values[drawn[f]] if isinstance(d, Choice) else drawn[f] for f, d in space.items()}
