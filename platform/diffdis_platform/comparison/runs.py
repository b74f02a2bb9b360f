"""The (arm, seed) runs of a comparison: which ones are left to do, and the training and evaluation of one of them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.evaluate import QualityConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.evaluation.headline import headline
from diffdis_platform.evaluation.quality import ReferenceFeatures, read_prompts
from diffdis_platform.evaluation.run import evaluate, open_sets, plan_evaluation
from diffdis_platform.exporting import build_task
from ray_platform import storage
from ray_platform.connect import describe_cluster
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.discovery import open_image_set
from ray_platform.evaluate.results import metrics_for_tracking
from ray_platform.json_values import first_difference, to_json, with_defaults
from ray_platform.redaction import redacted_values, restored
from ray_platform.report.records import EvaluationDetails
from ray_platform.tracking import RUN_RECORD, TrackingConfig, metric_history
from ray_platform.tracking.run_metadata import code_version
from ray_platform.train import checkpoint_format
from ray_platform.train.worker_spec import SUMMARY as TRAINING_SUMMARY

SUMMARY, RESULT = "summary.json", "result.json"
# Fields that no result depends on, or that name files whose digests are in the identity instead.
_NOT_IN_IDENTITY = (
    "pretrain.output_dir", "pretrain.tracking", "pretrain.preview_captions", "pretrain.train.seed", "pretrain.train.resume",
    "pretrain.train.heldout_sources", "pretrain.data.sources", "pretrain.model.text_encoder.path",
    "pretrain.model.autoencoder.path", "evaluation.checkpoint", "evaluation.output_dir", "evaluation.tracking",
    "evaluation.suite", "evaluation.data_roots", "evaluation.quality.prompts", "evaluation.quality.reference",
    "evaluation.num_workers", "evaluation.cpus_per_worker", "evaluation.gpus_per_worker", "pretrain.data.placement",
    "pretrain.train.placement", "evaluation.placement",
)  # fmt: skip

ArmFields = Mapping[str, Any]  # config field -> value
RunFigures = Mapping[str, Any]  # scores and costs of a run by name, and its `environment`
Results = dict[str, dict[int, RunFigures]]  # arm -> seed -> figures


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison whose config was checked."""

    identity: Mapping[str, Any]  # everything that the figures depend on, except for arm and seed
    fields: dict[str, ArmFields]  # arm -> fields in which it differs
    results: Results  # of earlier calls; `compare` adds to them
    pending: list[tuple[str, int]]  # (arm, seed) in the order in which they run: all arms of a seed first


def plan_comparison(config: CompareConfig) -> ComparisonPlan:
    """Check everything that needs no cluster, and find the runs that are left to do. Raises ConfigError and DataError."""
    identity = _identity(config)
    fields, results = _read_summary(config, identity)
    for arm in config.arms:
        if fields.setdefault(arm, config.fields_of(arm)) != config.fields_of(arm):
            raise ConfigError(f"own_arms.{arm}: {config.output_dir} has one with {fields[arm]}; use another name")
    pending = []
    for seed in config.seeds:
        for arm in config.arms:
            known = results.setdefault(arm, {})
            if seed not in known and (figures := _read_result(config, identity, arm, seed)) is not None:
                known[seed] = figures
            if seed not in known:
                pending.append((arm, seed))
    return ComparisonPlan(identity, fields, results, pending)


def measure(
    config: CompareConfig, identity: Mapping[str, Any], arm: str, seed: int, recipe: str, tracking: TrackingConfig
) -> RunFigures:
    """Train an arm with a seed, or resume its training, and evaluate it. Write result.json and return the figures.

    Raises:
        ConfigError, DataError, TrainingError: the run is not possible, or it failed.
    """
    pretrain, url = replace(config.pretrain_of(arm, seed), tracking=tracking), config.run_dir(arm, seed)
    if not _is_trained(pretrain):
        pretrain.run(recipe).fit()
    evaluation = config.evaluation_of(arm, seed)
    details = evaluate(evaluation, plan_evaluation(evaluation))
    if details["failures"]:
        raise DataError("; ".join(details["failures"]))
    newest = checkpoint_format.list_checkpoints(url)[0]
    manifest = checkpoint_format.read_manifest(newest)
    figures = _scores(details) | _costs(manifest, details) | {"environment": describe_cluster()}
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
    storage.write_bytes(storage.join(url, RESULT), to_json(result))
    return figures


def _is_trained(config: PretrainConfig) -> bool:
    """Return whether the training reached its last step and exported the model."""
    url = storage.join(config.output_dir, TRAINING_SUMMARY)
    return storage.exists(url) and storage.read_json(url)["num_steps"] == config.train.num_steps


def _scores(details: EvaluationDetails) -> dict[str, float]:
    """Return the scores of an evaluation; those that the model does not have are absent.

    They are the headline metrics, accuracy_<set>, and the image quality as fd, fd_infinity and kid: of the first feature network
    at the first guidance scale.
    """
    model, scores = details["models"][0]["name"], headline(details)
    if details["quality"]:
        quality = details["quality"][0]["metrics"]
        distance = next(iter(quality))  # fid, or fd_<network>
        kernel = "kid" + distance.removeprefix("fid").removeprefix("fd")
        names = {"fd": distance, "fd_infinity": f"{distance}_infinity", "kid": kernel}
        scores = {name: value for name, value in scores.items() if name not in quality}
        scores |= {name: value for name, metric in names.items() if (value := quality.get(metric)) is not None}
    sets = {entry["set"]: entry["metrics"]["acc1"] for entry in details["zero_shot"] if entry["model"] == model}
    return scores | {f"accuracy_{name}": value for name, value in sets.items() if value is not None}


def _costs(manifest: checkpoint_format.Manifest, details: Mapping[str, Any]) -> dict[str, float]:
    """Return the costs of a run: samples, seconds, trained parameters, FLOPs, and seconds of scoring and generation, summed over
    workers. The seconds of training are samples / mean throughput, so that they do not depend on interruptions."""
    metrics, parts = manifest.metrics, build_task(manifest.config).describe()["parameters"]
    flops = metrics["train/flops_per_second"] / metrics["train/samples_per_second"]
    costs = {
        "samples": manifest.samples_seen,
        "seconds": round(manifest.samples_seen / metrics["train/samples_per_second_mean"], 1),
        "parameters": sum(part["trained"] for part in parts.values()),
        "flops_a_sample": round(flops),
        "flops": round(flops * manifest.samples_seen),
    }
    if scoring := [entry["seconds"] for kind in ("zero_shot", "retrieval") for entry in details[kind]]:
        costs["scoring_seconds"] = round(sum(scoring), 1)
    if details["quality"]:
        costs["drawing_seconds"] = round(sum(entry["seconds"] for entry in details["quality"]), 1)
    return costs


def _identity(config: CompareConfig) -> dict[str, Any]:
    """Return the config that all runs share, with digests in place of the files that it names."""
    run = config.pretrain_of(config.arms[0], config.seeds[0]).run("")
    sets, _ = open_sets(config.evaluation)
    return redacted_values(_shared_fields(config)) | {
        "encoders": json.loads(json.dumps(run.describe_encoders())),
        "training_data": run.check().digest,
        "sets": {name: data.digest for name, data in sets.items()},
        "quality": _quality_digests(config.evaluation.quality),
    }


def _shared_fields(config: CompareConfig) -> dict[str, Any]:
    shared: dict[str, Any] = json.loads(to_json({"pretrain": asdict(config.pretrain), "evaluation": asdict(config.evaluation)}))
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
    real = ReferenceFeatures.read(config.reference) if config.reference.endswith(".npz") else open_image_set(config.reference)
    return {"prompts": prompts, "reference": real.digest}


def _with_new_fields(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity that earlier code wrote, with the defaults of the fields that were added since."""
    defaults = _shared_fields(CompareConfig())
    filled = {**identity, **{part: with_defaults(identity[part], values) for part, values in defaults.items()}}
    model = filled["pretrain"]["model"]
    if gamma := model["schedule"]["gamma"]:  # its deprecated name
        model["schedule"] |= {"gamma": 0.0, "query_snr": gamma * model["text_encoder"]["embedding_dim"] ** 0.5}
    return filled


def _read_summary(config: CompareConfig, identity: Mapping[str, Any]) -> tuple[dict[str, ArmFields], Results]:
    """Return the arms' fields and results in an existing summary. Raises ConfigError if it is of another comparison."""
    url = storage.join(config.output_dir, SUMMARY)
    if not storage.exists(url):
        return {}, {}
    try:
        summary = json.loads(storage.read_small(url))
        arms, saved = summary["arms"], dict(summary["config"])
        results = {arm: {int(seed): figures for seed, figures in entry["seeds"].items()} for arm, entry in arms.items()}
        fields = saved.pop("arms")
        saved = _with_new_fields(saved)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"output_dir: {url} is not a summary of a comparison ({error}); remove it") from None
    if difference := first_difference(saved, identity):
        field, before, now = difference
        raise ConfigError(
            f"output_dir: {config.output_dir} holds another comparison ({field}: {before} there, {now} here); restore the value, "
            "or give another output_dir"
        )
    return fields, results


def _read_result(config: CompareConfig, identity: Mapping[str, Any], arm: str, seed: int) -> RunFigures | None:
    """Return the figures of a run that finished with the same config."""
    url = storage.join(config.run_dir(arm, seed), RESULT)
    if not storage.exists(url):
        return None
    result = json.loads(storage.read_small(url))
    is_same = result["fields"] == config.fields_of(arm) and _with_new_fields(result["config"]) == identity
    return result["figures"] if is_same else None
