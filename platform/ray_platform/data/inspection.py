"""Inspecting a source before a run: every sample of some shards is read as training would read it, and counted."""

import hashlib
import io
import logging
import random
import time
import warnings
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import ray
import torch
from PIL import Image
from ray.exceptions import RayError, RayTaskError

from ray_platform import storage
from ray_platform.contracts import DataError, one_line
from ray_platform.data import filters
from ray_platform.data.catalog import Catalog, ShardRange
from ray_platform.data.causes import BAD_DATA, IGNORED, SHARD_CHANGED, SHARD_CRASHES, RejectedSample, samples_lost
from ray_platform.data.config import DataConfig
from ray_platform.data.decode import FORMATS, SIDEWAYS, exif_orientation, thumbnail_jpeg
from ray_platform.data.plan import Item
from ray_platform.data.source import Sample, open_samples
from ray_platform.data.tar import IMAGE_SUFFIXES, Record
from ray_platform.placement import label_selector, total_resources

logger = logging.getLogger(__name__)

EXAMPLES = 5  # keys per cause
THUMBNAILS = 48
DRY_RUN_SHARDS = 4
_CAPTION_CHARACTERS = 300  # shown per caption; some captions of the web are whole pages

_PIXELS = (0, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)
# Where each bin begins; the last bin is open.
EDGES: dict[str, tuple[float, ...]] = {
    "width": _PIXELS,
    "height": _PIXELS,
    "aspect_ratio": (0, 0.33, 0.5, 0.6, 0.7, 0.8, 0.95, 1.05, 1.25, 1.43, 1.67, 2, 3),  # width / height
    "image_bytes": tuple(1000 * kilobytes for kilobytes in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)),
    "caption_words": (1, 2, 3, 4, 6, 8, 11, 16, 21, 31, 51, 76, 101, 201),
    "caption_characters": (1, 6, 11, 21, 41, 61, 81, 121, 161, 241, 321, 501, 1001),
}


@dataclass
class Histogram:
    """Counts in fixed bins, the extremes and, in a summary, quantiles that are estimated from the bins."""

    edges: list[float]
    counts: list[int]
    minimum: float | None = None
    maximum: float | None = None
    p10: float | None = None
    p50: float | None = None
    p90: float | None = None

    def add(self, value: float) -> None:
        self.counts[max(0, bisect_right(self.edges, value) - 1)] += 1
        self._extend(value, value)

    def merge(self, other: "Histogram") -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        if other.minimum is not None and other.maximum is not None:
            self._extend(other.minimum, other.maximum)

    def quantile(self, fraction: float) -> float | None:
        """Estimate a quantile as if values were spread evenly in their bin; None without values."""
        if self.minimum is None or self.maximum is None:
            return None
        rank, below = fraction * sum(self.counts), 0
        for begin, end, count in zip(self.edges, [*self.edges[1:], self.maximum], self.counts, strict=True):
            if count and below + count >= rank:
                low, high = max(begin, self.minimum), min(max(end, begin), self.maximum)
                return low + (high - low) * (rank - below) / count
            below += count
        return self.maximum

    def _extend(self, minimum: float, maximum: float) -> None:
        self.minimum = minimum if self.minimum is None else min(self.minimum, minimum)
        self.maximum = maximum if self.maximum is None else max(self.maximum, maximum)


class Thumbnail(NamedTuple):
    """A sample of the contact sheet."""

    order: str  # a hash of the key: the sheet shows the samples that come first, however the work was split
    key: str
    caption: str
    size: tuple[int, int] | None  # (width, height) of the stored image, pixels
    jpeg: bytes  # the image as training sees it; empty for a precomputed sample


@dataclass
class Statistics:
    """Counts over some shard ranges. All but the two times merge exactly, however the shards were split.

    Sizes are those of all images whose header can be read, captions those of the used samples.
    """

    units: int = 0
    unusable_units: int = 0  # without a sample that can be used
    num_bytes: int = 0
    readable_units: int = 0
    num_samples: int = 0  # samples in the readable units, used or not
    used: int = 0
    upscaled: int = 0  # used images that are smaller than training asks for
    rejected: Counter[str] = field(default_factory=Counter)  # cause -> samples, except those of lost_units
    lost_units: Counter[str] = field(default_factory=Counter)  # cause -> units whose number of lost samples is not known
    truncated_samples: int = 0  # samples in the truncated ones of lost_units
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) for training -> used images
    examples: dict[str, list[str]] = field(default_factory=dict)  # cause -> its first keys, sorted
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(list(edges), [0] * len(edges)) for name, edges in EDGES.items()}
    )
    thumbnails: list[Thumbnail] = field(default_factory=list)  # sorted
    read_seconds: float = 0.0  # to read the units and find their samples
    decode_seconds: float = 0.0  # CPU time

    def count_rejected(self, key: str, cause: str, num_samples: int | None) -> None:
        """Count a rejection that stands for `num_samples`; None: for (the rest of) a unit of unknown size."""
        (self.lost_units if num_samples is None else self.rejected)[cause] += 1 if num_samples is None else num_samples
        self._add_examples(cause, [key])

    def count_used(self, sample: Sample, size: tuple[int, int] | None) -> None:
        """Count a sample that training would use. `size`: (width, height) of the stored image."""
        self.used += 1
        self.histograms["caption_words"].add(len(sample.caption.split()))
        self.histograms["caption_characters"].add(len(sample.caption))
        image = sample.tensors.get("image")
        if image is not None:
            height, width = image.shape[:2]
            self.shapes[height, width] += 1
            self.upscaled += bool(size and (size[0] < width or size[1] < height))
        order = hashlib.sha256(sample.key.encode()).hexdigest()[:16]
        if len(self.thumbnails) < THUMBNAILS or order < self.thumbnails[-1].order:
            caption = sample.caption[:_CAPTION_CHARACTERS] + "…" * (len(sample.caption) > _CAPTION_CHARACTERS)
            jpeg = b"" if image is None else thumbnail_jpeg(image)
            insort(self.thumbnails, Thumbnail(order, sample.key, caption, size, jpeg))
            del self.thumbnails[THUMBNAILS:]

    def merge(self, other: "Statistics") -> None:
        """Add the counts of other units."""
        for name, value in vars(self).items():
            if isinstance(value, int | float):
                setattr(self, name, value + getattr(other, name))
            elif isinstance(value, Counter):
                value.update(getattr(other, name))
        for cause, keys in other.examples.items():
            self._add_examples(cause, keys)
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)
        self.thumbnails = sorted([*self.thumbnails, *other.thumbnails])[:THUMBNAILS]

    def _add_examples(self, cause: str, keys: list[str]) -> None:
        self.examples[cause] = sorted([*self.examples.get(cause, []), *keys])[:EXAMPLES]


@dataclass(frozen=True)
class DryRun:
    """The first samples of some shards of a source, decoded."""

    num_shards: int
    good: int
    rejected: Mapping[str, int]  # cause -> samples
    example: Sample
    captions: tuple[str, ...]


def inspect_first_samples(catalog: Catalog, config: DataConfig, limit: int) -> DryRun:
    """Decode `limit` samples in this process: the first ones of a few shards, which are spread over the source.

    Raises DataError if none of the samples of a pool can be used.
    """
    units = spread_units(catalog, DRY_RUN_SHARDS)
    good: list[Sample] = []
    rejected: Counter[str] = Counter()
    for pool in catalog.pools:
        chosen, used = [unit for unit in pool if unit in units], len(good)
        causes: Counter[str] = Counter()
        details = BAD_DATA | IGNORED | filters.meanings(config.filters)
        for unit in chosen:
            shard = open_samples(Item(0, 0, 0, unit, []), config, seed=0)
            for place in range(min(-(-limit // len(units)), len(shard))):
                sample = shard.sample(place)
                if isinstance(sample, Sample):
                    good.append(sample)
                else:
                    causes[sample.cause] += 1
                    details[sample.cause] = sample.detail or details[sample.cause]
                    logger.warning("%s cannot be used: %s", sample.key, sample.cause)
        if len(good) == used:
            counts = ", ".join(f"{count} × {cause}" for cause, count in causes.most_common())
            main_cause, _ = causes.most_common()[0]
            raise DataError(
                f"{chosen[0].shard.url}: no sample tried in this shard and {len(chosen) - 1} more can be used ({counts}); "
                f"{main_cause}: {details[main_cause]}; correct the shards"
            )
        rejected += causes
    return DryRun(len(units), len(good), dict(rejected), good[0], tuple(sample.caption for sample in good))


def spread_units(catalog: Catalog, limit: int) -> list[ShardRange]:
    """Choose about `limit` units, always the same: a random one of each of as many equal parts of every pool. 0: all."""
    total = sum(catalog.num_units)
    if not limit or limit >= total:
        return [unit for pool in catalog.pools for unit in pool]
    rng = random.Random(0)
    chosen = []
    for pool in catalog.pools:
        parts = max(1, limit * len(pool) // total)  # at least one of every pool, however small
        borders = [len(pool) * part // parts for part in range(parts + 1)]
        chosen += [pool[rng.randrange(start, stop)] for start, stop in pairwise(borders)]
    return chosen


def inspect_units(units: Sequence[ShardRange], config: DataConfig) -> Iterator[Statistics]:
    """Inspect each unit in a Ray task with one CPU and yield the statistics in any order.

    A unit whose reader fails or dies counts as lost; the others continue.
    """
    task = ray.remote(inspect_unit).options(num_cpus=1, max_retries=1, label_selector=label_selector(config.placement))
    waiting = list(reversed(units))
    running: dict[ray.ObjectRef, ShardRange] = {}
    while waiting or running:
        while waiting and len(running) < cluster_cpus(config):
            unit = waiting.pop()
            running[task.remote(unit, config)] = unit
        (done,), _ = ray.wait(list(running))
        unit = running.pop(done)
        try:
            yield ray.get(done)
        except RayError as error:
            if isinstance(error, RayTaskError) and isinstance(error.cause, storage.StorageError):
                raise error.cause from None
            logger.warning("%s: its reader failed: %s", unit.shard.url, one_line(str(error).strip().splitlines()[-1]))
            yield _lost_unit(unit, SHARD_CRASHES)


def cluster_cpus(config: DataConfig) -> int:
    """Return the number of CPUs of the nodes that may read."""
    return max(1, int(total_resources(config.placement).get("CPU", 1)))


def inspect_unit(unit: ShardRange, config: DataConfig) -> Statistics:
    """Read all samples of a unit as training would, without Ray. Everything that is wrong with it is counted, not raised."""
    torch.set_num_threads(1)  # as in training: as many tasks run at once as there are cores for them
    started = time.perf_counter()
    try:
        shard = open_samples(Item(0, 0, 0, unit, []), config, seed=0)
    except storage.StorageError:  # of wrong credentials, for example: it concerns every shard
        raise
    except DataError:
        return _lost_unit(unit, SHARD_CHANGED)
    statistics = Statistics(units=1, num_bytes=unit.stop - unit.start, read_seconds=time.perf_counter() - started)
    for place in range(len(shard)):
        started = time.thread_time()  # CPU time: other processes may use this CPU, too
        sample = shard.sample(place)
        statistics.decode_seconds += time.thread_time() - started
        size = _count_image(statistics, shard.records[place])
        if isinstance(sample, Sample):
            statistics.count_used(sample, size)
        else:
            lost = samples_lost(sample.cause, unit.known_samples, len(shard))
            statistics.count_rejected(sample.key, sample.cause, lost)
            if lost is None and sample.cause == "tar_truncated":
                statistics.truncated_samples = len(shard) - 1
    statistics.unusable_units = int(not statistics.used)
    if not any(cause.startswith("shard_") for cause in statistics.examples):
        statistics.readable_units, statistics.num_samples = 1, len(shard)
    return statistics


def _lost_unit(unit: ShardRange, cause: str) -> Statistics:
    statistics = Statistics(units=1, unusable_units=1, num_bytes=unit.stop - unit.start)
    statistics.count_rejected(f"{unit.shard.name}/", cause, samples_lost(cause, unit.known_samples, 0))
    return statistics


def _count_image(statistics: Statistics, record: Record | Sample | RejectedSample) -> tuple[int, int] | None:
    """Count the image by its header; return its (width, height) after EXIF's rotation."""
    members = record.members if isinstance(record, Record) else {}
    content = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), b"")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                width, height = opened.size
                # If EXIF data did not precede the pixels, asking for it would decode them.
                if "exif" in opened.info and exif_orientation(opened) in SIDEWAYS:
                    width, height = height, width
        values = {"width": width, "height": height, "aspect_ratio": width / height, "image_bytes": len(content)}
    except Exception:
        return None  # Pillow raises nearly anything on broken files; decoding reports the cause
    for name, value in values.items():
        statistics.histograms[name].add(value)
    return width, height
