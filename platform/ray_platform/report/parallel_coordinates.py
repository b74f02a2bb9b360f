"""Parallel coordinates: one axis per field or metric, one line per trial."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes

from ray_platform.report.figures import (
    CHARACTER,
    COLORS,
    THEME,
    Artist,
    Chart,
    pixel_figure,
    round_ticks,
    shorten,
    spread_apart,
    tick_text,
)  # fmt: skip

_AXIS_GAP = 150  # px
_LEFT, _TOP, _FRAME, _BOTTOM = 64, 48, 260, 40
_HEIGHT = _TOP + _FRAME + _BOTTOM
_LONGEST_TICK, _LONGEST_NAME = 12, 21  # characters
_BELOW_LOG = 0.1  # fraction of a logarithmic axis below its smallest value, for values that have no logarithm


class ParallelAxis(NamedTuple):
    """An axis. `choices` are spaced evenly; `ends` are values that the axis contains in any case."""

    name: str
    caption: str  # a smaller line above the name
    tooltip: str
    log: bool = False
    choices: Sequence[Any] = ()
    ends: Sequence[float] = ()
    downwards: bool = False  # the smallest value is at the top


class ParallelLine(NamedTuple):
    """A trial: one value per axis, None where it has none."""

    name: str  # written at the right end unless it is empty
    values: Sequence[Any]
    color: str
    opacity: float
    dashed: bool
    tooltip: str


class ColorScale(NamedTuple):
    """The legend of the lines' colors."""

    title: str
    first: str  # text at the left end
    last: str
    colors: Sequence[str]


@rc_context(THEME)
def parallel_coordinates(axes: Sequence[ParallelAxis], lines: Sequence[ParallelLine], scale: ColorScale | None) -> Chart:
    """Draw the lines in their order, the last one on top, with a gap where a value is missing."""
    longest = max((len(shorten(line.name, _LONGEST_NAME)) for line in lines), default=0)
    width = _LEFT + (len(axes) - 1) * _AXIS_GAP + max(64, longest * CHARACTER + 16)
    figure = pixel_figure(width, _HEIGHT)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, _HEIGHT))
    canvas.set_axis_off()
    positions = [AxisPositions(axis, [line.values[i] for line in lines]) for i, axis in enumerate(axes)]
    artists: dict[str, Artist] = {}
    xs = [_LEFT + i * _AXIS_GAP for i in range(len(axes))]
    for number, line in enumerate(lines):
        ys = [math.nan if value is None else _y(at(value)) for at, value in zip(positions, line.values, strict=True)]
        gid = f"trial-{number}"
        artists[gid] = Artist([line.tooltip], opacity=line.opacity)
        dashes = (0, (6, 4)) if line.dashed else "-"
        canvas.plot(xs, ys, color=line.color, linestyle=dashes, gid=gid, zorder=3 + number, clip_on=False)
    for number, (at, x) in enumerate(zip(positions, xs, strict=True)):
        _draw_axis(canvas, at, x, f"axis-{number}", artists)
    _write_names(canvas, lines, positions, xs[-1])
    if scale:
        _draw_scale(canvas, scale)
    return Chart(figure, f"trials by {', '.join(axis.name for axis in axes)}", artists, "wide")


def choice_text(value: Any) -> str:
    """Return the value of a field, as short as it can be."""
    if isinstance(value, float):
        return tick_text(float(f"{value:.4g}"))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class AxisPositions:
    """The positions of an axis' values, from 0 at the bottom to 1 at the top, and its ticks."""

    def __init__(self, axis: ParallelAxis, values: Sequence[Any]) -> None:
        self.axis = axis
        known = [value for value in [*axis.choices, *axis.ends, *values] if value is not None]
        self._choices: dict[str, float] = {}
        self._has_zero = False
        self.ticks: list[tuple[float, str]] = []  # position, label
        if axis.choices or not all(_is_number(value) for value in known):
            self._set_choices(known)
        elif known:
            self._set_numbers(known)

    def __call__(self, value: Any) -> float:
        if self._choices:
            return self._choices[choice_text(value)]
        if self._has_zero and value <= 0:
            return 0.0
        low, high, value = (math.log(each) if self._log else each for each in (self._low, self._high, value))
        position = (value - low) / (high - low) if high > low else 0.5
        position = _BELOW_LOG + (1 - _BELOW_LOG) * position if self._has_zero else position
        return 1 - position if self.axis.downwards else position

    def _set_choices(self, values: Sequence[Any]) -> None:
        by_text = {choice_text(value): value for value in values}
        texts = list(by_text)
        if all(_is_number(value) for value in by_text.values()):
            texts.sort(key=by_text.__getitem__)
        self._choices = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
        self.ticks = [(position, text) for text, position in self._choices.items()]

    def _set_numbers(self, numbers: Sequence[float]) -> None:
        positive = [number for number in numbers if number > 0]
        self._log = self.axis.log and bool(positive)
        self._has_zero = self._log and len(positive) < len(numbers)
        placed = positive if self._log else numbers
        ticks = _log_ticks(placed) if self._log else _ticks_within(placed)
        self._low, self._high = min([*placed, *ticks]), max([*placed, *ticks])
        self.ticks = [(self(tick), tick_text(tick)) for tick in ticks]
        if self._has_zero:
            self.ticks.append((self(0.0), tick_text(max(number for number in numbers if number <= 0))))


def _y(position: float) -> float:
    return _BOTTOM + _FRAME * position


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ticks_within(values: Sequence[float]) -> list[float]:
    """Return the round numbers that are not outside the values; those around them if fewer than two are inside."""
    ticks = round_ticks(values)
    near = 1e-9 * (ticks[-1] - ticks[0])
    inside = [tick for tick in ticks if min(values) - near <= tick <= max(values) + near]
    return inside if len(inside) > 1 else ticks


def _log_ticks(values: Sequence[float]) -> list[float]:
    """Return the powers of ten among positive values; with 2 and 5 times these if they are fewer than three; else the ends."""
    low, high = min(values), max(values)
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [factor * float(power) for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
        if len(inside) > 2:
            return inside
    return inside if len(inside) > 1 else sorted({low, high})


def _draw_axis(canvas: Axes, at: AxisPositions, x: float, gid: str, artists: dict[str, Artist]) -> None:
    soft, ink = COLORS["soft"], COLORS["ink"]
    artists[gid] = Artist([at.axis.tooltip])
    canvas.text(x, _HEIGHT - 14, shorten(at.axis.caption, _LONGEST_NAME), color=soft, size=11, ha="center")
    canvas.text(x, _HEIGHT - 30, shorten(at.axis.name, _LONGEST_NAME), color=ink, ha="center", gid=gid)
    canvas.plot([x, x], [_y(0), _y(1)], color=soft, linewidth=1, zorder=1000, clip_on=False)
    for position, label in at.ticks:
        y = _y(position)
        canvas.plot([x - 4, x], [y, y], color=soft, linewidth=1, zorder=1000, clip_on=False)
        canvas.text(x - 7, y - 4, shorten(label, _LONGEST_TICK), color=soft, size=11, ha="right", gid="halo-0", zorder=1001)


def _write_names(canvas: Axes, lines: Sequence[ParallelLine], positions: Sequence[AxisPositions], x: float) -> None:
    """Write names at the right ends of their lines, moved apart."""
    named = [line for line in lines if line.name and line.values[-1] is not None]
    ends = sorted((_y(positions[-1](line.values[-1])), shorten(line.name, _LONGEST_NAME)) for line in named)
    places = spread_apart([y for y, _ in ends], 14, _BOTTOM, _BOTTOM + _FRAME)
    for (_, name), place in zip(ends, places, strict=True):
        canvas.text(x + 10, place - 4, name, color=COLORS["ink"], gid="halo-0", zorder=1001)


def _draw_scale(canvas: Axes, scale: ColorScale) -> None:
    y, step, soft = _BOTTOM - 31, 6, COLORS["soft"]
    boxes = [(_LEFT + i * step, step + 0.5) for i in range(len(scale.colors))]
    canvas.broken_barh(boxes, (y, 9), facecolors=list(scale.colors), clip_on=False, linewidth=0)
    end = _LEFT + len(scale.colors) * step
    canvas.text(_LEFT - 7, y + 1, scale.first, color=soft, size=11, ha="right")
    canvas.text(end + 7, y + 1, shorten(f"{scale.last}: {scale.title}", 80), color=soft, size=11)
