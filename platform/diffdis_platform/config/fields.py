"""Replacement of config fields by dotted names: `objective.lambda_alignment = 0.5`."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from diffdis_platform.config.arguments import Parser, resolve

T = TypeVar("T")


def with_fields(config: T, values: Mapping[str, Any]) -> T:
    """Return `config` with other values for dotted fields, checked like those of a command line.

    Raises:
        ConfigError: a field that does not exist, or a value of another type or one that the config rejects.
    """
    parser = Parser()
    parser.add_class_arguments(type(config), default=config)
    texts = {field: value if isinstance(value, str) else json.dumps(value) for field, value in values.items()}
    built, _ = resolve(parser, [f"--{field}={text}" for field, text in texts.items()])
    return type(config)(**{field.name: getattr(built, field.name) for field in fields(config)})  # type: ignore[arg-type]
