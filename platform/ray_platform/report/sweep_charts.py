"""The charts of a sweep: Pareto fronts, learning curves and parallel coordinates."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, to_hex

from ray_platform.metric_registry import describe_metric
from ray_platform.report.figures import COLORS, Chart, Line, Point, line_chart
from ray_platform.report.parallel_coordinates import (
    ColorScale,
    ParallelAxis,
    ParallelLine,
    choice_text,
    parallel_coordinates,
)  # fmt: skip
from ray_platform.report.records import ObjectiveRecord, SearchDimension, SweepDetails, TrialRecord
from ray_platform.units import is_number

CURVES_NOTE = "dashed: the recipe's values; hollow: stopped early"
TRIALS_NOTE = "one line per trial; dashed: the recipe's values; fainter: stopped early"
_SCORES = LinearSegmentedColormap.from_list("scores", ["#5b78d8", "#b45ca6", "#ee8a2e"])  # worst to best; for light and dark
_SHADES = 24


def pareto_chart(details: SweepDetails, x: ObjectiveRecord, y: ObjectiveRecord) -> Chart | None:
    """Draw two objectives against each other, with a staircase through the trials of the front that no other one dominates.

    Returns None if no trial has both metrics.
    """
    shown = [trial for trial in details["trials"] if _has(trial, x["metric"]) and _has(trial, y["metric"])]
    if not shown:
        return None
    front = _front([trial for trial in shown if trial["name"] in details["front"]], x, y)
    names = {trial["name"] for trial in front}
    lines = []
    if len(front) > 1:
        step = "steps-pre" if x["mode"] == "max" else "steps-post"  # around what the front dominates
        lines.append(Line("", [_point(details, trial, x, y) for trial in front], drawstyle=step))
    for trial in shown:
        point = _point(details, trial, x, y)
        if trial["name"] in names or trial["default"]:
            point = point._replace(label=short_name(trial))
        lines.append(Line("", [point], 0.5 if point.hollow else 1.0, "m1" if trial["default"] else "bar"))
    return line_chart(lines, describe_metric(x["metric"]).axis_label, describe_metric(y["metric"]).axis_label)


def pareto_note(x: ObjectiveRecord, y: ObjectiveRecord) -> str:
    sides = f"{'right' if x['mode'] == 'max' else 'left'} and {'up' if y['mode'] == 'max' else 'down'}"
    return f"better: {sides}; orange: the recipe's values; hollow: stopped early, scored at fewer samples"


def learning_curves(details: SweepDetails, name: str) -> Chart | None:
    """Draw a line per trial over the samples that it was trained on. Returns None if no trial has the metric."""
    metric, lines = describe_metric(name), []
    for trial, color in _colored(details):
        points = []
        for entry in trial["history"]:
            value = entry["metrics"].get(name)
            if is_number(value):
                tooltip = f"{short_name(trial)}: {metric.text(value)} after {entry['samples']:,} samples"
                points.append(Point(entry["samples"], metric.axis_value(value), tooltip=tooltip))
        if points:
            finished = trial["state"] == "finished"
            points[-1] = points[-1]._replace(hollow=not finished)
            label = short_name(trial) if _stands_out(details, trial) else ""
            lines.append(Line(label, points, 0.9 if finished else 0.6, color, trial["default"]))
    return line_chart(lines, "samples", metric.axis_label) if lines else None


def trials_chart(details: SweepDetails) -> Chart | None:
    """Draw all trials over the fields of the space and the objectives, colored by the first objective. None without trials."""
    if not details["trials"] or not details["space"]:
        return None
    axes = [_field_axis(field, space) for field, space in details["space"].items()]
    for objective in details["objectives"]:
        metric, least = describe_metric(objective["metric"]), objective["mode"] == "min"
        caption = f"{'lower' if least else 'higher'} is better ↑"
        axes.append(ParallelAxis(metric.label.partition(", ")[0], caption, metric.axis_label, downwards=least))
    lines = []
    for trial, color in _colored(details):
        values = [_axis_value(trial["values"][field]) if field in trial["values"] else None for field in details["space"]]
        for objective in details["objectives"]:
            value = trial["metrics"].get(objective["metric"])
            values.append(describe_metric(objective["metric"]).axis_value(value) if is_number(value) else None)
        opacity = 0.95 if trial["state"] == "finished" else 0.35
        label = short_name(trial) if _stands_out(details, trial) else ""
        lines.append(ParallelLine(label, values, color, opacity, trial["default"], trial_tooltip(details, trial)))
    return parallel_coordinates(axes, lines, _color_scale(details))


def short_name(trial: TrialRecord) -> str:
    return f"{trial['name']} (recipe)" if trial["default"] else trial["name"]


def trial_tooltip(details: SweepDetails, trial: TrialRecord) -> str:
    """Return a trial's scores and values, one per line."""
    metrics = [describe_metric(objective["metric"]) for objective in details["objectives"]]
    scores = [f"{metric.label} {metric.text(trial['metrics'].get(metric.name))}" for metric in metrics]
    values = [f"{field} {choice_text(value)}" for field, value in trial["values"].items()]
    return "\n".join([f"{short_name(trial)}, {trial['state']}", *scores, *values])


def _has(trial: TrialRecord, metric: str) -> bool:
    return is_number(trial["metrics"].get(metric))


def _value(trial: TrialRecord, objective: ObjectiveRecord) -> float:
    return float(trial["metrics"][objective["metric"]] or 0)


def _gain(trial: TrialRecord, objective: ObjectiveRecord) -> float:
    return _value(trial, objective) * (1 if objective["mode"] == "max" else -1)


def _stands_out(details: SweepDetails, trial: TrialRecord) -> bool:
    """Return whether charts write the trial's name."""
    return trial["default"] or trial["name"] in details["front"]


def _point(details: SweepDetails, trial: TrialRecord, x: ObjectiveRecord, y: ObjectiveRecord) -> Point:
    across, up = (describe_metric(each["metric"]).axis_value(_value(trial, each)) for each in (x, y))
    return Point(across, up, tooltip=trial_tooltip(details, trial), hollow=trial["state"] != "finished")


def _front(trials: Sequence[TrialRecord], x: ObjectiveRecord, y: ObjectiveRecord) -> list[TrialRecord]:
    """Return the front of two objectives, left to right. A front of more has trials that are dominated in two of them."""
    kept: list[TrialRecord] = []
    for trial in sorted(trials, key=lambda trial: (_gain(trial, x), _gain(trial, y)), reverse=True):
        if not kept or _gain(trial, y) > _gain(kept[-1], y):
            kept.append(trial)
    return sorted(kept, key=lambda trial: _value(trial, x))


def _field_axis(field: str, space: SearchDimension) -> ParallelAxis:
    above, _, name = field.rpartition(".")
    choices = [_axis_value(value) for value in space.get("values", ())]
    ends = [space[end] for end in ("low", "high") if end in space]
    log = bool(space.get("log"))
    return ParallelAxis(name, above, field + ", log" * log, log, choices, ends)


def _axis_value(value: Any) -> Any:
    """Return numbers as they are and everything else as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else choice_text(value)


def _colored(details: SweepDetails) -> Iterator[tuple[TrialRecord, str]]:
    """Yield the trials with their colors by the first objective; the best ones and the recipe's come last, on top."""
    objective = details["objectives"][0]
    gains = {trial["name"]: _gain(trial, objective) for trial in details["trials"] if _has(trial, objective["metric"])}

    def order(trial: TrialRecord) -> tuple[bool, bool, float]:
        return trial["default"], trial["state"] == "finished", gains.get(trial["name"], float("-inf"))

    for trial in sorted(details["trials"], key=order):
        if trial["name"] not in gains:
            yield trial, COLORS["meant"]
        else:
            low, high = min(gains.values()), max(gains.values())
            yield trial, to_hex(_SCORES((gains[trial["name"]] - low) / (high - low) if high > low else 1.0))


def _color_scale(details: SweepDetails) -> ColorScale | None:
    objective = details["objectives"][0]
    metric = describe_metric(objective["metric"])
    values = sorted({_value(trial, objective) for trial in details["trials"] if _has(trial, objective["metric"])})
    if len(values) < 2:
        return None
    ends = [metric.text(value) for value in (values[0], values[-1])]
    worst, best = ends if objective["mode"] == "max" else reversed(ends)
    return ColorScale(metric.label, worst, best, [to_hex(_SCORES(i / (_SHADES - 1))) for i in range(_SHADES)])
