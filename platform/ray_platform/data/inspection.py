"""What is in a source, seen before a run."""

import io
import logging
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import ray
import torch
from PIL import Image
from ray.exceptions import RayError

from ray_platform.contracts import DataError
from ray_platform.data.catalog import Catalog, ShardRange
from ray_platform.data.causes import RejectedSample
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import Item
from ray_platform.data.source import Sample, TarSamples, open_samples
from ray_platform.data.statistics import Statistics, thumbnail_jpeg
from ray_platform.data.tar import IMAGE_SUFFIXES, Record
from ray_platform.placement import label_selector, total_resources

logger = logging.getLogger(__name__)

# Causes that end a run, so that no sample of one ever has them.
SHARD_CHANGED = "shard_changed"  # its length is not what was listed
SHARD_CRASHES = "shard_crashes"  # whoever reads it dies, or fails in a way that nobody foresaw

_FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow's others include readers that start programs
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values that swap width and height
_CAPTION_CHARACTERS = 300  # of the contact sheet's; some of the web's are whole pages


@dataclass(frozen=True)
class Inspection:
    """What a dry run saw."""

    good: int
    rejected: Mapping[str, int]  # cause -> samples
    example: Sample


def inspect_first_samples(catalog: Catalog, config: DataConfig, limit: int) -> Inspection:
    """Decode the first `limit` samples of the first shard, here, without Ray. Raises DataError when none is good."""
    first = catalog.pools[0][0]
    unit = open_samples(Item(0, 0, 0, first, []), config, seed=0)
    samples = [unit.sample(place) for place in range(min(limit, len(unit)))]
    good = [sample for sample in samples if isinstance(sample, Sample)]
    rejected = Counter(str(sample.cause) for sample in samples if isinstance(sample, RejectedSample))
    if not good:
        causes = ", ".join(f"{count} × {cause}" for cause, count in rejected.most_common())
        raise DataError(
            f"{first.shard.url}: none of its first {len(samples)} samples can be used ({causes}); a sample is an image "
            "(.jpg, .png or .webp) and a caption (.txt, or `caption` in .json) of the same name: correct the shards"
        )
    return Inspection(len(good), dict(rejected), good[0])


def spread_units(catalog: Catalog, limit: int) -> list[ShardRange]:
    """About `limit` units, always the same ones: one at random from each of as many equal stretches of every pool. 0: all."""
    total = sum(catalog.num_units)
    if not limit or limit >= total:
        return [unit for pool in catalog.pools for unit in pool]
    rng = random.Random(0)
    chosen = []
    for pool in catalog.pools:
        parts = max(1, limit * len(pool) // total)  # no pool goes unseen, however small
        borders = [len(pool) * part // parts for part in range(parts + 1)]
        chosen += [pool[rng.randrange(start, stop)] for start, stop in pairwise(borders)]
    return chosen


def inspect_unit(unit: ShardRange, config: DataConfig) -> Statistics:
    """Look at all samples of a unit as training would, here, without Ray. What is wrong with it is counted, not raised."""
    begun = time.perf_counter()
    try:
        opened = open_samples(Item(0, 0, 0, unit, []), config, seed=0)
    except DataError:
        return _lost(unit, SHARD_CHANGED)
    found = Statistics(units=1, num_bytes=unit.stop - unit.start, read_seconds=time.perf_counter() - begun)
    known = max(0, unit.known_samples)
    for place in range(len(opened)):
        begun = time.thread_time()  # not the clock's: others may be using this CPU too
        sample = opened.sample(place)
        found.decode_seconds += time.thread_time() - begun
        size = _count_image(found, opened.records[place]) if isinstance(opened, TarSamples) else None
        if isinstance(sample, Sample):
            _count_used(found, sample, size)
        elif sample.cause.startswith("shard_"):
            found.count_reject(sample.key, sample.cause, known)
        else:
            # A tar that breaks off takes along what it should have held beyond the samples that precede this reject.
            cut_off = known - (len(opened) - 1) if sample.cause == "tar_truncated" else 1
            found.count_reject(sample.key, sample.cause, max(1, cut_off))
    found.unusable_units = int(not found.used)
    if not any(cause.startswith("shard_") for cause in found.examples):
        found.readable_units, found.looked_at = 1, len(opened)
    return found


def _lost(unit: ShardRange, cause: str) -> Statistics:
    found = Statistics(units=1, unusable_units=1, num_bytes=unit.stop - unit.start)
    found.count_reject(f"{unit.shard.name}/", cause, max(0, unit.known_samples))
    return found


def _count_image(found: Statistics, record: Record | RejectedSample) -> tuple[int, int] | None:
    """The image's (width, height) as it is seen, by its header."""
    members = {} if isinstance(record, RejectedSample) else record.members
    content = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # nothing is decoded
            with Image.open(io.BytesIO(content or b""), formats=_FORMATS) as opened:
                width, height = opened.size
                # Where EXIF was not met before the pixels, asking for it would decode them.
                turned = "exif" in opened.info and opened.getexif().get(_ORIENTATION) in _TURNED
    except Exception:
        # Pillow's plugins raise nearly anything on broken files; why the sample is not used, decoding tells.
        return None
    if not width or not height:
        return None
    width, height = (height, width) if turned else (width, height)
    values = {"width": width, "height": height, "aspect_ratio": width / height, "image_bytes": len(content or b"")}
    for name, value in values.items():
        found.histograms[name].add(value)
    return width, height


def _count_used(found: Statistics, sample: Sample, size: tuple[int, int] | None) -> None:
    found.used += 1
    found.histograms["caption_words"].add(len(sample.caption.split()))
    found.histograms["caption_characters"].add(len(sample.caption))
    image = sample.tensors.get("image")
    if image is not None:
        height, width = image.shape[:2]
        found.shapes[height, width] += 1
        found.upscaled += bool(size and (size[0] < width or size[1] < height))
    shown = sample.caption[:_CAPTION_CHARACTERS] + "…" * (len(sample.caption) > _CAPTION_CHARACTERS)
    found.offer_thumbnail(sample.key, shown, size, lambda: b"" if image is None else thumbnail_jpeg(image))


def cluster_cpus(config: DataConfig) -> int:
    """Of the nodes that may read."""
    return max(1, int(total_resources(config.placement).get("CPU", 1)))


def inspect_units(units: Sequence[ShardRange], config: DataConfig) -> Iterator[Statistics]:
    """Each unit's statistics as they come, by Ray: a task a unit on a CPU of its own, as many at a time as there are CPUs.

    A unit whose reader fails or dies counts as lost; the others go on.
    """
    task = ray.remote(_inspect_unit).options(num_cpus=1, max_retries=1, label_selector=label_selector(config.placement))
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
            logger.warning("%s: its reader failed: %s", unit.shard.url, str(error).strip().splitlines()[-1])
            yield _lost(unit, SHARD_CRASHES)


def _inspect_unit(unit: ShardRange, config: DataConfig) -> Statistics:
    torch.set_num_threads(1)  # as in training: as many tasks run at once as there are cores for them
    return inspect_unit(unit, config)
