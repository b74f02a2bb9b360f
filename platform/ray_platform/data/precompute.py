"""Precomputing: the frozen encoders' results for a source, computed once. Ray Data turns tars into `precomputed` shards.

Tasks read and decode on CPUs; actors encode (on a fraction of a GPU each, or on CPUs) and write one file per block. Only counts
return to the driver. A unit of the source is complete when its record, `progress/<unit>.json`, is written, after all its files;
complete units are not computed again. The manifest is written last: without it, the folder cannot be read as a source.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypedDict, cast

import numpy as np
import pyarrow as pa
import ray
import ray.data
import torch
from ray.exceptions import RayTaskError

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, Encoder
from ray_platform.data import precomputed
from ray_platform.data.catalog import MANIFEST, Catalog, ShardRange
from ray_platform.data.causes import LOST
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import Group, Item
from ray_platform.data.skip_counter import SkipCounter
from ray_platform.data.source import ShardSource, data_context, unpack
from ray_platform.placement import Labels, can_autoscale, describe_nodes, label_selector, total_resources

# Decoded bytes per file, at most 512 images: with 256 px and Stable Diffusion's sizes a file has 64 MB, a good size to read.
BLOCK_BYTES = 128 * 2**20
PROGRESS = "progress"


@dataclass(frozen=True)
class EncoderPool:
    """How many actors encode, on which nodes, and with which encoder."""

    build: Callable[[str], Encoder]  # torch device -> encoder; importable, because it is sent to the actors
    description: precomputed.Description  # equal descriptions give equal results
    count: int = 1
    gpus: float = 0.0  # per actor
    cpus: float = 1.0  # per actor
    batch_size: int = 64  # images per call of an encoder
    placement: Labels = field(default_factory=dict)  # labels of their nodes

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


class BlockRecord(TypedDict):
    """What an actor reports of one block."""

    item: tuple[int, ...]  # the unit's entry in the header of the block
    rows: int  # samples and rejections
    shard: str  # file
    samples: int
    rejects: list[tuple[str, str]]  # (key, cause)


@dataclass
class UnitProgress:
    """What was computed of one unit."""

    total: int = 0  # samples and rejections, known from its first block on
    rows: int = 0
    shards: dict[str, int] = field(default_factory=dict)  # file -> samples
    rejected: Counter[str] = field(default_factory=Counter)
    is_lost: bool = False  # storage did not return it: the next run tries again

    @property
    def is_complete(self) -> bool:
        return self.rows == self.total


@dataclass(frozen=True)
class PrecomputeProgress:
    """Progress of the whole source."""

    shards_done: int
    shards: int
    samples: int  # encoded by this run
    samples_per_second: float


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
    """Encode what is not complete yet, and write the manifest at the end. Yields the progress after every unit.

    Needs a running Ray.

    Raises:
        ConfigError: the encoders do not fit on the cluster.
        DataError: `output_dir` contains something else, a shard changed, or more than `max_skipped_share` of the samples were
            skipped.
    """
    check_cluster(encoders, config.placement)
    manifest = _manifest(catalog, config, encoders)
    units = dict(enumerate(catalog.pools[0]))
    _check_stems(units.values())
    progress = _resume(output_dir, manifest, units)
    skips, started = SkipCounter("precompute", config.max_skipped_share), time.perf_counter()
    for record in _records({n: unit for n, unit in units.items() if n not in progress}, config, encoders, output_dir):
        number = record["item"][2]
        unit = _count_block(record, progress, skips)
        if not unit.is_complete:
            continue
        if not unit.is_lost:
            content = json.dumps({"shards": unit.shards, "rejected": unit.rejected}).encode()
            storage.write_bytes(storage.join(output_dir, PROGRESS, f"{stem(units[number])}.json"), content)
        yield PrecomputeProgress(
            shards_done=sum(unit.is_complete for unit in progress.values()),
            shards=len(units),
            samples=skips.seen - skips.bad.total(),
            samples_per_second=skips.seen / (time.perf_counter() - started),
        )
    _write_manifest(output_dir, manifest, progress)


def stem(unit: ShardRange) -> str:
    """Return the first part of the names of a unit's files. It is unique in the catalog."""
    name = unit.shard.name.removesuffix(".tar").replace("/", "--")
    return name if unit.whole else f"{name}-at-{unit.start}"


def _check_stems(units: Iterable[ShardRange]) -> None:
    """Raise DataError if the files of two units would have the same name, as for `a/b.tar` and `a--b.tar`."""
    names: dict[str, str] = {}
    for unit in units:
        if (other := names.setdefault(stem(unit), unit.shard.url)) != unit.shard.url:
            raise DataError(f"{unit.shard.url}: its precomputed files would have the same names as those of {other}; rename one")


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


def _manifest(catalog: Catalog, config: DataConfig, encoders: EncoderPool) -> precomputed.PrecomputedManifest:
    """Return what must be equal for the work to be resumed in the same folder."""
    settings = {name: asdict(config)[name] for name in precomputed.SETTINGS}
    content = {"encoders": encoders.description, "settings": settings, "source": catalog.digest}
    return cast(precomputed.PrecomputedManifest, json.loads(json.dumps(content)))  # tuples become lists, as they are in the file


def _resume(output_dir: str, manifest: precomputed.PrecomputedManifest, units: dict[int, ShardRange]) -> dict[int, UnitProgress]:
    """Return the complete units; start the folder if it does not exist."""
    url = storage.join(output_dir, MANIFEST)
    if not storage.exists(url):
        storage.write_bytes(url, json.dumps({**manifest, "complete": False}, indent=2).encode())
        return {}
    try:
        stored = json.loads(storage.read_small(url, storage.LISTING_BYTES))
        differing = [name for name, value in manifest.items() if stored[name] != value]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{url}: is not a manifest of precomputed shards; name another output_dir") from None
    if differing:
        raise DataError(
            f"{output_dir}: was started with another {' and '.join(differing)} (see its {MANIFEST}); name another output_dir"
        )
    by_url = {storage.join(output_dir, PROGRESS, f"{stem(unit)}.json"): number for number, unit in units.items()}
    folder = storage.join(output_dir, PROGRESS)
    written = {file.url for file in storage.list_files(folder)} if storage.exists(folder) else set()
    contents = storage.read_many([url for url in by_url if url in written])
    records = {by_url[url]: json.loads(content) for url, content in contents.items()}
    return {number: UnitProgress(shards=r["shards"], rejected=Counter(r["rejected"])) for number, r in records.items()}


def _records(units: dict[int, ShardRange], config: DataConfig, encoders: EncoderPool, output_dir: str) -> Iterator[BlockRecord]:
    """Yield the record of each block that was encoded (see `EncodeBlock`), in any order."""
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
            fn_constructor_args=(encoders, output_dir, {n: stem(unit) for n, unit in units.items()}, config.retry_seconds),
            compute=ray.data.ActorPoolStrategy(size=encoders.count),
            num_cpus=encoders.cpus,
            num_gpus=encoders.gpus,
            label_selector=label_selector(encoders.placement),
            batch_size=None,
            batch_format="pyarrow",
        )
    try:
        for batch in records.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from map(json.loads, batch["record"].to_pylist())
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise DataError(str(error.cause).splitlines()[0]) from None
        raise


class EncodeBlock:
    """Actor that encodes the images and captions of blocks and writes each result as one shard."""

    def __init__(self, encoders: EncoderPool, output_dir: str, stems: dict[int, str], retry_seconds: float):
        torch.set_num_threads(max(1, int(encoders.cpus)))
        self.encode = encoders.build(encoders.device).encode
        self.batch_size, self.output_dir, self.stems, self.retry_seconds = encoders.batch_size, output_dir, stems, retry_seconds

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return one row: a BlockRecord as JSON."""
        block = unpack(table)
        header = block.header
        item = header["items"][0]
        name = f"{self.stems[item[2]]}-{min(header['order']):07d}.arrow"
        good = [row for row, cause in enumerate(header["cause"]) if not cause]
        if good:
            self._write(name, [header["key"][r] for r in good], [header["caption"][r] for r in good], block.stacks[0]["image"])
        record: BlockRecord = {
            "item": item,
            "rows": len(header["key"]),
            "shard": name,
            "samples": len(good),
            "rejects": [(key, cause) for key, cause in zip(header["key"], header["cause"], strict=True) if cause],
        }
        return pa.table({"record": [json.dumps(record)]})

    def _write(self, name: str, keys: Sequence[str], captions: Sequence[str], images: np.ndarray) -> None:
        starts = range(0, len(keys), self.batch_size)
        parts = [self.encode(images[at : at + self.batch_size], captions[at : at + self.batch_size]) for at in starts]
        encoded = {tensor: np.concatenate([part[tensor] for part in parts]) for tensor in parts[0]}
        with storage.retrying_for(self.retry_seconds):
            storage.write_bytes(storage.join(self.output_dir, name), precomputed.to_arrow(keys, captions, encoded))


def _count_block(record: BlockRecord, progress: dict[int, UnitProgress], skips: SkipCounter) -> UnitProgress:
    """Add a block to the progress of its unit, and return that."""
    number, total = record["item"][2:4]
    unit = progress.setdefault(number, UnitProgress(total))
    unit.rows += record["rows"]
    if record["samples"]:
        unit.shards[record["shard"]] = record["samples"]
        skips.count_good(record["item"], record["samples"])
    for key, cause in record["rejects"]:
        unit.rejected[cause] += skips.count_reject(key, cause, record["item"])
        unit.is_lost |= cause in LOST.values()
    return unit


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
    storage.write_bytes(storage.join(output_dir, MANIFEST), json.dumps(content, indent=2).encode())
