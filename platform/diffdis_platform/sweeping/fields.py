"""The fields that a sweep varies: from dotted names and values to a trial's configuration, checked before anything starts."""

import json
from collections.abc import Mapping
from typing import Any

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.parse import field_types, is_list, with_fields
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from ray_platform.contracts import ConfigError
from ray_platform.sweep.space import Choice, Dimension, dimension

EVALUATION = "evaluation."  # before the names of its fields
# What the sweep itself decides, and what has to be equal for all trials.
_OWN = (
    "output_dir", "tracking", "train.num_steps", "train.stop_at_step", "train.resume", "train.num_workers",
    "train.cpus_per_worker", "train.gpus_per_worker", "data.reads_per_rank", "data.cpus_per_read", "evaluation.checkpoint",
    "evaluation.output_dir", "evaluation.tracking", "evaluation.num_workers", "evaluation.cpus_per_worker",
    "evaluation.gpus_per_worker",
)  # fmt: skip


def configure(config: SweepConfig, values: Mapping[str, Any]) -> tuple[PretrainConfig, EvalConfig]:
    """A trial's. One plain value stands for a list of one. Raises ConfigError, in one line."""
    pretrain: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
    for field, value in values.items():
        of, name = (evaluation, field.removeprefix(EVALUATION)) if field.startswith(EVALUATION) else (pretrain, field)
        of[name] = [value] if _takes_list(field) and not isinstance(value, list | tuple) else value
    return with_fields(config.pretrain, pretrain), with_fields(config.evaluation, evaluation)


def _takes_list(field: str) -> bool:
    config_class = EvalConfig if field.startswith(EVALUATION) else PretrainConfig
    return is_list(field_types(config_class).get(field.removeprefix(EVALUATION)))


def open_space(config: SweepConfig) -> tuple[dict[str, Dimension], dict[str, Any]]:
    """(what each field ranges over, the recipe's own values of the fields). Raises ConfigError for a field that does not exist,
    and for a value or an end of a range that the configuration refuses while all other fields have the recipe's own values."""
    space: dict[str, Dimension] = {}
    default: dict[str, Any] = {}
    for field, given in config.space.items():
        if any(field == own or field.startswith(f"{own}.") for own in _OWN):
            raise ConfigError(f"space.{field}: the sweep sets it, for all trials alike")
        found = dimension(field, given)
        for value in found.values if isinstance(found, Choice) else (found.low, found.high):
            try:
                configure(config, {field: value})
            except ConfigError as error:
                raise ConfigError(f"space.{field}: {json.dumps(value)} cannot be: {error}") from None
        default[field] = own_value(config, field)
        if isinstance(default[field], float) and not isinstance(found, Choice):  # 1 to 4 means 1.5 as well
            found = dimension(field, dict(given) | {"low": float(found.low), "high": float(found.high)})
        space[field] = found
    return space, default


def own_value(config: SweepConfig, field: str) -> Any:
    """The recipe's, in JSON types; of a list of one the one."""
    value: Any = config if field.startswith(EVALUATION) else config.pretrain
    for name in field.split("."):
        value = getattr(value, name)
    if isinstance(value, tuple):
        return value[0] if _takes_list(field) and len(value) == 1 else list(value)
    return value
