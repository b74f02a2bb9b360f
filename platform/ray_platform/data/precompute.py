"""What the frozen encoders make of a source, computed once: Ray Data from tars to shards of `precomputed` rows.

Tasks read and decode on CPUs, actors encode (on a share of a GPU each, or on CPUs) and write one file a block; only counts
come back to the driver. A unit of the source is done when its record, `progress/<unit>.json`, is written, after all of its
files; what is done is not done again. The manifest comes last: without it nobody reads the folder.
"""

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

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
from ray_platform.data.config import DataConfig
from ray_platform.data.execution import data_context
from ray_platform.data.plan import Group, Item
from ray_platform.data.skip_counter import SkipCounter
from ray_platform.data.source import ShardSource, unpack
from ray_platform.placement import Labels, can_autoscale, describe_nodes, label_selector, total_resources

# Decoded bytes a file is made of, at most 512 images: at 256 px and Stable Diffusion's sizes it has 64 MB, a good size to read.
BLOCK_BYTES = 128 * 2**20
PROGRESS = "progress"


@dataclass(frozen=True)
class Encoders:
    """The actors."""

    build: Callable[[str], Encoder]  # by a torch device; importable, since it travels to the actors
    description: dict[str, Any]  # equal descriptions give equal results
    count: int = 1
    gpus: float = 0.0  # of each
    cpus: float = 1.0
    batch_size: int = 64  # images that an encoder is given at a time
    placement: Labels = field(default_factory=dict)  # of their nodes

    @property
    def device(self) -> str:
        return "cuda" if self.gpus else "cpu"


@dataclass
class Done:
    """What is known of one unit."""

    total: int = 0  # samples and rejects, once a block of it has come
    rows: int = 0
    shards: dict[str, int] = field(default_factory=dict)  # file -> samples
    rejected: Counter[str] = field(default_factory=Counter)
    lost: bool = False  # storage did not give it: to be tried again by the next run


def check(catalog: Catalog, config: DataConfig) -> None:
    """Raise ConfigError for what cannot be precomputed."""
    if catalog.manifest is not None:
        raise ConfigError("data.sources: these shards are precomputed already; name the tars that they were made of")
    for name, default in (("aspect_ratios", ()), ("crop", "centre"), ("weights", ())):
        if getattr(config, name) != default:
            raise ConfigError(f"data.{name}: cannot be had with precomputed shards, whose images are all one shape and cut once")


def precompute(catalog: Catalog, config: DataConfig, encoders: Encoders, output_dir: str) -> Iterator[dict[str, Any]]:
    """Encode what is not done yet; yields {shards_done, shards, samples, samples_per_second} as units get done.

    Needs a running Ray. The manifest is written at the end. Raises ConfigError for a cluster too small; DataError for a folder
    that holds something else, for a shard that changed, and when more than `max_skipped_share` of the samples were skipped.
    """
    check_cluster(encoders, config.placement)
    manifest = _manifest(catalog, config, encoders)
    units = dict(enumerate(catalog.pools[0]))
    _check_stems(units.values())
    done = _resume(output_dir, manifest, units)
    skips, begun = SkipCounter("precompute", config.max_skipped_share), time.perf_counter()
    for record in _records({n: unit for n, unit in units.items() if n not in done}, config, encoders, output_dir):
        if unit_done := _collect(record, done, skips):
            unit, now = unit_done
            if not now.lost:
                content = json.dumps({"shards": now.shards, "rejected": now.rejected}).encode()
                storage.write_bytes(storage.join(output_dir, PROGRESS, f"{stem(units[unit])}.json"), content)
            yield {
                "shards_done": sum(known.rows == known.total for known in done.values()),
                "shards": len(units),
                "samples": skips.seen - skips.bad.total(),
                "samples_per_second": skips.seen / (time.perf_counter() - begun),
            }
    _finish(output_dir, manifest, done)


def stem(unit: ShardRange) -> str:
    """A unit's part of the names of its files, unique in the catalog."""
    name = unit.shard.name.removesuffix(".tar").replace("/", "--")
    return name if unit.whole else f"{name}-at-{unit.start}"


def _check_stems(units: Iterable[ShardRange]) -> None:
    """Raise DataError where two units' files would have one name: `a/b.tar` beside `a--b.tar`."""
    names: dict[str, str] = {}
    for unit in units:
        if (other := names.setdefault(stem(unit), unit.shard.url)) != unit.shard.url:
            raise DataError(f"{unit.shard.url}: would be precomputed under the names of {other}; rename one of them")


def check_cluster(encoders: Encoders, readers: Labels) -> None:
    """Raise ConfigError when the encoders, and one task that decodes, do not fit: they would wait without a word."""
    if can_autoscale():
        return
    cpus, gpus = encoders.count * encoders.cpus, encoders.count * encoders.gpus
    beside = readers.items() <= encoders.placement.items()  # all of the encoders' nodes may read, too
    for labels, kind, amount in (
        (readers, "CPU", 1 + cpus * beside),
        (encoders.placement, "CPU", cpus),
        (encoders.placement, "GPU", gpus),
    ):
        there = total_resources(labels).get(kind, 0)
        if amount > there:
            raise ConfigError(
                f"num_encoders: {encoders.count} with {encoders.cpus:g} CPUs and {encoders.gpus:g} GPUs each, and a CPU to "
                f"decode, need {amount:g} {kind}s, but {describe_nodes(labels)} has {there:g}; "
                "lower num_encoders, cpus_per_encoder or gpus_per_encoder"
            )


def _manifest(catalog: Catalog, config: DataConfig, encoders: Encoders) -> dict[str, Any]:
    """What must be equal for the work to go on in the same folder."""
    settings = {name: asdict(config)[name] for name in precomputed.SETTINGS}
    described = {"encoders": encoders.description, "settings": settings, "source": catalog.digest}
    return json.loads(json.dumps(described))  # tuples become lists, as they are when it is read back


def _resume(output_dir: str, manifest: dict[str, Any], units: dict[int, ShardRange]) -> dict[int, Done]:
    """The units that are done; begins the folder where there is none."""
    url = storage.join(output_dir, MANIFEST)
    if not storage.exists(url):
        storage.write_bytes(url, json.dumps(manifest | {"complete": False}, indent=2).encode())
        return {}
    try:
        found = json.loads(storage.read_small(url, storage.LISTING_BYTES))
        differing = [name for name in manifest if found[name] != manifest[name]]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{url}: is no manifest of precomputed shards; give another output_dir") from None
    if differing:
        raise DataError(
            f"{output_dir}: was begun with another {' and '.join(differing)} (see its {MANIFEST}); give another output_dir"
        )
    by_url = {storage.join(output_dir, PROGRESS, f"{stem(unit)}.json"): number for number, unit in units.items()}
    folder = storage.join(output_dir, PROGRESS)
    written = {file.url for file in storage.list_files(folder)} if storage.exists(folder) else set()
    contents = storage.read_many([url for url in by_url if url in written])
    records = {by_url[url]: json.loads(content) for url, content in contents.items()}
    return {number: Done(shards=r["shards"], rejected=Counter(r["rejected"])) for number, r in records.items()}


def _records(units: dict[int, ShardRange], config: DataConfig, encoders: Encoders, output_dir: str) -> Iterator[dict[str, Any]]:
    """What the encoders report of each block, in any order."""
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
    """An actor: encodes a block's images and captions, and writes the result as one shard."""

    def __init__(self, encoders: Encoders, output_dir: str, stems: dict[int, str], retry_seconds: float):
        torch.set_num_threads(max(1, int(encoders.cpus)))
        self.encode = encoders.build(encoders.device).encode
        self.batch_size, self.output_dir, self.stems, self.retry_seconds = encoders.batch_size, output_dir, stems, retry_seconds

    def __call__(self, table: pa.Table) -> pa.Table:
        """Returns one row: {unit, total, rows, shard, samples, rejects: [[key, cause]]} as JSON."""
        block = unpack(table)
        header = block.header
        item = header["items"][0]
        name = f"{self.stems[item[2]]}-{min(header['order']):07d}.arrow"
        good = [row for row, cause in enumerate(header["cause"]) if not cause]
        if good:
            self._write(name, [header["key"][r] for r in good], [header["caption"][r] for r in good], block.stacks[0]["image"])
        record = {
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
        content = precomputed.to_arrow(keys, captions, encoded)
        write = functools.partial(storage.write_bytes, storage.join(self.output_dir, name), content)
        storage.with_retries(write, self.retry_seconds)


def _collect(record: dict[str, Any], done: dict[int, Done], skips: SkipCounter) -> tuple[int, Done] | None:
    """Count a block; the unit and what is known of it when this was its last."""
    number, total = record["item"][2:4]
    now = done.setdefault(number, Done(total))
    now.rows += record["rows"]
    if record["samples"]:
        now.shards[record["shard"]] = record["samples"]
        skips.count_good(record["item"], record["samples"])
    for key, cause in record["rejects"]:
        now.rejected[cause] += skips.count_reject(key, cause, record["item"])
        now.lost |= cause in ("shard_missing", "shard_forbidden", "shard_unavailable")
    return (number, now) if now.rows == now.total else None


def _finish(output_dir: str, manifest: dict[str, Any], done: dict[int, Done]) -> None:
    shards = {name: count for known in done.values() for name, count in known.shards.items()}
    rejected = sum((known.rejected for known in done.values()), Counter())
    if not shards:
        raise DataError(f"data.sources: no sample can be used ({dict(rejected)}); see jobs/inspect_data.py")
    content = manifest | {
        "complete": True,
        "samples": sum(shards.values()),
        "rejected": dict(rejected),
        "shards": dict(sorted(shards.items())),
    }
    storage.write_bytes(storage.join(output_dir, MANIFEST), json.dumps(content, indent=2).encode())
