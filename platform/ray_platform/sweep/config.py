"""Settings of a sweep that do not depend on what a trial trains. Parsing them imports neither Ray Tune nor Optuna."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ray_platform.contracts import ConfigError
from ray_platform.metric_registry import Direction

SearchName = Literal["grid", "random", "optuna"]
SchedulerName = Literal["asha", "pbt", "none"]
FieldValues = Mapping[str, Any]  # config field -> value


@dataclass(frozen=True)
class Choice:
    """A list of values of any JSON type."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A range that includes both ends. Two ints make a range of integers."""

    low: float
    high: float
    log: bool = False  # uniform in the logarithm

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def clip(self, value: float) -> float:
        """Return the nearest value in the range."""
        clipped = min(max(value, self.low), self.high)
        return round(clipped) if self.is_integer else float(clipped)


Dimension = Choice | Range
Space = Mapping[str, Dimension]


def parse_dimension(field: str, spec: FieldValues) -> Dimension:
    """Parse `{values: [...]}` or `{low, high, log}`. Raises ConfigError for anything else."""
    keys = set(spec)
    if keys == {"values"} and isinstance(spec["values"], list | tuple) and spec["values"]:
        return Choice(tuple(spec["values"]))
    if not {"low", "high"} <= keys <= {"low", "high", "log"}:
        raise ConfigError(f"space.{field}: {dict(spec)} is neither {{values: [...]}} nor {{low: ..., high: ..., log: true}}")
    low, high, log = spec["low"], spec["high"], spec.get("log", False)
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)) or not isinstance(log, bool):
        raise ConfigError(f"space.{field}: low and high must be numbers, and log true or false")
    if not low < high:
        raise ConfigError(f"space.{field}: low ({low}) is not below high ({high})")
    if log and low <= 0:
        raise ConfigError(f"space.{field}: a logarithmic range cannot start at {low}; give a low above 0")
    dimension = Range(low, high, log)
    return dimension if dimension.is_integer else Range(float(low), float(high), log)


def describe_space(space: Space) -> FieldValues:
    """Return the space in plain JSON types, as `parse_dimension` reads it."""
    return {field: {"values": list(d.values)} if isinstance(d, Choice) else asdict(d) for field, d in space.items()}


@dataclass(frozen=True)
class SearchConfig:
    """Search space, search algorithm, trial scheduler and the budget of a trial."""

    output_dir: str = ""
    """Absolute folder or s3:// URL of the sweep."""
    space: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fields to search, each with {"values": [...]} or {"low": ..., "high": ..., "log": true}."""
    search: SearchName = "optuna"
    """Search algorithm. `optuna` is TPE on all objectives at once; `grid` needs a list of values for every field."""
    scheduler: SchedulerName = "asha"
    """Which trials continue at a milestone: the best (`asha`), or all. With `none` all do; with `pbt` the lowest quarter clones
    the highest."""
    reduction: int = 2
    """Reduction factor of ASHA: the best 1 / reduction of the trials continue, and its milestones grow by this factor."""
    num_trials: int = 12
    """Trials, including the baseline with the recipe's values. Of a grid: 0, or its number of points."""
    samples: int = 1_000_000
    """Samples of a complete trial; train.num_steps follows from it."""
    num_milestones: int = 3
    """Evaluations per trial. The last one is at the end of its budget."""
    objectives: dict[str, Direction] = field(default_factory=dict)
    """Metrics to optimize, each with max or min. The scheduler compares the first one."""
    seed: int = 0
    """Seed of the search. Every trial trains with pretrain.train.seed."""
    max_concurrent: int = 0
    """Trials at the same time. 0: as many as the cluster has room for."""

    def __post_init__(self) -> None:
        if self.reduction < 2 or self.num_milestones < 1 or self.samples < 1 or self.max_concurrent < 0:
            raise ConfigError("reduction: at least 2; num_milestones and samples: at least 1; max_concurrent: at least 0")
        if not self.space or not self.objectives:
            raise ConfigError("space and objectives: give at least one field and one metric")
        if self.search != "grid" and self.num_trials < 2:
            raise ConfigError(f"num_trials: {self.num_trials}; give at least 2: the recipe's values and one other trial")
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ConfigError("search: optuna proposes new trials, but pbt changes existing ones; use random or grid with pbt")

    @property
    def budget_fractions(self) -> tuple[float, ...]:
        """Fraction of the budget at each milestone; the last is 1. Geometric with ratio `reduction` for ASHA, else even."""
        if self.scheduler == "asha":
            return tuple(1 / self.reduction ** (self.num_milestones - 1 - i) for i in range(self.num_milestones))
        return tuple((i + 1) / self.num_milestones for i in range(self.num_milestones))
