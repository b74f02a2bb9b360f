"""The page of a sweep, and its charts: Pareto fronts, learning curves and parallel coordinates."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

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
from ray_platform.report.render import render
from ray_platform.units import is_number

_STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}
_CURVES_NOTE = "dashed: the recipe's values; hollow: stopped early"
_TRIALS_NOTE = "one line per trial; dashed: the recipe's values; fainter: stopped early"
_SCORES = LinearSegmentedColormap.from_list("scores", ["#5b78d8", "#b45ca6", "#ee8a2e"])  # worst to best; for light and dark
_SHADES = 24


class SweepChart(NamedTuple):
    """A chart with its title and its note."""

    file: str
    title: str
    note: str
    chart: Chart


class ObjectiveSummary(NamedTuple):
    """The best trial by one objective against the trial with the recipe's values."""

    metric: str
    best: TrialRecord | None  # None if no trial was trained to the end
    default: float | None  # None if the recipe's values were not trained to the end
    gain: float  # 0 if no trial is better than the recipe's values


def sweep_page(details: SweepDetails) -> str:
    """Return the HTML page of a sweep."""
    charts = _charts(details)
    trained = sum(trial["history"][-1]["samples"] for trial in details["trials"] if trial["history"])
    return render(
        "sweep.html.j2",
        details=details,
        states=_STATES,
        failed=[trial for trial in details["trials"] if trial["state"] == "failed"],
        summaries=[_summary(details, objective) for objective in details["objectives"]],
        tiles=_tiles(details, trained),
        charts=[chart for chart in charts if chart.file != "parallel_coordinates.svg"],
        trials_chart=next((chart for chart in charts if chart.file == "parallel_coordinates.svg"), None),
        trials=_ranked(details),
        facts=_facts(details),
        choice_text=choice_text,
    )


def sweep_files(details: SweepDetails) -> dict[str, str]:
    """Return the charts for which there are values as SVG files that need no stylesheet: file name -> text."""
    return {chart.file: chart.chart.standalone(chart.title, chart.note) for chart in _charts(details)}


def _charts(details: SweepDetails) -> list[SweepChart]:
    first, *others = details["objectives"]
    charts = []
    for number, other in enumerate(others):
        title = f"{_label(other)} against {_label(first)}"
        charts.append((_file("pareto", number), title, pareto_note(first, other), pareto_chart(details, first, other)))
    for number, objective in enumerate(details["objectives"]):
        chart = learning_curves(details, objective["metric"])
        charts.append((_file("learning_curves", number), f"{_label(objective)} while training", _CURVES_NOTE, chart))
    charts.append(("parallel_coordinates.svg", "All trials", _TRIALS_NOTE, trials_chart(details)))
    return [SweepChart(file, title, note, chart) for file, title, note, chart in charts if chart is not None]


def _file(name: str, number: int) -> str:
    return f"{name}_{number + 1}.svg" if number else f"{name}.svg"


def _label(objective: ObjectiveRecord) -> str:
    return describe_metric(objective["metric"]).label


def _summary(details: SweepDetails, objective: ObjectiveRecord) -> ObjectiveSummary:
    metric = objective["metric"]
    best = next((trial for trial in details["trials"] if trial["name"] == details["best"].get(metric)), None)
    finished = [trial for trial in details["trials"] if trial["default"] and trial["state"] == "finished"]
    default = finished[0]["metrics"].get(metric) if finished else None
    if not is_number(default):
        return ObjectiveSummary(metric, best, None, 0.0)
    return ObjectiveSummary(metric, best, default, float(best["metrics"][metric] or 0) - default if best else 0.0)


def _tiles(details: SweepDetails, trained: int) -> list[tuple[str, str]]:
    tiles = []
    for objective in details["objectives"]:
        summary, metric = _summary(details, objective), describe_metric(objective["metric"])
        if summary.best:
            recipe = "" if summary.default is None else f"; the recipe: {metric.text(summary.default)}"
            tiles.append((metric.text(summary.best["metrics"].get(metric.name)), f"{metric.label}, best trial{recipe}"))
    counts = {label: sum(trial["state"] == state for trial in details["trials"]) for state, label in _STATES.items()}
    listed = ", ".join(f"{count:,} {label}" for label, count in counts.items() if count)
    tiles.append((f"{len(details['trials']):,}", f"trials: {listed}"))
    whole = details["budget_samples"] * len(details["trials"])
    budget = f"{100 * trained / whole:.0f} % of what all trials to the end would take" if whole else "in all"
    return [*tiles, (f"{trained:,}", f"samples trained on, {budget}")]


def _ranked(details: SweepDetails) -> Sequence[TrialRecord]:
    """Return finished trials first, the best by the first objective at the top; failed ones last."""
    objective = details["objectives"][0]

    def order(trial: TrialRecord) -> tuple[int, float]:
        value = trial["metrics"].get(objective["metric"])
        if not is_number(value):
            return list(_STATES).index(trial["state"]), float("inf")
        return list(_STATES).index(trial["state"]), -value if objective["mode"] == "max" else value

    return sorted(details["trials"], key=order)


def _facts(details: SweepDetails) -> dict[str, str]:
    """Return what else is needed to repeat the sweep."""
    facts = {name: details[name] for name in ("recipe", "search", "scheduler")}
    facts["samples per trial"] = f"{details['budget_samples']:,}"
    return facts | {field: _space_text(space) for field, space in details["space"].items()}


def _space_text(space: SearchDimension) -> str:
    if "values" in space:
        return ", ".join(map(choice_text, space["values"]))
    ends = f"{choice_text(space['low'])} to {choice_text(space['high'])}"
    return f"{ends}, logarithmic" if space.get("log") else ends


# --- Charts -------------------------------------------------------------------------------------------------------------------


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
            point = replace(point, label=short_name(trial))
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
            points[-1] = replace(points[-1], hollow=not finished)
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
