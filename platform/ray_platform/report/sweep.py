"""The page of a sweep, and its charts: Pareto fronts, learning curves and parallel coordinates."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex

from ray_platform.metric_registry import describe_metric
from ray_platform.report.figures import (
    CHARACTER,
    COLORS,
    THEME,
    Artist,
    Chart,
    Line,
    Point,
    line_chart,
    pixel_figure,
    round_ticks,
    shorten,
    spread_apart,
    tick_text,
)
from ray_platform.report.records import ObjectiveRecord, SearchDimension, SweepDetails, TrialRecord
from ray_platform.report.render import choice_text, render
from ray_platform.units import is_number

_STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}
_SCORES = LinearSegmentedColormap.from_list("scores", ["#5b78d8", "#b45ca6", "#ee8a2e"])  # worst to best; for light and dark
_SHADES = 24
_MIN_TRIALS = 4  # with scores, for the importance of parameters
# Parallel coordinates, in px.
_AXIS_GAP, _LEFT, _TOP, _FRAME, _BOTTOM = 150, 64, 48, 260, 40
_HEIGHT = _TOP + _FRAME + _BOTTOM
_LONGEST_TICK, _LONGEST_NAME = 12, 21  # characters
_BELOW_LOG = 0.1  # fraction of a logarithmic axis below its smallest value, for values that have no logarithm


class ScoredObjective:
    """An objective of a sweep."""

    def __init__(self, record: ObjectiveRecord) -> None:
        self.metric, self.maximize = describe_metric(record["metric"]), record["mode"] == "max"

    def value(self, trial: TrialRecord) -> float | None:
        """Return the trial's last value; None if it was not measured or is not finite."""
        value = trial["metrics"].get(self.metric.name)
        return value if is_number(value) else None

    def gain(self, trial: TrialRecord) -> float:
        """Return a number that is larger for better trials."""
        value = self.value(trial)
        return -math.inf if value is None else value if self.maximize else -value


class SweepChart(NamedTuple):
    """A chart with the name of its file, its title and its note."""

    file: str
    title: str
    note: str
    chart: Chart


def sweep_page(details: SweepDetails) -> str:
    """Return the HTML page of a sweep."""
    charts, states, first = _charts(details), list(_STATES), _objectives(details)[0]
    return render(
        "sweep.html.j2",
        details=details,
        states=_STATES,
        charts=[chart for chart in charts if not chart.file.startswith(("parallel_coordinates", "parameter_"))],
        parameter_charts=[chart for chart in charts if chart.file.startswith("parameter_")],
        importances=_importances(details),
        trials_chart=next((chart for chart in charts if chart.file == "parallel_coordinates.svg"), None),
        trials=sorted(details["trials"], key=lambda trial: (states.index(trial["state"]), -first.gain(trial))),
        num_samples=sum(trial["history"][-1]["samples"] for trial in details["trials"] if trial["history"]),
        by_name={trial["name"]: trial for trial in details["trials"]},
    )


def sweep_files(details: SweepDetails) -> dict[str, str]:
    """Return the charts for which there are values as SVG files that need no stylesheet: file name -> text."""
    return {chart.file: chart.chart.standalone(chart.title, chart.note) for chart in _charts(details)}


def _objectives(details: SweepDetails) -> list[ScoredObjective]:
    return [ScoredObjective(record) for record in details["objectives"]]


def _charts(details: SweepDetails) -> list[SweepChart]:
    objectives, charts = _objectives(details), []
    first = objectives[0]
    for i, other in enumerate(objectives[1:]):
        sides = f"{'right' if first.maximize else 'left'} and {'up' if other.maximize else 'down'}"
        note = f"better: {sides}; orange: the recipe's values; hollow: stopped early, scored at fewer samples"
        title = f"{other.metric.label} against {first.metric.label}"
        charts.append((_file("pareto", i), title, note, _pareto_chart(details, first, other)))
    note = "dashed: the recipe's values; hollow: stopped early"
    for i, objective in enumerate(objectives):
        title = f"{objective.metric.label} while training"
        charts.append((_file("learning_curves", i), title, note, _learning_curves(details, objective)))
    note = "one line per trial; dashed: the recipe's values; fainter: stopped early"
    charts.append(("parallel_coordinates.svg", "All trials", note, _trials_chart(details)))
    note = "orange: the recipe's values; hollow: stopped early, scored at fewer samples"
    for field, space in details["space"].items():
        charts.append((f"parameter_{field}.svg", field, note, _parameter_chart(details, field, bool(space.get("log")))))
    return [SweepChart(file, title, note, chart) for file, title, note, chart in charts if chart]


def _file(name: str, number: int) -> str:
    return f"{name}_{number + 1}.svg" if number else f"{name}.svg"


def _short_name(trial: TrialRecord) -> str:
    return f"{trial['name']} (recipe)" if trial["default"] else trial["name"]


def _line_name(details: SweepDetails, trial: TrialRecord) -> str:
    """Return the name that charts write next to the trial: empty unless it stands out."""
    return _short_name(trial) if trial["default"] or trial["name"] in details["front"] else ""


def _tooltip(details: SweepDetails, trial: TrialRecord) -> str:
    """Return a trial's scores and values, one per line."""
    scores = [f"{of.metric.label} {of.metric.text(of.value(trial))}" for of in _objectives(details)]
    values = [f"{field} {choice_text(value)}" for field, value in trial["values"].items()]
    return "\n".join([f"{_short_name(trial)}, {trial['state']}", *scores, *values])


def _pareto_chart(details: SweepDetails, x: ScoredObjective, y: ScoredObjective) -> Chart | None:
    """Draw two objectives against each other, with a staircase through the trials of the front that no other one dominates.

    A front of more objectives has trials that are dominated in two of them. Returns None if no trial has both metrics.
    """
    points: dict[str, Point] = {}
    front: list[str] = []  # best x first
    height = -math.inf
    for trial in sorted(details["trials"], key=lambda trial: (x.gain(trial), y.gain(trial)), reverse=True):
        across, up = x.value(trial), y.value(trial)
        if across is not None and up is not None:
            values = x.metric.axis_value(across), y.metric.axis_value(up)
            points[trial["name"]] = Point(*values, "", _tooltip(details, trial), trial["state"] != "finished")
            if trial["name"] in details["front"] and y.gain(trial) > height:
                height = y.gain(trial)
                front.append(trial["name"])
    lines = []
    if len(front) > 1:
        step = "steps-pre" if x.maximize else "steps-post"  # around what the front dominates
        lines.append(Line("", sorted(points[name] for name in front), drawstyle=step))
    for trial in details["trials"]:
        if point := points.get(trial["name"]):
            label = _short_name(trial) if trial["name"] in front or trial["default"] else ""
            color = "m1" if trial["default"] else "bar"
            lines.append(Line("", [point._replace(label=label)], 0.5 if point.hollow else 1.0, color))
    return line_chart(lines, x.metric.axis_label, y.metric.axis_label) if lines else None


def _parameter_chart(details: SweepDetails, field: str, log: bool) -> Chart | None:
    """Draw the first objective against the values of a field. Returns None if fewer than two trials have numbers."""
    objective, lines = _objectives(details)[0], []
    for trial in details["trials"]:
        score, value = objective.value(trial), trial["values"].get(field)
        if score is not None and is_number(value):
            hollow, label = trial["state"] != "finished", _line_name(details, trial)
            point = Point(value, objective.metric.axis_value(score), label, _tooltip(details, trial), hollow)
            lines.append(Line("", [point], 0.5 if hollow else 1.0, "m1" if trial["default"] else "bar"))
    if len(lines) < 2:
        return None
    low, high = (pick(line.points[0].x for line in lines) for pick in (min, max))
    decades: Sequence[float] = ()
    if log and 0 < low < high:
        decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    return line_chart(lines, field, objective.metric.axis_label, decades)


def _importances(details: SweepDetails) -> dict[str, float]:
    """Return by field the fraction of the first objective's differences that it explains, the largest first.

    By fANOVA (Hutter et al. 2014) over the finished trials; empty for fewer than `_MIN_TRIALS`.
    """
    objective = _objectives(details)[0]
    trials = [trial for trial in details["trials"] if trial["state"] == "finished" and objective.value(trial) is not None]
    columns = {field: [_axis_value(trial["values"].get(field)) for trial in trials] for field in details["space"]}
    columns = {field: values for field, values in columns.items() if len(set(values)) > 1}
    if len(trials) < _MIN_TRIALS or not columns:
        return {}
    import optuna  # takes a second

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {
        field: values if all(is_number(value) for value in values) else [str(value) for value in values]
        for field, values in columns.items()
    }
    distributions = {
        field: optuna.distributions.CategoricalDistribution(sorted(set(values)))
        if isinstance(values[0], str)
        else optuna.distributions.FloatDistribution(
            min(values), max(values), log=bool(details["space"][field].get("log")) and min(values) > 0
        )
        for field, values in columns.items()
    }
    study = optuna.create_study(direction="maximize" if objective.maximize else "minimize")
    for i, trial in enumerate(trials):
        params = {field: column[i] for field, column in columns.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, value=objective.value(trial)))
    return optuna.importance.get_param_importances(study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0))


def _learning_curves(details: SweepDetails, objective: ScoredObjective) -> Chart | None:
    """Draw a line per trial over the samples that it was trained on. Returns None if no trial has the metric."""
    metric, lines = objective.metric, []
    for trial, color in _colored(details):
        points = []
        for entry in trial["history"]:
            value = entry["metrics"].get(metric.name)
            if is_number(value):
                tooltip = f"{_short_name(trial)}: {metric.text(value)} after {entry['samples']:,} samples"
                points.append(Point(entry["samples"], metric.axis_value(value), "", tooltip))
        if points:
            finished = trial["state"] == "finished"
            points[-1] = points[-1]._replace(hollow=not finished)
            lines.append(Line(_line_name(details, trial), points, 0.9 if finished else 0.6, color, trial["default"]))
    return line_chart(lines, "samples", metric.axis_label) if lines else None


def _colored(details: SweepDetails) -> Iterator[tuple[TrialRecord, str]]:
    """Yield the trials with their colors by the first objective; the best ones and the recipe's come last, on top."""
    objective = _objectives(details)[0]
    gains = [gain for trial in details["trials"] if (gain := objective.gain(trial)) > -math.inf]

    def order(trial: TrialRecord) -> tuple[bool, bool, float]:
        return trial["default"], trial["state"] == "finished", objective.gain(trial)

    for trial in sorted(details["trials"], key=order):
        if objective.value(trial) is None:
            yield trial, COLORS["meant"]
        else:
            low, high = min(gains), max(gains)
            yield trial, to_hex(_SCORES((objective.gain(trial) - low) / (high - low) if high > low else 1.0))


# --- Parallel coordinates: one axis per field and objective, one line per trial -------------------------------------------------


class ParallelAxis:
    """The positions of an axis' values, from 0 at the bottom to 1 at the top, and its ticks."""

    def __init__(self, caption: str, name: str, tooltip: str, values: Sequence[Any], space: SearchDimension, down: bool) -> None:
        """Place `values`, None where a trial has none. `down`: the smallest value is at the top."""
        self.caption, self.name, self.tooltip, self.values, self._down = caption, name, tooltip, values, down
        known = [*map(_axis_value, space.get("values", ())), *(space[end] for end in ("low", "high") if end in space)]
        known += [value for value in values if value is not None]
        self._choices: dict[str, float] = {}
        self._log = self._has_zero = False
        self.ticks: list[tuple[float, str]] = []  # position, label
        if "values" in space or not all(is_number(value) for value in known):
            texts = {choice_text(value): value for value in known}
            if all(is_number(value) for value in texts.values()):
                texts = dict(sorted(texts.items(), key=lambda item: item[1]))
            self._choices = {text: (i + 0.5) / len(texts) for i, text in enumerate(texts)}
            self.ticks = [(position, text) for text, position in self._choices.items()]
        elif known:
            self._place_numbers(known, bool(space.get("log")))

    def position(self, value: Any) -> float:
        if self._choices:
            return self._choices[choice_text(value)]
        if self._has_zero and value <= 0:
            return 0.0
        low, high, value = (math.log(each) if self._log else each for each in (self._low, self._high, value))
        position = (value - low) / (high - low) if high > low else 0.5
        position = _BELOW_LOG + (1 - _BELOW_LOG) * position if self._has_zero else position
        return 1 - position if self._down else position

    def _place_numbers(self, numbers: Sequence[float], log: bool) -> None:
        positive = [number for number in numbers if number > 0]
        self._log = log and bool(positive)
        self._has_zero = self._log and len(positive) < len(numbers)
        placed = positive if self._log else numbers
        ticks = _log_ticks(min(placed), max(placed)) if self._log else _ticks_within(placed)
        self._low, self._high = min([*placed, *ticks]), max([*placed, *ticks])
        self.ticks = [(self.position(tick), tick_text(tick)) for tick in ticks]
        if self._has_zero:
            self.ticks.append((0.0, tick_text(max(number for number in numbers if number <= 0))))


def _ticks_within(values: Sequence[float]) -> list[float]:
    """Return the round numbers that are not outside the values; those around them if fewer than two are inside."""
    ticks = round_ticks(values)
    near = 1e-9 * (ticks[-1] - ticks[0])
    inside = [tick for tick in ticks if min(values) - near <= tick <= max(values) + near]
    return inside if len(inside) > 1 else ticks


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the powers of ten within low..high; with 2 and 5 times these if they are fewer than three; else the ends."""
    powers = 10.0 ** np.arange(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        ticks = [factor * float(power) for power in powers for factor in factors]
        inside = [tick for tick in ticks if low <= tick * (1 + 1e-9) and tick <= high * (1 + 1e-9)]
        if len(inside) > 2:
            return inside
    return inside if len(inside) > 1 else sorted({low, high})


@rc_context(THEME)
def _trials_chart(details: SweepDetails) -> Chart | None:
    """Draw all trials over the fields of the space and the objectives, colored by the first objective. None without trials."""
    if not details["trials"] or not details["space"]:
        return None
    trials = list(_colored(details))  # the last one is on top
    axes, names = _axes(details, [trial for trial, _ in trials]), [_line_name(details, trial) for trial, _ in trials]
    longest = max(len(shorten(name, _LONGEST_NAME)) for name in names)
    width = _LEFT + (len(axes) - 1) * _AXIS_GAP + max(64, longest * CHARACTER + 16)
    figure = pixel_figure(width, _HEIGHT)
    canvas = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, _HEIGHT))
    canvas.set_axis_off()
    xs = [_LEFT + i * _AXIS_GAP for i in range(len(axes))]
    artists: dict[str, Artist] = {}
    ends: list[tuple[float, str]] = []
    for i, (trial, color) in enumerate(trials):
        ys = [math.nan if axis.values[i] is None else _y(axis.position(axis.values[i])) for axis in axes]
        artists[f"trial-{i}"] = Artist([_tooltip(details, trial)], opacity=0.95 if trial["state"] == "finished" else 0.35)
        dashes = (0, (6, 4)) if trial["default"] else "-"
        canvas.plot(xs, ys, color=color, linestyle=dashes, gid=f"trial-{i}", zorder=3 + i, clip_on=False)
        if names[i] and not math.isnan(ys[-1]):
            ends.append((ys[-1], shorten(names[i], _LONGEST_NAME)))
    for i, axis in enumerate(axes):
        _draw_axis(canvas, axis, xs[i], f"axis-{i}")
        artists[f"axis-{i}"] = Artist([axis.tooltip])
    ends.sort()
    places = spread_apart([y for y, _ in ends], 14, _BOTTOM, _BOTTOM + _FRAME)
    for (_, name), place in zip(ends, places, strict=True):
        canvas.text(xs[-1] + 10, place - 4, name, color=COLORS["ink"], gid="halo-0", zorder=1001)
    _draw_scale(canvas, details)
    return Chart(figure, f"trials by {', '.join(axis.name for axis in axes)}", artists, "wide")


def _axes(details: SweepDetails, trials: Sequence[TrialRecord]) -> list[ParallelAxis]:
    axes = []
    for field, space in details["space"].items():
        above, _, name = field.rpartition(".")
        values = [_axis_value(trial["values"][field]) if field in trial["values"] else None for trial in trials]
        axes.append(ParallelAxis(above, name, field + ", log" * bool(space.get("log")), values, space, down=False))
    for objective in _objectives(details):
        metric, caption = objective.metric, f"{'higher' if objective.maximize else 'lower'} is better ↑"
        values = [None if (value := objective.value(trial)) is None else metric.axis_value(value) for trial in trials]
        name = metric.label.partition(", ")[0]
        axes.append(ParallelAxis(caption, name, metric.axis_label, values, {}, down=not objective.maximize))
    return axes


def _axis_value(value: Any) -> Any:
    """Return numbers as they are and everything else as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else choice_text(value)


def _y(position: float) -> float:
    return _BOTTOM + _FRAME * position


def _draw_axis(canvas: Axes, axis: ParallelAxis, x: float, gid: str) -> None:
    soft, ink = COLORS["soft"], COLORS["ink"]
    canvas.text(x, _HEIGHT - 14, shorten(axis.caption, _LONGEST_NAME), color=soft, size=11, ha="center")
    canvas.text(x, _HEIGHT - 30, shorten(axis.name, _LONGEST_NAME), color=ink, ha="center", gid=gid)
    canvas.plot([x, x], [_y(0), _y(1)], color=soft, linewidth=1, zorder=1000, clip_on=False)
    for position, label in axis.ticks:
        y = _y(position)
        canvas.plot([x - 4, x], [y, y], color=soft, linewidth=1, zorder=1000, clip_on=False)
        canvas.text(x - 7, y - 4, shorten(label, _LONGEST_TICK), color=soft, size=11, ha="right", gid="halo-0", zorder=1001)


def _draw_scale(canvas: Axes, details: SweepDetails) -> None:
    """Draw the legend of the colors, from the worst to the best value of the first objective, if there are two."""
    objective = _objectives(details)[0]
    trials = sorted((trial for trial in details["trials"] if objective.value(trial) is not None), key=objective.gain)
    if len({objective.value(trial) for trial in trials}) > 1:
        worst, best = (objective.metric.text(objective.value(trial)) for trial in (trials[0], trials[-1]))
        y, step, soft = _BOTTOM - 31, 6, COLORS["soft"]
        boxes = [(_LEFT + i * step, step + 0.5) for i in range(_SHADES)]
        colors = [to_hex(_SCORES(i / (_SHADES - 1))) for i in range(_SHADES)]
        canvas.broken_barh(boxes, (y, 9), facecolors=colors, clip_on=False, linewidth=0)
        canvas.text(_LEFT - 7, y + 1, worst, color=soft, size=11, ha="right")
        label = shorten(f"{best}: {objective.metric.label}", 80)
        canvas.text(_LEFT + _SHADES * step + 7, y + 1, label, color=soft, size=11)
