"""An evaluation, from its configuration to its report."""

import base64
import functools
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime

import numpy as np

from diffdis.export_folder import CONFIG_NAME
from diffdis.metrics.zero_shot import ZERO_SHOT_METRICS
from diffdis_platform.config.evaluate import EvalConfig, suite_sets
from diffdis_platform.evaluation.measurements import RetrievalMeasurement, ZeroShotMeasurement, build_unit
from diffdis_platform.evaluation.models import EvaluationModel, open_baseline, open_model
from diffdis_platform.evaluation.quality import QualityMeasurement, network_builders
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.discovery import SetNotFoundError, find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.result_cache import ResultCache
from ray_platform.evaluate.results import metrics_for_tracking, write_results
from ray_platform.evaluate.sets import PAPER_SETS, PUBLISHED, PUBLISHED_RETRIEVAL, EvaluationSet, check_counts
from ray_platform.evaluate.unit_work import Thumbnails, WorkerModels
from ray_platform.metric_registry import check_declared
from ray_platform.redaction import is_redacted, restored
from ray_platform.replicas import ReplicaPool, ReplicaSpec, WorkUnit
from ray_platform.report.evaluation import evaluation_page
from ray_platform.report.records import CurvePoint, EvaluationDetails, ExampleImage, QualityPoint, RetrievalResult, ZeroShotResult
from ray_platform.terminal import render_table
from ray_platform.tracking import RUN_RECORD, RunMetadata, TrackedData, start_run
from ray_platform.tracking.run_metadata import code_version, dated_name, run_tags

UNITS, REPORT = "units", "report.html"

Measurement = ZeroShotMeasurement | RetrievalMeasurement | QualityMeasurement


@dataclass
class EvaluationPlan:
    """What is measured, with which models and on which sets."""

    model: EvaluationModel
    baselines: list[EvaluationModel]
    sets: dict[str, EvaluationSet]
    zero_shot: list[ZeroShotMeasurement] = field(default_factory=list)
    retrieval: list[RetrievalMeasurement] = field(default_factory=list)
    curve: list[ZeroShotMeasurement] = field(default_factory=list)
    quality: QualityMeasurement | None = None
    failures: dict[str, str] = field(default_factory=dict)  # measurement's group or missing set -> error

    @property
    def measurements(self) -> list[Measurement]:
        return [*self.zero_shot, *self.retrieval, *self.curve, *([self.quality] if self.quality else [])]


def plan_evaluation(config: EvalConfig) -> EvaluationPlan:
    """Return the plan after every check that needs no cluster. Raises ConfigError and DataError."""
    check_declared(ZERO_SHOT_METRICS)
    sets, missing = open_sets(config)
    model = open_model(config)
    baselines: list[EvaluationModel] = []
    for url in config.baselines:
        baselines.append(open_baseline(url, {model.name, *(baseline.name for baseline in baselines)}))
    plan = EvaluationPlan(model, baselines, sets, failures=missing)
    for data in sets.values():
        if data.known_images is not None:  # reject a short set before hours of work, if the number is known
            check_counts(data, data.known_images, 0, config.allow_short)
        for scorer in [*([model] if model.can_score else []), *baselines]:
            if data.task == "zeroshot_classification":
                plan.zero_shot.append(ZeroShotMeasurement(scorer, data, config.allow_short))
            else:
                plan.retrieval.append(RetrievalMeasurement(scorer, data, config.allow_short))
    plan.curve = _plan_curve(config, plan)
    if config.quality.prompts:
        if not model.can_generate:
            raise ConfigError(f"quality.prompts: a model that was trained for {model.task} cannot generate images; remove it")
        image_size = storage.read_json(storage.join(model.url, CONFIG_NAME))["image_size"]
        plan.quality = QualityMeasurement(model, image_size, config.quality, config.output_dir)
    return plan


def open_sets(config: EvalConfig) -> tuple[dict[str, EvaluationSet], dict[str, str]]:
    """Return the sets of the suite, and an error per missing set, if missing sets are allowed."""
    sets, missing = {}, {}
    for name, url in suite_sets(config.suite).items():
        try:
            sets[name] = open_evaluation_set(name, url) if url else find_evaluation_set(config.data_roots, name)
        except SetNotFoundError as error:
            missing[name] = str(error)
    if missing and not config.allow_missing:
        raise ConfigError(f"{'; '.join(missing.values())} (--allow_missing true evaluates the other sets)")
    if not sets and not config.quality.prompts:
        folders = ", ".join(config.data_roots) or "any data_roots"
        raise ConfigError(f"suite: none of the sets of {config.suite} is below {folders}; correct data_roots")
    return sets, missing


def _plan_curve(config: EvalConfig, plan: EvaluationPlan) -> list[ZeroShotMeasurement]:
    """Plan accuracy against steps and draws. A model of the `clip` task has neither."""
    if not config.curve_set or plan.model.task == "clip" or not plan.model.can_score:
        return []
    data = plan.sets.get(config.curve_set)
    if data is None or data.task != "zeroshot_classification":
        raise ConfigError(
            f"curve_set: {config.curve_set} is not a zero-shot set of this evaluation; use one of {', '.join(plan.sets)}"
        )
    return [
        ZeroShotMeasurement(
            replace(plan.model, settings={"num_steps": steps, "num_draws": draws, "guidance": config.scoring.guidance}),
            data, config.allow_short, num_examples=0,
        )
        for draws in config.curve_draws
        for steps in config.curve_steps
    ]  # fmt: skip


def evaluate(config: EvalConfig, plan: EvaluationPlan) -> EvaluationDetails:
    """Measure everything on a running Ray, write results/, results.csv, details.json and report.html, and return the details."""
    started = time.monotonic()
    builders = {model.name: model.build for model in [plan.model, *plan.baselines]} | network_builders(config.quality)
    if config.quality.clip and plan.quality:
        builders["clip"] = open_baseline(config.quality.clip, set()).build
    build = functools.partial(WorkerModels, builders, max(1, int(config.cpus_per_worker)))
    spec = ReplicaSpec(build, config.num_workers, config.cpus_per_worker, config.gpus_per_worker, config.placement)
    cache = ResultCache(storage.join(config.output_dir, UNITS))
    with ReplicaPool(spec, cache, functools.partial(print, flush=True)) as pool:
        _measure(pool, plan)
        print("everything is measured; writing the results …", flush=True)
        details = _details(plan)
        _add_example_images(pool, plan, details)
    details["seconds"] = round(time.monotonic() - started, 1)
    write_results(details, config.output_dir)
    storage.write_bytes(storage.join(config.output_dir, REPORT), evaluation_page(details).encode())
    _track(config, plan.model, plan.sets.values(), details)
    return details


def _measure(pool: ReplicaPool, plan: EvaluationPlan) -> None:
    """Run the units of all measurements in one go. Measurements that need the same unit share it."""
    receivers: dict[str, list[tuple[Measurement, WorkUnit]]] = {}
    for measurement in plan.measurements:
        for unit in measurement.units:
            receivers.setdefault(unit.key, []).append((measurement, unit))
    for result in pool.run([pairs[0][1] for pairs in receivers.values()]):
        for measurement, unit in receivers[result.unit.key]:
            if result.rows is not None:
                measurement.add(unit, result.rows)
            else:
                plan.failures.setdefault(measurement.group, result.error)


def _details(plan: EvaluationPlan) -> EvaluationDetails:
    """Return the details of the measurements that are complete; the others are listed as failures."""
    zero_shot: list[ZeroShotResult] = []
    retrieval: list[RetrievalResult] = []
    quality: list[QualityPoint] = []
    curve: list[CurvePoint] = []
    for measurement in plan.measurements:
        if measurement.group in plan.failures:
            continue
        try:
            if isinstance(measurement, QualityMeasurement):
                quality = measurement.results()
            elif isinstance(measurement, RetrievalMeasurement):
                retrieval.append(measurement.result())
            elif measurement in plan.curve:
                settings = measurement.model.settings
                curve.append(
                    {
                        "set": measurement.data.name,
                        "model": measurement.model.name,
                        "num_steps": int(settings["num_steps"]),
                        "num_draws": int(settings["num_draws"]),
                        "acc1": measurement.scores().accuracy(),
                        "seconds": round(measurement.seconds, 1),
                    }
                )
            else:
                zero_shot.append(measurement.result())
        except DataError as error:
            plan.failures[measurement.group] = str(error)
    models = [plan.model, *plan.baselines]
    return {
        "title": f"Evaluation of {plan.model.url}",
        "created": datetime.now().isoformat(timespec="seconds"),
        "seconds": 0.0,
        "code_version": code_version(),
        "models": [model.describe() for model in models],
        "zero_shot": zero_shot,
        "retrieval": retrieval,
        "curve": curve,
        "quality": quality,
        "means": {model.name: _mean(model.name, zero_shot) for model in models},
        "published": PUBLISHED,
        "published_retrieval": PUBLISHED_RETRIEVAL,
        "failures": list(dict.fromkeys(plan.failures.values())),
    }


def _mean(name: str, results: Iterable[ZeroShotResult]) -> float | None:
    """Return the mean of the main metrics of the 12 sets; None if one is missing."""
    main = {result["set"]: result["metrics"][result["main_metric"]] for result in results if result["model"] == name}
    return float(np.mean([main[name] for name in PAPER_SETS])) if all(name in main for name in PAPER_SETS) else None


def _add_example_images(pool: ReplicaPool, plan: EvaluationPlan, details: EvaluationDetails) -> None:
    """Have the replicas read the images that the report shows, and add them to `details`."""
    examples: dict[tuple[str, str], list[ExampleImage]] = {}
    for result in details.get("zero_shot", ()):
        for example in (example for confusion in result["confusions"] for example in confusion["examples"]):
            examples.setdefault((result["set"], example["key"]), []).append(example)
    for retrieved in details.get("retrieval", ()):
        images = (image for query in retrieved["examples"] for image in query["images"])
        for example in (*images, *retrieved["image_examples"]):
            examples.setdefault((retrieved["set"], example["key"]), []).append(example)
    units: dict[str, tuple[str, WorkUnit]] = {}
    for measurement in [*plan.zero_shot, *plan.retrieval]:
        data = measurement.data
        for part, keys in measurement.slices_with({key for name, key in examples if name == data.name}).items():
            group, name, work = f"images of {data.name}", f"images of {part.name}", Thumbnails(part, keys)
            unit = build_unit(group, name, 1.0, work, data=data.digest, slice=part.name, keys=keys)
            units[unit.key] = (data.name, unit)
    for unit_result in pool.run([unit for _, unit in units.values()]):
        if (rows := unit_result.rows) is not None:
            name, _ = units[unit_result.unit.key]
            jpegs = np.split(rows["jpegs"], np.cumsum(rows["sizes"]))
            for key, jpeg in zip(rows["keys"], jpegs, strict=False):  # behind the last one is an empty part
                for example in examples.get((name, str(key)), []):
                    example["jpeg"] = base64.b64encode(jpeg.tobytes()).decode()


def _track(config: EvalConfig, model: EvaluationModel, sets: Iterable[EvaluationSet], details: EvaluationDetails) -> None:
    """Log on the run that trained the model; if that is not known, on a new one."""
    tracking, metadata, run_id = config.tracking, None, ""
    if model.run_record and model.run_record["run_id"]:
        uri = restored(model.run_record["tracking_uri"], config.tracking.uri)
        if is_redacted(uri):
            print(
                f"tracking.uri: the results are not logged on the model's run, because {RUN_RECORD} has its address without "
                f"the secrets ({uri}); give --tracking.uri",
                flush=True,
            )
            return
        tracking = replace(config.tracking, uri=uri, experiment=model.run_record["experiment"])
        run_id = model.run_record["run_id"]
    else:
        text = f"An evaluation of `{model.url}`. Report: `{config.output_dir}/{REPORT}`."
        tags = run_tags("evaluation", config.output_dir, details["code_version"])
        metadata = RunMetadata(dated_name("evaluation"), text, tags, {"evaluation": asdict(config)})
    with start_run(tracking, config.output_dir, metadata, run_id=run_id) as tracker:
        tracker.log_data(
            [
                TrackedData(
                    data.name, data.digest, data.url, "evaluation",
                    {"num_classes": len(data.classes), "num_files": data.num_files, "num_bytes": data.num_bytes}
                    | ({} if data.known_images is None else {"num_samples": data.known_images}),
                )
                for data in sets
            ]
        )  # fmt: skip
        tracker.log_metrics(metrics_for_tracking(details), model.step or 0)
        tracker.log_bytes(storage.read_bytes(storage.join(config.output_dir, REPORT)), f"evaluation/{REPORT}")
        tracker.log_bytes(storage.read_bytes(storage.join(config.output_dir, "results.csv")), "evaluation/results.csv")


def render_results(details: EvaluationDetails) -> str:
    """Return a table for the terminal, with a row per set and a column per model, and a line per guidance scale."""
    names = [model["name"] for model in details["models"]]
    values: dict[str, dict[str, float | None]] = {}  # row -> model -> metric
    for result in details.get("zero_shot", ()):
        values.setdefault(result["set"], {})[result["model"]] = result["metrics"][result["main_metric"]]
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
