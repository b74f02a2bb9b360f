"""Search space of a sweep: config fields by name, each with a list of values or a range."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray_platform.contracts import ConfigError


@dataclass(frozen=True)
class Choice:
    """A list of values of any JSON type."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """A range that includes both ends. Two ints make a range of integers."""

    low: float
    high: float
    log: bool = False  # uniform in the logarithm

    @property
    def is_integer(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def clip(self, value: float) -> float:
        """Return the nearest value in the range."""
        clipped = min(max(value, self.low), self.high)
        return round(clipped) if self.is_integer else float(clipped)


Dimension = Choice | Range
Space = Mapping[str, Dimension]
FieldValues = Mapping[str, Any]  # config field -> value


def parse_dimension(field: str, spec: Mapping[str, Any]) -> Dimension:
    """Parse `{values: [...]}` or `{low, high, log}`. Raises ConfigError for anything else."""
    keys = set(spec)
    if keys == {"values"} and isinstance(spec["values"], list | tuple) and spec["values"]:
        return Choice(tuple(spec["values"]))
    if not {"low", "high"} <= keys <= {"low", "high", "log"}:
        raise ConfigError(f"space.{field}: {dict(spec)} is neither {{values: [...]}} nor {{low: ..., high: ..., log: true}}")
    low, high, log = spec["low"], spec["high"], spec.get("log", False)
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)) or not isinstance(log, bool):
        raise ConfigError(f"space.{field}: low and high must be numbers, and log true or false")
    if not low < high:
        raise ConfigError(f"space.{field}: low ({low}) is not below high ({high})")
    if log and low <= 0:
        raise ConfigError(f"space.{field}: a logarithmic range cannot start at {low}; give a low above 0")
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    return Range(low, high, log)


def describe_space(space: Space) -> dict[str, Any]:
    """Return the space in plain JSON types, as `parse_dimension` reads it."""
    return {field: {"values": list(d.values)} if isinstance(d, Choice) else asdict(d) for field, d in space.items()}
