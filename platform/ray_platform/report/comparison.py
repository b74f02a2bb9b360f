"""The page of a controlled comparison."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.metric_registry import Metric, describe_metric
from ray_platform.report.arms import Arms, Difference
from ray_platform.report.dot_plot import DotPlot, DotRow
from ray_platform.report.figures import Chart, Line, Point, line_chart
from ray_platform.report.records import Claim, ComparisonDetails, ImageGrid
from ray_platform.report.render import plural, render
from ray_platform.units import is_number


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
