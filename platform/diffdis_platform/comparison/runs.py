"""One run of an arm: trained, evaluated, and what it gave and cost."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffdis_platform.comparison.plan import RESULT
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.evaluation.headline import headline
from diffdis_platform.evaluation.run import evaluate
from diffdis_platform.evaluation.run import plan as plan_evaluation
from diffdis_platform.exporting import build_task
from ray_platform import storage
from ray_platform.connect import describe_cluster
from ray_platform.contracts import DataError
from ray_platform.evaluate.results import metrics_for_tracking
from ray_platform.json_values import to_json
from ray_platform.redaction import restored
from ray_platform.tracking import RUN_RECORD, TrackingConfig, metric_history
from ray_platform.tracking.run_metadata import code_version
from ray_platform.train import checkpoint_format
from ray_platform.train.launch import SUMMARY as TRAINED

_CURVE = "heldout/"  # what is scored while training


def measure(
    config: CompareConfig, identity: Mapping[str, Any], arm: str, seed: int, recipe: str, tracking: TrackingConfig
) -> dict[str, Any]:
    """Train the arm with that seed, or go on with it, and evaluate it. Writes result.json and returns its figures.

    Raises ConfigError, DataError and TrainingError.
    """
    pretrain, url = dataclasses.replace(config.pretrain_of(arm, seed), tracking=tracking), config.run_dir(arm, seed)
    if not _is_trained(pretrain):
        pretrain.run(recipe).fit()
    wanted = config.evaluation_of(arm, seed)
    details = evaluate(wanted, plan_evaluation(wanted))
    if details["failures"]:
        raise DataError("; ".join(details["failures"]))
    newest = checkpoint_format.list_checkpoints(url)[0]
    manifest = checkpoint_format.read_manifest(newest)
    figures = scores(details) | _costs(manifest, details) | {"environment": describe_cluster()}
    tracked = storage.read_json(storage.join(url, RUN_RECORD))
    curve = metric_history(restored(tracked["tracking_uri"], tracking.uri), tracked["run_id"], _CURVE, url)
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
    """To the last step, with the model exported."""
    url = storage.join(config.output_dir, TRAINED)
    return storage.exists(url) and storage.read_json(url)["num_steps"] == config.train.num_steps


def scores(details: Mapping[str, Any]) -> dict[str, float]:
    """The figures that arms are compared by, of an evaluation's details; those that the model does not have are absent.

    Those of `headline`, with accuracy_<set>, and image quality as fd, fd_infinity and kid: of the first feature network at the
    first guidance scale.
    """
    model, found = details["models"][0]["name"], headline(details)
    if details["quality"]:
        quality = details["quality"][0]["metrics"]
        distance = next(iter(quality))  # fid, or fd_<network>
        kernel = "kid" + distance.removeprefix("fid").removeprefix("fd")
        named = {"fd": distance, "fd_infinity": f"{distance}_infinity", "kid": kernel}
        found = {name: value for name, value in found.items() if name not in quality}
        found |= {name: quality[metric] for name, metric in named.items() if metric in quality}
    of_sets = {entry["set"]: entry["metrics"]["acc1"] for entry in details["zero_shot"] if entry["model"] == model}
    return found | {f"accuracy_{name}": value for name, value in of_sets.items()}


def _costs(manifest: checkpoint_format.Manifest, details: Mapping[str, Any]) -> dict[str, float]:
    """samples; seconds of training at the rate at which it ended, without checkpoints and scores, so that they do not depend on
    how often it was cut off; trained parameters; operations; and the workers' seconds of scoring and drawing."""
    metrics, parts = manifest.metrics, build_task(manifest.config).describe()["parameters"]
    flops = metrics["train/flops_per_second"] / metrics["train/samples_per_second"]
    scored = [entry["seconds"] for kind in ("zero_shot", "retrieval") for entry in details[kind]]
    costs = {
        "samples": manifest.samples_seen,
        "seconds": round(manifest.samples_seen / metrics["train/samples_per_second_mean"], 1),
        "parameters": sum(part["trained"] for part in parts.values()),
        "flops_a_sample": round(flops),
        "flops": round(flops * manifest.samples_seen),
    }
    if scored:
        costs["scoring_seconds"] = round(sum(scored), 1)
    if details["quality"]:
        costs["drawing_seconds"] = round(sum(entry["seconds"] for entry in details["quality"]), 1)
    return costs
