"""How a pretraining is described in the tracker: its name, its tags, and the datasets that it reads."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray_platform.data.catalog import Catalog, build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.tracking import RunMetadata, TrackedData
from ray_platform.tracking.run_metadata import append_command, dated_name, run_tags
from ray_platform.train.config import TrainConfig


def pretraining_metadata(
    params: Mapping[str, Any],
    catalog: Catalog,
    data: DataConfig,
    train: TrainConfig,
    output_dir: str,
    *,
    command: str,
    code_version: str,
) -> RunMetadata:
    """Describe a pretraining with the resolved configuration `params`. Raises DataError if a held-out source is missing."""
    recipe = str(params.get("recipe", "run"))
    datasets = tracked_data(catalog, data, train)
    return RunMetadata(
        f"{dated_name(recipe)}-seed{train.seed}",
        description(recipe, command, train, datasets, output_dir),
        run_tags(recipe, output_dir, code_version) | {"data.sources": ", ".join(data.sources)},
        params,
        datasets,
    )


def description(recipe: str, command: str, train: TrainConfig, datasets: Iterable[TrackedData], output_dir: str) -> str:
    """Describe a pretraining in Markdown."""
    workers = f"{train.min_workers} to {train.max_workers} workers" if train.elastic else f"{train.max_workers} workers"
    if train.max_workers == 1:
        workers = "one worker"
    lines = [
        f"Pretraining by the recipe `{recipe}`, seed {train.seed}: {train.num_steps:,} steps on {workers}, "
        f"ZeRO {train.zero_stage}.",
        "",
        *(f"- {part.context} data: {_format_counts(part.counts)} in `{part.url}` (digest `{part.digest}`)" for part in datasets),
        f"- output: `{output_dir}` (checkpoints, `export/`, `config.yaml`)",
    ]
    return append_command("\n".join(lines), command)


def tracked_data(catalog: Catalog, config: DataConfig, train: TrainConfig) -> list[TrackedData]:
    """Return the training sources, one by one, and the held-out ones. Raises DataError if a held-out source is missing."""
    datasets = _of_sources(catalog, config.sources, "training")
    if train.heldout_sources:
        heldout = build_catalog(replace(config, sources=train.heldout_sources, weights=()))
        datasets += _of_sources(heldout, train.heldout_sources, "heldout")
    return datasets


def _of_sources(catalog: Catalog, sources: Sequence[str], context: str) -> list[TrackedData]:
    datasets = []
    for number, source in enumerate(sources):
        if shards := catalog.of_source(number):  # empty if earlier sources already contain all of its shards
            # Unlike the catalog's digest, the same in every mixture and however the shards are read.
            digest = hashlib.sha256(json.dumps([(shard.name, shard.size) for shard in shards]).encode()).hexdigest()[:16]
            counts = {"num_shards": len(shards), "num_bytes": sum(shard.size for shard in shards)}
            if min(shard.num_samples for shard in shards) >= 0:
                counts["num_samples"] = sum(shard.num_samples for shard in shards)
            datasets.append(TrackedData(_source_name(source), digest, source, context, counts))
    return datasets


def _source_name(source: str) -> str:
    """Return the last part of a source's path that is not a pattern: `train` for s3://bucket/train/part-*.tar."""
    parts = source.rpartition("://")[2].strip("/").split("/")
    plain = [part for part in parts if not set(part) & set("*?[{")]
    return plain[-1] if plain else source


def _format_counts(counts: Mapping[str, Any]) -> str:
    samples = f"{counts['num_samples']:,} samples, " if "num_samples" in counts else ""
    return f"{samples}{counts['num_shards']:,} shards, {counts['num_bytes'] / 1e6:,.1f} MB"
