"""An evaluation from its configuration to its report."""

import base64
import functools
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, cast

import numpy as np

from diffdis.pipeline import CONFIG_NAME
from diffdis_platform.config.evaluate import EvalConfig, suite_sets
from diffdis_platform.evaluation import quality
from diffdis_platform.evaluation.models import Model, open_baseline, open_model
from diffdis_platform.evaluation.quality import Quality
from diffdis_platform.evaluation.retrieval import Retrieval
from diffdis_platform.evaluation.units import unit
from diffdis_platform.evaluation.zero_shot import ZeroShot
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.find import NotFoundError, find_set, open_set
from ray_platform.evaluate.result_cache import ResultCache
from ray_platform.evaluate.results import metrics_for_tracking, write_results
from ray_platform.evaluate.sets import PAPER, PUBLISHED, PUBLISHED_RETRIEVAL, EvaluationSet, check_counts
from ray_platform.evaluate.work import Thumbnails, WorkerModels, image_name
from ray_platform.redaction import is_redacted, restored
from ray_platform.replicas import ReplicaPool, ReplicaSpec, WorkUnit
from ray_platform.report.evaluation import evaluation_page
from ray_platform.report.records import EvaluationDetails
from ray_platform.terminal import render_table
from ray_platform.tracking import RUN_RECORD, RunMetadata, TrackedData, TrackingConfig, start_run
from ray_platform.tracking.run_metadata import code_version, dated_name, run_tags

UNITS, REPORT = "units", "report.html"


@dataclass
class Plan:
    """What is measured, of which models, on which sets."""

    model: Model
    baselines: list[Model]
    sets: dict[str, EvaluationSet]
    measurements: list[ZeroShot | Retrieval] = field(default_factory=list)
    curve: list[ZeroShot] = field(default_factory=list)
    quality: Quality | None = None
    failures: dict[str, str] = field(default_factory=dict)  # group -> line

    @property
    def all(self) -> list[Any]:
        return [*self.measurements, *self.curve, *([self.quality] if self.quality else [])]


def plan(config: EvalConfig) -> Plan:
    """After every check that needs no cluster. Raises ConfigError and DataError."""
    sets, failures = open_sets(config)
    model = open_model(config)
    baselines: list[Model] = []
    for url in config.baselines:
        baselines.append(open_baseline(url, {model.name, *(b.name for b in baselines)}))
    made = Plan(model, baselines, sets, failures=failures)
    for data in sets.values():
        if data.known_images is not None:  # a short set is refused before hours of work where that can be told
            check_counts(data, data.known_images, 0, config.allow_short)
        for scored in [*([model] if model.can_score else []), *baselines]:
            if data.task == "zeroshot_classification":
                made.measurements.append(ZeroShot(scored, data, config.allow_short))
            else:
                made.measurements.append(Retrieval(scored, data, config.allow_short))
    made.curve = _curve(config, made)
    if config.quality.prompts:
        if not model.can_draw:
            raise ConfigError(f"quality.prompts: this model was trained for {model.task} alone and cannot draw images")
        image_size = storage.read_json(storage.join(model.url, CONFIG_NAME))["image_size"]
        made.quality = Quality(model, image_size, config.quality, config.output_dir)
    return made


def open_sets(config: EvalConfig) -> tuple[dict[str, EvaluationSet], dict[str, str]]:
    """(the suite's sets, a line for each that is missing, if that is allowed)."""
    sets, missing = {}, {}
    for name, url in suite_sets(config.suite).items():
        try:
            sets[name] = open_set(name, url) if url else find_set(config.data_roots, name)
        except NotFoundError as error:
            missing[name] = str(error)
    if missing and not config.allow_missing:
        raise ConfigError(f"{'; '.join(missing.values())} (--allow_missing true goes on without)")
    if not sets and not config.quality.prompts:
        raise ConfigError(
            f"suite: none of the sets of {config.suite} is below {', '.join(config.data_roots) or 'any data_roots'}"
        )
    return sets, missing


def _curve(config: EvalConfig, made: Plan) -> list[ZeroShot]:
    """Accuracy against steps and draws. A model of the `clip` task has neither."""
    if not config.curve_set or made.model.task == "clip" or not made.model.can_score:
        return []
    data = made.sets.get(config.curve_set)
    if data is None or data.task != "zeroshot_classification":
        raise ConfigError(f"curve_set: {config.curve_set} is no zero-shot set of this evaluation: {', '.join(made.sets)}")
    guidance = config.scoring.guidance
    return [
        ZeroShot(made.model.with_settings(num_steps=steps, num_draws=draws, guidance=guidance), data, config.allow_short, 0)
        for draws in config.curve_draws
        for steps in config.curve_steps
    ]


def evaluate(config: EvalConfig, made: Plan) -> dict[str, Any]:
    """Needs a running Ray. Writes results/, results.csv, details.json and report.html; returns the report's details."""
    begun = time.monotonic()
    builders: dict[str, Any] = {model.name: model.build for model in [made.model, *made.baselines]}
    builders |= quality.builders(config.quality)
    if config.quality.clip and made.quality:
        builders["clip"] = open_baseline(config.quality.clip, set()).build
    threads = max(1, int(config.cpus_per_worker))
    fleet = ReplicaSpec(
        functools.partial(WorkerModels, builders, threads),
        config.num_workers, config.cpus_per_worker, config.gpus_per_worker, config.placement,
    )  # fmt: skip
    with ReplicaPool(fleet, ResultCache(storage.join(config.output_dir, UNITS)), functools.partial(print, flush=True)) as fan_out:
        _measure(fan_out, made)
        print("all is measured; putting the results together …", flush=True)
        details = _details(made)
        _illustrate(fan_out, made, details)
    details |= {"code_version": code_version(), "seconds": round(time.monotonic() - begun, 1)}
    write_results(details, config.output_dir)
    storage.write_bytes(storage.join(config.output_dir, REPORT), evaluation_page(cast(EvaluationDetails, details)).encode())
    _track(config, made.model, made.sets.values(), details)
    return details


def _measure(fan_out: ReplicaPool, made: Plan) -> None:
    """All units of all measurements in one fan-out. Two that ask for the same unit share it."""
    wanted: dict[str, list[Any]] = {}
    units: dict[str, WorkUnit] = {}
    for measurement in made.all:
        for piece in measurement.units:
            units.setdefault(piece.key, piece)
            wanted.setdefault(piece.key, []).append((measurement, piece))
    for outcome in fan_out.run(list(units.values())):
        for measurement, piece in wanted[outcome.unit.key]:
            if outcome.rows is not None:
                measurement.add(piece, outcome.rows)
            else:
                made.failures.setdefault(measurement.group, outcome.error)


def _details(made: Plan) -> dict[str, Any]:
    """Of what was measured whole; the others are among the failures."""
    parts: dict[str, list[dict[str, Any]]] = {"zero_shot": [], "retrieval": [], "curve": [], "quality": []}
    for measurement in made.all:
        if measurement.group in made.failures:
            continue
        try:
            if isinstance(measurement, Quality):
                parts["quality"] = measurement.results()
                continue
            entry = measurement.result()
        except DataError as error:
            made.failures[measurement.group] = str(error)
            continue
        if measurement in made.curve:
            named = ("set", "model", "seconds")
            steps = {name: entry["settings"][name] for name in ("num_steps", "num_draws")}
            parts["curve"].append({name: entry[name] for name in named} | steps | {"acc1": entry["metrics"]["acc1"]})
        else:
            parts["zero_shot" if isinstance(measurement, ZeroShot) else "retrieval"].append(entry)
    models = [made.model, *made.baselines]
    return {
        "title": f"Evaluation of {made.model.url}",
        "created": datetime.now().isoformat(timespec="seconds"),
        "models": [model.describe() for model in models],
        **parts,
        "means": {model.name: _mean(model.name, parts["zero_shot"]) for model in models},
        "published": PUBLISHED,
        "published_retrieval": PUBLISHED_RETRIEVAL,
        "failures": list(dict.fromkeys(made.failures.values())),
    }


def _mean(name: str, entries: Iterable[Mapping[str, Any]]) -> float | None:
    """Of the main metrics of the 12 sets; None where one is missing."""
    found = {entry["set"]: entry["metrics"][entry["main_metric"]] for entry in entries if entry["model"] == name}
    return float(np.mean([found[name] for name in PAPER])) if all(name in found for name in PAPER) else None


def _illustrate(fan_out: ReplicaPool, made: Plan, details: dict[str, Any]) -> None:
    """Fetch the pictures that the report shows, by the same workers, and put them into `details`."""
    slots: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in details["zero_shot"]:
        for confusion in entry["confusions"]:
            for example in confusion["examples"]:
                slots.setdefault((entry["set"], example["key"]), []).append(example)
    for entry in details["retrieval"]:
        found = [image for example in entry["examples"] for image in example["images"]] + entry["image_examples"]
        for example in found:
            slots.setdefault((entry["set"], example["key"]), []).append(example)
    units = {}
    for measurement in made.measurements:
        name = measurement.data.name
        keys = {key for of, key in slots if of == name}
        for part, inside in measurement.slices_of(keys).items():
            identity = {"data": measurement.data.digest, "slice": part.name, "keys": inside}
            made_unit = unit(f"pictures of {name}", f"pictures of {part.name}", 1.0, Thumbnails(part, inside), identity)
            units[made_unit.key] = (name, made_unit)
    for outcome in fan_out.run([made_unit for _, made_unit in units.values()]):
        if outcome.rows is not None:
            name, _ = units[outcome.unit.key]
            for key, jpeg in _pictures(outcome.rows):
                for slot in slots.get((name, key), []):
                    slot["jpeg"] = jpeg
    for entry in details["quality"] if made.quality else []:
        entry["samples"] = _samples(made.quality, entry["guidance_scale"])


def _pictures(rows: Mapping[str, np.ndarray]) -> Iterable[tuple[str, str]]:
    ends = np.cumsum(rows["sizes"])
    for key, size, end in zip(rows["keys"], rows["sizes"], ends, strict=True):
        yield str(key), base64.b64encode(rows["jpegs"][end - size : end].tobytes()).decode()


def _samples(measured: Any, scale: float) -> list[dict[str, str]]:
    """The first generated images with their prompts."""
    shown = measured.prompts[: quality.SHOWN]
    urls = [storage.join(measured.images_dir(scale), image_name(place)) for place in range(len(shown))]
    found = storage.read_many(urls)
    return [
        {"caption": prompt, "png": base64.b64encode(found[url]).decode()}
        for prompt, url in zip(shown, urls, strict=True)
        if url in found
    ]


def _track(config: EvalConfig, model: Model, sets: Iterable[EvaluationSet], details: Mapping[str, Any]) -> None:
    """Log on the run that made the checkpoint; if that is not known, on a new one."""
    tracking, metadata, run_id = config.tracking, None, ""
    if model.tracked:
        uri = restored(model.tracked["tracking_uri"], config.tracking.uri)
        if is_redacted(uri):
            print(
                f"tracking.uri: the results are not logged on the model's run, because {RUN_RECORD} has its address without "
                f"the secrets ({uri}); give --tracking.uri",
                flush=True,
            )
            return
        tracking = TrackingConfig(uri, model.tracked["experiment"], backends=config.tracking.backends)
        run_id = model.tracked["run_id"]
    else:
        text = f"An evaluation of `{model.url}`. Report: `{config.output_dir}/{REPORT}`."
        tags = run_tags("evaluation", config.output_dir, details["code_version"])
        metadata = RunMetadata(dated_name("evaluation"), text, tags, {"evaluation": asdict(config)})
    with start_run(tracking, config.output_dir, metadata, run_id=run_id) as tracker:
        tracker.log_data([_tracked_data(data) for data in sets])
        tracker.log_metrics(metrics_for_tracking(details), model.step or 0)
        tracker.log_bytes(storage.read_bytes(storage.join(config.output_dir, REPORT)), f"evaluation/{REPORT}")
        tracker.log_bytes(storage.read_bytes(storage.join(config.output_dir, "results.csv")), "evaluation/results.csv")


def _tracked_data(data: EvaluationSet) -> TrackedData:
    images = {} if data.known_images is None else {"num_samples": data.known_images}
    counts = {"num_classes": len(data.classes), "num_files": data.num_files, "num_bytes": data.num_bytes, **images}
    return TrackedData(data.name, data.digest, data.url, "evaluation", counts)


def table(details: Mapping[str, Any], names: Sequence[str]) -> str:
    """For the terminal: a row a set, a column a model."""
    cells = [["", *names]]
    for kind, metric in (("zero_shot", ""), ("retrieval", "text_retrieval_recall@1"), ("retrieval", "image_retrieval_recall@1")):
        rows: dict[str, dict[str, float]] = {}
        for entry in details[kind]:
            shown = metric or entry["main_metric"]
            label = f"{entry['set']} {'' if not metric else metric.split('_')[0] + ' R@1'}".strip()
            rows.setdefault(label, {})[entry["model"]] = entry["metrics"][shown]
        for label, values in rows.items():
            cells.append([label, *(f"{values[n]:.2%}" if n in values else "-" for n in names)])
    lines = [render_table(cells)]
    for entry in details["quality"]:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in entry["metrics"].items())
        lines.append(f"guidance {entry['guidance_scale']:g}: {figures}")
    return "\n".join(lines)
