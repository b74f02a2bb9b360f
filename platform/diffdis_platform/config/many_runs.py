"""A check that the commands of many runs share: `compare` and `sweep`."""

from typing import Any

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.contracts import ConfigError
from ray_platform.tracking import TrackingConfig


def reject_fields_of_runs(command: str, pretrain: PretrainConfig, evaluation: EvalConfig, *others: tuple[str, Any, str]) -> None:
    """Raise ConfigError for a field that the command sets for each run, so that a value for all of them would be ignored, and for
    `train.max_minutes`, which limits one training and not the command.

    Args:
        command: what sets the fields, such as "comparison".
        pretrain: training of all runs.
        evaluation: evaluation of all runs.
        others: more of these fields, each with its value, which is false for the default, and what to do instead.
    """
    unset = TrackingConfig()
    for name, value, instead in (
        ("pretrain.output_dir", pretrain.output_dir, "use output_dir"),
        ("pretrain.tracking", pretrain.tracking != unset, "use tracking"),
        ("pretrain.train.resume", pretrain.train.resume != "none", "leave it out: the same command resumes"),
        ("evaluation.output_dir", evaluation.output_dir, "use output_dir"),
        ("evaluation.checkpoint", evaluation.checkpoint, "leave it out: the model of each run is evaluated"),
        ("evaluation.steps", evaluation.steps, "leave it out: the newest checkpoint is evaluated"),
        ("evaluation.tracking", evaluation.tracking != unset, "use tracking"),
        *others,
    ):
        if value:
            raise ConfigError(f"{name}: is set by the {command}; {instead}")
    if pretrain.train.max_minutes:
        raise ConfigError(
            f"pretrain.train.max_minutes: would end a single training, not the {command}; leave it out, stop the command before "
            "the time limit, and repeat it later: it resumes"
        )
