"""A sweep's pictures: the Pareto front, parallel coordinates, and a learning curve a trial."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ray_platform.report import charts, metric_names
from ray_platform.report import parallel_coordinates as parallel
from ray_platform.report.charts import Line, Point, line_chart
from ray_platform.report.parallel_coordinates import Axis, Scale, Trial, choice_text, mapping_lines
from ray_platform.report.text import is_number

STYLE = charts.STYLE + parallel.STYLE
NOTE = "dashed: the recipe's own values; hollow: stopped early"
NOTE_ON_ALL = "a line is a trial; dashed: the recipe's own values; fainter: stopped early"
_RAMP = ((0x5B, 0x78, 0xD8), (0xB4, 0x5C, 0xA6), (0xEE, 0x8A, 0x2E))  # of colours, worst to best; seen on light and dark
_NO_SCORE = "var(--meant)"
_SHADES = 24


def pareto(details: Mapping[str, Any], x: Mapping[str, str], y: Mapping[str, str]) -> str:
    """Two objectives against each other; those of the front that no other beats in both are joined. "" without values."""
    shown = [trial for trial in details["trials"] if _has(trial, x["metric"]) and _has(trial, y["metric"])]
    if not shown:
        return ""
    front = _joined([trial for trial in shown if trial["name"] in details["front"]], x, y)
    names = {trial["name"] for trial in front}
    lines = []
    if len(front) > 1:
        lines.append(Line("", [_place(details, trial, x, y) for trial in front]))
    for trial in shown:
        point = _place(details, trial, x, y)
        if trial["name"] in names or trial["default"]:
            point = point._replace(label=short_name(trial))
        strength = 0.5 if point.hollow else 1.0
        lines.append(Line("", [point], strength, "var(--m1)" if trial["default"] else ""))
    return line_chart(lines, metric_names.axis_title(x["metric"]), metric_names.axis_title(y["metric"]))


def pareto_note(x: Mapping[str, str], y: Mapping[str, str]) -> str:
    sides = f"{'right' if x['mode'] == 'max' else 'left'} and {'up' if y['mode'] == 'max' else 'down'}"
    return f"better: {sides}; orange: the recipe's own values; hollow: stopped early, scored at fewer samples"


def learning_curves(details: Mapping[str, Any], metric: str) -> str:
    """A line a trial over the samples that it was trained on, ending where the trial ended. "" without values."""
    lines = []
    for trial, colour in _with_colours(details):
        points = [
            Point(one["samples"], metric_names.shown(metric, one["metrics"][metric]), about=_reached(trial, one, metric))
            for one in trial["history"]
            if is_number(one["metrics"].get(metric))
        ]
        if points:
            if trial["state"] != "finished":
                points[-1] = points[-1]._replace(hollow=True)
            name = short_name(trial) if _stands_out(details, trial) else ""
            lines.append(Line(name, points, 0.9 if trial["state"] == "finished" else 0.6, colour, trial["default"]))
    return line_chart(lines, "samples", metric_names.axis_title(metric)) if lines else ""


def parallel_coordinates(details: Mapping[str, Any]) -> str:
    """All trials over the fields of the space and the objectives, coloured by the first objective. "" without trials."""
    if not details["trials"] or not details["space"]:
        return ""
    axes = [_field_axis(field, space) for field, space in details["space"].items()]
    for objective in details["objectives"]:
        metric, least = objective["metric"], objective["mode"] == "min"
        name = metric_names.axis_title(metric)
        axes.append(Axis(name.partition(", ")[0], f"{'less' if least else 'more'} is better ↑", name, downwards=least))
    lines = []
    for trial, colour in _with_colours(details):
        values = [_field_value(trial, field) for field in details["space"]]
        for objective in details["objectives"]:
            value = trial["metrics"].get(objective["metric"])
            values.append(metric_names.shown(objective["metric"], value) if is_number(value) else None)
        strength = 0.95 if trial["state"] == "finished" else 0.35
        name = short_name(trial) if _stands_out(details, trial) else ""
        lines.append(Trial(name, values, colour, strength, trial["default"], about(details, trial)))
    return parallel.parallel_coordinates(axes, lines, _scale(details))


def short_name(trial: Mapping[str, Any]) -> str:
    return f"{trial['name']} (recipe)" if trial["default"] else trial["name"]


def about(details: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    """All of a trial, for a pointer."""
    scores = [
        f"{metric_names.title(each['metric'])} {metric_names.value_text(each['metric'], trial['metrics'].get(each['metric']))}"
        for each in details["objectives"]
    ]
    return "\n".join([f"{short_name(trial)}, {trial['state']}", *scores, mapping_lines(trial["values"])])


def _has(trial: Mapping[str, Any], metric: str) -> bool:
    return is_number(trial["metrics"].get(metric))


def _stands_out(details: Mapping[str, Any], trial: Mapping[str, Any]) -> bool:
    """Whether pictures write its name."""
    return trial["default"] or trial["name"] in details["front"]


def _place(details: Mapping[str, Any], trial: Mapping[str, Any], x: Mapping[str, str], y: Mapping[str, str]) -> Point:
    across, up = (metric_names.shown(each["metric"], trial["metrics"][each["metric"]]) for each in (x, y))
    return Point(across, up, about=about(details, trial), hollow=trial["state"] != "finished")


def _joined(front: Sequence[Mapping[str, Any]], x: Mapping[str, str], y: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """From left to right. A front of three objectives has trials that are beaten where two of them are looked at."""

    def gain(trial: Mapping[str, Any], objective: Mapping[str, str]) -> float:
        return trial["metrics"][objective["metric"]] * (1 if objective["mode"] == "max" else -1)

    kept: list[Mapping[str, Any]] = []
    for trial in sorted(front, key=lambda one: (gain(one, x), gain(one, y)), reverse=True):
        if not kept or gain(trial, y) > gain(kept[-1], y):
            kept.append(trial)
    return sorted(kept, key=lambda trial: trial["metrics"][x["metric"]])


def _reached(trial: Mapping[str, Any], one: Mapping[str, Any], metric: str) -> str:
    return f"{short_name(trial)}: {metric_names.value_text(metric, one['metrics'][metric])} after {one['samples']:,} samples"


def _field_axis(field: str, space: Mapping[str, Any]) -> Axis:
    above, _, name = field.rpartition(".")
    choices = [_shown(value) for value in space.get("values", ())]
    ends = [space[end] for end in ("low", "high") if end in space]  # so that it is seen what lies at an edge of the space
    return Axis(name, above, field + ", log" * bool(space.get("log")), bool(space.get("log")), choices, ends)


def _field_value(trial: Mapping[str, Any], field: str) -> Any:
    return _shown(trial["values"][field]) if field in trial["values"] else None


def _shown(value: Any) -> Any:
    """Numbers go on an axis as such; all else by its text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else choice_text(value)


def _with_colours(details: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Trials with their colours by the first objective, in the order in which they are drawn: the default and the best last."""
    objective = details["objectives"][0]
    metric, sign = objective["metric"], 1 if objective["mode"] == "max" else -1
    scores = [sign * trial["metrics"][metric] for trial in details["trials"] if _has(trial, metric)]

    def order(trial: Mapping[str, Any]) -> tuple[Any, ...]:
        score = sign * trial["metrics"][metric] if _has(trial, metric) else float("-inf")
        return trial["default"], trial["state"] == "finished", score

    for trial in sorted(details["trials"], key=order):
        if not _has(trial, metric):
            yield trial, _NO_SCORE
        else:
            low, high = min(scores), max(scores)
            yield trial, _colour((sign * trial["metrics"][metric] - low) / (high - low) if high > low else 1.0)


def _scale(details: Mapping[str, Any]) -> Scale | None:
    objective = details["objectives"][0]
    metric = objective["metric"]
    values = [trial["metrics"][metric] for trial in details["trials"] if _has(trial, metric)]
    if len(set(values)) < 2:
        return None
    ends = [metric_names.value_text(metric, value) for value in (min(values), max(values))]
    worst, best = ends if objective["mode"] == "max" else reversed(ends)
    return Scale(metric_names.title(metric), worst, best, [_colour(i / (_SHADES - 1)) for i in range(_SHADES)])


def _colour(share: float) -> str:
    """Of the ramp."""
    place = share * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    mixed = (a + (b - a) * (place - first) for a, b in zip(_RAMP[first], _RAMP[first + 1], strict=True))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)
