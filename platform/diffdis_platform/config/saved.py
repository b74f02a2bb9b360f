"""Saved configurations: reading a file, the version of its format, former names of fields, and fields that do not exist now."""

import dataclasses
import logging
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from diffdis_platform.config.fields import FieldTypes
from ray_platform.contracts import ConfigError, named_field, one_line
from ray_platform.formats import VERSION_KEY, FileFormat
from ray_platform.json_values import JsonObject

logger = logging.getLogger(__name__)

_MAX_BYTES = 2**20
_MAX_VALUES = 100_000  # with YAML aliases expanded


class _Loader(yaml.SafeLoader):
    """Reads 1e-5 as a number, as YAML 1.2 does."""


class _Dumper(yaml.SafeDumper):
    """Quotes texts that `_Loader` would read as numbers."""


for _each in (_Loader, _Dumper):
    _each.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )

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


def read_yaml(field: str, url: str, remedy: str) -> JsonObject:
    """Return the content of a YAML file of a reasonable size, local or in a bucket.

    Args:
        field: the field or option that names the file, for messages.
        url: the file.
        remedy: what to give instead, for messages.

    Raises:
        ConfigError: the file cannot be read, is too large, or is not a mapping.
        DataError: storage cannot be read.
    """
    if "://" in url:
        from ray_platform import storage

        with named_field(field):
            storage.exists(url)  # reports an endpoint that does not answer sooner than a read, which is repeated for minutes
            content = storage.read_small(url, _MAX_BYTES)
    else:
        try:
            with Path(url).open("rb") as file:
                content = file.read(_MAX_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{field}: {url}: {error.strerror}; {remedy}") from None
    if len(content) > _MAX_BYTES:
        raise ConfigError(f"{field}: {url} has more than {_MAX_BYTES:,} bytes; {remedy}")
    try:
        num_values = _count_values(yaml.compose(content, _Loader), {})
        values = load_yaml(content) if num_values <= _MAX_VALUES else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{field}: {url} cannot be read as YAML ({one_line(error)}); {remedy}") from None
    if num_values > _MAX_VALUES:
        raise ConfigError(f"{field}: {url} has more than {_MAX_VALUES:,} values, counting each alias; write fewer")
    if not isinstance(values, dict):
        raise ConfigError(f"{field}: {url} has no fields; {remedy}")
    return values


def load_yaml(content: str | bytes) -> Any:
    """Return the value of a YAML document. Raises ValueError."""
    try:
        return yaml.load(content, _Loader)  # noqa: S506 (it is a SafeLoader)
    except Exception as error:  # PyYAML raises errors of any type for the content of a tag
        raise ValueError(one_line(error)) from None


def dump_yaml(values: JsonObject) -> str:
    """Return a YAML document that `load_yaml` reads as the same values, in the same order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def _count_values(node: Any, counts: dict[int, int]) -> int:
    """Return the number of values in a YAML node with aliases expanded; a node that contains itself counts as too many."""
    if id(node) not in counts:
        counts[id(node)] = _MAX_VALUES + 1  # for a node that contains itself
        inner: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        counts[id(node)] = 1 + sum(_count_values(part, counts) for part in inner)
    return counts[id(node)]
