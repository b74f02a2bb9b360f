"""What a sweep varies: fields by name, each over a list of values or a range."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ray_platform.contracts import ConfigError


@dataclass(frozen=True)
class Choice:
    """One of some values, of whatever type."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Range:
    """Both ends belong to it. Two ints make a range of ints."""

    low: float
    high: float
    log: bool = False  # uniform in the logarithm

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    def clip(self, value: float) -> float:
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.whole else float(inside)


Dimension = Choice | Range
Space = Mapping[str, Dimension]


def dimension(field: str, given: Mapping[str, Any]) -> Dimension:
    """From `{values: [...]}` or `{low, high, log}`. Raises ConfigError for anything else."""
    named = set(given)
    if named == {"values"} and isinstance(given["values"], list | tuple) and given["values"]:
        return Choice(tuple(given["values"]))
    if not {"low", "high"} <= named <= {"low", "high", "log"}:
        raise ConfigError(f"space.{field}: {dict(given)} is neither {{values: [...]}} nor {{low: ..., high: ..., log: true}}")
    low, high, log = given["low"], given["high"], given.get("log", False)
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high)) or not isinstance(log, bool):
        raise ConfigError(f"space.{field}: low and high must be numbers, and log true or false")
    if not low < high:
        raise ConfigError(f"space.{field}: low, {low}, is not below high, {high}")
    if log and low <= 0:
        raise ConfigError(f"space.{field}: a logarithmic range cannot begin at {low}")
    if not (isinstance(low, int) and isinstance(high, int)):
        low, high = float(low), float(high)
    return Range(low, high, log)


def describe(space: Space) -> dict[str, dict[str, Any]]:
    """In plain JSON types."""
    return {field: {"values": list(d.values)} if isinstance(d, Choice) else asdict(d) for field, d in space.items()}
