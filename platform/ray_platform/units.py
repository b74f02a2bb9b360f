"""Texts of numbers with their units, as tables, pages and messages write them."""

import math
import numbers
from typing import TypeGuard

NO_VALUE = "–"
_SI_PREFIXES = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def is_number(value: object) -> TypeGuard[float]:
    """Return whether `value` is a finite number, and not a truth value."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def size_text(num_bytes: float) -> str:
    """Return a size in bytes with a decimal prefix: `1.9 kB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if num_bytes < 999.5 or unit == "TB":
            break
        num_bytes /= 1000
    return f"{num_bytes:.0f} {unit}" if unit == "B" or num_bytes >= 99.95 else f"{num_bytes:.1f} {unit}"


def duration_text(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two: `90.0 s`, `118.3 min`, `22.2 h`, `11.6 days`."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.1f} s"


def quantity_text(value: float) -> str:
    """Return a count with three digits and a decimal prefix: `1.4 P`."""
    scale, prefix = next(((scale, prefix) for scale, prefix in _SI_PREFIXES if value >= scale), (1.0, ""))
    return f"{value / scale:.3g} {prefix}".strip()


def plural(count: int, noun: str) -> str:
    """Return the count with its noun: `1 class`, `1,000 classes`."""
    ending = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{ending}"


def number_text(value: float | None) -> str:
    """Return a number of unknown size with three or four significant digits; a dash where it is not defined."""
    if not is_number(value):
        return NO_VALUE
    decimals = 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
    return f"{value:,.{decimals}f}".replace("-", "−")


def percent_text(fraction: float | None) -> str:
    """Return 87.3 for 0.873, without the sign; a dash where it is not defined."""
    return f"{100 * fraction:.1f}" if is_number(fraction) else NO_VALUE
