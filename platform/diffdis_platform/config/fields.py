"""Other values for some fields of a configuration: `objective.lambda_alignment = 0.5`."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from diffdis_platform.config.arguments import Parser, resolve

T = TypeVar("T")


def with_fields(config: T, values: Mapping[str, Any]) -> T:
    """`config` with the values of dotted fields, checked as those of a command line are.

    Raises ConfigError, in one line, for a field that does not exist, a value of another type, or one that the configuration
    refuses.
    """
    parser = Parser()
    parser.add_class_arguments(type(config), default=config)
    texts = {field: value if isinstance(value, str) else json.dumps(value) for field, value in values.items()}
    built, _ = resolve(parser, [f"--{field}={text}" for field, text in texts.items()])
    return type(config)(**{field.name: getattr(built, field.name) for field in fields(config)})  # type: ignore[arg-type]
