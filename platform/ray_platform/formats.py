"""Versions of the files that outlive a release: what a reader does with a file of another version.

A file holds `format_version`, or none for version 1. The version grows only when old code can no longer read the file: an added
field does not change it, because readers ignore unknown fields with a warning.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ray_platform.contracts import DataError
from ray_platform.json_values import JsonObject

logger = logging.getLogger(__name__)

VERSION_KEY = "format_version"
_warned: set[tuple[str, str]] = set()  # (format, field) of the warnings that this process logged


class NewerFormatError(DataError):
    """A file was written by a newer version of this code, and cannot be read."""


@dataclass(frozen=True)
class FileFormat:
    """Format of one kind of JSON or YAML file."""

    name: str  # for messages: "checkpoint manifest"
    version: int = 1
    renamed: Mapping[str, str] = field(default_factory=dict)  # former name of a field -> its name today

    def stamp(self, values: Mapping[str, object]) -> JsonObject:
        """Return the content of a file, with its version first."""
        return {VERSION_KEY: self.version, **values}

    def check_version(self, values: JsonObject, url: str) -> None:
        """Raise NewerFormatError for a file that a newer version wrote, and ValueError if the version is not a number."""
        version = values.get(VERSION_KEY, 1)
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise ValueError(f"{VERSION_KEY} is {str(version)[:50]!r}")
        if version > self.version:
            raise NewerFormatError(
                f"{url}: was written by a newer version of this code ({self.name} format {version}, this code reads up to "
                f"{self.version}); use that version"
            )

    def read(self, values: JsonObject, fields: Iterable[str], url: str) -> JsonObject:
        """Return the known fields under their names of today, and warn of unknown ones.

        Raises NewerFormatError, ValueError for an invalid version, and AttributeError if `values` is not an object.
        """
        self.check_version(values, url)
        current = {self.renamed.get(name, name): value for name, value in values.items() if name != VERSION_KEY}
        known = set(fields)
        unknown = sorted(name for name in current.keys() - known if (self.name, name) not in _warned)
        if unknown:
            _warned.update((self.name, name) for name in unknown)
            logger.warning("%s: ignoring unknown fields of the %s: %s", url, self.name, ", ".join(unknown)[:200])
        return {name: value for name, value in current.items() if name in known}
