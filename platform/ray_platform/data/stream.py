"""From a catalog to a rank's endless, resumable stream of batches.

Ray Data runs `source.read_group` for the rank's groups, several side by side, and `merged` gives their samples one order,
however fast each read was: at one seed and world_size the stream is the same sample for sample, and a `Ledger` says where
to go on. Only `_blocks`, `_context` and `check_cpus` know Ray.
"""

import heapq
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from itertools import islice

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.exceptions import RayTaskError

from ray_platform.contracts import Batch, ConfigError, ConsumedRange, DataError
from ray_platform.data.catalog import Catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.execution import data_context
from ray_platform.data.ledger import merge_ranges
from ray_platform.data.plan import Group, Reader, check_world_size, groups
from ray_platform.data.skip_counter import SkipCounter
from ray_platform.data.source import Block, ShardSource, unpack
from ray_platform.placement import can_autoscale, describe_nodes, is_on_this_node, label_selector, total_resources

# Of one Ray dataset, over however many epochs. The next dataset starts cold, but only once in so many groups.
DATASET_GROUPS = 1024
TASK_SAMPLES = 8192
PAUSE_SECONDS, WAITING_PAUSE_SECONDS = 0.05, 0.01


def stream(catalog: Catalog, config: DataConfig, reader: Reader, *, batch_size: int, num_batches: int) -> Iterator[Batch]:
    """The rank's next `num_batches` batches. Needs a running Ray; exhaust or close it to stop its reads.

    Raises ConfigError, at once, for more ranks than shards or a cluster with too few CPUs for the reads; DataError,
    while iterating, for a shard that changed and when more than `max_skipped_share` of the samples were skipped.
    """
    check_world_size(catalog, reader.world_size)
    check_cpus(config, reader.world_size)
    batcher = Batcher(batch_size, SkipCounter(f"rank {reader.rank}", config.max_skipped_share))

    def run() -> Iterator[Batch]:
        # No group is without a row, so more groups than samples are never needed; a short run need not set up many.
        at_once = min(DATASET_GROUPS, num_batches * batch_size)
        with ExitStack() as stack:
            lanes = [stack.enter_context(closing(lane)) for lane in _lanes(catalog, config, reader, at_once)]
            yield from islice(batcher.batches(merged([map(unpack, lane) for lane in lanes])), num_batches)

    return run()


def merged(lanes: Sequence[Iterable[Block]]) -> Iterator[tuple[Block, int]]:
    """The rows of all lanes: window after window, by what each sample drew. Needs no more than a block of each lane."""

    def rows(blocks: Iterable[Block]) -> Iterator[tuple[int, float, Block, int]]:
        for block in blocks:
            for row, sort_key in enumerate(block.header["sort_key"]):
                yield block.header["window"], sort_key, block, row

    if len(lanes) == 1:  # already in order, or in whatever order it was asked for
        return ((block, row) for _, _, block, row in rows(lanes[0]))
    return ((block, row) for _, _, block, row in heapq.merge(*map(rows, lanes), key=lambda row: row[:2]))


class Batcher:
    """The good samples of blocks, in order, as batches of exactly `batch_size`, each with one shape.

    Samples of other shapes wait for their own batch; they are not consumed until it is full. Independent of where blocks end.
    """

    def __init__(self, batch_size: int, skips: SkipCounter):
        self.batch_size, self.skips = batch_size, skips
        self.waiting: dict[str, list[tuple[Block, int]]] = {}
        self.passed: list[tuple[Block, int]] = []  # skipped since the last batch

    def batches(self, rows: Iterable[tuple[Block, int]]) -> Iterator[Batch]:
        for block, row in rows:
            header = block.header
            key, cause, item = header["key"][row], header["cause"][row], header["items"][header["item"][row]]
            if cause:
                self.skips.count_reject(key, cause, item)
                self.passed.append((block, row))
                continue
            self.skips.count_good(item)
            waiting = self.waiting.setdefault(block.shapes[block.place[row][0]], [])
            waiting.append((block, row))
            if len(waiting) == self.batch_size:
                yield self._batch(waiting)
                waiting.clear()
                self.passed = []

    def _batch(self, rows: list[tuple[Block, int]]) -> Batch:
        places = [(block, *block.place[row]) for block, row in rows]
        names = places[0][0].stacks[places[0][1]].keys()
        tensors = {}
        for name in names:
            samples = [block.stacks[stack][name][index] for block, stack, index in places]
            # Copied, so a batch is writable and does not pin Ray's shared memory; into memory of Arrow's pool (see `source`).
            buffer = pa.allocate_buffer(len(samples) * samples[0].nbytes)
            tensors[name] = np.frombuffer(buffer, samples[0].dtype).reshape(len(samples), *samples[0].shape)
            np.stack(samples, out=tensors[name])
        return Batch(
            tensors,
            tuple(block.header["caption"][row] for block, row in rows),
            tuple(block.header["key"][row] for block, row in rows),
            _consumed_ranges([*self.passed, *rows]),
            dict(self.skips.skipped),
        )


def _consumed_ranges(rows: Iterable[tuple[Block, int]]) -> tuple[ConsumedRange, ...]:
    """Return the ranges that consist of these samples."""
    samples = sorted((*block.header["items"][block.header["item"][row]][:4], block.header["order"][row]) for block, row in rows)
    return merge_ranges(ConsumedRange(pool, epoch, unit, order, order + 1, total) for pool, epoch, unit, total, order in samples)


def _lanes(catalog: Catalog, config: DataConfig, reader: Reader, at_once: int) -> list[Generator[pa.Table, None, None]]:
    """A stream of blocks for each of the reads that go on side by side; just one where their order does not matter.

    In one ordered dataset, all reads but the first would soon wait, with full buffers, for it to end.
    """
    if not config.deterministic:
        return [_blocks(groups(catalog, reader, config.interleave, 1), config, reader, at_once)]

    def lane(number: int) -> Iterator[Group]:
        return (g for g in groups(catalog, reader, config.interleave, config.reads_per_rank) if g.lane == number)

    return [_blocks(lane(number), config, reader, at_once) for number in range(config.reads_per_rank)]


def _blocks(planned: Iterator[Group], config: DataConfig, reader: Reader, at_once: int) -> Generator[pa.Table, None, None]:
    """The blocks of the groups through one Ray dataset after the other, in order where that matters."""
    context = _context(config, reader.world_size)
    while True:
        tasks = list(_tasks(islice(planned, at_once), TASK_SAMPLES if config.deterministic else 0))
        # A dataset takes a copy of the context that it is created in: nobody else's datasets are touched.
        with ray.data.DataContext.current(context):
            dataset = ray.data.read_datasource(
                ShardSource(tasks, config, reader.seed),
                override_num_blocks=len(tasks),
                num_cpus=config.cpus_per_read,
                label_selector=label_selector(config.placement),
                compute=ray.data.TaskPoolStrategy(size=1 if config.deterministic else min(config.reads_per_rank, len(tasks))),
            )
        try:
            blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
            while (block := _next(blocks)) is not None:
                yield block
        except RayTaskError as error:
            if isinstance(error.cause, DataError):
                # Ray appends lines of its own to the message.
                raise DataError(str(error.cause).splitlines()[0]) from None
            raise


def _tasks(planned: Iterable[Group], least_samples: int) -> Iterator[list[Group]]:
    """Small groups together: from the end of one task to the start of the next, a lane stands still for a moment."""
    task: list[Group] = []
    samples = 0
    for group in planned:
        task.append(group)
        samples += sum(max(item.unit.known_samples, 0) or item.unit.nominal_samples for item in group.items)
        if samples >= least_samples:
            yield task
            task, samples = [], 0
    if task:
        yield task


def _next(blocks: Iterator[pa.Table]) -> pa.Table | None:
    SchedulerThrottle.wanted.set()
    try:
        return next(blocks, None)
    finally:
        SchedulerThrottle.wanted.clear()


class SchedulerThrottle(ExecutionCallback):
    """A pause in each turn of Ray Data's scheduling loop, which runs in a thread of the trainer's process.

    While a rank trains, its reads wait with full hands, and the loop turns without pause: it took half of the process's
    time, and the global interpreter lock with it. See LOG.md. While the rank itself waits, the pause is short.
    """

    wanted = threading.Event()  # this process waits for a block

    def on_execution_step(self, executor: object) -> None:
        time.sleep(WAITING_PAUSE_SECONDS)
        self.wanted.wait(PAUSE_SECONDS - WAITING_PAUSE_SECONDS)


def _context(config: DataConfig, world_size: int) -> ray.data.DataContext:
    context = data_context()
    context.execution_options.preserve_order = config.deterministic
    context._max_num_blocks_in_streaming_gen_buffer = 4  # a read may be that far ahead of a turn of the scheduling loop
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, SchedulerThrottle]
    # Each dataset believes itself alone: by default each would fill half of the object store.
    datasets = world_size * (config.reads_per_rank if config.deterministic else 1)
    if (
        share := total_resources(config.placement).get("object_store_memory", 0) / 2 / datasets
    ):  # else such nodes are still to come
        context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=share)
    return context


def check_cpus(config: DataConfig, world_size: int) -> None:
    """Raise ConfigError when the reads of all ranks do not fit beside the workers.

    Not just slow: a read that waits for its rank to consume keeps its CPUs. If the rank itself waits for one whose
    reads got none, both wait for ever.
    """
    runtime = ray.get_runtime_context()
    beside = runtime.get_actor_id() and is_on_this_node(config.placement)
    own = runtime.get_assigned_resources().get("CPU", 0.0) if beside else 0.0
    needed = world_size * (own + config.reads_per_rank * config.cpus_per_read)
    total = total_resources(config.placement).get("CPU", 0.0)
    if needed > total and not can_autoscale():
        raise ConfigError(
            f"{world_size} workers with {own:g} CPUs and data.reads_per_rank = {config.reads_per_rank} reads of "
            f"data.cpus_per_read = {config.cpus_per_read:g} each need {needed:g} CPUs, but "
            f"{describe_nodes(config.placement)} has {total:g}; lower one of these or give the cluster more CPUs"
        )
