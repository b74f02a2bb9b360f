"""The (arm, seed) runs of a comparison: which ones are left to do, their training and evaluation, and the report."""

import base64
import hashlib
import io
import json
import logging
import time
from dataclasses import asdict, replace
from datetime import datetime

from PIL import Image

from diffdis.image_grid import image_grid
from diffdis_platform.comparison.summary import CLAIM, ComparisonPlan, ComparisonSummary, Fields, Results, RunFigures, summarize
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.evaluate import QualityConfig
from diffdis_platform.config.saved import with_current_names
from diffdis_platform.evaluation.datasets import open_sets
from diffdis_platform.evaluation.distance import read_reference
from diffdis_platform.evaluation.headline import headline
from diffdis_platform.evaluation.quality import images_dir, read_prompts, stored_samples
from diffdis_platform.evaluation.run import evaluate, plan_evaluation
from diffdis_platform.exporting import build_task
from diffdis_platform.parent_run import start_parent_run
from ray_platform import storage
from ray_platform.connect import describe_cluster
from ray_platform.contracts import ConfigError, DataError, UserError, describe_error
from ray_platform.evaluate.discovery import open_image_set
from ray_platform.evaluate.results import metrics_for_tracking
from ray_platform.formats import FileFormat
from ray_platform.json_values import first_difference, to_json, with_defaults
from ray_platform.redaction import redacted_traceback, redacted_values, restored
from ray_platform.report.comparison import comparison_page
from ray_platform.report.records import ComparisonDetails, EvaluationDetails, ImageGrid, TrainingPoint
from ray_platform.tracking import RUN_RECORD, Tracker, TrackingConfig, metric_history
from ray_platform.tracking.run_metadata import code_version
from ray_platform.train import checkpoint_format
from ray_platform.train.fault_tolerance import Stopped
from ray_platform.train.worker_spec import SUMMARY as TRAINING_SUMMARY

logger = logging.getLogger(__name__)

NUM_SAMPLES = 32  # images per arm in the report
COMPARISON_FORMAT = FileFormat(
    "comparison result", renamed={"flops_a_sample": "flops_per_sample", "drawing_seconds": "generation_seconds"}
)
REPORT, SUMMARY, RESULT = "report.html", "summary.json", "result.json"
# Fields that no result depends on, or that name files whose digests are in the identity instead.
_NOT_IN_IDENTITY = (
    "pretrain.output_dir", "pretrain.tracking", "pretrain.preview_captions", "pretrain.train.seed", "pretrain.train.resume",
    "pretrain.train.heldout_sources", "pretrain.data.sources", "pretrain.model.text_encoder.path",
    "pretrain.model.autoencoder.path", "evaluation.checkpoint", "evaluation.output_dir", "evaluation.tracking",
    "evaluation.suite", "evaluation.data_roots", "evaluation.quality.prompts", "evaluation.quality.reference",
    "evaluation.num_workers", "evaluation.cpus_per_worker", "evaluation.gpus_per_worker", "pretrain.data.placement",
    "pretrain.train.placement", "evaluation.placement",
)  # fmt: skip


# --- The runs -------------------------------------------------------------------------------------------------------------------


def plan_comparison(config: CompareConfig) -> ComparisonPlan:
    """Check everything that needs no cluster, and find the runs that are left to do. Raises ConfigError and DataError."""
    identity = _identity(config)
    fields, results, selected_on = _read_summary(config, identity)
    for arm in config.arms:
        if fields.setdefault(arm, config.fields_of(arm)) != config.fields_of(arm):
            raise ConfigError(f"own_arms.{arm}: {config.output_dir} has one with {fields[arm]}; use another name")
    pending = []
    for arm, seed in config.runs():
        known = results.setdefault(arm, {})
        figures = None if seed in known else _read_result(config, identity, arm, seed)
        if figures is not None and not _content_difference(results, figures):
            known[seed] = figures
        if seed not in known:
            pending.append((arm, seed))
    # A seed on which something was chosen once is never fresh again.
    return ComparisonPlan(identity, fields, results, pending, tuple(sorted({*selected_on, *config.selection_seeds})))


def compare(config: CompareConfig, plan: ComparisonPlan, recipe: str, command: str) -> ComparisonSummary:
    """Do the runs that are left, one after the other, on the connected cluster.

    Write summary.json after every run, and report.html and samples/ at the end. Return the summary, which lists the runs that
    failed.

    Raises:
        Stopped: the job received SIGTERM.
    """
    start = time.monotonic()
    failures: list[str] = []

    def save() -> ComparisonSummary:
        summary = summarize(plan, failures)
        storage.write_bytes(storage.join(config.output_dir, SUMMARY), to_json(COMPARISON_FORMAT.stamp(summary)))
        return summary

    params = {"arms": plan.fields, "seeds": list(config.seeds), **plan.identity}
    with start_parent_run(config, "comparison", recipe, command, params) as (tracker, tracking):
        summary = save()  # before the first run: it identifies the comparison in this folder
        for number, (arm, seed) in enumerate(plan.pending, 1):
            print(f"run {number} of {len(plan.pending)}: {arm}, seed {seed}", flush=True)
            try:
                run_tracking = replace(tracking, run_name=f"{arm} seed {seed}")
                figures = measure(config, plan.identity, arm, seed, recipe, run_tracking)
                if difference := _content_difference(plan.results, figures):
                    raise DataError(difference)
                plan.results[arm][seed] = figures
            except Stopped:
                raise
            except Exception as error:  # the other runs continue
                if not isinstance(error, UserError):
                    logger.error("an unexpected error\n%s", redacted_traceback(error))
                failures.append(f"{arm}, seed {seed}: {describe_error(error)}")
                print(f"failed: {failures[-1]}", flush=True)
            summary = save()
        details: ComparisonDetails = {
            "title": f"Comparison {recipe}",
            "created": datetime.now().isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            "code_version": code_version(),
            "command": command,
            **summary,
            "grids": _read_grids(config),
            "curves": _read_curves(config),
        }
        _write_report(config, tracker, summary, details)
    return summary


def measure(config: CompareConfig, identity: Fields, arm: str, seed: int, recipe: str, tracking: TrackingConfig) -> RunFigures:
    """Train an arm with a seed, or resume its training, and evaluate it. Write result.json and return the figures.

    Raises:
        ConfigError, DataError, TrainingError: the run is not possible, or it failed.
    """
    pretrain, url = replace(config.pretrain_of(arm, seed), tracking=tracking), config.run_dir(arm, seed)
    training = storage.join(url, TRAINING_SUMMARY)
    if not storage.exists(training) or storage.read_json(training)["num_steps"] != pretrain.train.num_steps:
        pretrain.run(recipe).fit()
    evaluation = config.evaluation_of(arm, seed)
    details = evaluate(evaluation, plan_evaluation(evaluation))
    if details["failures"]:
        raise DataError("; ".join(details["failures"]))
    newest = checkpoint_format.list_checkpoints(url)[0]
    manifest = checkpoint_format.read_manifest(newest)
    figures = _scores(details) | _costs(manifest, details) | {"environment": describe_cluster(), "contents": _contents(details)}
    tracked = storage.read_json(storage.join(url, RUN_RECORD))
    curve = metric_history(restored(tracked["tracking_uri"], tracking.uri), tracked["run_id"], "heldout/", url)
    result = {
        "arm": arm,
        "seed": seed,
        "config": identity,
        "fields": config.fields_of(arm),
        "figures": figures,
        "metrics": metrics_for_tracking(details),
        "curve": [{"samples": step * manifest.global_batch_size, "metrics": metrics} for step, metrics in curve.items()],
        "checkpoint": newest,
        "run_id": tracked["run_id"],
        "code_version": code_version(),
    }
    storage.write_bytes(storage.join(url, RESULT), to_json(COMPARISON_FORMAT.stamp(result)))
    return figures


def _contents(details: EvaluationDetails) -> dict[str, str]:
    """Return the digests of what was read of each set and of the reference images."""
    contents = {result["set"]: result["content_digest"] for result in [*details["zero_shot"], *details["retrieval"]]}
    if reference := next((str(entry["protocol"]["reference_content"]) for entry in details["quality"]), ""):
        contents["quality.reference"] = reference
    return contents


def _content_difference(results: Results, figures: RunFigures) -> str:
    """Return which data are not those of the earlier runs, so that the arms cannot be compared; "" if all are the same."""
    for arm, runs in results.items():
        for seed, earlier in runs.items():
            for name, digest in figures.get("contents", {}).items():
                if digest != (before := earlier.get("contents", {}).get(name, digest)):
                    return (
                        f"{name}: its data are not those of {arm}, seed {seed} (content digest {digest}, not {before}); restore "
                        "them and repeat the command, or compare in another output_dir"
                    )
    return ""


def _scores(details: EvaluationDetails) -> dict[str, float]:
    """Return the scores of an evaluation; those that the model does not have are absent.

    They are the headline metrics, accuracy_<set>, and the image quality as fd, fd_infinity and kid, each also of the best image
    of n (`fd_best_of_<n>`) if it was measured: of the first feature network at the first guidance scale.
    """
    model, scores = details["models"][0]["name"], headline(details)
    if details["quality"]:
        quality = details["quality"][0]["metrics"]
        distance = next(iter(quality))  # fid, or fd_<network>
        kernel = "kid" + distance.removeprefix("fid").removeprefix("fd")
        names = {"fd": distance, "fd_infinity": f"{distance}_infinity", "kid": kernel}
        chosen = details["quality"][0]["protocol"].get("best_of", 1)
        names |= {f"{name}_best_of_{chosen}": f"{metric}_best_of_{chosen}" for name, metric in names.items()}
        scores = {name: value for name, value in scores.items() if name not in quality}
        scores |= {name: value for name, metric in names.items() if (value := quality.get(metric)) is not None}
    sets = {entry["set"]: entry["metrics"]["acc1"] for entry in details["zero_shot"] if entry["model"] == model}
    return scores | {f"accuracy_{name}": value for name, value in sets.items() if value is not None}


def _costs(manifest: checkpoint_format.Manifest, details: EvaluationDetails) -> dict[str, float]:
    """Return samples, seconds, trained parameters, FLOPs, and seconds of scoring and generation, summed over workers.

    The seconds of training are samples / mean throughput, so that they do not depend on interruptions.
    """
    metrics, parts = manifest.metrics, build_task(manifest.config).describe()["parameters"]
    flops = metrics["train/flops_per_second"] / metrics["train/samples_per_second"]
    costs = {
        "samples": manifest.samples_seen,
        "seconds": round(manifest.samples_seen / metrics["train/samples_per_second_mean"], 1),
        "parameters": sum(part["trained"] for part in parts.values()),
        "flops_per_sample": round(flops),
        "flops": round(flops * manifest.samples_seen),
    }
    if scored := [*details["zero_shot"], *details["retrieval"]]:
        costs["scoring_seconds"] = round(sum(entry["seconds"] for entry in scored), 1)
    if details["quality"]:
        costs["generation_seconds"] = round(sum(entry["seconds"] for entry in details["quality"]), 1)
    return costs


# --- Earlier results, which belong to this comparison if its identity is the same -----------------------------------------------


def _identity(config: CompareConfig) -> Fields:
    """Return the config that all runs share, with digests in place of the files that it names."""
    run = config.pretrain_of(config.arms[0], config.seeds[0]).run("")
    sets, _ = open_sets(config.evaluation)
    return redacted_values(_shared_fields(config)) | {
        "encoders": json.loads(json.dumps(run.describe_encoders())),
        "training_data": run.check().digest,
        # By names and sizes: a comparison continues after a copy of its data, and one of an earlier release is recognized. Each
        # run's `contents` are compared with those of the others.
        "sets": {name: data.names_digest for name, data in sets.items()},
        "quality": _quality_digests(config.evaluation.quality),
    }


def _shared_fields(config: CompareConfig) -> dict[str, Fields]:
    shared = json.loads(to_json({"pretrain": asdict(config.pretrain), "evaluation": asdict(config.evaluation)}))
    for field in _NOT_IN_IDENTITY:
        *groups, name = field.split(".")
        inner = shared
        for group in groups:
            inner = inner[group]
        inner.pop(name)
    return shared


def _quality_digests(config: QualityConfig) -> dict[str, str]:
    """Return digests of the prompts and of the reference images."""
    if not config.prompts:
        return {}
    prompts = hashlib.sha256("\n".join(read_prompts(config)).encode()).hexdigest()[:16]
    if config.reference.endswith(".npz"):
        return {"prompts": prompts, "reference": read_reference("evaluation.quality.reference", config.reference).digest}
    return {"prompts": prompts, "reference": open_image_set(config.reference).names_digest}


def _with_new_fields(identity: Fields) -> Fields:
    """Return an identity that earlier code wrote, with today's names and the defaults of the fields that were added since."""
    filled = with_defaults(with_current_names(identity), _shared_fields(CompareConfig()))
    model = filled["pretrain"]["model"]
    if gamma := model["schedule"]["gamma"]:  # its deprecated name
        model["schedule"] |= {"gamma": 0.0, "query_snr": gamma * model["text_encoder"]["embedding_dim"] ** 0.5}
    return filled


def _read_summary(config: CompareConfig, identity: Fields) -> tuple[dict[str, Fields], Results, list[int]]:
    """Return the arms' fields and results in an existing summary, and the seeds of choices.

    Raises ConfigError if it is of another comparison.
    """
    url = storage.join(config.output_dir, SUMMARY)
    if not storage.exists(url):
        return {}, {}, []
    try:
        summary = json.loads(storage.read_small(url))
        COMPARISON_FORMAT.check_version(summary, url)
        config_of_all = dict(summary["config"])
        fields = config_of_all.pop("arms")
        saved = _with_new_fields(config_of_all)
        results = {arm: {int(s): _with_current_names(run) for s, run in e["seeds"].items()} for arm, e in summary["arms"].items()}
        selected_on = [int(seed) for seed in summary.get("selected_on", ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"output_dir: {url} is not a summary of a comparison ({error}); remove it") from None
    if difference := first_difference(saved, identity):
        field, before, now = difference
        raise ConfigError(
            f"output_dir: {config.output_dir} holds another comparison ({field}: {before} there, {now} here); restore the value, "
            "or give another output_dir"
        )
    return fields, results, selected_on


def _read_result(config: CompareConfig, identity: Fields, arm: str, seed: int) -> RunFigures | None:
    """Return the figures of a run that finished with the same config."""
    url = storage.join(config.run_dir(arm, seed), RESULT)
    if not storage.exists(url):
        return None
    result = storage.read_json(url)
    COMPARISON_FORMAT.check_version(result, url)
    is_same = result["fields"] == config.fields_of(arm) and _with_new_fields(result["config"]) == identity
    return _with_current_names(result["figures"]) if is_same else None


def _with_current_names(figures: RunFigures) -> RunFigures:
    return {COMPARISON_FORMAT.renamed.get(name, name): value for name, value in figures.items()}


# --- The report -----------------------------------------------------------------------------------------------------------------


def _write_report(config: CompareConfig, tracker: Tracker, summary: ComparisonSummary, details: ComparisonDetails) -> None:
    """Write the report and sample images to the output folder and, with the metrics, to the tracked run."""
    files = {REPORT: comparison_page(details, CLAIM).encode()}
    for arm in details["grids"]:
        images = [Image.open(io.BytesIO(base64.b64decode(sample["png"]))) for sample in arm["samples"]]
        buffer = io.BytesIO()
        image_grid(images, [sample["caption"] for sample in arm["samples"]]).save(buffer, format="PNG")
        files[f"samples/{arm['arm']}_seed{arm['seed']}.png"] = buffer.getvalue()
    for name, content in files.items():
        storage.write_bytes(storage.join(config.output_dir, name), content)
        tracker.log_bytes(content, name)
    tracker.log_bytes(to_json(summary), SUMMARY)
    metrics = {f"mean/{arm}/{name}": value for arm, entry in summary["arms"].items() for name, value in entry["mean"].items()}
    for name, entry in summary["paired"].items():
        metrics |= {f"paired/{name}/{part}": entry[part] for part in ("mean", "low", "high", "n")}
        metrics[f"paired/{name}/detectable"] = entry.get("detectable")
    metrics["claim/holds"] = summary["claim"]["holds"]
    tracker.log_metrics({name: float(value) for name, value in metrics.items() if value is not None}, step=0)


def _read_grids(config: CompareConfig) -> list[ImageGrid]:
    """Return the first images of each arm that generates, for equal prompts and noise."""
    quality = config.evaluation.quality
    prompts = read_prompts(quality)[:NUM_SAMPLES] if quality.prompts else []
    grids: list[ImageGrid] = []
    for arm in config.arms if prompts else ():
        for seed in config.seeds:
            evaluation = config.evaluation_of(arm, seed)
            folder = images_dir(evaluation.output_dir, evaluation.name, quality.guidance_scales[0])
            samples = stored_samples(prompts, folder)
            if samples:
                grids.append({"arm": arm, "seed": seed, "samples": samples})
                break
    return grids


def _read_curves(config: CompareConfig) -> dict[str, dict[str, list[TrainingPoint]]]:
    """Return validation scores during training, by arm and seed, of the runs in the output folder."""
    urls = {(arm, str(seed)): storage.join(config.run_dir(arm, seed), RESULT) for arm in config.arms for seed in config.seeds}
    files = storage.read_many(list(urls.values()))
    curves: dict[str, dict[str, list[TrainingPoint]]] = {}
    for (arm, seed), url in urls.items():
        if url in files and (curve := json.loads(files[url])["curve"]):
            curves.setdefault(arm, {})[seed] = curve
    return curves
