"""Saved configurations: the version of their format, former names of fields, and fields that no longer exist."""

import dataclasses
import logging
from collections.abc import Collection

from diffdis_platform.config.fields import FieldTypes
from ray_platform.formats import VERSION_KEY, FileFormat
from ray_platform.json_values import JsonObject

logger = logging.getLogger(__name__)

CONFIG_FORMAT = FileFormat("configuration", renamed={"data.max_skipped_share": "data.max_skipped_fraction"})


def current_name(name: str) -> str:
    """Return today's name of a field, given its dotted name. A former name is deprecated."""
    for former, current in CONFIG_FORMAT.renamed.items():
        if f".{name}".endswith(f".{former}"):
            logger.warning("%s is deprecated; use %s", former, current)
            return name.removesuffix(former) + current
    return name


def with_current_names(values: JsonObject, prefix: str = "") -> JsonObject:
    """Return a configuration with nested sections under today's names of its fields."""
    return {
        current_name(f"{prefix}{key}").removeprefix(prefix): (
            with_current_names(value, f"{prefix}{key}.") if isinstance(value, dict) else value
        )
        for key, value in values.items()
    }


def read_saved(values: JsonObject, fields: FieldTypes, url: str, options: Collection[str] = ()) -> JsonObject:
    """Return a saved configuration without the fields that no longer exist, which a warning names.

    Args:
        values: the configuration, with nested sections.
        fields: result of `field_types`.
        url: the file, for messages.
        options: names at the top level that are not fields, such as `recipe`.

    Raises:
        NewerFormatError: a newer version saved it.
        ValueError: the version is not a number, or a section is a single value.
    """
    CONFIG_FORMAT.check_version(values, url)
    current, unknown = known_fields(with_current_names(values), fields, options)
    if unknown:
        logger.warning("%s: ignoring fields that no longer exist: %s", url, ", ".join(unknown)[:200])
    return current


def known_fields(
    values: JsonObject, fields: FieldTypes, options: Collection[str], prefix: str = ""
) -> tuple[JsonObject, list[str]]:
    """Return the fields of a configuration that exist, and the dotted names of the others.

    Raises ValueError for a section that is a single value.
    """
    known: JsonObject = {}
    unknown: list[str] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if dataclasses.is_dataclass(fields.get(name)):
            if not isinstance(value, dict):
                raise ValueError(f"{name}: {value!r} is not a section; indent its fields below it, or leave it out")
            known[key], others = known_fields(value, fields, (), f"{name}.")
            unknown += others
        elif name in fields or name in options:
            known[key] = value
        elif name != VERSION_KEY:
            unknown.append(name)
    return known, unknown
