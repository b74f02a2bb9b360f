"""The page of a sweep, and its charts as files."""

from collections.abc import Sequence
from typing import NamedTuple

from ray_platform.metric_registry import describe_metric
from ray_platform.report.figures import Chart
from ray_platform.report.parallel_coordinates import choice_text
from ray_platform.report.records import ObjectiveRecord, SearchDimension, SweepDetails, TrialRecord
from ray_platform.report.render import render
from ray_platform.report.sweep_charts import (
    CURVES_NOTE,
    TRIALS_NOTE,
    learning_curves,
    pareto_chart,
    pareto_note,
    trials_chart,
)  # fmt: skip
from ray_platform.units import is_number

_STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}


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
        charts.append((_file("learning_curves", number), f"{_label(objective)} while training", CURVES_NOTE, chart))
    charts.append(("parallel_coordinates.svg", "All trials", TRIALS_NOTE, trials_chart(details)))
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
