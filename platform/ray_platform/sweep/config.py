"""Settings of a sweep that do not depend on what a trial trains. Parsing them imports neither Ray Tune nor Optuna."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ray_platform.contracts import ConfigError

SearchName = Literal["grid", "random", "optuna"]
SchedulerName = Literal["asha", "pbt", "none"]
Mode = Literal["max", "min"]


@dataclass(frozen=True)
class SearchConfig:
    """Search space, search algorithm, trial scheduler and the budget of a trial."""

    output_dir: str = ""  # absolute folder or s3:// URL
    # Config fields, each with {values: [...]} or {low: ..., high: ..., log: true}.
    space: dict[str, dict[str, Any]] = field(default_factory=dict)
    search: SearchName = "optuna"  # optuna: TPE on all objectives at once; a grid needs a list of values for every field
    scheduler: SchedulerName = "asha"  # which trials continue at a milestone; pbt: the lowest quarter clones the highest
    reduction: int = 2  # of ASHA: the upper 1 / reduction continue at a milestone; its milestones grow by this factor
    num_trials: int = 12  # including the baseline, which has the recipe's values; of a grid: 0, or its number of points
    samples: int = 1_000_000  # budget of a complete trial; train.num_steps follows from it
    num_milestones: int = 3  # evaluations per trial; the last one is at the end of its budget
    objectives: dict[str, Mode] = field(default_factory=dict)  # metric -> max or min; the scheduler compares the first one
    seed: int = 0  # of the search; every trial trains with pretrain.train.seed
    max_concurrent: int = 0  # trials that run at the same time; 0: as many as the cluster has resources for

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
