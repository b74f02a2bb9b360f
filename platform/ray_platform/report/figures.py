"""Figures as SVG: matplotlib draws them, `Chart` gives them the colors of the pages.

Text stays text, colors become the stylesheet's variables (so that a figure follows the light and the dark mode), and points and
lines carry tooltips. `Chart.standalone` is the same figure as a file that other programs than browsers can display.
"""

import copy
import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullFormatter, NullLocator

STYLESHEET = (Path(__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
_WIDTH, _HEIGHT = 440, 280  # px of a line chart
_LEFT, _RIGHT, _TOP, _BOTTOM, _INSET = 54, 16, 14, 44, 14  # margins around the frame; margin inside it, left and right
_LABEL_GAP, _RADIUS = 14, 4.0  # px between the labels of lines; of a dot
CHARACTER = 6.8  # px, width of a character of a label
_LONGEST_LABEL = 24  # characters
_SVG = "{http://www.w3.org/2000/svg}"
_INVALID_IN_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
THEME: Any = {  # Any: the type that matplotlib declares has no name
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.family": "DejaVu Sans", "font.size": 12,
    "lines.scale_dashes": False, "lines.linewidth": 2, "lines.solid_joinstyle": "round", "path.simplify": False,
}  # fmt: skip


def _light_colors() -> dict[str, str]:
    """Return the stylesheet's colors of the light mode by their names; the dark ones come second."""
    colors: dict[str, str] = {}
    for name, digits in re.findall(r"--([\w-]+): #([0-9a-f]+)", STYLESHEET):
        colors.setdefault(name, f"#{digits if len(digits) == 6 else ''.join(2 * digit for digit in digits)}")
    return colors


COLORS = _light_colors()


class Point(NamedTuple):
    """A point of a line."""

    x: float
    y: float
    label: str = ""  # written next to the point
    tooltip: str = ""
    hollow: bool = False


class Line(NamedTuple):
    """Points from left to right. A line of one point is a dot; a line with a name carries it at its right end."""

    name: str
    points: Sequence[Point]
    opacity: float = 1.0
    color: str = "bar"  # a name of the stylesheet or #rrggbb
    dashed: bool = False
    drawstyle: str = "default"  # matplotlib's: steps-pre and steps-post make a staircase


class Artist(NamedTuple):
    """What a part of a figure carries besides its colors."""

    tooltips: Sequence[str]  # one per marker, or one for the whole part
    hollow: Sequence[bool] = ()  # one per marker
    opacity: float = 1.0  # of the whole, so that a line does not show through its dots


class Chart:
    """A finished figure. A template writes it as inline SVG in the page's colors."""

    def __init__(self, figure: Figure, label: str, artists: dict[str, Artist], kind: str = "", stretch: bool = False) -> None:
        """Convert a figure that is drawn in pixels (72 dpi) in the light colors, of the CSS class `kind`.

        `label` is for readers who do not see it, `artists` are by their gids in matplotlib, whose part before `-` becomes a CSS
        class; `stretch` fills the figure's place, whatever its proportions.
        """
        text = io.StringIO()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a glyph that the font for measuring texts lacks; browsers have it
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
        self._root = ElementTree.fromstring(text.getvalue())  # noqa: S314 (matplotlib's output)
        for attribute in ("version", "width", "height"):
            self._root.attrib.pop(attribute, None)
        self._root.attrib |= {"role": "img", "aria-label": printable(label)} | ({"class": kind} if kind else {})
        if stretch:
            self._root.set("preserveAspectRatio", "none")
        for name in ("metadata", "defs"):
            for element in self._root.findall(_SVG + name):
                self._root.remove(element)
        self._simplify(self._root, artists)

    def __html__(self) -> str:
        root = copy.deepcopy(self._root)
        names = {color: f"var(--{name})" for name, color in COLORS.items()}
        for element in root.iter():
            element.tag = element.tag.removeprefix(_SVG)
            if "style" in element.attrib:
                style = re.sub(r"#[0-9a-f]{6}", lambda match: names.get(match[0], match[0]), element.get("style", ""))
                element.set("style", style)
        return Markup(ElementTree.tostring(root, encoding="unicode"))  # noqa: S704 (ElementTree has escaped every text)

    def standalone(self, title: str, note: str) -> str:
        """Return the text of an .svg file: the figure below its title and above its note, in the light colors."""
        root = copy.deepcopy(self._root)
        width, height = (float(size) for size in root.get("viewBox", "").split()[2:])
        titles, notes = (textwrap.wrap(each, int((width - 28) / wide)) for each, wide in ((title, 9), (note, CHARACTER)))
        top = 16 + 18 * len(titles)
        whole = top + height + 12 + 16 * len(notes)
        size = {"width": f"{width:g}", "height": f"{whole:g}"}
        root.attrib |= size | {"viewBox": f"0 {-top} {width:g} {whole:g}"}
        root.insert(0, ElementTree.Element(_SVG + "rect", {"y": str(-top), "style": f"fill: {COLORS['card']}", **size}))
        lines: list[tuple[float, int, str, str]] = [(18 * i - top + 24, 14, "ink", line) for i, line in enumerate(titles)]
        lines += [(height + 14 + 16 * i, 12, "soft", line) for i, line in enumerate(notes)]
        for y, font_size, color, line in lines:
            style = f"font: {font_size}px system-ui, sans-serif; fill: {COLORS[color]}" + "; font-weight: 600" * (font_size == 14)
            ElementTree.SubElement(root, _SVG + "text", {"x": "14", "y": f"{y:g}", "style": style}).text = printable(line)
        ElementTree.register_namespace("", _SVG.strip("{}"))
        return ElementTree.tostring(root, encoding="unicode") + "\n"

    def _simplify(self, parent: ElementTree.Element, artists: dict[str, Artist]) -> None:
        """Turn references to marker paths into circles and ids (which must be unique in a page) into classes, add tooltips."""
        gid = parent.attrib.pop("id", "")
        artist = artists.get(gid)
        if "-" in gid:
            parent.set("class", gid.partition("-")[0])
        children: list[ElementTree.Element] = []
        if artist:
            circles = list(parent.iter(_SVG + "use"))
            for circle, tooltip, hollow in zip(circles, artist.tooltips, artist.hollow, strict=bool(circles)):
                _make_circle(circle, tooltip, hollow)
            children += [] if circles else [_title(artist.tooltips[0])]
            if artist.opacity < 1:
                parent.set("opacity", f"{artist.opacity:.2f}")
        for child in parent:
            self._simplify(child, artists)
            if "d" in child.attrib:
                child.set("d", re.sub(r"(\.\d\d)\d+", r"\1", " ".join(child.get("d", "").split())))
            if "style" in child.attrib:
                child.set("style", child.get("style", "").replace("'DejaVu Sans'", "system-ui, sans-serif"))
            if child.get("transform", "").startswith("rotate(-0 "):
                del child.attrib["transform"]
            if child.tag != _SVG + "defs":
                children += list(child) if child.tag == _SVG + "g" and not child.attrib else [child]
            child.tail = None
        if parent.text and not parent.text.strip():
            parent.text = None
        parent[:] = children


def _make_circle(element: ElementTree.Element, tooltip: str, hollow: bool) -> None:
    """Turn a reference to matplotlib's path of a marker into a circle."""
    colors = dict(part.split(": ") for part in element.get("style", "").split("; "))
    fill, stroke = (colors["stroke"], colors["fill"]) if hollow else (colors["fill"], colors["stroke"])
    place = {name: f"{float(element.get(old, 0)):.1f}" for name, old in (("cx", "x"), ("cy", "y"))}
    style = f"fill: {fill}; stroke: {stroke}; stroke-width: 1.5"
    element.tag, element.attrib = _SVG + "circle", place | {"r": f"{_RADIUS:g}", "style": style}
    element.append(_title(tooltip))


def _title(text: str) -> ElementTree.Element:
    title = ElementTree.Element(_SVG + "title")
    title.text = printable(text)
    return title


def printable(value: str) -> str:
    """Return the text with `?` for what no XML file can hold: control characters and halves of surrogate pairs."""
    return _INVALID_IN_XML.sub("?", value.encode("utf-8", "replace").decode())


def shorten(value: str, longest: int = _LONGEST_LABEL) -> str:
    """Return a label on one line, cut to `longest` characters."""
    value = " ".join(printable(value).split())
    return value if len(value) <= longest else f"{value[: longest - 1]}…"


def tick_text(value: float) -> str:
    return f"{value:,.6g}".replace("-", "−")


def round_ticks(values: Iterable[float], most: int = 5) -> list[float]:
    """Return round numbers at equal distances, from at or below the least of finite `values` to at or above the largest."""
    values = list(values)
    low, high = min(values), max(values)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1e-3), high + 0.5 * max(abs(high), 1e-3)
    ticks = MaxNLocator(nbins=most, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    return [float(f"{tick:.12g}") + 0.0 for tick in ticks]


def spread_apart(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return sorted `places` moved as far as needed to be `gap` apart and within low..high, as long as there is room."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap if moved else low))
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], high if i == len(moved) - 1 else moved[i + 1] - gap)
    return moved


def pixel_figure(width: float, height: float) -> Figure:
    """Return an empty figure whose unit is the pixel of the SVG."""
    return Figure(figsize=(width / 72, height / 72), dpi=72, frameon=False)


@rc_context(THEME)
def line_chart(lines: Sequence[Line], x_title: str, y_title: str, log_ticks: Sequence[float] = ()) -> Chart:
    """Draw lines, with at least one point in all, and a dot at each point.

    `log_ticks`: all values of x, above 0, for a logarithmic axis that is marked at them.
    """
    longest = max(len(shorten(line.name)) for line in lines)
    right = _WIDTH - _RIGHT - (longest * CHARACTER + 12 if longest else 0)
    figure = pixel_figure(_WIDTH, _HEIGHT)
    box = (_LEFT / _WIDTH, _BOTTOM / _HEIGHT, (right - _LEFT) / _WIDTH, (_HEIGHT - _TOP - _BOTTOM) / _HEIGHT)
    axes = figure.add_axes(box, facecolor="none", frame_on=False)
    points = [point for line in lines for point in line.points]
    _set_axes(axes, points, log_ticks, right - _LEFT)
    axes.set_xlabel(shorten(x_title, 60), color=COLORS["soft"], labelpad=9)
    axes.yaxis.set_label_coords(14 / _WIDTH, 0.5 * (_BOTTOM + _HEIGHT - _TOP) / _HEIGHT, transform=figure.transFigure)
    axes.set_ylabel(shorten(y_title, 40), color=COLORS["soft"], va="center")
    artists: dict[str, Artist] = {}
    for i, line in enumerate(lines):
        _draw_line(axes, line, i, artists)
    pixels = [axes.transData.transform([(point.x, point.y) for point in line.points]) for line in lines]
    _write_line_names(axes, lines, pixels, right)
    _write_point_labels(axes, lines, pixels)
    return Chart(figure, f"{y_title} by {x_title}", artists)


@rc_context(THEME)
def profile(values: Sequence[float], other: Sequence[float]) -> Chart:
    """Draw fractions as an area, largest first, and `other` ones as a line over it; it stretches to the size of its place."""
    figure = pixel_figure(200, 100)
    axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
    axes.set_axis_off()
    axes.set(xlim=(0, max(1, len(values))), ylim=(0, 1))
    axes.stairs(sorted(values, reverse=True), fill=True, color=COLORS["bar"], clip_on=False, gid="area-0", linewidth=0)
    if other:
        axes.stairs(sorted(other, reverse=True), baseline=None, color=COLORS["m1"], clip_on=False, gid="other-0")
    return Chart(figure, "recall of all classes, best first", {}, "profile", stretch=True)


def _set_axes(axes: Axes, points: Sequence[Point], log_ticks: Sequence[float], width: float) -> None:
    """Set limits, ticks and grid. Rounded limits in y; in x the points touch the frame but for an inset."""
    soft = COLORS["soft"]
    y_ticks = round_ticks([point.y for point in points])
    axes.set_ylim(y_ticks[0], y_ticks[-1])
    axes.yaxis.set(major_locator=FixedLocator(y_ticks), major_formatter=FixedFormatter([tick_text(tick) for tick in y_ticks]))
    axes.yaxis.set_tick_params(length=0, pad=7, labelcolor=soft)
    axes.grid(axis="y", color=COLORS["line"], linewidth=1, clip_on=False)
    axes.set_axisbelow(True)
    xs = [point.x for point in points] if not log_ticks else list(log_ticks)
    low, high = min(xs), max(xs)
    inset = _INSET / (width - 2 * _INSET)
    if log_ticks:
        axes.set_xscale("log")
        margin = (high / low) ** inset if high > low else 2
        axes.set_xlim(low / margin, high * margin)
        x_ticks = list(log_ticks)
    else:
        margin = inset * (high - low) or 0.5 * max(abs(low), 1e-3)
        axes.set_xlim(low - margin, high + margin)
        x_ticks = _ticks_inside(low, high, width)
    axes.xaxis.set(major_locator=FixedLocator(x_ticks), major_formatter=FixedFormatter([tick_text(tick) for tick in x_ticks]))
    axes.xaxis.set(minor_locator=NullLocator(), minor_formatter=NullFormatter())
    axes.xaxis.set_tick_params(length=0, pad=6, labelcolor=soft)


def _ticks_inside(low: float, high: float, width: float) -> list[float]:
    """Return round numbers within low..high for as many labels as `width` pixels have room for."""
    for most in (5, 4, 3, 2, 1):
        ticks = round_ticks([low, high], most)
        near = 1e-9 * (ticks[-1] - ticks[0])
        inside = [tick for tick in ticks if low - near <= tick <= high + near]
        room = (max(len(tick_text(tick)) for tick in ticks) * CHARACTER + 12) * (len(inside) - 1)
        if inside and room <= width - 2 * _INSET:
            return inside
    return [low]


def _draw_line(axes: Axes, line: Line, number: int, artists: dict[str, Artist]) -> None:
    color = COLORS.get(line.color, line.color)
    gid = f"{'dashed' if line.dashed else 'line'}-{number}"
    artists[gid] = Artist([point.tooltip for point in line.points], [point.hollow for point in line.points], line.opacity)
    xs, ys = [point.x for point in line.points], [point.y for point in line.points]
    axes.plot(
        xs, ys, "o", color=color, linestyle=(0, (6, 4)) if line.dashed else "-", drawstyle=line.drawstyle,
        markersize=2 * _RADIUS, markeredgecolor=COLORS["card"], clip_on=False, zorder=3 + number, gid=gid,
    )  # fmt: skip


def _write_line_names(axes: Axes, lines: Sequence[Line], pixels: Sequence[Any], right: float) -> None:
    """Write names next to the last points, moved apart, with thin lines to the points that they belong to."""
    ends = sorted((y, x, shorten(line.name)) for line, (*_, (x, y)) in zip(lines, pixels, strict=True) if line.name)
    places = spread_apart([y for y, _, _ in ends], _LABEL_GAP, _BOTTOM, _HEIGHT - _TOP)
    arrow = {"arrowstyle": "-", "color": COLORS["soft"], "linewidth": 0.7, "shrinkA": 3, "shrinkB": 5, "relpos": (0, 0.5)}
    for (y, x, name), place in zip(ends, places, strict=True):
        axes.annotate(
            name, (x, y), (right + 6, place), "figure pixels", "figure pixels", arrow, color=COLORS["ink"], va="center"
        )  # fmt: skip


def _write_point_labels(axes: Axes, lines: Sequence[Line], pixels: Sequence[Any]) -> None:
    """Write each label next to its point, on the side where it covers least of what is drawn there."""
    covered = np.concatenate([_covered_boxes(places) for places in pixels])
    written = np.empty((0, 4))
    points = [
        (point, at) for line, places in zip(lines, pixels, strict=True) for point, at in zip(line.points, places, strict=True)
    ]
    for label, (x, y) in [(shorten(point.label), at) for point, at in points if point.label]:
        width = len(label) * CHARACTER
        places = [(left, y + up) for up in (-6, 6, -19, 19, -32) for left in (x + 8, x - 8 - width, x - width / 2)]
        boxes = [
            np.array([left, bottom, left + width, bottom + 12])
            for left, bottom in places
            if left > _LEFT and left + width < _WIDTH and _BOTTOM < bottom < _HEIGHT - 12
        ]
        box = min(boxes, key=lambda box: _overlap(box, covered) + 10 * _overlap(box, written))
        written = np.vstack([written, box + np.array([-6, 0, 6, 0])])  # so that two labels do not read as one
        axes.annotate(label, (box[0], (box[1] + box[3]) / 2), xycoords="figure pixels", color=COLORS["ink"], va="center")


def _covered_boxes(places: Any) -> np.ndarray:
    """Return small boxes [K, 4] around the dots of a line and along what connects them. places: [N, 2], px."""
    centers, sizes = [places], [np.full(len(places), 5)]
    for start, stop in pairwise(places):
        steps = max(1, math.ceil(np.hypot(*(stop - start)) / 6))
        centers.append(np.linspace(start, stop, steps, endpoint=False))
        sizes.append(np.full(steps, 2))
    center, size = np.concatenate(centers), np.concatenate(sizes)[:, None]
    return np.hstack([center - size, center + size])


def _overlap(box: np.ndarray, others: np.ndarray) -> float:
    """Return the area in px² that a box [left, bottom, right, top] shares with others [K, 4]."""
    common = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    return float(common.clip(0).prod(axis=1).sum())
