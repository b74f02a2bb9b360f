"""Parallel coordinates as inline SVG: an axis a field or score, a line a trial."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ray_platform.report.charts import apart, cut, tick_text, ticks_within
from ray_platform.report.page import text

_AXIS_GAP = 150  # px
_LEFT, _TOP, _FRAME, _BOTTOM = 64, 48, 260, 40
_LONGEST_TICK, _LONGEST_NAME = 12, 21  # characters
_CHARACTER = 6.8  # px wide
_ZERO_SHARE = 0.1  # of a logarithmic axis, below its least value, where values are that have no logarithm

STYLE = """
svg.wide { max-width: none; min-width: 680px; } .scroll { overflow-x: auto; }
svg .axis { stroke: var(--soft); }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4; stroke-linejoin: round; }
svg text.small { font-size: 11px; } svg .trial { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
svg g:hover > .trial { stroke-width: 4; } svg .dashed .trial { stroke-dasharray: 6 4; }
"""


class Axis(NamedTuple):
    """Of a field: `log` where its range is; `choices` where there are few values, which are then evenly apart; `ends` are values
    that it holds in any case."""

    name: str
    above: str  # a smaller line over the name
    about: str  # what a pointer shows
    log: bool = False
    choices: Sequence[Any] = ()
    ends: Sequence[float] = ()
    downwards: bool = False  # the smallest value at the top


class Trial(NamedTuple):
    """A value an axis, None where there is none."""

    name: str  # written at the right end, if not empty
    values: Sequence[Any]
    colour: str  # a CSS colour
    strength: float
    dashed: bool
    about: str


class Scale(NamedTuple):
    """Of the colours, under the axes: `colours` from the first to the last value of what `title` names."""

    title: str
    first: str
    last: str
    colours: Sequence[str]


def parallel_coordinates(axes: Sequence[Axis], trials: Sequence[Trial], scale: Scale | None) -> str:
    """An SVG. Trials are drawn in the order that they come in, the last one on top; a gap where one lacks a value."""
    names = max((min(_LONGEST_NAME, len(trial.name)) for trial in trials), default=0)
    width = _LEFT + (len(axes) - 1) * _AXIS_GAP + max(64, names * _CHARACTER + 16)
    height = _TOP + _FRAME + _BOTTOM
    placed = [_Placed(axis, [trial.values[i] for trial in trials]) for i, axis in enumerate(axes)]
    lines = "".join(_line(trial, placed) for trial in trials)
    marks = "".join(_axis(axis, _LEFT + i * _AXIS_GAP) for i, axis in enumerate(placed))
    parts = [lines, marks, _names(trials, placed), _scale(scale) if scale else ""]
    what = ", ".join(axis.name for axis in axes)
    return (
        f'<svg class="wide" viewBox="0 0 {width:.0f} {height}" role="img" aria-label="{text(f"trials by {what}")}">'
        f"{''.join(parts)}</svg>"
    )


def choice_text(value: Any) -> str:
    """A field's value, as short as it can be."""
    if isinstance(value, float):
        return tick_text(float(f"{value:.4g}"))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class _Placed:
    """Where an axis has its values: y in px."""

    def __init__(self, axis: Axis, values: Sequence[Any]) -> None:
        self.axis = axis
        known = [value for value in values if value is not None]
        numbers = [value for value in [*axis.choices, *axis.ends, *known] if _is_number(value)]
        self._choices: dict[str, float] = {}
        self._zero = False
        self.marks: list[tuple[float, str]] = []  # share from the bottom, label
        if axis.choices or not all(_is_number(value) for value in known):
            self._place_choices([*axis.choices, *axis.ends, *known])
        elif numbers:
            self._place_numbers(numbers)

    def _place_choices(self, values: Sequence[Any]) -> None:
        found = {choice_text(value): value for value in values}
        texts = list(found)
        if all(_is_number(value) for value in found.values()):
            texts.sort(key=found.__getitem__)
        self._choices = {each: (i + 0.5) / len(texts) for i, each in enumerate(texts)}
        self.marks = [(share, each) for each, share in self._choices.items()]

    def _place_numbers(self, numbers: Sequence[float]) -> None:
        positive = [number for number in numbers if number > 0]
        log = self.axis.log and bool(positive)
        self._zero = log and len(positive) < len(numbers)
        shown, placed = (_log_ticks(positive), positive) if log else (ticks_within(numbers), numbers)
        self._log, self._low, self._high = log, min([*placed, *shown]), max([*placed, *shown])
        self.marks = [(self.share(tick), tick_text(tick)) for tick in shown]
        if self._zero:
            self.marks.append((self.share(0.0), tick_text(max(number for number in numbers if number <= 0))))

    def share(self, value: Any) -> float:
        """From the bottom of the axis, 0 to 1."""
        if self._choices:
            return self._choices[choice_text(value)]
        if self._zero and value <= 0:
            return 0.0
        place = math.log if self._log else float
        share = (place(value) - place(self._low)) / (place(self._high) - place(self._low)) if self._high > self._low else 0.5
        share = _ZERO_SHARE + (1 - _ZERO_SHARE) * share if self._zero else share
        return 1 - share if self.axis.downwards else share

    def y(self, value: Any) -> float:
        return _TOP + _FRAME * (1 - self.share(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _log_ticks(values: Sequence[float]) -> list[float]:
    """The powers of ten among positive values, or 1, 2 and 5 times these where that is fewer than three; else both ends."""
    low, high = min(values), max(values)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        marks = [factor * 10.0**power for power in powers for factor in factors]
        inside = [mark for mark in marks if low <= mark * (1 + 1e-9) and mark <= high * (1 + 1e-9)]
        if len(inside) > 2:
            return inside
    return inside if len(inside) > 1 else sorted({low, high})


def _line(trial: Trial, placed: Sequence[_Placed]) -> str:
    """Pieces of it, parted where a value is missing."""
    pieces: list[list[str]] = [[]]
    for i, (axis, value) in enumerate(zip(placed, trial.values, strict=True)):
        if value is None:
            pieces.append([])
        else:
            pieces[-1].append(f"{_LEFT + i * _AXIS_GAP},{axis.y(value):.1f}")
    paths = "".join(f'<polyline class="trial" points="{" ".join(piece)}"/>' for piece in pieces if len(piece) > 1)
    looks = f'opacity="{trial.strength:.2f}" style="color:{trial.colour}"' + ' class="dashed"' * trial.dashed
    return f"<g {looks}><title>{text(trial.about)}</title>{paths}</g>"


def _axis(placed: _Placed, x: float) -> str:
    axis = placed.axis
    parts = [
        f'<g><title>{text(axis.about)}</title><text class="small" x="{x}" y="14" text-anchor="middle">{text(axis.above)}</text>'
        f'<text class="name" x="{x}" y="30" text-anchor="middle">{text(cut(axis.name, _LONGEST_NAME))}</text></g>',
        f'<line class="axis" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_TOP + _FRAME}"/>',
    ]
    for share, label in placed.marks:
        y = _TOP + _FRAME * (1 - share)
        parts.append(f'<line class="axis" x1="{x - 4}" x2="{x}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = text(cut(label, _LONGEST_TICK))
        parts.append(f'<text class="small halo" x="{x - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return "".join(parts)


def _names(trials: Sequence[Trial], placed: Sequence[_Placed]) -> str:
    """At the right end of the lines that have one, moved apart."""
    x = _LEFT + (len(placed) - 1) * _AXIS_GAP
    named = [trial for trial in trials if trial.name and trial.values[-1] is not None]
    ends = sorted((placed[-1].y(trial.values[-1]), trial.name) for trial in named)
    places = apart([y for y, _ in ends], 14, _TOP, _TOP + _FRAME)
    return "".join(
        f'<text class="name halo" x="{x + 10}" y="{place + 4:.1f}">{text(cut(name, _LONGEST_NAME))}</text>'
        for (_, name), place in zip(ends, places, strict=True)
    )


def _scale(scale: Scale) -> str:
    y, step = _TOP + _FRAME + 22, 6
    boxes = "".join(
        f'<rect x="{_LEFT + i * step}" y="{y}" width="{step + 0.5}" height="9" fill="{colour}"/>'
        for i, colour in enumerate(scale.colours)
    )
    end = _LEFT + len(scale.colours) * step
    return (
        f'<text class="small" x="{_LEFT - 7}" y="{y + 8}" text-anchor="end">{text(scale.first)}</text>{boxes}'
        f'<text class="small" x="{end + 7}" y="{y + 8}">{text(f"{scale.last}: {scale.title}")}</text>'
    )


def mapping_lines(values: Mapping[str, Any]) -> str:
    """Fields and their values, one a line, for a pointer."""
    return "\n".join(f"{field} {choice_text(value)}" for field, value in values.items())
