"""From shards to a rank's endless, resumable stream of batches.

Ray Data runs one task a shard: it reads the whole tar into memory, decodes its samples in an order drawn from
(seed, epoch, shard) and hands on blocks of them. Blocks arrive in the plan's order, so at one seed and world_size the
stream is the same sample for sample, however fast each task was, and can be taken up again at any `Position`.
Only `_blocks`, `_context` and `_check_cpus` know Ray.
"""

import logging
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayTaskError

from ray_platform import storage
from ray_platform.contracts import Batch, ConfigError, DataError, Position
from ray_platform.data.catalog import Shard
from ray_platform.data.config import DataConfig
from ray_platform.data.decode import Reject, Sample, decode, read_tar
from ray_platform.data.plan import START, Item, items_per_epoch, plan, shuffled

logger = logging.getLogger(__name__)

# One row a sample, rejected ones included. Columns: image [N, H, W, 3] uint8, caption, key, cause ("" for a good one),
# item and order (its position in the stream).
Block = Mapping[str, np.ndarray]
BLOCK_SAMPLES = 128
# Items of one Ray dataset, over however many epochs. The next dataset starts cold, but only once in so many shards.
DATASET_ITEMS = 256
PAUSE_SECONDS = 0.05
SHOWN_REJECTS = 3  # of each cause, by key, as warnings
ENOUGH_SAMPLES = 100  # to judge the skipped share by


def stream(
    shards: Sequence[Shard],
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    rank: int,
    world_size: int,
    start: Position = START,
    num_batches: int,
) -> Iterator[Batch]:
    """`rank`'s next `num_batches` batches after `start`. Needs a running Ray; exhaust or close it to stop its reads.

    `Batch.skipped` counts from `start`, not from the beginning of the run.

    Raises ConfigError, at once, for more ranks than shards or a cluster with too few CPUs for the reads; DataError,
    while iterating, for a shard that cannot be read and when more than `max_skipped_share` of the samples were skipped.
    """
    tally = Tally(rank, config.max_skipped_share, start.item, items_per_epoch(len(shards), rank, world_size))
    items = plan(shards, seed, rank, world_size, start)
    _check_cpus(config, world_size)

    def run() -> Iterator[Batch]:
        # No item is without a row, so more items than samples are never needed; a short run need not set up many.
        dataset_items = min(DATASET_ITEMS, num_batches * batch_size)
        with closing(_blocks(items, config, seed, world_size, dataset_items)) as blocks:
            yield from islice(rebatch(blocks, batch_size, tally), num_batches)

    return run()


@dataclass
class Tally:
    """Counts what a rank saw and skipped, and stops the run when it skips too much."""

    rank: int
    max_skipped_share: float
    first_item: int
    items_per_epoch: int
    seen: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def count(self, key: str, cause: str, item: int) -> None:
        """One sample: a good one when `cause` is empty. Raises DataError when the skipped share is too large."""
        # This sample's epoch being a later one, the samples before it are a whole epoch: all there is to judge by.
        if item - self.first_item >= self.items_per_epoch:
            self._judge()
        self.seen += 1
        if cause:
            self.skipped[cause] += 1
            if self.skipped[cause] <= SHOWN_REJECTS:
                more = "; further ones are only counted" if self.skipped[cause] == SHOWN_REJECTS else ""
                logger.warning("rank %d skips %s: %s%s", self.rank, key, cause, more)
        if self.seen >= ENOUGH_SAMPLES:
            self._judge()

    def _judge(self) -> None:
        skipped = self.skipped.total()
        if skipped <= self.max_skipped_share * self.seen:
            return
        shares = ", ".join(f"{cause} {count / self.seen:.1%}" for cause, count in self.skipped.most_common())
        raise DataError(
            f"rank {self.rank} had to skip {skipped} of {self.seen} samples ({shares}), more than "
            f"data.max_skipped_share = {self.max_skipped_share:.1%}; correct the shards (the warnings name samples) "
            "or raise data.max_skipped_share"
        )


def rebatch(blocks: Iterable[Block], batch_size: int, tally: Tally) -> Iterator[Batch]:
    """The good samples of `blocks`, in order, as batches of exactly `batch_size`.

    Independent of where blocks end: `skipped` and `position` of a batch are as of its last sample.
    """
    images: list[np.ndarray] = []
    captions: list[str] = []
    keys: list[str] = []
    for block in blocks:
        for row in range(len(block["key"])):
            key, cause, item = str(block["key"][row]), str(block["cause"][row]), int(block["item"][row])
            tally.count(key, cause, item)
            if cause:
                continue
            images.append(block["image"][row])
            captions.append(str(block["caption"][row]))
            keys.append(key)
            if len(images) == batch_size:
                position = Position(item, int(block["order"][row]) + 1)
                # The stack copies, so a batch is writable and does not pin Ray's shared memory.
                yield Batch(np.stack(images), tuple(captions), tuple(keys), position, dict(tally.skipped))
                images, captions, keys = [], [], []


def read_item(item: Item, seed: int, image_size: int) -> Iterator[Block]:
    """Read, order and decode one item's samples after its `skip`, as blocks. Raises DataError."""
    shard = item.shard
    records = shuffled(read_tar(storage.read_bytes(shard.url), shard.name), seed, item.epoch, shard.name)
    for first in range(item.skip, len(records), BLOCK_SAMPLES):
        samples = [decode(record, image_size) for record in records[first : first + BLOCK_SAMPLES]]
        yield _block(samples, item.number, first, image_size)


def _block(samples: Sequence[Sample | Reject], item: int, first: int, image_size: int) -> Block:
    images = np.zeros((len(samples), image_size, image_size, 3), np.uint8)
    for image, sample in zip(images, samples, strict=True):
        if isinstance(sample, Sample):
            image[:] = sample.image
    return {
        "image": images,
        "caption": np.array([s.caption if isinstance(s, Sample) else "" for s in samples], dtype=object),
        "key": np.array([s.key for s in samples], dtype=object),
        "cause": np.array(["" if isinstance(s, Sample) else s.cause for s in samples], dtype=object),
        "item": np.full(len(samples), item),
        "order": np.arange(first, first + len(samples)),
    }


@dataclass(frozen=True)
class Inspection:
    """What a dry run saw."""

    good: int
    rejected: Mapping[str, int]  # cause -> samples
    example: Sample


def inspect_first_samples(shards: Sequence[Shard], config: DataConfig, limit: int) -> Inspection:
    """Decode the first `limit` samples of the first shard, here, without Ray. Raises DataError when none is good."""
    shard = shards[0]
    records = read_tar(storage.read_bytes(shard.url), shard.name)[:limit]
    samples = [decode(record, config.image_size) for record in records]
    good = [sample for sample in samples if isinstance(sample, Sample)]
    rejected = Counter(str(sample.cause) for sample in samples if isinstance(sample, Reject))
    if not good:
        causes = ", ".join(f"{count} × {cause}" for cause, count in rejected.most_common())
        raise DataError(
            f"{shard.url}: none of its first {len(samples)} samples can be used ({causes}); a sample is an image "
            "(.jpg, .png or .webp) and a caption (.txt, or `caption` in .json) of the same name: correct the shards"
        )
    return Inspection(len(good), dict(rejected), good[0])


def _blocks(
    items: Iterator[Item], config: DataConfig, seed: int, world_size: int, dataset_items: int
) -> Generator[Block, None, None]:
    """The blocks of all items, in order, through one Ray dataset after the other."""

    def read(row: Mapping[str, np.ndarray]) -> Iterator[Block]:
        shard = Shard(str(row["url"][0]), int(row["size"][0]), str(row["name"][0]))
        item = Item(int(row["number"][0]), int(row["epoch"][0]), shard, int(row["skip"][0]))
        return read_item(item, seed, config.image_size)

    context = _context(config, world_size)
    while True:
        rows = [
            {"number": item.number, "epoch": item.epoch, "skip": item.skip, **vars(item.shard)}
            for item in islice(items, dataset_items)
        ]
        # A dataset takes a copy of the context that it is created in: nobody else's datasets are touched.
        with ray.data.DataContext.current(context):
            dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                read,
                batch_size=1,
                num_cpus=config.cpus_per_read,
                compute=ray.data.TaskPoolStrategy(size=config.reads_per_rank),
            )
        try:
            for block in dataset.iter_batches(batch_size=None, batch_format="numpy"):
                if block:
                    yield block
        except RayTaskError as error:
            if isinstance(error.cause, DataError):
                # Ray appends lines of its own to the message.
                raise DataError(str(error.cause).splitlines()[0]) from None
            raise


class _Paced(ExecutionCallback):
    """A pause in each turn of Ray Data's scheduling loop, which runs in a thread of the trainer's process.

    While a rank trains, its reads wait with full hands, and the loop turns without pause: it took half of the process's
    time, and the global interpreter lock with it. See LOG.md.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(PAUSE_SECONDS)


def _context(config: DataConfig, world_size: int) -> ray.data.DataContext:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, _Paced]
    # Otherwise a task collects 128 MiB before it hands anything on.
    context.target_max_block_size = BLOCK_SAMPLES * config.image_size**2 * 3
    # Each rank's dataset believes itself alone: by default each would fill half of the object store.
    share = ray.cluster_resources().get("object_store_memory", 0) / 2 / world_size
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=share)
    # Lines about every dataset's start and end, and a warning that bars are off, are no news; other warnings still show.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return context


def _check_cpus(config: DataConfig, world_size: int) -> None:
    """Raise ConfigError when the reads of all ranks do not fit beside the workers.

    Not just slow: a read that waits for its rank to consume keeps its CPUs. If the rank itself waits for one whose
    reads got none, both wait for ever.
    """
    runtime = ray.get_runtime_context()
    own = runtime.get_assigned_resources().get("CPU", 0.0) if runtime.get_actor_id() else 0.0
    needed = world_size * (own + config.reads_per_rank * config.cpus_per_read)
    total = ray.cluster_resources().get("CPU", 0.0)
    if needed > total:
        raise ConfigError(
            f"{world_size} workers with {own:g} CPUs and data.reads_per_rank = {config.reads_per_rank} reads of "
            f"data.cpus_per_read = {config.cpus_per_read:g} each need {needed:g} CPUs, but the cluster has {total:g}; "
            "lower one of these or give the cluster more CPUs"
        )
