"""A rank's endless, resumable stream of batches.

Ray Data runs `source.read_group` for the rank's groups, several at a time, and `merged` puts their samples into one order,
however fast each read was: with one seed and world_size, the stream is the same sample for sample, and a `Ledger` records where
to resume. Only `_blocks`, `_context` and `_worker_cpus` know Ray.
"""

import heapq
import threading
import time
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import chain, islice

import pyarrow as pa
import ray
import ray.data

from ray_platform.contracts import Batch, ConsumedRange
from ray_platform.data.catalog import Catalog
from ray_platform.data.causes import SkipCounter
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import merge_ranges
from ray_platform.data.plan import Group, Reader, check_cpus, check_world_size, groups
from ray_platform.data.source import ReadSample, ShardSource, data_context, data_errors, stack_arrays, unpack
from ray_platform.placement import label_selector, total_resources
from ray_platform.ray_internals import set_generator_buffer

DATASET_GROUPS = 1024  # per Ray dataset, over however many epochs: the next dataset starts without prefetched blocks
TASK_SAMPLES = 8192
PAUSE_SECONDS, WAITING_PAUSE_SECONDS = 0.05, 0.01


def stream(catalog: Catalog, config: DataConfig, reader: Reader, *, batch_size: int, num_batches: int) -> Iterator[Batch]:
    """Return an iterator of the rank's next `num_batches` batches. Needs Ray. Exhaust or close it to stop its reads.

    Raises ConfigError at once, for more ranks than shards or too few CPUs for the reads; the iterator raises DataError for a
    shard that changed, and after many shards in a row without a good sample.
    """
    check_world_size(catalog, reader.world_size)
    check_cpus(config, reader.world_size, _worker_cpus(config))
    batcher = Batcher(batch_size, SkipCounter(f"rank {reader.rank}", catalog.size, config.max_skipped_share))

    def run() -> Iterator[Batch]:
        # Every group has at least one sample, so a short run needs no more groups than samples.
        max_groups = min(DATASET_GROUPS, num_batches * batch_size)
        with ExitStack() as stack:
            streams = [stack.enter_context(closing(blocks)) for blocks in _read_streams(catalog, config, reader, max_groups)]
            yield from islice(batcher.batches(merged(streams)), num_batches)

    return run()


def merged(read_streams: Sequence[Iterable[pa.Table]]) -> Iterator[ReadSample]:
    """Yield the samples of all read streams, window after window, by their sort keys. Holds one block per read stream."""
    samples = [chain.from_iterable(map(unpack, blocks)) for blocks in read_streams]
    if len(samples) == 1:  # already in order, or no order was asked for
        return samples[0]
    return heapq.merge(*samples, key=lambda sample: (sample.window, sample.sort_key))


class Batcher:
    """Turns the good samples of blocks, in order, into batches of exactly `batch_size` samples of one shape.

    Samples of other shapes wait for their own batch and are not consumed until it is full. Does not depend on where blocks end.
    """

    def __init__(self, batch_size: int, skips: SkipCounter):
        self.batch_size, self.skips = batch_size, skips

    def batches(self, samples: Iterable[ReadSample]) -> Iterator[Batch]:
        waiting: dict[str, list[ReadSample]] = defaultdict(list)  # shape -> samples
        passed: list[ReadSample] = []  # skipped since the last batch
        for sample in samples:
            if sample.cause:
                self.skips.count_reject(sample.key, sample.cause, sample.unit, sample.caption)
                passed.append(sample)
                continue
            self.skips.count_good(sample.unit)
            waiting[sample.shape].append(sample)
            if len(waiting[sample.shape]) == self.batch_size:
                batch = waiting.pop(sample.shape)
                yield Batch(
                    # A copy, so that a batch is writable and does not pin Ray's shared memory.
                    {name: stack_arrays([sample.tensors[name] for sample in batch]) for name in sample.tensors},
                    tuple(sample.caption for sample in batch),
                    tuple(sample.key for sample in batch),
                    merge_ranges(
                        ConsumedRange(*sample.unit[:3], sample.order, sample.order + 1, sample.unit.total)
                        for sample in [*passed, *batch]
                    ),
                    dict(self.skips.skipped),
                    self.skips.epoch_samples,
                    dict(self.skips.details),
                )
                passed.clear()


def _read_streams(catalog: Catalog, config: DataConfig, reader: Reader, max_groups: int) -> list[Generator[pa.Table, None, None]]:
    """Return a stream of blocks for each concurrent read, or a single one if the order does not matter.

    In one ordered dataset, all reads but the first would soon wait for it to end, with full buffers.
    """
    if not config.deterministic:
        return [_blocks(groups(catalog, reader, config.interleave, 1), config, reader, max_groups)]

    def read_stream(number: int) -> Iterator[Group]:
        return (g for g in groups(catalog, reader, config.interleave, config.reads_per_rank) if g.read_stream == number)

    return [_blocks(read_stream(number), config, reader, max_groups) for number in range(config.reads_per_rank)]


def _blocks(planned: Iterator[Group], config: DataConfig, reader: Reader, max_groups: int) -> Generator[pa.Table, None, None]:
    """Yield the blocks of the groups, which one Ray dataset after the other reads, in order if that matters."""
    context = _context(config, reader.world_size)
    while True:
        tasks = list(_tasks(islice(planned, max_groups), TASK_SAMPLES if config.deterministic else 0))
        # A dataset copies the context in which it is created, so other datasets keep theirs.
        with ray.data.DataContext.current(context):
            dataset = ray.data.read_datasource(
                ShardSource(tasks, config, reader.seed),
                override_num_blocks=len(tasks),
                num_cpus=config.cpus_per_read,
                label_selector=label_selector(config.placement),
                compute=ray.data.TaskPoolStrategy(size=1 if config.deterministic else min(config.reads_per_rank, len(tasks))),
            )
        with data_errors():
            blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
            while (block := _next(blocks)) is not None:
                yield block


def _tasks(planned: Iterable[Group], min_samples: int) -> Iterator[list[Group]]:
    """Combine small groups: between two tasks a read stream pauses for a moment."""
    task: list[Group] = []
    samples = 0
    for group in planned:
        task.append(group)
        samples += sum(max(item.unit.known_samples, 0) or item.unit.nominal_samples for item in group.items)
        if samples >= min_samples:
            yield task
            task, samples = [], 0
    if task:
        yield task


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


def _context(config: DataConfig, world_size: int) -> ray.data.DataContext:
    context = data_context()
    context.execution_options.preserve_order = config.deterministic
    set_generator_buffer(context, num_blocks=4)  # so far may a read be ahead of a turn of the scheduling loop
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, SchedulerThrottle]
    # Each dataset assumes that it is alone: by default each would fill half of the object store.
    datasets = world_size * (config.reads_per_rank if config.deterministic else 1)
    # 0: the nodes that read are still to come.
    if limit := total_resources(config.placement).get("object_store_memory", 0) / 2 / datasets:
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=limit)
    return context


def _worker_cpus(config: DataConfig) -> float:
    """Return the CPUs of this process, a worker, if the nodes that read include its own; else 0."""
    runtime = ray.get_runtime_context()
    shares_nodes = runtime.get_actor_id() and config.placement.items() <= runtime.get_node_labels().items()
    return runtime.get_assigned_resources().get("CPU", 0.0) if shares_nodes else 0.0
