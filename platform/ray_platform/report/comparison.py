"""The page of a controlled comparison."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from ray_platform.metric_registry import Metric, describe_metric
from ray_platform.report.figures import Chart, Line, Point, line_chart, round_ticks, tick_text
from ray_platform.report.records import Claim, ComparisonDetails, ImageGrid, PairedDifference
from ray_platform.report.render import color_class, plural, render
from ray_platform.units import NO_VALUE, is_number

_VISIBILITY = "model.query_visibility"
_MARGIN = 3.0  # percent of a dot plot's width, so that dots at the ends stay inside


# --- The arms and the differences between them --------------------------------------------------------------------------------


class Difference(NamedTuple):
    """The difference of a metric between two arms, first minus second, over the seeds that both have."""

    metric: Metric
    first: str
    second: str
    mean: float | None
    interval: tuple[float, float] | None  # 95 %; None with one seed
    n: int

    @property
    def outcome(self) -> Literal["favorable", "adverse", "inconclusive", "single"]:
        """Whether the interval excludes zero, for or against the first arm, or includes it; `single` without an interval."""
        if self.interval is None:
            return "single"
        low, high = self.interval
        if low <= 0 <= high or self.metric.direction is None:
            return "inconclusive"
        return "favorable" if (high < 0) == (self.metric.direction == "min") else "adverse"

    @property
    def interval_text(self) -> str:
        if self.interval is None:
            return "no interval"
        return " to ".join(self.metric.difference_text(end, with_unit=False) for end in self.interval)


class Arms:
    """The arms of a comparison with their runs, means and configurations."""

    def __init__(self, details: ComparisonDetails) -> None:
        self._arms = details["arms"]
        self._config: Mapping[str, Any] = details.get("config", {})
        self.names = list(self._arms)
        names = dict.fromkeys(name for arm in self._arms.values() for run in arm["seeds"].values() for name in run)
        measured = [describe_metric(name) for name in names if any(self.mean(arm, name) is not None for arm in self.names)]
        self.metrics = [metric for metric in measured if not metric.is_cost]
        self.costs = [metric for metric in measured if metric.is_cost]
        paired = details.get("paired", {}).items()
        self.differences = [each for key, entry in paired if (each := self._difference(key, entry))]

    def color(self, name: str) -> str:
        """Return the CSS class of an arm's color; arms without a finished run come after all others."""
        return color_class(self.names, name)

    def seeds(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the runs of an arm by seed."""
        return self._arms[name]["seeds"]

    def mean(self, name: str, metric: str) -> float | None:
        return _known(self._arms[name]["mean"].get(metric))

    def std(self, name: str, metric: str) -> float | None:
        return _known(self._arms[name]["std"].get(metric))

    def is_best(self, name: str, metric: Metric) -> bool:
        """Return whether the arm's mean is the best one of several."""
        means = [mean for arm in self.names if (mean := self.mean(arm, metric.name)) is not None]
        return metric.direction is not None and len(means) > 1 and self.mean(name, metric.name) == metric.best(means)

    def claimed(self, claim: Claim) -> list[Difference]:
        """Return the differences that a claim is about, as far as they were measured."""
        known = {(each.metric.name, each.first, each.second): each for each in self.differences}
        return [known[difference] for difference in claim.differences if difference in known]

    def by_seed(self, difference: Difference) -> dict[str, float]:
        """Return a difference seed by seed."""
        first, second = self.seeds(difference.first), self.seeds(difference.second)
        pairs = {seed: (first[seed].get(difference.metric.name), second[seed].get(difference.metric.name))
                 for seed in first if seed in second}  # fmt: skip
        return {seed: a - b for seed, (a, b) in pairs.items() if is_number(a) and is_number(b)}

    def visibility(self, name: str) -> str:
        """Return the arm's attention mask, `joint` or `one_way`."""
        base = self._config.get("pretrain", {}).get("model", {}).get("query_visibility", "")
        return self._fields(name).get(_VISIBILITY, base)

    def fields_text(self, name: str) -> str:
        """Return the fields that the arm sets, with their values."""
        return ", ".join(f"{field} {value}" for field, value in self._fields(name).items()) or NO_VALUE

    def with_both_masks(self) -> list[str]:
        """Return the arms of the first task that was trained with both masks."""
        by_task: dict[str, list[str]] = {}
        base = self._config.get("pretrain", {}).get("objective", {}).get("task", "")
        for name in self.names:
            by_task.setdefault(self._fields(name).get("objective.task", base), []).append(name)
        for names in by_task.values():
            if {"joint", "one_way"} <= {self.visibility(name) for name in names}:
                return names
        return []

    def _fields(self, name: str) -> Mapping[str, Any]:
        return self._config.get("arms", {}).get(name, {})

    def _difference(self, key: str, entry: PairedDifference) -> Difference | None:
        """Return the difference of a key `<metric>_<arm>_minus_<arm>`; None if one of the arms has no run."""
        left, _, second = key.rpartition("_minus_")
        candidates: Sequence[str] = [name for name in self.names if left.endswith(f"_{name}")]
        if not candidates or second not in self.names:
            return None
        first = max(candidates, key=len)
        low, high = _known(entry["low"]), _known(entry["high"])
        interval = None if low is None or high is None else (low, high)
        metric = describe_metric(left.removesuffix(f"_{first}"))
        return Difference(metric, first, second, _known(entry["mean"]), interval, entry["n"])


def _known(value: float | None) -> float | None:
    return value if is_number(value) else None


# --- Dot plots: HTML, so that their text keeps its size on a narrow screen ----------------------------------------------------


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


# --- The page -------------------------------------------------------------------------------------------------------------------


def comparison_page(details: ComparisonDetails, claim: Claim | None = None) -> str:
    """Return the HTML page of a comparison. Sections for which `details` has no data are left out.

    Args:
        details: `summary.json` with a header, images and learning curves.
        claim: what the comparison is about; the page starts with its outcome.
    """
    arms = Arms(details)
    claimed = arms.claimed(claim) if claim else []
    return render(
        "comparison.html.j2",
        details=details,
        arms=arms,
        verdict=_verdict(details, claim, claimed) if claim else None,
        tiles=_tiles(arms, claimed),
        paired=_paired_plots(arms),
        runs=[(metric, plot) for metric in arms.metrics if (plot := _runs_plot(arms, metric))],
        both_masks=arms.with_both_masks(),
        curves=_curves(details, arms),
        grids=_grids(details),
    )


def _verdict(details: ComparisonDetails, claim: Claim, claimed: Sequence[Difference]) -> dict[str, Any]:
    """Return the outcome of the claim, and whether its sentences are not enough to explain it."""
    complete = len(claimed) == len(claim.differences)
    if details["claim"]["holds"]:
        kind, title = "", claim.holds
    elif any(difference.outcome == "adverse" for difference in claimed):
        kind, title = "stop", claim.opposite
    elif not complete or any(difference.outcome == "single" for difference in claimed):
        kind, title = "null", claim.undecided
    else:
        kind, title = "null", claim.not_shown
    return {"kind": kind, "title": title, "differences": claimed, "why": "" if complete else details["claim"]["why"]}


def _tiles(arms: Arms, claimed: Sequence[Difference]) -> list[tuple[str, str]]:
    tiles = []
    for each in claimed:
        interval = "no interval" if each.interval is None else f"95 % interval {each.interval_text}"
        label = f"{each.metric.label}, {each.first} minus {each.second}; {interval}, {plural(each.n, 'seed')}"
        tiles.append((each.metric.difference_text(each.mean), label))
    seeds = {seed for name in arms.names for seed in arms.seeds(name)}
    tiles.append((f"{len(arms.names)} × {len(seeds)}", "arms × seeds"))
    samples = {run["samples"] for name in arms.names for run in arms.seeds(name).values() if "samples" in run}
    if samples:
        tiles.append((" to ".join(f"{each:,.0f}" for each in sorted({min(samples), max(samples)})), "samples per run"))
    return tiles


def _paired_plots(arms: Arms) -> tuple[list[tuple[str, DotPlot]], list[tuple[str, DotPlot]]]:
    """Return the plots of differences in points, and one for each other kind of metric (`fd` and `fd_infinity` share one)."""
    groups: dict[str, list[Difference]] = {}
    for difference in arms.differences:
        if difference.mean is not None:
            metric = difference.metric
            groups.setdefault("" if metric.is_fraction else metric.name.partition("_")[0], []).append(difference)
    in_points: list[tuple[str, DotPlot]] = []
    others: list[tuple[str, DotPlot]] = []
    for name, differences in groups.items():
        title = describe_metric(name).label if name else "Accuracy and retrieval, in points"
        arm = differences[0].first if len({each.first for each in differences}) == 1 else "the first"
        ends = (f"← {arm} worse", f"{arm} better →")
        if differences[0].metric.direction == "min":
            ends = (f"← {arm} better", f"{arm} worse →")
        ordered = sorted(differences, key=lambda each: arms.names.index(each.second))
        plot = DotPlot([_difference_row(each, arms) for each in ordered], has_zero=True, ends=ends)
        (others if name else in_points).append((title, plot))
    return in_points, others


def _difference_row(difference: Difference, arms: Arms) -> DotRow:
    metric, interval = difference.metric, difference.interval
    return DotRow(
        label=metric.label,
        arms=(difference.first, difference.second),
        value=metric.difference_text(difference.mean, with_unit=False),
        interval_text=difference.interval_text,
        kind="inconclusive" if difference.outcome == "single" else difference.outcome,
        dots=[
            (metric.axis_value(value), f"seed {seed}: {metric.difference_text(value)}")
            for seed, value in arms.by_seed(difference).items()
        ],
        mean=None if difference.mean is None else metric.axis_value(difference.mean),
        interval=interval and (metric.axis_value(interval[0]), metric.axis_value(interval[1])),
    )


def _runs_plot(arms: Arms, metric: Metric) -> DotPlot | None:
    """Return every run as a dot, with mean and standard deviation of each arm."""
    rows = []
    for name in arms.names:
        mean, std = arms.mean(name, metric.name), arms.std(name, metric.name)
        if mean is None:
            continue
        dots = [
            (metric.axis_value(run[metric.name]), f"{name}, seed {seed}: {metric.text(run[metric.name])}")
            for seed, run in arms.seeds(name).items()
            if is_number(run.get(metric.name))
        ]
        interval = (metric.axis_value(mean - std), metric.axis_value(mean + std)) if std else None
        value = metric.text(mean, with_unit=False)
        rows.append(DotRow("", (name,), value, "", arms.color(name), dots, metric.axis_value(mean), interval))
    return DotPlot(rows) if rows else None


def _curves(details: ComparisonDetails, arms: Arms) -> list[tuple[str, Chart]]:
    """Return a chart for each metric that was followed: a line per run in the color of its arm, over the samples."""
    runs = [(arm, seed, points) for arm, seeds in details.get("curves", {}).items() for seed, points in seeds.items()]
    charts = []
    for name in dict.fromkeys(name for _, _, points in runs for point in points for name in point["metrics"]):
        metric, lines, named = describe_metric(name), [], set()
        for arm, seed, points in runs:
            line = []
            for point in points:
                value = point["metrics"].get(name)
                if is_number(value):
                    tooltip = f"{arm}, seed {seed}: {metric.text(value)} after {point['samples']:,} samples"
                    line.append(Point(point["samples"], metric.axis_value(value), tooltip=tooltip))
            if line:
                color = arms.color(arm).replace("m0", "bar")
                lines.append(Line("" if arm in named else arm, line, 0.75, color))
                named.add(arm)
        if lines:
            charts.append((f"{metric.label} while training", line_chart(lines, "samples", metric.axis_label)))
    return charts


def _grids(details: ComparisonDetails) -> list[dict[str, Any]]:
    """Return, for each seed, images of the same captions from the same noise by all arms, next to each other."""
    by_seed: dict[str, list[ImageGrid]] = {}
    for grid in details.get("grids", ()):
        if grid["samples"]:
            by_seed.setdefault(str(grid["seed"]), []).append(grid)
    grids = []
    for seed, of_seed in by_seed.items():
        images: list[Mapping[tuple[int, str], str]] = [
            {(i, sample["caption"]): sample["png"] for i, sample in enumerate(grid["samples"])} for grid in of_seed
        ]
        names = [grid["arm"] for grid in of_seed]
        cells = [
            {"caption": key[1], "images": [(name, of_arm.get(key, "")) for name, of_arm in zip(names, images, strict=True)]}
            for key in sorted({key for of_arm in images for key in of_arm})
        ]
        grids.append({"seed": seed, "arms": names, "cells": cells})
    return grids
