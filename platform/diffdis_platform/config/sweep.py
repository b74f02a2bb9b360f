"""Configuration of a sweep."""

from dataclasses import dataclass, field
from typing import Any, Literal

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.parse import check_output_dir
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.contracts import ConfigError
from ray_platform.sweep.schedulers import SchedulerName
from ray_platform.sweep.sweep import SearchName
from ray_platform.tracking import TrackingConfig

# What the method leaves open: the losses' weights, where the text query's noise lies, and guidance.
SPACE: dict[str, dict[str, Any]] = {
    "objective.lambda_alignment": {"low": 0.02, "high": 4.0, "log": True},
    "model.schedule.gamma": {"low": 0.03, "high": 0.5, "log": True},
    "objective.query_timestep_min": {"low": 0, "high": 700},
    "objective.caption_dropout": {"low": 0.0, "high": 0.3},
    "objective.temperature": {"low": 0.03, "high": 0.3, "log": True},
    "evaluation.quality.guidance_scales": {"low": 1.0, "high": 6.0},
}


@dataclass(frozen=True)
class SweepConfig:
    """What is tried, on what budget, and what counts."""

    output_dir: str = ""  # absolute folder or s3:// URL
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)  # what all trials share; its own values are the first trial
    evaluation: EvalConfig = field(default_factory=EvalConfig)  # of a trial at each milestone
    # Fields of pretrain (objective.temperature) and of evaluation (evaluation.scoring.num_draws), each with {values: [...]} or
    # {low: ..., high: ..., log: true}.
    space: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(SPACE))
    search: SearchName = "optuna"  # optuna: TPE on all objectives at once; a grid needs values everywhere
    scheduler: SchedulerName = "asha"  # who goes on at a milestone; pbt: the lower ones take over from the higher ones
    reduction: int = 2  # of ASHA: at a milestone the upper 1 / reduction go on; its milestones grow by this factor
    num_trials: int = 12  # with the recipe's own values; of a grid: 0, or as many as it has points
    samples: int = 1_000_000  # that a whole trial is trained on; train.num_steps follows
    num_milestones: int = 3  # at which a trial is evaluated; the last one is the end of its budget
    objectives: dict[str, Literal["max", "min"]] = field(
        default_factory=lambda: {"accuracy": "max", "fd_efficientnet_lite0": "min"}
    )  # the scheduler goes by the first
    seed: int = 0  # of the search; the trials train with pretrain.train.seed, all of them
    max_concurrent: int = 0  # trials side by side; 0: as many as there is room for
    registered_model: str = "diffdis-sweep"  # the best trials and the front become its versions in MLflow; empty: none
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # of the sweep's run and of its trials'

    def __post_init__(self) -> None:
        if self.reduction < 2 or self.num_milestones < 1 or self.samples < 1 or self.max_concurrent < 0:
            raise ConfigError("reduction: at least 2; num_milestones and samples: at least 1; max_concurrent: at least 0")
        if not self.space or not self.objectives:
            raise ConfigError("space and objectives: give at least one field and one metric")
        if self.search != "grid" and self.num_trials < 2:
            raise ConfigError(f"num_trials: {self.num_trials}; the recipe's own values and at least one more")
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ConfigError("search: optuna proposes new trials, and pbt changes those that there are; take random or grid")

    def check(self) -> None:
        """Raise ConfigError for an output_dir that a job cannot write to."""
        check_output_dir(self.output_dir)
