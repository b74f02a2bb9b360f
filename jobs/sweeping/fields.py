"""The fields that a sweep varies: from dotted names and values to a trial's configuration, checked before anything starts."""

import json
from collections.abc import Mapping
from typing import Any

from ray_platform.contracts import ConfigError
from ray_platform.sweep.space import Choice, Dimension, dimension
from recipes.arguments import Parser, is_list, resolve
from recipes.config import PretrainConfig
from recipes.evaluate import EvalConfig
from recipes.sweep import SweepConfig

EVALUATION = "evaluation"
# What the sweep itself decides, and what has to be equal for all trials.
_OWN = (
    "output_dir", "tracking", "train.num_steps", "train.stop_at_step", "train.resume", "train.num_workers",
    "train.cpus_per_worker", "train.gpus_per_worker", "data.reads_per_rank", "data.cpus_per_read", "evaluation.checkpoint",
    "evaluation.output_dir", "evaluation.tracking", "evaluation.num_workers", "evaluation.cpus_per_worker",
    "evaluation.gpus_per_worker",
)  # fmt: skip


def configure(config: SweepConfig, values: Mapping[str, Any]) -> tuple[PretrainConfig, EvalConfig]:
    """A trial's, by the same way that a command line takes. Raises ConfigError, in one line."""
    parser = Parser()
    parser.add_class_arguments(PretrainConfig, default=config.pretrain)
    parser.add_class_arguments(EvalConfig, EVALUATION, default=config.evaluation)
    arguments = []
    for field, value in values.items():
        arguments += [f"--{field}", json.dumps([value] if is_list(field) and not isinstance(value, list | tuple) else value)]
    built, _ = resolve(parser, arguments)
    pretrain = PretrainConfig(**{name: getattr(built, name) for name in PretrainConfig.__dataclass_fields__})
    return pretrain, built[EVALUATION]


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
    value: Any = config if field.startswith(f"{EVALUATION}.") else config.pretrain
    for name in field.split("."):
        value = getattr(value, name)
    if isinstance(value, tuple):
        return value[0] if is_list(field) and len(value) == 1 else list(value)
    return value
