"""The fields of a configuration, with those of its nested dataclasses: their types and their explanations."""

import dataclasses
import inspect
import typing
from typing import Any

import docstring_parser

FieldTypes = dict[str, Any]  # by dotted name


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
