"""The page of an evaluation."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ray_platform.contracts import ConfigError
from ray_platform.evaluate.results import check_same_protocol
from ray_platform.metric_registry import describe_metric
from ray_platform.report.figures import Chart, Line, Point, line_chart, profile
from ray_platform.report.records import ClassRecall, CurvePoint, EvaluationDetails, QualityPoint, RetrievalResult, ZeroShotResult
from ray_platform.report.render import clipped, color_class, plural, render
from ray_platform.units import NO_VALUE, duration_text, is_number, number_text, percent_text

_ALL_AS_BARS = 60  # up to so many classes are displayed as bars; of more, the worst and the best
_NEXT_TO_CONFUSIONS = 20  # up to so many classes are displayed next to the confusions, more above them
_ENDS = 12  # worst and best classes of many
_COLUMNS = 3
_RETRIEVAL = {"image_retrieval_recall": "text → image", "text_retrieval_recall": "image → text"}  # CLIP_benchmark's names
_METRICS = {"acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "per class"}  # column heads of a zero-shot result
_SECTIONS = {
    "zero-shot": "Zero-shot", "sets": "Set by set", "retrieval": "Retrieval", "quality": "Image quality",
    "curve": "Steps and draws",
}  # fmt: skip


def evaluation_page(details: EvaluationDetails) -> str:
    """Return the HTML page of an evaluation. Sections for which `details` has no data are left out."""
    models, scores = Models(details), Scores(details)
    quality = sorted(details.get("quality", ()), key=lambda point: point["guidance_scale"])
    data = {"zero-shot": scores.sets, "sets": scores.sets, "retrieval": details.get("retrieval", ()), "quality": quality}
    data |= {"curve": details.get("curve", ())}
    return render(
        "evaluation.html.j2",
        details=details,
        models=models,
        scores=scores,
        sections={anchor: title for anchor, title in _SECTIONS.items() if data[anchor]},
        lost=_lost_images(details),
        tiles=_tiles(details, models, scores),
        zero_shot_metrics=_METRICS,
        cards=[_dataset_card(scores.of_set(name), scores, models) for name in scores.sets],
        retrieval=_retrieval_table(details),
        quality=_quality(quality) if quality else None,
        curves=_curves(details.get("curve", ())),
    )


class Models:
    """The evaluated models in the report's order: the first one is what the report is about, the others are baselines."""

    def __init__(self, details: EvaluationDetails) -> None:
        self.all = details["models"]
        self.names = [model["name"] for model in self.all]
        self.main = self.names[0]
        self.baselines = self.names[1:]

    def color(self, name: str) -> str:
        return color_class(self.names, name)


class Scores:
    """Zero-shot results by dataset and model, and what was published for the same datasets."""

    def __init__(self, details: EvaluationDetails) -> None:
        results = details.get("zero_shot", ())
        self.sets = list(dict.fromkeys(result["set"] for result in results))
        published = details.get("published", {})
        self.published = {model: values for model, values in published.items() if not values.keys().isdisjoint(self.sets)}
        self._results = {(result["set"], result["model"]): result for result in results}
        self._means = details.get("means", {})

    def of(self, name: str, model: str) -> ZeroShotResult | None:
        return self._results.get((name, model))

    def of_set(self, name: str) -> list[ZeroShotResult]:
        """Return the results of a dataset in the order of the models."""
        return [result for (of, _), result in self._results.items() if of == name]

    def main(self, name: str, model: str) -> float | None:
        """Return the main metric of an evaluated model or of a published one."""
        if model in self.published:
            return self.published[model].get(name)
        result = self.of(name, model)
        return result["metrics"][result["main_metric"]] if result else None

    def mains(self, name: str, models: Sequence[str]) -> list[float | None]:
        return [self.main(name, model) for model in models]

    def means(self, models: Sequence[str]) -> list[float | None]:
        """Return the means of several models over the same datasets; the first model decides over which."""
        return [self.mean(model, self.is_complete(models[0])) for model in models]

    def is_complete(self, model: str) -> bool:
        """Return whether every dataset over which the benchmark's mean is defined was measured."""
        return is_number(self._means.get(model))

    def mean(self, model: str, complete: bool) -> float | None:
        """Return the mean over the whole benchmark, or over the datasets of this report; None if one of them is missing."""
        if complete:
            return self.published[model].get("mean") if model in self.published else self._means.get(model)
        values = [self.main(name, model) for name in self.sets]
        numbers = [value for value in values if is_number(value)]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def _lost_images(details: EvaluationDetails) -> dict[str, int]:
    """Return how many images of each dataset could not be read; the models read the same files."""
    lost: dict[str, int] = {}
    for result in [*details.get("zero_shot", ()), *details.get("retrieval", ())]:
        if result["num_unreadable"]:
            lost[result["set"]] = max(lost.get(result["set"], 0), result["num_unreadable"])
    return lost


def _tiles(details: EvaluationDetails, models: Models, scores: Scores) -> list[tuple[str, str]]:
    """Return the few numbers that a reader looks for first, with their labels."""
    tiles = []
    if scores.sets:
        complete = scores.is_complete(models.main)
        published = ", ".join(f"{name} {percent_text(scores.mean(name, complete))}" for name in scores.published)
        mean = scores.mean(models.main, complete)
        label = f"mean over {plural(len(scores.sets), 'zero-shot set')}" + (f"; {published}" if published else "")
        tiles.append((f"{percent_text(mean)} %" if is_number(mean) else NO_VALUE, label))
    for result in details.get("retrieval", ()):
        for direction, title in _RETRIEVAL.items():
            if result["model"] == models.main and f"{direction}@1" in result["metrics"]:
                tiles.append((f"{percent_text(result['metrics'][f'{direction}@1'])} %", f"{result['set']} R@1, {title}"))
    points = details.get("quality", ())
    for name in filter(_is_headline, points[0]["metrics"] if points else ()):
        known = [(value, point["guidance_scale"]) for point in points if is_number(value := point["metrics"].get(name))]
        if known:
            value, scale = min(known)
            tiles.append((number_text(value), f"lowest {describe_metric(name).label}, at guidance {scale:g}"))
    return tiles


# --- One card per zero-shot dataset ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClassBar:
    """Recall of a class, and that of the first baseline."""

    name: str
    recall: float
    baseline: float | None
    tooltip: str


def _dataset_card(results: Sequence[ZeroShotResult], scores: Scores, models: Models) -> dict[str, Any]:
    """Return what the card of a dataset displays. Classes and confusions are those of the first model that has a result."""
    result = min(results, key=lambda result: models.names.index(result["model"]))
    baseline = scores.of(result["set"], models.baselines[0]) if models.baselines and result["model"] == models.main else None
    classes = _class_bars(result, baseline)
    recalls = [one.recall for one in classes]
    columns, others = [classes], [one.baseline for one in classes if one.baseline is not None]
    is_small = len(result["per_class"]) <= _NEXT_TO_CONFUSIONS
    if not is_small:
        length = max(1, -(-len(classes) // _COLUMNS))
        columns = [classes[start : start + length] for start in range(0, len(classes), length)]
    return {
        "result": result,
        "results": results,
        "classes": classes,
        "is_small": is_small,
        "columns": columns if len(classes) <= _ALL_AS_BARS else None,
        "worst": classes[:_ENDS],
        "best": classes[: -_ENDS - 1 : -1],
        "median": median(recalls) if recalls else None,
        "profile": profile(recalls, []) if recalls else None,
        "profile_with_baseline": profile(recalls, others) if len(classes) > _ALL_AS_BARS else None,
        "num_empty": len(result["per_class"]) - len(classes),
        "unreadable": unreadable_groups(results),
    }


def _class_bars(result: ZeroShotResult, baseline: ZeroShotResult | None) -> list[ClassBar]:
    """Return the classes that have images, worst first."""
    # Baselines go by place, because names repeat: ImageNet has 998 of 1000.
    others: Sequence[ClassRecall | None] = [None] * len(result["per_class"])
    if baseline and [one["class"] for one in baseline["per_class"]] == [one["class"] for one in result["per_class"]]:
        others = baseline["per_class"]
    bars = []
    for one, other in zip(result["per_class"], others, strict=True):
        recall = one["recall"]
        if is_number(recall):
            tooltip = f"{clipped(one['class'])}: {percent_text(recall)} % of {one['count']:,} images"
            bars.append(ClassBar(one["class"], recall, other["recall"] if other else None, tooltip))
    return sorted(bars, key=lambda bar: (bar.recall, bar.name))


def unreadable_groups(results: Sequence[Any]) -> list[list[Any]]:
    """Return the results of one dataset that lost images, grouped by what they lost."""
    groups: dict[str, list[Any]] = {}
    for result in results:
        if result["num_unreadable"]:
            groups.setdefault(json.dumps([result["num_unreadable"], result["unreadable"]]), []).append(result)
    return list(groups.values())


# --- Retrieval ------------------------------------------------------------------------------------------------------------------


def _retrieval_table(details: EvaluationDetails) -> dict[str, Any]:
    """Return the results by dataset, and the columns of both directions by rank."""
    by_set: dict[str, list[RetrievalResult]] = {}
    for result in details.get("retrieval", ()):
        by_set.setdefault(result["set"], []).append(result)
    names = dict.fromkeys(name for results in by_set.values() for result in results for name in result["metrics"])
    columns = {
        title: sorted((name for name in names if name.startswith(f"{direction}@")), key=lambda name: int(name.split("@")[1]))
        for direction, title in _RETRIEVAL.items()
    }
    unreadable = [group for results in by_set.values() for group in unreadable_groups(results)]
    return {"by_set": by_set, "columns": {title: names for title, names in columns.items() if names}, "unreadable": unreadable}


# --- Image quality --------------------------------------------------------------------------------------------------------------


def _is_headline(name: str) -> bool:
    """Return whether a metric is FID or FD-<network> over the images that were generated, which a report is asked for."""
    return name.startswith(("fid", "fd_")) and not name.endswith("_infinity")


def _quality(points: Sequence[QualityPoint]) -> dict[str, Any]:
    problem = _protocol_problem(points)
    names = [name for name in dict.fromkeys(n for point in points for n in point["metrics"]) if not name.endswith("_std")]
    best = {}
    for name in names:
        numbers = [value for point in points if is_number(value := point["metrics"].get(name))]
        if not problem and len(numbers) > 1:
            best[name] = describe_metric(name).best(numbers)
    judges = [point.get("alignment_by", "") for point in points if is_number(point["metrics"].get("alignment"))]
    return {
        "points": points,
        "problem": problem,
        "names": names,
        "best": best,
        "judges": list(dict.fromkeys(judges)),
        "protocols": _protocols(points),
        "chart": None if problem else _quality_chart(points, names),
    }


def _protocol_problem(points: Sequence[QualityPoint]) -> str:
    """Return why the points cannot be compared; empty if they can."""
    try:
        for point in points[1:]:
            check_same_protocol(_without_guidance(points[0]["protocol"]), _without_guidance(point["protocol"]))
    except ConfigError as error:
        return str(error)
    return ""


def _without_guidance(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a protocol that the points of one table must share."""
    return {field: value for field, value in protocol.items() if not field.startswith("guidance")}


def _protocols(points: Sequence[QualityPoint]) -> list[tuple[dict[str, Any], list[str]]]:
    """Return each protocol once, with the guidance scales that it was used for."""
    scales: dict[str, list[str]] = {}
    for point in points:
        key = json.dumps(_without_guidance(point["protocol"]), default=str)
        scales.setdefault(key, []).append(f"{point['guidance_scale']:g}")
    return [(json.loads(key), used) for key, used in scales.items()]


def _quality_chart(points: Sequence[QualityPoint], names: Sequence[str]) -> dict[str, Any] | None:
    """Return distance against alignment by guidance scale; against guidance itself if alignment was not measured."""
    distance = next(filter(_is_headline, names), "kid")
    known = [point for point in points if is_number(point["metrics"].get(distance))]
    aligned = [point for point in known if is_number(point["metrics"].get("alignment"))]
    by_alignment = len(aligned) > 1
    label, line = describe_metric(distance).label, []
    for point in aligned if by_alignment else known:
        scale, metrics = f"{point['guidance_scale']:g}", point["metrics"]
        tooltip = f"guidance {scale}: {label} {number_text(metrics[distance])}"
        if by_alignment:
            tooltip += f", alignment {number_text(metrics['alignment'])}"
        x = metrics["alignment"] if by_alignment else point["guidance_scale"]
        line.append(Point(float(x or 0), float(metrics[distance] or 0), scale if by_alignment else "", tooltip))
    if len(line) < 2:
        return None
    x_title = "alignment" if by_alignment else "guidance scale"
    title = f"{label} against {'alignment, by guidance scale' if by_alignment else x_title}"
    return {"title": title, "chart": line_chart([Line("", line)], x_title, label), "by_alignment": by_alignment}


# --- Accuracy against denoising steps and draws ---------------------------------------------------------------------------------


def _curves(points: Sequence[CurvePoint]) -> list[dict[str, Any]]:
    """Return a chart and a table for each dataset and model."""
    groups: dict[tuple[str, str], dict[tuple[int, int], CurvePoint]] = {}
    for point in points:
        groups.setdefault((point["set"], point["model"]), {})[point["num_draws"], point["num_steps"]] = point
    curves = []
    for (name, model), known in groups.items():
        draws, steps = (sorted({key[i] for key in known}) for i in (0, 1))
        chart = _curve_chart(known, draws, steps) if len(steps) > 1 else None
        curves.append({"set": name, "model": model, "known": known, "draws": draws, "steps": steps, "chart": chart})
    return curves


def _curve_chart(known: Mapping[tuple[int, int], CurvePoint], draws: Sequence[int], steps: Sequence[int]) -> Chart | None:
    lines = []
    for i, n in enumerate(draws):
        points = []
        for k in steps:
            acc1 = known[n, k]["acc1"] if (n, k) in known else None
            if is_number(acc1):
                took = duration_text(known[n, k]["seconds"])
                tooltip = f"{k} steps, {plural(n, 'draw')}: acc1 {percent_text(acc1)} %, {took}"
                points.append(Point(k, 100 * acc1, tooltip=tooltip))
        if points:
            lines.append(Line(plural(n, "draw"), points, opacity=0.4 + 0.6 * (i + 1) / len(draws)))
    return line_chart(lines, "denoising steps", describe_metric("acc1").axis_label, steps) if lines else None
