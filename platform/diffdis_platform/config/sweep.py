"""Configuration of a sweep."""

from dataclasses import dataclass, field
from typing import Any

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.many_runs import reject_fields_of_runs
from diffdis_platform.config.parse import check_output_dir
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.metric_registry import Direction, find_metric
from ray_platform.sweep.config import SearchConfig
from ray_platform.tracking import TrackingConfig

# Hyperparameters that the method leaves open: loss weights, the noise of the text query, and guidance.
SPACE: dict[str, dict[str, Any]] = {
    "objective.lambda_alignment": {"low": 0.02, "high": 4.0, "log": True},
    "model.schedule.query_snr": {"low": 0.6, "high": 10.0, "log": True},
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
    """Fields to search, each with {"values": [...]} or {"low": ..., "high": ..., "log": true}. They are fields of pretrain
    (objective.temperature) or of evaluation (evaluation.scoring.num_draws)."""
    objectives: dict[str, Direction] = field(default_factory=lambda: directions("accuracy", "fd_efficientnet_lite0"))
    """Metrics to optimize, each with max or min. The scheduler compares the first one."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Training of all trials. The baseline trial has these values, except train.num_steps, which follows from `samples`."""
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation of a trial at each milestone."""
    registered_model: str = "diffdis-sweep"
    """MLflow model whose versions are the best trials and the front. Empty: none."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Tracking of the sweep's run and of the runs of its trials."""

    def check(self) -> None:
        """Raise ConfigError for an output_dir that a job cannot write to, or a field that the sweep sets."""
        check_output_dir(self.output_dir)
        stops = self.pretrain.train.stop_at_step
        reject_fields_of_runs(
            "sweep", self.pretrain, self.evaluation, ("pretrain.train.stop_at_step", stops, "use samples and num_milestones")
        )
