"""What a run is, for those who find it in the tracker: its name, tags, description and data sets."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_platform.data.catalog import Catalog, build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.tracking import DataSet
from ray_platform.train.config import TrainConfig


def dated(recipe: str) -> str:
    """`demo-1125-2143`: a name for what begins now (UTC)."""
    return f"{recipe}-{time.strftime('%m%d-%H%M', time.gmtime())}"


def tags(recipe: str, output_dir: str, code_version: str) -> dict[str, str]:
    """By which runs are searched and grouped. `mlflow.source.*` is what MLflow's pages show as a run's source."""
    found = {
        "recipe": recipe,
        "code_version": code_version,
        "output_dir": output_dir,
        "mlflow.source.name": f"recipe {recipe}",
        "mlflow.source.type": "JOB",
    }
    if code_version.startswith("git-"):
        found["mlflow.source.git.commit"] = code_version.removeprefix("git-")
    return found


def description(recipe: str, command: str, train: TrainConfig, data_sets: Iterable[DataSet], output_dir: str) -> str:
    """Markdown: what a pretraining is, and where the rest of it is."""
    workers = f"{train.min_workers} to {train.max_workers} workers" if train.elastic else f"{train.max_workers} workers"
    if train.max_workers == 1:
        workers = "one worker"
    lines = [
        f"Pretraining by the recipe `{recipe}`, seed {train.seed}: {train.num_steps:,} steps on {workers}, "
        f"ZeRO {train.zero_stage}.",
        "",
        *(f"- {data.context} data: {_counted(data.counts)} in `{data.url}` (digest `{data.digest}`)" for data in data_sets),
        f"- output: `{output_dir}` (checkpoints, `export/`, `config.yaml`)",
    ]
    return with_command("\n".join(lines), command)


def with_command(text: str, command: str) -> str:
    """A description and what was typed."""
    return f"{text}\n\n```\n{command}\n```" if command else text


def data_sets(catalog: Catalog, config: DataConfig, train: TrainConfig) -> list[DataSet]:
    """The sources that are trained on, one by one, and the held-out ones that are scored meanwhile."""
    found = _of_sources(catalog, config.sources, "training")
    if train.heldout_sources:
        heldout = build_catalog(replace(config, sources=train.heldout_sources, weights=()))
        found += _of_sources(heldout, train.heldout_sources, "heldout")
    return found


def _of_sources(catalog: Catalog, sources: Sequence[str], context: str) -> list[DataSet]:
    found = []
    for number, source in enumerate(sources):
        if shards := catalog.of_source(number):  # none: others named all of them before
            # Unlike the catalog's digest, the same in every mixture and however the shards are read.
            digest = hashlib.sha256(json.dumps([(shard.name, shard.size) for shard in shards]).encode()).hexdigest()[:16]
            counts = {"num_shards": len(shards), "num_bytes": sum(shard.size for shard in shards)}
            if min(shard.num_samples for shard in shards) >= 0:
                counts["num_samples"] = sum(shard.num_samples for shard in shards)
            found.append(DataSet(_name(source), digest, source, context, counts))
    return found


def _name(source: str) -> str:
    """The last part of a source's path that is no pattern: `train` of s3://bucket/train/part-*.tar."""
    parts = source.rpartition("://")[2].strip("/").split("/")
    plain = [part for part in parts if not set(part) & set("*?[{")]
    return plain[-1] if plain else source


def _counted(counts: Mapping[str, Any]) -> str:
    samples = f"{counts['num_samples']:,} samples, " if "num_samples" in counts else ""
    return f"{samples}{counts['num_shards']:,} shards, {counts['num_bytes'] / 1e6:,.1f} MB"
