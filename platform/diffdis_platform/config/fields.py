"""The fields of a configuration, with those of its nested dataclasses: types, explanations, and a check of values for secrets."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import docstring_parser

from ray_platform.contracts import ConfigError
from ray_platform.redaction import is_redacted

FieldTypes = dict[str, Any]  # by dotted name

_S3_CREDENTIALS = re.compile(r"s3a?://[^/]*@")


def field_names(config_class: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(config_class)]


def field_types(config_class: type, prefix: str = "") -> FieldTypes:
    """Return the type of every field by dotted name, including the fields of nested dataclasses."""
    found: FieldTypes = {}
    for name, kind in typing.get_type_hints(config_class).items():
        if name in field_names(config_class):
            found[prefix + name] = kind
            if dataclasses.is_dataclass(kind):
                found |= field_types(typing.cast(type, kind), f"{prefix}{name}.")
    return found


def field_texts(config_class: type, prefix: str = "") -> dict[str, str]:
    """Return the explanation of every field and section by dotted name, from the docstrings below the fields.

    A section without a docstring is explained by the first sentence of the docstring of its class.
    """
    documented: dict[str, str] = {}
    for base in reversed(inspect.getmro(config_class)):
        if dataclasses.is_dataclass(base):
            parameters = docstring_parser.parse_from_object(base).params
            documented |= {each.arg_name: " ".join((each.description or "").split()) for each in parameters}
    texts: dict[str, str] = {}
    for name, kind in typing.get_type_hints(config_class).items():
        texts[prefix + name] = documented.get(name, "")
        if dataclasses.is_dataclass(kind):
            texts[prefix + name] = texts[prefix + name] or (kind.__doc__ or "").partition(".")[0] + "."
            texts |= field_texts(typing.cast(type, kind), f"{prefix}{name}.")
    return texts


def check_secrets(plain: Mapping[str, Any]) -> None:
    """Reject secrets that a saved configuration lacks, and credentials in S3 URLs."""
    for field, value in _texts(plain):
        if is_redacted(value):
            raise ConfigError(f"--{field}: a secret in it was not saved with the configuration; give this field again")
        if _S3_CREDENTIALS.match(value):
            raise ConfigError(
                f"{field}: a URL contains credentials (before an @); leave them out, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted field, text) for every text in a configuration; the texts of a list have the list's field."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, field)
    elif isinstance(value, str):
        yield field, value
