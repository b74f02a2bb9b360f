"""Precomputing: the frozen encoders' results for a source, computed once. Ray Data turns tars into `precomputed` shards.

Tasks read and decode on CPUs; actors encode (on a fraction of a GPU each, or on CPUs) and write one file per block. Only counts
return to the driver. The actors are Ray Data's and not a `ReplicaPool`, whose replicas read their own work: here, decoding scales
on other nodes than encoding, and Ray Data moves the blocks between them.

A unit of the source is complete when its record, `progress/<unit>.json`, is written, after all its files;
complete units are not computed again. The manifest is written last: without it, the folder cannot be read as a source.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
import torch

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, Encoder
from ray_platform.data import precomputed
from ray_platform.data.catalog import MANIFEST, PRECOMPUTED_FORMAT, Catalog, ShardRange
from ray_platform.data.causes import LOST, SkipCounter, UnitCounts, check_skipped, num_bad
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import Group, Item
from ray_platform.data.source import ShardSource, data_context, data_errors, unpack
from ray_platform.json_values import JsonObject
from ray_platform.placement import Labels, can_autoscale, describe_nodes, label_selector, total_resources

# Decoded bytes per file, at most 512 images: with 256 px and Stable Diffusion's sizes a file has 64 MB, a good size to read.
BLOCK_BYTES = 128 * 2**20
PROGRESS = "progress"


@dataclass(frozen=True)
class EncoderPool:
    """How many actors encode, on which nodes, and with which encoder."""

    build: Callable[[str], Encoder]  # torch device -> encoder; importable, because it is sent to the actors
    description: JsonObject  # equal descriptions give equal results
    count: int = 1
    gpus: float = 0.0  # per actor
    cpus: float = 1.0  # per actor
    batch_size: int = 64  # images per call of an encoder
    placement: Labels = field(default_factory=dict)  # labels of their nodes


class BlockRecord(NamedTuple):
    """What an actor reports of one block."""

    unit: UnitCounts
    rows: int  # samples and rejections
    shard: str  # file
    samples: int
    rejects: list[tuple[str, str, str]]  # (key, cause, detail)


@dataclass
class UnitProgress:
    """What was computed of one unit."""

    rows: int = 0  # samples and rejections
    shards: dict[str, int] = field(default_factory=dict)  # file -> samples
    rejected: Counter[str] = field(default_factory=Counter)
    is_complete: bool = False
    is_lost: bool = False  # storage did not return it: the next run tries again

    def add(self, record: BlockRecord, skips: SkipCounter) -> None:
        """Count a block, also in `skips`."""
        self.rows += record.rows
        self.is_complete = self.rows == record.unit.total
        if record.samples:
            self.shards[record.shard] = record.samples
            skips.count_good(record.unit, record.samples)
        for key, cause, detail in record.rejects:
            self.rejected[cause] += skips.count_reject(key, cause, record.unit, detail)
            self.is_lost |= cause in LOST.values()


@dataclass(frozen=True)
class PrecomputeProgress:
    """Progress of the whole source."""

    shards_done: int
    shards: int
    shards_lost: int  # of shards_done; the next run tries them again
    samples: int  # encoded by this run
    samples_per_second: float
    seconds_left: float


def check(catalog: Catalog, config: DataConfig) -> None:
    """Raise ConfigError for a source or setting that cannot be precomputed."""
    if catalog.manifest is not None:
        raise ConfigError("data.sources: these shards are precomputed already; name the tars from which they were computed")
    for name, default in (("aspect_ratios", ()), ("crop", "centre"), ("weights", ())):
        if getattr(config, name) != default:
            raise ConfigError(
                f"data.{name}: does not work with precomputed shards (their images have one shape and one crop); leave it out"
            )


def precompute(catalog: Catalog, config: DataConfig, encoders: EncoderPool, output_dir: str) -> Iterator[PrecomputeProgress]:
    """Encode what is not complete yet, and write the manifest at the end. Yields the progress after every unit. Needs Ray.

    Raises ConfigError if the encoders do not fit on the cluster, and DataError if `output_dir` contains something else, a shard
    changed, or more than `max_skipped_fraction` of the samples were skipped.
    """
    check_cluster(encoders, config.placement)
    settings = {name: asdict(config)[name] for name in precomputed.SETTINGS}
    identity = {"encoders": encoders.description, "settings": settings, "source": catalog.digest}
    manifest: precomputed.PrecomputedManifest = json.loads(json.dumps(identity))  # tuples become lists, as they are in the file
    units, stems = catalog.pools[0], [stem(unit) for unit in catalog.pools[0]]
    if len(set(stems)) < len(stems):  # as for `a/b.tar` and `a--b.tar`
        name = Counter(stems).most_common(1)[0][0]
        one, other, *_ = (unit.shard.url for unit in units if stem(unit) == name)
        raise DataError(f"{other}: its precomputed files would have the same names as those of {one}; rename one")
    progress = _resume(output_dir, manifest, stems)
    skips, started = SkipCounter("precompute", catalog.size, config.max_skipped_fraction), time.perf_counter()
    left = {number: unit for number, unit in enumerate(units) if number not in progress}
    num_earlier = len(progress)
    for record in _records(left, stems, config, encoders, output_dir):
        number = record.unit.unit
        unit = progress.setdefault(number, UnitProgress())
        unit.add(record, skips)
        check_skipped(
            "precompute", skips.skipped, skips.num_good, skips.epoch_samples, config.max_skipped_fraction, skips.details
        )
        if unit.is_complete:
            if not unit.is_lost:
                content = json.dumps({"shards": unit.shards, "rejected": unit.rejected}).encode()
                storage.write_bytes(storage.join(output_dir, PROGRESS, f"{stems[number]}.json"), content)
            elapsed, done = time.perf_counter() - started, sum(unit.is_complete for unit in progress.values())
            yield PrecomputeProgress(
                shards_done=done,
                shards=len(units),
                shards_lost=sum(unit.is_lost for unit in progress.values()),
                samples=skips.num_good,
                samples_per_second=(skips.num_good + num_bad(skips.skipped)) / elapsed,
                seconds_left=elapsed * (len(units) - done) / (done - num_earlier),
            )
    _write_manifest(output_dir, manifest, progress)


def stem(unit: ShardRange) -> str:
    """Return the first part of the names of a unit's files."""
    name = unit.shard.name.removesuffix(".tar").replace("/", "--")
    return name if unit.is_whole_shard else f"{name}-at-{unit.start}"


def check_cluster(encoders: EncoderPool, readers: Labels) -> None:
    """Raise ConfigError if the encoders and one task that decodes do not fit: they would wait without a message."""
    if can_autoscale():
        return
    cpus, gpus = encoders.count * encoders.cpus, encoders.count * encoders.gpus
    shares_nodes = readers.items() <= encoders.placement.items()  # all nodes of the encoders may read, too
    for labels, kind, amount in (
        (readers, "CPU", 1 + cpus * shares_nodes),
        (encoders.placement, "CPU", cpus),
        (encoders.placement, "GPU", gpus),
    ):
        available = total_resources(labels).get(kind, 0)
        if amount > available:
            raise ConfigError(
                f"num_encoders: {encoders.count} with {encoders.cpus:g} CPUs and {encoders.gpus:g} GPUs each, and a CPU to "
                f"decode, need {amount:g} {kind}s, but {describe_nodes(labels)} has {available:g}; "
                "lower num_encoders, cpus_per_encoder or gpus_per_encoder"
            )


def _resume(output_dir: str, manifest: precomputed.PrecomputedManifest, stems: list[str]) -> dict[int, UnitProgress]:
    """Return the complete units of a folder with the same manifest; start the folder if it does not exist."""
    url = storage.join(output_dir, MANIFEST)
    if not storage.exists(url):
        storage.write_bytes(url, json.dumps(PRECOMPUTED_FORMAT.stamp({**manifest, "complete": False}), indent=2).encode())
        return {}
    try:
        stored = json.loads(storage.read_small(url, storage.LISTING_BYTES))
        PRECOMPUTED_FORMAT.check_version(stored, url)
        differing = [name for name, value in manifest.items() if stored[name] != value]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{url}: is not a manifest of precomputed shards; name another output_dir") from None
    if differing:
        raise DataError(
            f"{output_dir}: was started with another {' and '.join(differing)} (see its {MANIFEST}); name another output_dir"
        )
    folder = storage.join(output_dir, PROGRESS)
    written = {file.url for file in storage.list_folder(folder)} if storage.exists(folder) else set()
    number_of = {storage.join(folder, f"{name}.json"): number for number, name in enumerate(stems)}
    records = storage.read_many([url for url in number_of if url in written])
    return {
        number_of[url]: UnitProgress(shards=record["shards"], rejected=Counter(record["rejected"]), is_complete=True)
        for url, record in ((url, json.loads(content)) for url, content in records.items())
    }


def _records(
    units: dict[int, ShardRange], stems: list[str], config: DataConfig, encoders: EncoderPool, output_dir: str
) -> Iterator[BlockRecord]:
    """Encode units and yield the record of each block, in any order."""
    if not units:
        return
    tasks = [[Group(0, 0, (Item(0, 0, number, unit, []),))] for number, unit in units.items()]
    with ray.data.DataContext.current(data_context()):
        blocks = ray.data.read_datasource(
            ShardSource(tasks, config, seed=0, block_bytes=BLOCK_BYTES),
            override_num_blocks=len(tasks),
            num_cpus=1,
            label_selector=label_selector(config.placement),
        )
        records = blocks.map_batches(
            EncodeBlock,
            fn_constructor_args=(encoders, output_dir, stems, config.retry_seconds),
            compute=ray.data.ActorPoolStrategy(size=encoders.count),
            num_cpus=encoders.cpus,
            num_gpus=encoders.gpus,
            label_selector=label_selector(encoders.placement),
            batch_size=None,
            batch_format="pyarrow",
        )
    with data_errors():
        for batch in records.iter_batches(batch_size=None, batch_format="pyarrow"):
            for unit, *record in map(json.loads, batch["record"].to_pylist()):
                yield BlockRecord(UnitCounts(*unit), *record)


class EncodeBlock:
    """Actor that encodes the images and captions of blocks and writes each result as one shard."""

    def __init__(self, encoders: EncoderPool, output_dir: str, stems: list[str], retry_seconds: float):
        torch.set_num_threads(max(1, int(encoders.cpus)))
        self.encode = encoders.build("cuda" if encoders.gpus else "cpu").encode
        self.batch_size, self.output_dir, self.stems, self.retry_seconds = encoders.batch_size, output_dir, stems, retry_seconds

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return one row: a BlockRecord as JSON."""
        samples = unpack(table)
        unit = samples[0].unit
        name = f"{self.stems[unit.unit]}-{min(sample.order for sample in samples):07d}.arrow"
        good = [sample for sample in samples if not sample.cause]
        if good:
            keys, captions = [sample.key for sample in good], [sample.caption for sample in good]
            images = [sample.tensors["image"] for sample in good]
            parts = [slice(start, start + self.batch_size) for start in range(0, len(good), self.batch_size)]
            encoded = [self.encode(np.stack(images[part]), captions[part]) for part in parts]
            tensors = {tensor: np.concatenate([part[tensor] for part in encoded]) for tensor in encoded[0]}
            with storage.retrying_for(self.retry_seconds):
                storage.write_bytes(storage.join(self.output_dir, name), precomputed.to_arrow(keys, captions, tensors))
        rejects = [(sample.key, sample.cause, sample.caption) for sample in samples if sample.cause]
        return pa.table({"record": [json.dumps(BlockRecord(unit, len(samples), name, len(good), rejects))]})


def _write_manifest(output_dir: str, manifest: precomputed.PrecomputedManifest, progress: dict[int, UnitProgress]) -> None:
    shards = {name: count for unit in progress.values() for name, count in unit.shards.items()}
    rejected = sum((unit.rejected for unit in progress.values()), Counter())
    if not shards:
        raise DataError(f"data.sources: no sample can be used ({dict(rejected)}); see jobs/inspect_data.py")
    content: precomputed.PrecomputedManifest = {
        **manifest,
        "complete": True,
        "samples": sum(shards.values()),
        "rejected": dict(rejected),
        "shards": dict(sorted(shards.items())),
    }
    storage.write_bytes(storage.join(output_dir, MANIFEST), json.dumps(PRECOMPUTED_FORMAT.stamp(content), indent=2).encode())
