"""Dot plots: a row per arm or difference, with dots, their mean, and an interval around it.

A template writes them in HTML, so that their text keeps its size on a narrow screen.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ray_platform.report.figures import round_ticks, tick_text

_MARGIN = 3.0  # percent of the width, so that dots at the ends stay inside


@dataclass(frozen=True)
class DotRow:
    """A row: what it is about, and its values on the common axis."""

    label: str
    arms: tuple[str, ...]  # one arm, whose run this is, or two, whose difference it is
    value: str
    interval_text: str
    kind: str  # CSS class of the color
    dots: Sequence[tuple[float, str]]  # value and tooltip
    mean: float | None
    interval: tuple[float, float] | None


class DotPlot:
    """Rows on one axis. At least one row has a value."""

    def __init__(self, rows: Sequence[DotRow], has_zero: bool = False, ends: tuple[str, str] = ("", "")) -> None:
        """Place the rows. has_zero: the axis contains 0 and marks it; ends: what is left and right of it."""
        self.rows, self.has_zero, self.ends = rows, has_zero, ends
        values = [value for row in rows for value in (*(dot for dot, _ in row.dots), *(row.interval or ()))]
        values += [row.mean for row in rows if row.mean is not None] + [0.0] * has_zero
        self.ticks = round_ticks(values)

    def left(self, value: float) -> str:
        """Return the position of a value in percent of the width."""
        return f"{_MARGIN + self._span(value - self.ticks[0]):.2f}"

    def width(self, interval: tuple[float, float]) -> str:
        """Return the width of an interval in percent of the width."""
        return f"{self._span(interval[1] - interval[0]):.2f}"

    def labels(self) -> list[tuple[float, str]]:
        """Return the ticks that have room for a label on a narrow screen; zero is among them."""
        most = 3 if max(len(tick_text(tick)) for tick in self.ticks) > 4 else 5
        stride = math.ceil(len(self.ticks) / most)
        first = self.ticks.index(min(self.ticks, key=abs)) % stride
        return [(tick, tick_text(tick)) for tick in self.ticks[first::stride]]

    def _span(self, difference: float) -> float:
        return (100 - 2 * _MARGIN) * difference / (self.ticks[-1] - self.ticks[0])
