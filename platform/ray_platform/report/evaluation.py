"""The page of an evaluation."""

import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from statistics import mean, median, stdev
from typing import NamedTuple

from ray_platform.contracts import ConfigError
from ray_platform.evaluate.results import check_same_protocol, result_files
from ray_platform.metric_registry import describe_metric
from ray_platform.report.figures import Chart, Line, Point, line_chart, profile
from ray_platform.report.records import (
    CurvePoint,
    DatasetResult,
    EvaluationDetails,
    PredictedImage,
    QualityPoint,
    RetrievalResult,
    StepScore,
    ZeroShotResult,
    is_complete,
)
from ray_platform.report.render import render
from ray_platform.units import duration_text, is_number, number_text, percent_text, plural

_RETRIEVAL = {"image_retrieval_recall": "text → image", "text_retrieval_recall": "image → text"}  # CLIP_benchmark's names
_NUM_COMPARED = 2  # published models that have a column of their own next to the results
_NUM_EXAMPLES = 5  # correct predictions on the first screen, and incorrect ones
_METRICS = {"acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "per class"}  # column heads of a zero-shot result


def evaluation_page(details: EvaluationDetails, path_to_output: str | None = None) -> str:
    """Return the HTML page of an evaluation. Sections for which `details` has no data are left out.

    `path_to_output` is the relative path from the page to the evaluation's output folder, such as "../../": the page links to the
    files there. A page that is stored without these files has no links (None).
    """
    quality = sorted(details.get("quality", ()), key=lambda point: point["guidance_scale"])
    metrics = list(dict.fromkeys(name for point in quality for name in point["metrics"] if not name.endswith("_std")))
    results: list[DatasetResult] = [*details.get("zero_shot", ()), *details.get("retrieval", ())]
    problem, distance = _protocol_problem(quality), next(filter(_is_headline, metrics), "kid")
    return render(
        "evaluation.html.j2",
        details=details,
        scores=Scores(details),
        path_to_output=path_to_output,
        result_files=result_files,
        first_examples=_first_examples(details),
        predictions_by_outcome=_predictions_by_outcome,
        shortfall_text=_shortfall_text,
        with_differences=[result for result in results if result.get("differences")],
        with_seeds=[result for result in results if result.get("seeds")],
        stdev=_standard_deviation,
        zero_shot_metrics=_METRICS,
        retrieval=details.get("retrieval", ()),
        retrieval_directions=_RETRIEVAL,
        retrieval_columns=_retrieval_columns(details.get("retrieval", ())),
        quality=quality,
        quality_metrics=metrics,
        quality_problem=problem,
        quality_chart=None if problem else _quality_chart(quality, distance),
        distance=distance,
        best={} if problem else {name: _best(quality, name) for name in metrics},
        protocols=_protocols(quality),
        curve=details.get("curve", ()),
        curve_chart=_curve_chart,
        training_chart=_training_chart(details.get("over_training", ())),
        class_bars=_class_bars,
        unreadable_groups=_unreadable_groups,
        is_headline=_is_headline,
        profile=profile,
        median=median,
        mean=mean,
    )


class Scores:
    """Zero-shot results by dataset and model, and what was published for the same datasets."""

    def __init__(self, details: EvaluationDetails) -> None:
        self.models = [model["name"] for model in details["models"]]  # the first one is what the report is about
        self.by_set: dict[str, dict[str, ZeroShotResult]] = {}
        for result in details.get("zero_shot", ()):
            self.by_set.setdefault(result["set"], {})[result["model"]] = result
        results: list[DatasetResult] = [*details.get("zero_shot", ()), *details.get("retrieval", ())]
        # Sets that lack images, or of which some could not be read, with a result that shows it. The models read the same files.
        self.incomplete = {result["set"]: result for result in results if not is_complete(result)}
        self.complete_sets = [name for name in self.by_set if name not in self.incomplete]
        published = details.get("published", {})
        self.all_published = {
            model: values for model, values in published.items() if not values.keys().isdisjoint(self.complete_sets)
        }
        # Those with which the results are compared set by set.
        self.published = dict(list(self.all_published.items())[:_NUM_COMPARED])
        self.published_sets = [name for name in self.complete_sets if any(name in each for each in published.values())]
        retrieved = {result["set"] for result in details.get("retrieval", ())} - self.incomplete.keys()
        self.published_retrieval = {
            model: values
            for model, values in details.get("published_retrieval", {}).items()
            if not values.keys().isdisjoint(retrieved)
        }
        self._means = details.get("means", {})
        # Whether every dataset over which the benchmark's mean is defined was measured.
        self.is_complete = is_number(self._means.get(self.models[0])) and not self.incomplete

    def main(self, name: str, model: str) -> float | None:
        """Return the main metric of an evaluated model, or of a published one if the set is complete."""
        if model in self.all_published:
            return None if name in self.incomplete else self.all_published[model].get(name)
        result = self.by_set[name].get(model)
        return result["metrics"][result["main_metric"]] if result else None

    def error(self, name: str | None, model: str) -> float | None:
        """Return the standard error of the main metric of an evaluated model on a set; None if it is not known."""
        result = self.by_set.get(name or "", {}).get(model)
        return result.get("standard_errors", {}).get(result["main_metric"]) if result else None

    def row(self, name: str | None) -> list[float | None]:
        """Return the main metrics of a dataset (their means if `name` is None) of all models and then of the published ones."""
        return [self.main(name, model) if name else self.mean(model) for model in [*self.models, *self.published]]

    def ranking(self) -> list[tuple[str, list[float | None], float | None]]:
        """Return the name of each evaluated and published model, its main metrics on `published_sets`, and their mean.

        The best one comes first. A model without a result on one of the sets has no mean, and comes last.
        """
        rows = []
        for model in [*self.models, *self.all_published]:
            values = [self.main(name, model) for name in self.published_sets]
            numbers = [value for value in values if is_number(value)]
            rows.append((model, values, mean(numbers) if numbers and len(numbers) == len(values) else None))
        return sorted(rows, key=lambda row: -1.0 if row[2] is None else row[2], reverse=True)

    def mean(self, model: str) -> float | None:
        """Return the mean over the benchmark or, if it is incomplete, over the report's complete sets; None if one is missing."""
        if self.is_complete:
            return self.published[model].get("mean") if model in self.published else self._means.get(model)
        values = [value for name in self.complete_sets if is_number(value := self.main(name, model))]
        return sum(values) / len(values) if values and len(values) == len(self.complete_sets) else None


def _predictions_by_outcome(result: ZeroShotResult) -> dict[str, list[PredictedImage]]:
    """Return the correct and the incorrect example predictions of a set; an outcome without examples is left out."""
    outcomes: dict[str, list[PredictedImage]] = {"Correct": [], "Incorrect": []}
    for example in result.get("examples", ()):
        outcomes["Correct" if example["predicted"][0]["right"] else "Incorrect"].append(example)
    return {outcome: examples for outcome, examples in outcomes.items() if examples}


def _first_examples(details: EvaluationDetails) -> dict[str, list[PredictedImage]]:
    """Return a few example predictions of the model by their outcome, of all sets in turn."""
    main = details["models"][0]["name"]
    by_set = [_predictions_by_outcome(result) for result in details.get("zero_shot", ()) if result["model"] == main]
    in_turn = {
        outcome: [
            example
            for examples in zip_longest(*(of_set.get(outcome, ()) for of_set in by_set))
            for example in examples
            if example is not None
        ]
        for outcome in ("Correct", "Incorrect")
    }
    return {outcome: examples[:_NUM_EXAMPLES] for outcome, examples in in_turn.items() if examples}


def _is_headline(metric: str) -> bool:
    """Return whether a metric is FID or FD-<network> over the images that were generated, which a report is asked for."""
    return metric.startswith(("fid", "fd_")) and not metric.endswith("_infinity")


def _standard_deviation(values: Sequence[float | None]) -> float | None:
    """Return the standard deviation of several defined values, with n - 1 in the denominator."""
    numbers = [value for value in values if is_number(value)]
    return stdev(numbers) if len(numbers) == len(values) > 1 else None


def _shortfall_text(result: DatasetResult) -> str:
    """Return what a set lacks: `41 of 8,041 images are missing, 11 could not be read`."""
    parts = []
    if limit := result.get("limit"):
        parts.append(f"a random sample of {limit:,}")
    if missing := result.get("num_missing", 0):
        parts.append(f"{missing:,} of {plural(result.get('num_expected') or 0, 'image')} are missing")
    if unreadable := result["num_unreadable"]:
        parts.append(f"{plural(unreadable, 'image')} could not be read" if not parts else f"{unreadable:,} could not be read")
    return ", ".join(parts)


def _unreadable_groups(results: Sequence[DatasetResult]) -> list[list[DatasetResult]]:
    """Return the results that lost images, grouped by what they lost."""
    groups: dict[str, list[DatasetResult]] = {}
    for result in results:
        if result["num_unreadable"]:
            groups.setdefault(json.dumps([result["set"], result["unreadable"], result["num_unreadable"]]), []).append(result)
    return list(groups.values())


class ClassBar(NamedTuple):
    """Recall of a class, and that of the first baseline."""

    recall: float
    name: str
    num_images: int
    baseline: float | None


def _class_bars(result: ZeroShotResult, baseline: ZeroShotResult | None) -> list[ClassBar]:
    """Return the classes that have images, worst first."""
    classes = result["per_class"]
    others: list[float | None] = [None] * len(classes)
    # Baselines go by place, because names repeat: ImageNet has 998 of 1000.
    if baseline and [one["class"] for one in baseline["per_class"]] == [one["class"] for one in classes]:
        others = [one["recall"] for one in baseline["per_class"]]
    pairs = zip(classes, others, strict=True)
    bars = [ClassBar(one["recall"], one["class"], one["count"], other) for one, other in pairs if is_number(one["recall"])]
    return sorted(bars, key=lambda bar: bar[:2])


def _retrieval_columns(results: Sequence[RetrievalResult]) -> dict[str, list[str]]:
    """Return the metrics of each direction by rank."""
    names = dict.fromkeys(name for result in results for name in result["metrics"])
    columns = {
        title: sorted((name for name in names if name.startswith(f"{direction}@")), key=lambda name: int(name.split("@")[1]))
        for direction, title in _RETRIEVAL.items()
    }
    return {title: names for title, names in columns.items() if names}


def _best(points: Sequence[QualityPoint], metric: str) -> float | None:
    """Return the best value of several; None of fewer."""
    values = [value for point in points if is_number(value := point["metrics"].get(metric))]
    return describe_metric(metric).best(values) if len(values) > 1 else None


def _protocol(point: QualityPoint) -> Mapping[str, object]:
    """Return the part of a protocol that the points of one table must share."""
    return {field: value for field, value in point["protocol"].items() if not field.startswith("guidance")}


def _protocol_problem(points: Sequence[QualityPoint]) -> str:
    """Return why the points cannot be compared; empty if they can."""
    try:
        for point in points[1:]:
            check_same_protocol(_protocol(points[0]), _protocol(point))
    except ConfigError as error:
        return str(error)
    return ""


def _protocols(points: Sequence[QualityPoint]) -> list[tuple[Mapping[str, object], list[float]]]:
    """Return each protocol once, with the guidance scales that it was used for."""
    scales: dict[str, list[float]] = {}
    for point in points:
        scales.setdefault(json.dumps(_protocol(point), default=str), []).append(point["guidance_scale"])
    return [(json.loads(protocol), used) for protocol, used in scales.items()]


def _quality_chart(points: Sequence[QualityPoint], distance: str) -> tuple[str, Chart] | None:
    """Return the title of x and a chart: distance against alignment; against guidance if alignment was not measured."""
    label = describe_metric(distance).label
    against_guidance, against_alignment = [], []
    for point in points:
        scale, y, x = point["guidance_scale"], point["metrics"].get(distance), point["metrics"].get("alignment")
        if is_number(y):
            tooltip = f"guidance {scale:g}: {label} {number_text(y)}"
            against_guidance.append(Point(scale, y, tooltip=tooltip))
            if is_number(x):
                against_alignment.append(Point(x, y, f"{scale:g}", f"{tooltip}, alignment {number_text(x)}"))
    if len(against_alignment) > 1:
        return "alignment", line_chart([Line("", against_alignment)], "alignment", label)
    if len(against_guidance) > 1:
        return "guidance scale", line_chart([Line("", against_guidance)], "guidance scale", label)
    return None


def _curve_chart(points: Sequence[CurvePoint]) -> Chart | None:
    """Return accuracy by denoising steps, a line per number of draws."""
    draws, steps = (sorted({point[key] for point in points}) for key in ("num_draws", "num_steps"))
    lines = []
    for i, n in enumerate(draws):
        line = []
        for point in sorted((p for p in points if p["num_draws"] == n), key=lambda p: p["num_steps"]):
            if is_number(acc1 := point["acc1"]):
                took = f"acc1 {percent_text(acc1)} %, {duration_text(point['seconds'])}"
                line.append(Point(point["num_steps"], 100 * acc1, "", f"{point['num_steps']} steps, {plural(n, 'draw')}: {took}"))
        if line:
            lines.append(Line(plural(n, "draw"), line, 0.4 + 0.6 * (i + 1) / len(draws)))
    if not lines or len(steps) < 2:
        return None
    return line_chart(lines, "denoising steps", describe_metric("acc1").axis_label, steps)


def _training_chart(scores: Sequence[StepScore]) -> Chart | None:
    """Return the main metrics by step, a line per set and metric; None of fewer than two checkpoints."""
    lines: dict[tuple[str, str], list[Point]] = {}
    for score in sorted(scores, key=lambda score: score["step"]):
        if is_number(value := score["value"]):
            label, error = describe_metric(score["metric"]).label, score["standard_error"]
            margin = f" ± {percent_text(error)}" if is_number(error) else ""
            tooltip = f"{score['set']}, step {score['step']:,}: {label} {percent_text(value)}{margin} %"
            lines.setdefault((score["set"], label), []).append(Point(score["step"], 100 * value, "", tooltip))
    if len({score["step"] for score in scores}) < 2 or not lines:
        return None
    return line_chart([Line(f"{name}, {label}", points) for (name, label), points in lines.items()], "step", "main metric, %")
