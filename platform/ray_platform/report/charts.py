"""Charts as inline SVG: no script; colours are the page's CSS variables, so that they follow its light and dark modes.
`standalone` makes a file of one, for where there is no page."""

import math
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ray_platform.report import page
from ray_platform.report.page import text

_WIDTH, _HEIGHT = 440, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 16, 14, 44  # around the frame
_LABEL_GAP = 14  # between the names of lines, px
_Box = tuple[float, float, float, float]  # left, top, width, height
_CHARACTER = 6.8  # of a label, px wide
_LONGEST_NAME = 24  # characters of a name or label that are shown

STYLE = """
svg { display: block; width: 100%; max-width: 520px; height: auto; font: 12px system-ui, sans-serif; color: var(--bar); }
svg text { fill: var(--soft); font-variant-numeric: tabular-nums; } svg text.name { fill: var(--ink); }
svg .grid { stroke: var(--line); } svg .lead { stroke: var(--soft); stroke-width: .7; }
svg .line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round; }
svg .dot { fill: currentColor; stroke: var(--card); stroke-width: 1.5; }
svg .dot.hollow { fill: var(--card); stroke: currentColor; } svg .dashed .line { stroke-dasharray: 6 4; }
.profile { position: relative; } .profile svg { max-width: none; height: 100%; }
.profile .area { fill: var(--bar); opacity: .8; } .profile .other { fill: none; stroke: var(--m1); stroke-width: 1.5; }
"""


class Point(NamedTuple):
    """Of a line."""

    x: float
    y: float
    label: str = ""  # beside the point
    about: str = ""  # what a pointer shows
    hollow: bool = False


class Line(NamedTuple):
    """Points from left to right, and how strongly they are drawn, 0 to 1. A line of one point is a dot."""

    name: str
    points: Sequence[Point]
    strength: float = 1.0
    colour: str = ""  # a CSS colour; empty: the page's
    dashed: bool = False


class _Frame:
    """Where values are in the picture. Logarithmic in x where `ticks_at` gives the only values that occur."""

    def __init__(self, lines: Sequence[Line], ticks_at: Sequence[float], right: float) -> None:
        points = [point for line in lines for point in line.points]
        self.right, self.bottom = _WIDTH - right, _HEIGHT - _BOTTOM
        self._log = bool(ticks_at)
        xs = [point.x for point in points]
        self.x_ticks = list(ticks_at) or ticks_within(xs)
        self.y_ticks = ticks([point.y for point in points])
        xs = self.x_ticks if self._log else [*self.x_ticks, *xs]
        self._x = self._place(min(xs)), self._place(max(xs))
        self._y = min(self.y_ticks), max(self.y_ticks)

    def _place(self, x: float) -> float:
        return math.log(x) if self._log else x

    def x(self, value: float) -> float:
        low, high = self._x
        inset = 14  # the first and the last point do not touch the frame
        share = (self._place(value) - low) / (high - low) if high > low else 0.5
        return _LEFT + inset + share * (self.right - _LEFT - 2 * inset)

    def y(self, value: float) -> float:
        low, high = self._y
        return self.bottom - (value - low) / (high - low) * (self.bottom - _TOP)


def line_chart(lines: Sequence[Line], x_title: str, y_title: str, log_ticks: Sequence[float] = ()) -> str:
    """An SVG of lines with a dot at each point; lines that have a name carry it at their right end.

    log_ticks: the values of x, all above 0, for a logarithmic axis that is marked at them.
    """
    lines = [_shortened(line) for line in lines]
    names = max((len(line.name) for line in lines), default=0)
    frame = _Frame(lines, log_ticks, _RIGHT + (names * _CHARACTER + 12 if names else 0))
    parts = [_axes(frame, x_title, y_title)]
    for line in lines:
        path = " ".join(f"{frame.x(point.x):.1f},{frame.y(point.y):.1f}" for point in line.points)
        dots = "".join(_dot(frame, point) for point in line.points)
        looks = (f' style="color:{line.colour}"' if line.colour else "") + ' class="dashed"' * line.dashed
        parts.append(f'<g opacity="{line.strength:.2f}"{looks}><polyline class="line" points="{path}"/>{dots}</g>')
    parts += [_names(frame, lines), _labels(frame, lines)]
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{text(f"{y_title} by {x_title}")}">{"".join(parts)}</svg>'
    )


def standalone(svg: str, style: str, title: str, note: str) -> str:
    """The text of an .svg file: a chart of a page under its title and over its note, in the page's light colours.

    style: the CSS of that chart and what defines its colours, beyond what all pages share. Few programs but browsers know CSS
    variables, so that none is left.
    """
    css = page.STYLE + style
    colours: dict[str, str] = {}
    for name, colour in re.findall(r"--([\w-]+): ([^;}]+)", css):
        colours.setdefault(name, colour)  # the light ones are defined first
    rules = "".join(re.findall(r"^svg .*$", style, re.MULTILINE))
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    titles, notes = (textwrap.wrap(each, int((width - 28) / wide)) for each, wide in ((title, 9), (note, _CHARACTER)))
    top, all_height = 16 + 18 * len(titles), 28 + 18 * len(titles) + height + 16 * len(notes)
    size = f'width="{width:g}" height="{all_height:g}"'
    lines = [
        f'<text class="name" x="14" y="{18 * i - top + 24}" font-size="14" font-weight="600">{text(line)}</text>'
        for i, line in enumerate(titles)
    ]
    lines += [f'<text x="14" y="{height + 14 + 16 * i:g}">{text(line)}</text>' for i, line in enumerate(notes)]
    whole = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {-top} {width:g} {all_height:g}" {size} '
        f'style="width:{width:g}px;height:{all_height:g}px;max-width:none"><style>{rules}</style>'
        f'<rect y="{-top}" {size} fill="var(--card)"/>{"".join(lines)}{svg[svg.index(">") + 1 :]}'
    )
    whole = re.sub(r"var\(--([\w-]+)\)", lambda found: colours.get(found[1], found[0]), whole)
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "?", whole) + "\n"  # which no XML may hold


def profile(values: Sequence[float], other: Sequence[float], height: int) -> str:
    """Shares, largest first, as an area as wide as there is room; `other` is a line over it, of as many or of no values."""
    area = "".join(f"L{i} {1 - value:.4f}L{i + 1} {1 - value:.4f}" for i, value in enumerate(sorted(values, reverse=True)))
    line = "".join(f"L{i} {1 - value:.4f}L{i + 1} {1 - value:.4f}" for i, value in enumerate(sorted(other, reverse=True)))
    over = f'<path class="other" vector-effect="non-scaling-stroke" d="M{line[1:]}"/>' if line else ""
    return (
        f'<div class="profile" style="height:{height}px"><svg viewBox="0 0 {max(1, len(values))} 1" preserveAspectRatio="none" '
        f'aria-hidden="true"><path class="area" d="M0 1{area}L{len(values)} 1Z"/>{over}</svg></div>'
    )


def cut(value: str, longest: int) -> str:
    """A name, as far as there is room for it."""
    return value if len(value) <= longest else f"{value[: longest - 1]}…"


def ticks(values: Sequence[float]) -> list[float]:
    """Three to seven round numbers, equally far from each other, around finite `values`."""
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def ticks_within(values: Sequence[float]) -> list[float]:
    """Those of `ticks` that are not outside the values; all where fewer than two are inside."""
    marks = ticks(values)
    near = 1e-9 * (marks[-1] - marks[0])
    inside = [mark for mark in marks if min(values) - near <= mark <= max(values) + near]
    return inside if len(inside) > 1 else marks


def _shortened(line: Line) -> Line:
    points = [point._replace(label=cut(point.label, _LONGEST_NAME)) for point in line.points]
    return line._replace(name=cut(line.name, _LONGEST_NAME), points=points)


def _axes(frame: _Frame, x_title: str, y_title: str) -> str:
    parts = []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{frame.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick_text(tick)}</text>')
    widest = max(len(tick_text(tick)) for tick in frame.x_ticks) * _CHARACTER + 8
    places = [frame.x(tick) for tick in frame.x_ticks]
    gap = min((b - a for a, b in pairwise(places)), default=widest)
    for tick in frame.x_ticks[:: math.ceil(widest / gap)]:
        parts.append(f'<text x="{frame.x(tick):.1f}" y="{frame.bottom + 17}" text-anchor="middle">{tick_text(tick)}</text>')
    parts.append(f'<text x="{(_LEFT + frame.right) / 2:.1f}" y="{_HEIGHT - 7}" text-anchor="middle">{text(x_title)}</text>')
    parts.append(
        f'<text transform="translate(12 {(_TOP + frame.bottom) / 2:.1f}) rotate(-90)" text-anchor="middle">{text(y_title)}</text>'
    )
    return "".join(parts)


def _dot(frame: _Frame, point: Point) -> str:
    place = f'cx="{frame.x(point.x):.1f}" cy="{frame.y(point.y):.1f}"'
    kind = "dot hollow" if point.hollow else "dot"
    return f'<circle class="{kind}" {place} r="4"><title>{text(point.about)}</title></circle>'


def _names(frame: _Frame, lines: Sequence[Line]) -> str:
    """Beside the last points, moved apart, with a thin line to where each belongs."""
    ends = sorted((frame.y(line.points[-1].y), frame.x(line.points[-1].x), line.name) for line in lines if line.name)
    places = apart([y for y, _, _ in ends], _LABEL_GAP, _TOP, frame.bottom)
    return "".join(
        f'<line class="lead" x1="{x + 5:.1f}" y1="{y:.1f}" x2="{frame.right + 3:.1f}" y2="{place:.1f}"/>'
        f'<text class="name" x="{frame.right + 6:.1f}" y="{place + 4:.1f}">{text(name)}</text>'
        for (y, x, name), place in zip(ends, places, strict=True)
    )


def apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Sorted `places`, moved as far as needed to be `gap` apart and within low..high, as long as there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], high if i == len(moved) - 1 else moved[i + 1] - gap)
    return moved


def _labels(frame: _Frame, lines: Sequence[Line]) -> str:
    """Each beside its point, on the side where it covers least of what is there."""
    drawn = [box for line in lines for box in _covered([(frame.x(point.x), frame.y(point.y)) for point in line.points])]
    written: list[_Box] = []
    parts = []
    for point in (point for line in lines for point in line.points if point.label):
        x, y, width = frame.x(point.x), frame.y(point.y), len(point.label) * _CHARACTER
        places = [(left, y + down) for down in (-6, -18, 7, -31, 20) for left in (x + 8, x - 8 - width, x - width / 2)]
        boxes = [
            (left, top, width, 12.0) for left, top in places if left > _LEFT and left + width < _WIDTH and 0 < top < frame.bottom
        ]
        box = min(
            boxes,
            key=lambda box: sum(_overlap(box, other) for other in drawn) + 10 * sum(_overlap(box, other) for other in written),
        )
        written.append((box[0] - 6, box[1], box[2] + 12, box[3]))  # so that two labels do not read as one
        parts.append(f'<text class="name" x="{box[0]:.1f}" y="{box[1] + 10:.1f}">{text(point.label)}</text>')
    return "".join(parts)


def _covered(points: Sequence[tuple[float, float]]) -> list[_Box]:
    """By the dots of a line, and by what connects them, in small boxes."""
    boxes = [(x - 5, y - 5, 10.0, 10.0) for x, y in points]
    for (x, y), (to_x, to_y) in pairwise(points):
        pieces = max(1, math.ceil(math.hypot(to_x - x, to_y - y) / 6))
        boxes += [(x + (to_x - x) * i / pieces - 2, y + (to_y - y) * i / pieces - 2, 4.0, 4.0) for i in range(pieces)]
    return boxes


def _overlap(a: _Box, b: _Box) -> float:
    """Of two boxes, px²."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(0.0, width) * max(0.0, height)


def tick_text(value: float) -> str:
    return f"{value:,.6g}".replace("-", "−")
