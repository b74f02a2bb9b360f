"""Fields that a sweep varies: from dotted names and values to the config of a trial, checked before anything starts."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.parse import with_fields
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from ray_platform.contracts import ConfigError
from ray_platform.sweep.space import Choice, Dimension, parse_dimension

_EVALUATION = "evaluation."  # prefix of the fields of the evaluation; all others are fields of the pretraining
# Fields that the sweep sets, or that must be equal for all trials.
_FIXED = (
    "output_dir", "tracking", "train.num_steps", "train.stop_at_step", "train.resume", "train.num_workers",
    "train.cpus_per_worker", "train.gpus_per_worker", "data.reads_per_rank", "data.cpus_per_read", "evaluation.checkpoint",
    "evaluation.output_dir", "evaluation.tracking", "evaluation.num_workers", "evaluation.cpus_per_worker",
    "evaluation.gpus_per_worker",
)  # fmt: skip


def configure(config: SweepConfig, values: Mapping[str, Any]) -> tuple[PretrainConfig, EvalConfig]:
    """Return the configs of a trial with these values. For a field that is a list, a scalar stands for a list of one.

    Raises:
        ConfigError: a field that does not exist, or a value that is not valid.
    """
    pretrain: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    for field, value in values.items():
        if isinstance(_recipe_value(config, field), tuple) and not isinstance(value, list | tuple):
            value = [value]
        if field.startswith(_EVALUATION):
            evaluation[field.removeprefix(_EVALUATION)] = value
        else:
            pretrain[field] = value
    return with_fields(config.pretrain, pretrain), with_fields(config.evaluation, evaluation)


def open_space(config: SweepConfig) -> tuple[dict[str, Dimension], dict[str, Any]]:
    """Return the search space, and the recipe's values of its fields in JSON types.

    Raises:
        ConfigError: a field that does not exist or that the sweep sets, or a value or an end of a range that is not valid
            while all other fields have the recipe's values.
    """
    space: dict[str, Dimension] = {}
    baseline: dict[str, Any] = {}
    for field, spec in config.space.items():
        if any(field == fixed or field.startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigError(f"space.{field}: the sweep sets it, for all trials alike; remove it from the space")
        dimension = parse_dimension(field, spec)
        values = dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        for value in values:
            try:
                configure(config, {field: value})
            except ConfigError as error:
                raise ConfigError(f"space.{field}: {json.dumps(value)} is not valid: {error}") from None
        default = _recipe_value(config, field)
        if isinstance(default, tuple):
            lists_given = any(isinstance(value, list | tuple) for value in values)
            default = list(default) if lists_given or len(default) != 1 else default[0]
        if isinstance(default, float) and not isinstance(dimension, Choice):  # 1 to 4 includes 1.5
            dimension = parse_dimension(field, asdict(dimension) | {"low": float(dimension.low), "high": float(dimension.high)})
        space[field], baseline[field] = dimension, default
    return space, baseline


def _recipe_value(config: SweepConfig, field: str) -> Any:
    value: Any = config if field.startswith(_EVALUATION) else config.pretrain
    for name in field.split("."):
        value = getattr(value, name, None)
    return value
