"""What an evaluation measures, and the results, each of which exists as soon as its units are complete."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import numpy as np

from diffdis_platform.evaluation.measurements import RetrievalMeasurement, SetMeasurement, ZeroShotMeasurement
from diffdis_platform.evaluation.models import EvaluationModel
from diffdis_platform.evaluation.quality import QualityMeasurement
from diffdis_platform.evaluation.units import count_units
from ray_platform.contracts import UnitOrigin, UserError, describe_error
from ray_platform.evaluate.results import has_confusion_matrix, write_confusion, write_predictions
from ray_platform.evaluate.sets import (
    PAPER_SETS,
    PUBLISHED,
    PUBLISHED_NOTES,
    PUBLISHED_RETRIEVAL,
    PUBLISHED_SOURCES,
    EvaluationSet,
)
from ray_platform.redaction import redacted_traceback
from ray_platform.replicas import UnitResult, WorkUnit
from ray_platform.report.records import (
    CurvePoint,
    DatasetResult,
    EvaluationDetails,
    QualityPoint,
    RetrievalResult,
    StepScore,
    ZeroShotResult,
    is_complete,
)
from ray_platform.terminal import render_table
from ray_platform.tracking.run_metadata import code_version

logger = logging.getLogger(__name__)

Measurement = SetMeasurement | QualityMeasurement
RETRIEVAL_METRICS = ("image_retrieval_recall@1", "text_retrieval_recall@1")  # main ones


@dataclass
class EvaluationPlan:
    """What is measured, with which models and on which sets."""

    model: EvaluationModel
    baselines: list[EvaluationModel]
    sets: dict[str, EvaluationSet]
    zero_shot: list[ZeroShotMeasurement] = field(default_factory=list)
    retrieval: list[RetrievalMeasurement] = field(default_factory=list)
    repeats: list[SetMeasurement] = field(default_factory=list)  # of the model, with other seeds
    curve: list[ZeroShotMeasurement] = field(default_factory=list)
    quality: QualityMeasurement | None = None
    failures: dict[str, str] = field(default_factory=dict)  # units' group or missing set -> error

    def add(self, measurement: SetMeasurement) -> None:
        """Add the measurement of a model on a set."""
        if isinstance(measurement, ZeroShotMeasurement):
            self.zero_shot.append(measurement)
        elif isinstance(measurement, RetrievalMeasurement):
            self.retrieval.append(measurement)

    @property
    def of_sets(self) -> list[SetMeasurement]:
        """The measurements of models on sets."""
        return [*self.zero_shot, *self.retrieval, *self.repeats]

    @property
    def builders(self) -> dict[str, Callable[[str], Any]]:
        """The functions that build a model on a replica: by the names that units have for it."""
        models, networks = [self.model, *self.baselines], {}
        if self.quality:
            models += filter(None, (self.quality.judge, self.quality.ranker))
            networks = self.quality.network_builders
        return {model.identity: model.build for model in models} | networks

    @property
    def measurements(self) -> list[Measurement]:
        return [*self.of_sets, *self.curve, *([self.quality] if self.quality else [])]


class EvaluationResults:
    """The results of a plan. Whatever fails is one line for its group of units, and ends nothing else."""

    def __init__(self, plan: EvaluationPlan):
        self.plan, self.failures = plan, plan.failures
        self.zero_shot: dict[SetMeasurement, ZeroShotResult] = {}
        self.retrieval: dict[SetMeasurement, RetrievalResult] = {}
        self._curve: dict[SetMeasurement, CurvePoint] = {}
        self._with_predictions: set[SetMeasurement] = set()  # whose predictions are written
        self._origins: list[UnitOrigin | None] = []  # of all units; measurements may share a unit
        self._missing = {measurement: len(measurement.units) for measurement in plan.measurements}
        self._unfinished = {name: [each for each in plan.of_sets if each.data.name == name] for name in plan.sets}
        self._receivers: dict[str, list[tuple[Measurement, WorkUnit]]] = {}  # unit key -> who needs its rows
        for measurement in plan.measurements:
            for unit in measurement.units:
                self._receivers.setdefault(unit.key, []).append((measurement, unit))

    @property
    def units(self) -> list[WorkUnit]:
        """The units to run: set by set, so that the first sets are finished early, then the curve, and images last."""
        stages = {name: stage for stage, name in enumerate(self.plan.sets)}
        units = []
        for (measurement, unit), *_ in self._receivers.values():
            if isinstance(measurement, QualityMeasurement):
                stage = len(stages) + 1
            else:
                stage = len(stages) if measurement in self.plan.curve else stages[measurement.data.name]
            units.append(replace(unit, stage=stage))
        return units

    def add(self, result: UnitResult) -> bool:
        """Receive a unit. Return whether a set is finished: measured with every model, or failed."""
        self._origins.append(result.origin)
        for measurement, unit in self._receivers[result.unit.key]:
            measurement.origins.append(result.origin)
            if result.rows is None:
                self.failures.setdefault(unit.group, result.error)
            elif unit.group not in self.failures:
                with self._failure_of(unit.group):
                    measurement.add(unit, result.rows)
            self._missing[measurement] -= 1
            if isinstance(measurement, SetMeasurement) and not self._missing[measurement]:
                self._finish(measurement)
        if self.plan.quality and (error := self.plan.quality.reference_error):
            # Not even the alignment is measured: half of what was asked for looks like all of it.
            self.failures |= dict.fromkeys(self.plan.quality.groups, error)
        return self._finish_sets()

    def _finish(self, measurement: SetMeasurement) -> None:
        if measurement.group in self.failures:
            return
        with self._failure_of(measurement.group):
            if isinstance(measurement, RetrievalMeasurement):
                self.retrieval[measurement] = measurement.result()
            elif isinstance(measurement, ZeroShotMeasurement) and measurement in self.plan.curve:
                self._curve[measurement] = measurement.curve_point()
            elif isinstance(measurement, ZeroShotMeasurement):
                self.zero_shot[measurement] = measurement.result()

    def _finish_sets(self) -> bool:
        """Return whether there are sets that have just been finished; they are removed from the unfinished ones."""
        finished = [
            name
            for name, measurements in self._unfinished.items()
            if all(not self._missing[each] or each.group in self.failures for each in measurements)
        ]
        for name in finished:
            del self._unfinished[name]
        return bool(finished)

    @contextmanager
    def _failure_of(self, group: str) -> Iterator[None]:
        """Turn any error into the failure of a group."""
        try:
            yield
        except UserError as error:
            self.failures.setdefault(group, str(error))
        except Exception as error:  # a metric that fails, for whatever reason, must not take the other results with it
            if not isinstance(error, ValueError):
                logger.error("%s\n%s", group, redacted_traceback(error))
            self.failures.setdefault(group, f"{group}: {describe_error(error)}")

    def write_predictions(self, output_dir: str) -> None:
        """Write the predicted classes of every sample and the confusion matrices of the zero-shot sets finished since."""
        for each in self.plan.zero_shot:
            if each in self.zero_shot and each not in self._with_predictions:
                names = output_dir, each.model.name, each.data.name, each.data.classes
                write_predictions(*names, each.samples())
                if has_confusion_matrix(len(each.data.classes)):
                    write_confusion(*names, each.scores().confusion)
                self._with_predictions.add(each)

    def finish(self) -> EvaluationDetails:
        """Return the details after the last unit."""
        for measurement, missing in self._missing.items():
            if isinstance(measurement, SetMeasurement) and missing and measurement.group not in self.failures:
                self.failures[measurement.group] = f"{measurement.group}: it shares units with a measurement that failed"
        self._unfinished = {}
        return self.details(with_quality=True)

    def details(self, *, with_quality: bool = False) -> EvaluationDetails:
        """Return what is measured until now. Distances of generated images are computed at the end only."""
        quality: list[QualityPoint] = []
        if self.plan.quality and with_quality:
            with self._failure_of("image quality"):
                quality = self.plan.quality.results(self.failures)
        models = [self.plan.model, *self.plan.baselines]
        self._add_differences()
        self._add_seeds()
        zero_shot = [self.zero_shot[each] for each in self.plan.zero_shot if each in self.zero_shot]
        return {
            "title": f"Evaluation of {self.plan.model.url}",
            "created": datetime.now().isoformat(timespec="seconds"),
            "seconds": 0.0,
            "code_version": code_version(),
            "models": [model.describe() for model in models],
            "zero_shot": zero_shot,
            "retrieval": [self.retrieval[each] for each in self.plan.retrieval if each in self.retrieval],
            "curve": [self._curve[each] for each in self.plan.curve if each in self._curve],
            "quality": quality,
            "means": {model.name: benchmark_mean(model.name, zero_shot) for model in models},
            "published": PUBLISHED,
            "published_retrieval": PUBLISHED_RETRIEVAL,
            "published_sources": PUBLISHED_SOURCES,
            "published_notes": PUBLISHED_NOTES,
            "units": count_units(self._origins),
            "unfinished": list(self._unfinished),
            "warnings": [warning for data in self.plan.sets.values() for warning in data.warnings],
            "failures": list(dict.fromkeys(self.failures.values())),
        }

    def _add_differences(self) -> None:
        """Add the paired differences of the model to each baseline on the sets that both have."""
        results: dict[SetMeasurement, DatasetResult] = {**self.zero_shot, **self.retrieval}
        for measurement in [*self.plan.zero_shot, *self.plan.retrieval]:
            if measurement.model is not self.plan.model or measurement not in results:
                continue
            differences = results[measurement].setdefault("differences", {})
            for other in results:
                if other.data is measurement.data and other.model in self.plan.baselines:
                    with self._failure_of(f"difference of {measurement.group} and {other.group}"):
                        differences[other.model.name] = measurement.differences_to(other)

    def _add_seeds(self) -> None:
        """Add the metrics of all seeds to the results of the first seed, once all of them are measured."""
        results: dict[SetMeasurement, DatasetResult] = {**self.zero_shot, **self.retrieval}
        for measurement in [*self.plan.zero_shot, *self.plan.retrieval]:
            same = [each for each in self.plan.repeats if (each.model, each.data) == (measurement.model, measurement.data)]
            if same and all(each in results for each in [measurement, *same]):
                metrics = [results[each]["metrics"] for each in [measurement, *same]]
                results[measurement]["seeds"] = {name: [each[name] for each in metrics] for name in metrics[0]}


def step_scores(details: EvaluationDetails) -> list[StepScore]:
    """Return the main metrics of the evaluated model, a line each in a curve over its training; none if its step is unknown."""
    model, scores = details["models"][0], list[StepScore]()
    main: list[tuple[DatasetResult, Sequence[str]]] = [(each, (each["main_metric"],)) for each in details.get("zero_shot", ())]
    main += [(result, RETRIEVAL_METRICS) for result in details.get("retrieval", ())]
    for result, metrics in main:
        if result["model"] == model["name"] and model["step"] is not None:
            for metric in metrics:
                error = result.get("standard_errors", {}).get(metric)
                scores.append(
                    {
                        "step": model["step"],
                        "set": result["set"],
                        "metric": metric,
                        "value": result["metrics"][metric],
                        "standard_error": error,
                    }
                )
    return scores


def benchmark_mean(name: str, results: Iterable[ZeroShotResult]) -> float | None:
    """Return the mean of the main metrics of the 12 sets; None if one is missing or incomplete."""
    complete = [result for result in results if result["model"] == name and is_complete(result)]
    main = {result["set"]: result["metrics"][result["main_metric"]] for result in complete}
    return float(np.mean([main[name] for name in PAPER_SETS])) if all(name in main for name in PAPER_SETS) else None


def render_results(details: EvaluationDetails) -> str:
    """Return a table for the terminal, with a row per set and a column per model, and a line per guidance scale."""
    names = [model["name"] for model in details["models"]]
    values: dict[str, dict[str, float | None]] = {}  # row -> model -> metric
    for result in details.get("zero_shot", ()):
        row = result["set"] if is_complete(result) else f"{result['set']} (incomplete)"
        values.setdefault(row, {})[result["model"]] = result["metrics"][result["main_metric"]]
    for way in ("text", "image"):
        for retrieved in details.get("retrieval", ()):
            metric = retrieved["metrics"][f"{way}_retrieval_recall@1"]
            values.setdefault(f"{retrieved['set']} {way} R@1", {})[retrieved["model"]] = metric
    rows = [
        [row, *("-" if (value := metrics.get(name)) is None else f"{value:.2%}" for name in names)]
        for row, metrics in values.items()
    ]
    lines = [render_table([["", *names], *rows])]
    for point in details.get("quality", ()):
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in point["metrics"].items())
        lines.append(f"guidance {point['guidance_scale']:g}: {metrics}")
    return "\n".join(lines)
