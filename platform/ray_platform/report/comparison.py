"""The page of a controlled comparison."""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from ray_platform.metric_registry import Metric, describe_metric
from ray_platform.report.figures import Chart, Line, Point, line_chart, round_ticks, tick_text
from ray_platform.report.records import Claim, ComparisonDetails, ImageGrid, NestedFields, PairedDifference
from ray_platform.report.render import color_class, render
from ray_platform.units import is_number

_MARGIN = 3.0  # percent of a dot plot's width, so that dots at the ends stay inside


def comparison_page(details: ComparisonDetails, claim: Claim | None = None) -> str:
    """Return the HTML page of a comparison, which starts with the outcome of `claim`. Sections without data are left out."""
    arms, config = details["arms"], details.get("config", {})
    runs = [run for arm in arms.values() for run in arm["seeds"].values()]
    means = {
        describe_metric(name): [mean for arm in arms.values() if is_number(mean := arm["mean"].get(name))]
        for name in dict.fromkeys(name for run in runs for name in run)
    }
    scores = [metric for metric, values in means.items() if values and not metric.is_cost]
    differences = _differences(details)
    claimed = _claimed(differences, claim) if claim else []
    fields = {name: _fields_of(config, name) for name in arms}
    return render(
        "comparison.html.j2",
        details=details,
        arms=arms,
        scores=scores,
        costs=[metric for metric, values in means.items() if values and metric.is_cost],
        best={metric.name: metric.best(means[metric]) for metric in scores if metric.direction and len(means[metric]) > 1},
        seeds={seed for arm in arms.values() for seed in arm["seeds"]},
        samples=[run["samples"] for run in runs if "samples" in run],
        claimed=claimed,
        verdict=claim_verdict(details, claim) if claim else None,
        paired=_paired_plots(details, differences),
        runs=[(metric, _runs_plot(details, metric)) for metric in scores],
        fields=fields,
        both_masks=_arms_with_both_masks(fields),
        best_of=_best_of(details, fields),
        curves=_curves(details),
        cells=_cells,
    )


class Difference(NamedTuple):
    """The difference of a metric between two arms, first minus second, over the seeds that both have."""

    metric: Metric
    first: str
    second: str
    mean: float | None
    interval: tuple[float, float] | None  # 95 %; None with one seed
    n: int
    detectable: float | None = None  # found with 80 % power

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
        return " to ".join(self.text(end, with_unit=False) for end in self.interval)

    def text(self, difference: float | None, with_unit: bool = True) -> str:
        """Return a difference of this metric with two significant digits of the interval's half width, if it has one."""
        low, high = self.interval or (0.0, 0.0)
        decimals = max(0, 1 - math.floor(math.log10((high - low) / 2))) if high > low else None
        return self.metric.difference_text(difference, with_unit, decimals)

    @classmethod
    def of(cls, metric: Metric, first: str, second: str, entry: PairedDifference) -> "Difference":
        mean, low, high = (value if is_number(value := entry[part]) else None for part in ("mean", "low", "high"))
        interval = None if low is None or high is None else (low, high)
        return cls(metric, first, second, mean, interval, entry["n"], entry.get("detectable"))


def _differences(details: ComparisonDetails) -> list[Difference]:
    """Return the paired differences, from keys `<metric>_<arm>_minus_<arm>`, of arms that have runs."""
    differences = []
    for key, entry in details.get("paired", {}).items():
        left, _, second = key.rpartition("_minus_")
        first = max((name for name in details["arms"] if left.endswith(f"_{name}")), key=len, default="")
        if first and second in details["arms"]:
            differences.append(Difference.of(describe_metric(left.removesuffix(f"_{first}")), first, second, entry))
    return differences


class BestOf(NamedTuple):
    """A metric of one arm: of a single image per caption, and of the best one of several."""

    arm: str
    ranked_by: str
    single: float | None
    best: float | None
    difference: Difference


def _best_of(details: ComparisonDetails, fields: Mapping[str, NestedFields]) -> dict[str, list[BestOf]]:
    """Return the rows of each number of images."""
    tables: dict[str, list[BestOf]] = {}
    entries: NestedFields = details
    for key in (key for key in entries if key.startswith("best_of_")):
        for arm, differences in entries[key]["arms"].items():
            means = details["arms"][arm]["mean"]
            ranked_by = "clip" if fields[arm]["all"]["objective.task"] == "generation" else "itself"
            for metric in (name.removesuffix("_minus_random") for name in differences):
                difference = Difference.of(describe_metric(metric), arm, arm, differences[f"{metric}_minus_random"])
                row = BestOf(arm, ranked_by, means.get(metric), means.get(f"{metric}_{key}"), difference)
                tables.setdefault(key.removeprefix("best_of_"), []).append(row)
    return tables


def _claimed(differences: Sequence[Difference], claim: Claim) -> list[Difference]:
    known = {(each.metric.name, each.first, each.second): each for each in differences}
    return [known[key] for key in claim.differences if key in known]


def claim_verdict(details: ComparisonDetails, claim: Claim) -> tuple[str, str, str]:
    """Return the CSS class and the sentence of the claim's outcome, and what else explains it."""
    claimed = _claimed(_differences(details), claim)
    complete, outcomes = len(claimed) == len(claim.differences), {difference.outcome for difference in claimed}
    why = "" if complete else details["claim"]["why"]
    if details["claim"]["holds"]:
        return "", claim.holds, why
    if "adverse" in outcomes:
        return "stop", claim.opposite, why
    if not complete or "single" in outcomes:
        return "null", claim.undecided, why
    return "null", claim.partly if "favorable" in outcomes else claim.not_shown, why


def _fields_of(config: NestedFields, arm: str) -> NestedFields:
    """Return the fields that an arm sets, after the ones that all arms have."""
    pretrain = config.get("pretrain", {})
    base = {"objective.task": pretrain.get("objective", {}).get("task", "")}
    base["model.query_visibility"] = pretrain.get("model", {}).get("query_visibility", "")
    return {"all": base | config.get("arms", {}).get(arm, {}), "own": config.get("arms", {}).get(arm, {})}


def _arms_with_both_masks(fields: Mapping[str, NestedFields]) -> list[str]:
    """Return the arms of the first task that was trained with both masks."""
    by_task: dict[str, list[str]] = {}
    for name, values in fields.items():
        by_task.setdefault(values["all"]["objective.task"], []).append(name)
    for names in by_task.values():
        if {"joint", "one_way"} <= {fields[name]["all"]["model.query_visibility"] for name in names}:
            return names
    return []


# --- Dot plots: HTML, so that their text keeps its size on a narrow screen ----------------------------------------------------


class DotRow(NamedTuple):
    """A row: what it is about, and its values on the common axis."""

    label: str
    arms: tuple[str, ...]  # one arm, whose run this is, or two, whose difference it is
    value: str
    interval_text: str
    kind: str  # CSS class of the color
    dots: Sequence[tuple[float, str]]  # value and tooltip
    mean: float
    interval: tuple[float, float] | None


class DotPlot:
    """Rows on one axis."""

    def __init__(self, rows: Sequence[DotRow], has_zero: bool = False, ends: tuple[str, str] = ("", "")) -> None:
        """Place the rows. has_zero: the axis contains 0 and marks it; ends: what is left and right of it."""
        self.rows, self.has_zero, self.ends = rows, has_zero, ends
        values = [value for row in rows for value in (row.mean, *(dot for dot, _ in row.dots), *(row.interval or ()))]
        self.ticks = round_ticks(values + [0.0] * has_zero)
        most = 3 if max(len(tick_text(tick)) for tick in self.ticks) > 4 else 5
        stride = math.ceil(len(self.ticks) / most)
        first = self.ticks.index(min(self.ticks, key=abs)) % stride
        # Those that have room for a label on a narrow screen; zero is among them.
        self.labels = [(tick, tick_text(tick)) for tick in self.ticks[first::stride]]

    def left(self, value: float) -> str:
        """Return the position of a value in percent of the width."""
        return f"{_MARGIN + float(self.width(self.ticks[0], value)):.2f}"

    def width(self, start: float, stop: float) -> str:
        """Return the width of an interval in percent of the width."""
        return f"{(100 - 2 * _MARGIN) * (stop - start) / (self.ticks[-1] - self.ticks[0]):.2f}"


def _paired_plots(details: ComparisonDetails, differences: Sequence[Difference]) -> dict[str, DotPlot]:
    """Return the plot of differences in points, and one for each other kind of metric (`fd` and `fd_infinity` share one)."""
    groups: dict[str, list[Difference]] = {}
    for each in (difference for difference in differences if difference.mean is not None):
        kind = "Accuracy and retrieval, in points"
        if not each.metric.is_fraction:
            kind = describe_metric(each.metric.name.partition("_")[0]).label
        groups.setdefault(kind, []).append(each)
    plots, arms = {}, list(details["arms"])
    for title, group in groups.items():
        arm = group[0].first if len({each.first for each in group}) == 1 else "the first"
        left, right = ("better", "worse") if group[0].metric.direction == "min" else ("worse", "better")
        rows = [_difference_row(details, each) for each in sorted(group, key=lambda each: arms.index(each.second))]
        plots[title] = DotPlot(rows, has_zero=True, ends=(f"← {arm} {left}", f"{arm} {right} →"))
    return plots


def _difference_row(details: ComparisonDetails, difference: Difference) -> DotRow:
    metric, outcome = difference.metric, difference.outcome
    first, second = (details["arms"][name]["seeds"] for name in (difference.first, difference.second))
    dots = []
    for seed in first:
        a, b = first[seed].get(metric.name), second.get(seed, {}).get(metric.name)
        if is_number(a) and is_number(b):
            dots.append((metric.axis_value(a - b), f"seed {seed}: {difference.text(a - b)}"))
    return DotRow(
        metric.label,
        (difference.first, difference.second),
        difference.text(difference.mean, with_unit=False),
        difference.interval_text,
        "inconclusive" if outcome == "single" else outcome,
        dots,
        metric.axis_value(difference.mean or 0),
        difference.interval and (metric.axis_value(difference.interval[0]), metric.axis_value(difference.interval[1])),
    )


def _runs_plot(details: ComparisonDetails, metric: Metric) -> DotPlot:
    """Return every run as a dot, with mean and standard deviation of each arm."""
    rows = []
    for name, arm in details["arms"].items():
        mean, std = arm["mean"].get(metric.name), arm["std"].get(metric.name)
        if is_number(mean):
            runs = [(seed, run[metric.name]) for seed, run in arm["seeds"].items() if is_number(run.get(metric.name))]
            dots = [(metric.axis_value(value), f"{name}, seed {seed}: {metric.text(value)}") for seed, value in runs]
            interval = (metric.axis_value(mean - std), metric.axis_value(mean + std)) if is_number(std) and std else None
            color, value = color_class(list(details["arms"]), name), metric.text(mean, with_unit=False)
            rows.append(DotRow("", (name,), value, "", color, dots, metric.axis_value(mean), interval))
    return DotPlot(rows)


def _curves(details: ComparisonDetails) -> list[tuple[str, Chart]]:
    """Return a chart for each metric that was measured more than once: a line per run in its arm's color, over the samples."""
    runs = [(arm, seed, points) for arm, seeds in details.get("curves", {}).items() for seed, points in seeds.items()]
    charts = []
    for name in dict.fromkeys(name for _, _, points in runs for point in points for name in point["metrics"]):
        metric, lines, named = describe_metric(name), [], set()
        for arm, seed, points in runs:
            known = [(point["samples"], value) for point in points if is_number(value := point["metrics"].get(name))]
            line = [
                Point(
                    samples, metric.axis_value(value), "", f"{arm}, seed {seed}: {metric.text(value)} after {samples:,} samples"
                )
                for samples, value in known
            ]
            if line:
                color = color_class(list(details["arms"]), arm).replace("m0", "bar")
                lines.append(Line("" if arm in named else arm, line, 0.75, color))
                named.add(arm)
        if any(len(line.points) > 1 for line in lines):
            charts.append((f"{metric.label} while training", line_chart(lines, "samples", metric.axis_label)))
    return charts


def _cells(grids: Sequence[ImageGrid]) -> dict[tuple[int, str], dict[str, str]]:
    """Return the images of the grids by place and caption, and by arm: the same caption from the same noise."""
    cells: dict[tuple[int, str], dict[str, str]] = {}
    for grid in grids:
        for i, sample in enumerate(grid["samples"]):
            cells.setdefault((i, sample["caption"]), {})[grid["arm"]] = sample["png"]
    return dict(sorted(cells.items()))
