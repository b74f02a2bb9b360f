"""Configuration of a sweep."""

from dataclasses import dataclass, field
from typing import Any

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.parse import check_output_dir
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.metric_registry import Direction, find_metric
from ray_platform.sweep.config import SearchConfig
from ray_platform.tracking import TrackingConfig

# Hyperparameters that the method leaves open: loss weights, the noise of the text query, and guidance.
SPACE: dict[str, dict[str, Any]] = {
    "objective.lambda_alignment": {"low": 0.02, "high": 4.0, "log": True},
    "model.schedule.gamma": {"low": 0.03, "high": 0.5, "log": True},
    "objective.query_timestep_min": {"low": 0, "high": 700},
    "objective.caption_dropout": {"low": 0.0, "high": 0.3},
    "objective.temperature": {"low": 0.03, "high": 0.3, "log": True},
    "evaluation.quality.guidance_scales": {"low": 1.0, "high": 6.0},
}


def directions(*metrics: str) -> dict[str, Direction]:
    """Return objectives in the directions that the metric registry declares."""
    return {metric: direction for metric in metrics if (direction := find_metric(metric).direction)}


@dataclass(frozen=True)
class SweepConfig(SearchConfig):
    """Search over the fields of a recipe.

    `space` has fields of `pretrain` (objective.temperature) and of `evaluation` (evaluation.scoring.num_draws).
    """

    space: dict[str, dict[str, Any]] = field(default_factory=lambda: dict(SPACE))
    objectives: dict[str, Direction] = field(default_factory=lambda: directions("accuracy", "fd_efficientnet_lite0"))
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)  # of all trials; the baseline trial has its values
    evaluation: EvalConfig = field(default_factory=EvalConfig)  # of a trial at each milestone
    registered_model: str = "diffdis-sweep"  # MLflow model whose versions are the best trials and the front; empty: none
    tracking: TrackingConfig = field(default_factory=TrackingConfig)  # of the sweep's run and the runs of its trials

    def check(self) -> None:
        """Raise ConfigError for an output_dir that a job cannot write to."""
        check_output_dir(self.output_dir)
