"""A rank's endless, resumable stream of batches.

Ray Data runs `source.read_group` for the rank's groups, several at a time, and `merged` puts their samples into one order,
however fast each read was: with one seed and world_size, the stream is the same sample for sample, and a `Ledger` records where
to resume. Only `_blocks`, `reading_context` and `_worker_cpus` know Ray.
"""

import heapq
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain, islice

import numpy as np
import pyarrow as pa
import ray
import ray.data

from ray_platform.contracts import Batch, ConsumedRange, DataError, MixtureState
from ray_platform.data.catalog import Catalog
from ray_platform.data.causes import SkipCounter
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import merge_ranges
from ray_platform.data.plan import Group, Reader, check_cpus, check_world_size, groups
from ray_platform.data.source import ReadSample, ShardSource, data_context, data_errors, stack_arrays, unpack
from ray_platform.placement import label_selector, total_resources
from ray_platform.ray_internals import set_generator_buffer

DATASET_GROUPS = 1024  # at most, per Ray dataset, over however many epochs: the next dataset starts without prefetched blocks
DATASET_SAMPLES = 2**21  # about, per Ray dataset
TASK_SAMPLES = 8192
READ_AHEAD_SAMPLES = 4096  # at most, per concurrent read; of tiny images the object store would hold whole epochs
SPARE_SAMPLES = 1.05  # a stream reads so many times the samples that it needs, as some are skipped
_MIN_EMPTY_UNITS = 100  # read without a good sample before a source counts as empty
PAUSE_SECONDS, WAITING_PAUSE_SECONDS = 0.5, 0.01


def stream(catalog: Catalog, config: DataConfig, reader: Reader, *, batch_size: int, num_batches: int) -> Iterator[Batch]:
    """Return an iterator of the rank's next `num_batches` batches. Needs Ray. Exhaust or close it to stop its reads.

    Raises ConfigError at once, for more ranks than shards or too few CPUs for the reads; the iterator raises DataError for a
    shard that changed, and after many shards in a row without a good sample.
    """
    check_world_size(catalog, reader.world_size)
    check_cpus(config, reader.world_size, _worker_cpus(config))
    batcher = Batcher(batch_size, catalog, config, reader)

    def run() -> Iterator[Batch]:
        num_samples = SPARE_SAMPLES * num_batches * batch_size
        with ExitStack() as stack:
            pools = [_read_streams(catalog, config, reader, num_samples * weight, n) for n, weight in enumerate(catalog.weights)]
            for blocks in chain.from_iterable(pools):
                stack.enter_context(closing(blocks))
            stack.callback(SchedulerThrottle.rank_waits.set)  # so that no scheduling loop pauses before it sees its end
            yield from islice(batcher.batches([merged(streams) for streams in pools]), num_batches)

    return run()


def dataset_groups(catalog: Catalog, config: DataConfig) -> int:
    """Return how many groups a Ray dataset reads: fewer of large shards, as with many ranks they would span many epochs."""
    large = round(DATASET_SAMPLES / (config.interleave * catalog.size.samples_per_unit))
    return min(DATASET_GROUPS, max(large, 4 * config.reads_per_rank))


def merged(read_streams: Sequence[Iterable[pa.Table]]) -> Iterator[ReadSample]:
    """Yield the samples of all read streams, window after window, by their sort keys. Holds one block per read stream."""
    samples = [chain.from_iterable(map(unpack, blocks)) for blocks in read_streams]
    if len(samples) == 1:  # already in order, or no order was asked for
        return samples[0]
    return heapq.merge(*samples, key=lambda sample: (sample.window, sample.sort_key))


class Mixture:
    """Chooses the pool of one good sample after the other, so that the pools have the proportions of their weights.

    Every pool gains its weight per sample, and the pool with the highest credit pays 1 for being chosen (smooth weighted round
    robin). Only samples for batches count, so the proportions hold whatever the shards contain and the filters drop: each rank is
    about one sample per pool away from them at any time. A resume with other ranks starts again at that.
    """

    def __init__(self, weights: Sequence[float], state: MixtureState) -> None:
        """`state`: of the last batch before a resume. The samples that waited then come first, in the same order."""
        self.weights = weights
        self.credits = list(state.credits) if len(state.credits) == len(weights) else [0.0] * len(weights)
        self._waiting = deque(state.waiting)

    def next_pool(self) -> int:
        if self._waiting:
            return self._waiting.popleft()
        self.credits = [credit + weight for credit, weight in zip(self.credits, self.weights, strict=True)]
        pool = self.credits.index(max(self.credits))
        self.credits[pool] -= 1.0
        return pool


class Batcher:
    """Turns the good samples of all pools, mixed by weight, into batches of exactly `batch_size` samples of one shape.

    Samples of other shapes wait for their own batch and are not consumed until it is full. Does not depend on where blocks end.
    """

    def __init__(self, batch_size: int, catalog: Catalog, config: DataConfig, reader: Reader):
        self.batch_size, self.num_units = batch_size, catalog.num_units
        self.pool_names = config.sources if config.weights else ("data.sources",)
        self.skips = SkipCounter(f"rank {reader.rank}", catalog.size, config.max_skipped_fraction)
        self.mixture = Mixture(catalog.weights, reader.mixture)
        self._passed: list[ReadSample] = []  # skipped since the last batch

    def batches(self, pools: Sequence[Iterator[ReadSample]]) -> Iterator[Batch]:
        """Yield batches of the samples of each pool. Raises DataError for a pool without a good sample."""
        waiting: list[ReadSample] = []
        counts: Counter[str] = Counter()  # of the waiting samples, by shape
        while (sample := self._next_good(pools[self.mixture.next_pool()])) is not None:
            waiting.append(sample)
            counts[sample.shape] += 1
            if counts[sample.shape] < self.batch_size:
                continue
            batch = [other for other in waiting if other.shape == sample.shape]
            waiting = [other for other in waiting if other.shape != sample.shape]
            for other in waiting:  # copied once: a view would keep its whole block in Ray's shared memory until its batch is full
                other.tensors.update({name: np.require(tensor, requirements="O") for name, tensor in other.tensors.items()})
            del counts[sample.shape]
            yield Batch(
                # A copy, so that a batch is writable and does not pin Ray's shared memory.
                {name: stack_arrays([sample.tensors[name] for sample in batch]) for name in sample.tensors},
                tuple(sample.caption for sample in batch),
                tuple(sample.key for sample in batch),
                merge_ranges(
                    ConsumedRange(*sample.unit[:3], sample.order, sample.order + 1, sample.unit.total)
                    for sample in [*self._passed, *batch]
                ),
                dict(self.skips.skipped),
                self.skips.epoch_samples,
                dict(self.skips.details),
                MixtureState(tuple(self.mixture.credits), tuple(other.unit.pool for other in waiting)),
            )
            self._passed.clear()

    def _next_good(self, samples: Iterator[ReadSample]) -> ReadSample | None:
        """Return the next good sample of a pool and count those before it, which are skipped. None at the end of the samples."""
        units: set[tuple[int, ...]] = set()  # of the samples that are skipped
        for sample in samples:
            if not sample.cause:
                self.skips.count_good(sample.unit)
                return sample
            self.skips.count_reject(sample.key, sample.cause, sample.unit, sample.caption)
            self._passed.append(sample)
            units.add(sample.unit[:3])
            if len(units) > max(_MIN_EMPTY_UNITS, 2 * self.num_units[sample.unit.pool]):
                raise DataError(
                    f"{self.pool_names[sample.unit.pool]}: {self.skips.reader} found no sample that can be used, "
                    f"up to {sample.key} ({sample.cause}); relax data.filters or leave the source out"
                )
        return None


def _read_streams(
    catalog: Catalog, config: DataConfig, reader: Reader, num_samples: float, pool: int
) -> list[Generator[pa.Table, None, None]]:
    """Return a stream of blocks of a pool for each concurrent read, or a single one if the order does not matter.

    In one ordered dataset, all reads but the first would soon wait for it to end, with full buffers. `num_samples` are needed.
    """
    num_reads, max_groups = config.reads_per_pool[pool], dataset_groups(catalog, config)
    num_streams = num_reads if config.deterministic else 1

    def read_stream(number: int) -> Generator[pa.Table, None, None]:
        planned = (g for g in groups(catalog, reader, config.interleave, num_streams, pool) if g.read_stream == number)
        context = reading_context(catalog, config, reader.world_size)
        while True:
            part = islice(enough_groups(num_samples / num_streams, planned), max_groups)
            tasks = list(_tasks(part, TASK_SAMPLES if config.deterministic else 0))
            yield from _blocks(ShardSource(tasks, config, reader.seed), config, context, num_reads // num_streams)

    return [read_stream(number) for number in range(num_streams)]


def _blocks(
    source: ShardSource, config: DataConfig, context: ray.data.DataContext, num_reads: int
) -> Generator[pa.Table, None, None]:
    """Yield the blocks that a Ray dataset reads, `num_reads` tasks at once; 1 keeps their order."""
    # A dataset copies the context in which it is created, so other datasets keep theirs.
    with ray.data.DataContext.current(context):
        dataset = ray.data.read_datasource(
            source,
            override_num_blocks=len(source.tasks),
            num_cpus=config.cpus_per_read,
            label_selector=label_selector(config.placement),
            compute=ray.data.TaskPoolStrategy(size=min(num_reads, len(source.tasks))),
        )
    with data_errors():
        blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
        while (block := _next(blocks)) is not None:
            yield block


def enough_groups(num_samples: float, planned: Iterator[Group]) -> Iterator[Group]:
    """Yield the first groups with about `num_samples` samples that are left to read."""
    while num_samples > 0:
        group = next(planned)
        num_samples -= _samples_left(group)
        yield group


def _tasks(planned: Iterable[Group], min_samples: int) -> Iterator[list[Group]]:
    """Combine small groups: between two tasks a read stream pauses for a moment."""
    task: list[Group] = []
    samples = 0
    for group in planned:
        task.append(group)
        samples += _samples_left(group)
        if samples >= min_samples:
            yield task
            task, samples = [], 0
    if task:
        yield task


def _samples_left(group: Group) -> int:
    """Return the number of samples that are left to read, or an estimate by the shards' sizes; at least 1."""
    total = sum(max(item.unit.known_samples, 0) or item.unit.nominal_samples for item in group.items)
    return max(1, total - sum(stop - start for item in group.items for start, stop in item.consumed))


def _next(blocks: Iterator[pa.Table]) -> pa.Table | None:
    SchedulerThrottle.rank_waits.set()
    try:
        return next(blocks, None)
    finally:
        SchedulerThrottle.rank_waits.clear()


class SchedulerThrottle:
    """Execution callback of Ray Data that pauses in each turn of its scheduling loop, a thread of the trainer's process.

    While a rank trains, its reads wait with full buffers and the loop turns without a pause: it took half of the process's time,
    and the interpreter lock with it (LOG.md). While the rank waits for data, the pause is short.
    """

    rank_waits = threading.Event()

    def on_execution_step(self, executor: object) -> None:
        time.sleep(WAITING_PAUSE_SECONDS)
        self.rank_waits.wait(PAUSE_SECONDS - WAITING_PAUSE_SECONDS)

    def _do_nothing(self, *arguments: object) -> None:
        pass

    before_execution_starts = after_execution_succeeds = after_execution_fails = _do_nothing


def reading_context(catalog: Catalog, config: DataConfig, world_size: int) -> ray.data.DataContext:
    """Return the settings of the Ray dataset of a read stream."""
    context = data_context()
    context.execution_options.preserve_order = config.deterministic
    set_generator_buffer(context, num_blocks=4)  # so far may a read be ahead of a turn of the scheduling loop
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, SchedulerThrottle]
    # Each dataset assumes that it is alone: by default each would fill half of the object store.
    datasets = world_size * (sum(config.reads_per_pool) if config.deterministic else len(config.reads_per_pool))
    # inf: the nodes that read are still to come.
    limit = total_resources(config.placement).get("object_store_memory", math.inf) / 2 / datasets
    if catalog.manifest is None:  # else samples are what the encoders return
        reads = 1 if config.deterministic else config.reads_per_rank
        limit = min(limit, reads * READ_AHEAD_SAMPLES * max(3 * height * width for height, width in config.target_sizes))
    if limit < math.inf:
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=limit)
    return context


def _worker_cpus(config: DataConfig) -> float:
    """Return the CPUs of this process, a worker, if the nodes that read include its own; else 0."""
    runtime = ray.get_runtime_context()
    shares_nodes = runtime.get_actor_id() and config.placement.items() <= runtime.get_node_labels().items()
    return runtime.get_assigned_resources().get("CPU", 0.0) if shares_nodes else 0.0
