"""The Ray Data source: one task reads, filters, decodes and resizes the samples of a group of units and yields them as blocks.

A block is a table with one row: each tensor of its samples as one binary value, which crosses processes without a copy, and a
JSON header with everything else. Ray neither splits nor joins such blocks, and images of several shapes fit in one.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypedDict

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ray_platform import storage
from ray_platform.data import captions, decode, filters
from ray_platform.data.causes import LOST, RejectedSample, SampleError
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import Group, Item
from ray_platform.data.precomputed import from_arrow
from ray_platform.data.tar import Record, check_size, read_tar_slice

BLOCK_BYTES = 16 * 2**20
_MAX_BLOCK_SAMPLES = 512
_MAX_ARROW_BYTES = 2**31  # precomputing writes some megabytes per file


@dataclass(frozen=True)
class Sample:
    """A sample as training receives it."""

    key: str
    caption: str
    tensors: dict[str, np.ndarray]


class ShardSamples(Protocol):
    """The samples of an opened unit, by their places in it."""

    def __len__(self) -> int: ...

    def sample(self, place: int) -> Sample | RejectedSample: ...


class TarSamples:
    """The samples of a tar. They are decoded on access."""

    def __init__(self, records: Sequence[Record | RejectedSample], config: DataConfig, seed: str):
        self.records, self.config, self.seed = records, config, seed

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, place: int) -> Sample | RejectedSample:
        return decode_record(self.records[place], self.config, self.seed)


class PrecomputedSamples:
    """The samples of a precomputed shard."""

    def __init__(self, data: pa.Buffer):
        """Raises pa.ArrowInvalid, KeyError, ValueError or TypeError for another file."""
        self.keys, self.captions, self.tensors = from_arrow(data)

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, place: int) -> Sample:
        return Sample(self.keys[place], self.captions[place], {name: array[place] for name, array in self.tensors.items()})


class RejectedShard:
    """Takes the place of a unit that cannot be read: the same rejection for each of its `num_samples` places."""

    def __init__(self, key: str, cause: str, num_samples: int = 1):
        self.rejected, self.num_samples = RejectedSample(key, cause), num_samples

    def __len__(self) -> int:
        return self.num_samples

    def sample(self, place: int) -> RejectedSample:
        return self.rejected


def decode_record(record: Record | RejectedSample, config: DataConfig, seed: str) -> Sample | RejectedSample:
    """Decode a sample. Never raises an error because of the record's content."""
    if isinstance(record, RejectedSample):
        return record
    try:
        if record.repeated:
            raise SampleError("key_repeated")
        caption = captions.caption(record.members, config)
        filters.check(filters.Candidate(caption, record.members), config.filters, reads_image=False)
        return Sample(record.key, caption, {"image": decode.image(record.members, config, f"{seed}/{record.key}")})
    except SampleError as error:
        return RejectedSample(record.key, error.cause)


def open_samples(item: Item, config: DataConfig, seed: int) -> ShardSamples:
    """Read a unit. One that storage does not return becomes a RejectedShard. Raises DataError if the shard has changed."""
    shard, unit = item.unit.shard, item.unit
    rejected_key = f"{shard.name}/"
    num_rejected = 1 + max((stop for _, stop in item.consumed), default=0)  # one more than what was consumed already
    try:
        with storage.retrying_for(config.retry_seconds):
            if not shard.url.endswith(".arrow"):
                records = read_tar_slice(shard.url, shard.name, shard.size, unit.start, unit.stop)
                return TarSamples(records, config, f"{seed}/{item.epoch}")
            if shard.size > _MAX_ARROW_BYTES:
                return RejectedShard(rejected_key, "shard_unreadable", num_rejected)
            data = storage.read_buffer(shard.url)
    except storage.StorageError as error:
        return RejectedShard(rejected_key, LOST[error.kind], num_rejected)
    check_size(shard.url, data.size, shard.size)
    return open_precomputed(data, rejected_key)


def open_precomputed(data: pa.Buffer, rejected_key: str) -> ShardSamples:
    """Return the samples of a precomputed shard, or a RejectedShard if it is damaged or empty."""
    try:
        samples = PrecomputedSamples(data)
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError):
        return RejectedShard(rejected_key, "shard_unreadable")
    return samples if len(samples) else RejectedShard(rejected_key, "shard_empty")


def reading_order(group: Group, units: Sequence[ShardSamples], seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Return the order in which a group's samples are read.

    Every sample has a random sort key that depends on (seed, epoch, unit). A unit is read in the order of its sort keys, and the
    units of a group, as the groups of a window, are merged by them. So the rest keeps its order when some of it is left out.

    Returns:
        The sort keys [N], ascending; [N, 2] (unit in the group, order in the unit), both without the consumed samples; and for
        each unit an array order -> place.
    """
    sort_keys, rows, places = [], [], []
    for index, (item, unit) in enumerate(zip(group.items, units, strict=True)):
        digest = hashlib.sha256(f"{seed}/{item.epoch}/{item.unit.shard.name}/{item.unit.start}".encode()).digest()
        keys = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(len(unit))
        order = np.argsort(keys, kind="stable")
        is_left = np.ones(len(unit), dtype=bool)
        for start, stop in item.consumed:
            is_left[start:stop] = False
        left = np.flatnonzero(is_left)
        sort_keys.append(keys[order][left])
        rows.append(np.stack([np.full(len(left), index), left], axis=1))
        places.append(order)
    merged = np.argsort(np.concatenate(sort_keys), kind="stable")
    return np.concatenate(sort_keys)[merged], np.concatenate(rows)[merged], places


def read_group(group: Group, config: DataConfig, seed: int, block_bytes: int = BLOCK_BYTES) -> Iterator[pa.Table]:
    """Yield a group's samples, decoded, as blocks. Raises DataError if a shard has changed."""
    torch.set_num_threads(1)  # as many tasks run at once as there are cores for them
    units = [open_samples(item, config, seed) for item in group.items]
    sort_keys, order, places = reading_order(group, units, seed)
    totals = [len(unit) for unit in units]
    builder = BlockBuilder(group, totals, block_bytes)
    for sort_key, (index, row) in zip(sort_keys.tolist(), order.tolist(), strict=True):
        builder.add(index, row, sort_key, units[index].sample(int(places[index][row])))
        if builder.is_full:
            yield builder.block()
            builder = BlockBuilder(group, totals, block_bytes)
    if builder.rows:
        yield builder.block()


class StackHeader(TypedDict):
    """The samples of a block whose tensors have equal shapes."""

    tensors: list[tuple[str, str, tuple[int, ...]]]  # (name, dtype, shape) of each tensor of a sample
    rows: list[int]


class BlockHeader(TypedDict):
    """Everything about the samples of a block but their tensors. The lists after `items` have one entry per sample."""

    window: int
    items: list[tuple[int, ...]]  # (pool, epoch, unit, its samples, known samples or -1, nominal samples)
    item: list[int]  # index in `items`
    order: list[int]  # place in the reading order of the item
    sort_key: list[float]
    key: list[str]
    caption: list[str]
    cause: list[str]  # of a rejection; empty for a good sample
    stacks: list[StackHeader]


class BlockBuilder:
    """Builds one block. Samples of equal shapes are written to one contiguous array as they come."""

    def __init__(self, group: Group, totals: Sequence[int], block_bytes: int):
        self.window, self.block_bytes = group.window, block_bytes
        self.items = [
            (item.pool, item.epoch, item.number, total, item.unit.known_samples, item.unit.nominal_samples)
            for item, total in zip(group.items, totals, strict=True)
        ]
        self.rows: list[tuple[int, int, float, str, str, str]] = []  # item, order, sort_key, key, caption, cause
        self.stacks: dict[tuple, _Stack] = {}
        self.num_bytes = 0

    @property
    def is_full(self) -> bool:
        return self.num_bytes >= self.block_bytes or len(self.rows) == _MAX_BLOCK_SAMPLES

    def add(self, index: int, order: int, sort_key: float, sample: Sample | RejectedSample) -> None:
        """Add the sample that comes at `order` in the reading order of the item `index`."""
        if isinstance(sample, RejectedSample):
            self.rows.append((index, order, sort_key, sample.key, "", sample.cause))
            return
        signature = tuple((name, t.dtype.str, t.shape) for name, t in sample.tensors.items())
        if signature not in self.stacks:
            self.stacks[signature] = _Stack(sample.tensors, self.block_bytes)
        self.num_bytes += self.stacks[signature].add(sample.tensors, len(self.rows))
        self.rows.append((index, order, sort_key, sample.key, sample.caption, ""))

    def block(self) -> pa.Table:
        """Return everything that was added as a table of one row."""
        item, order, sort_key, key, caption, cause = map(list, zip(*self.rows, strict=True))
        header = {
            "window": self.window, "items": self.items, "item": item, "order": order, "sort_key": sort_key, "key": key,
            "caption": caption, "cause": cause,
            "stacks": [{"tensors": tensors, "rows": stack.rows} for tensors, stack in self.stacks.items()],
        }  # fmt: skip
        columns = {"header": pa.array([json.dumps(header)], pa.large_string())}
        arrays = [array for stack in self.stacks.values() for array in stack.binary()]
        return pa.table(columns | {f"tensor_{i}": array for i, array in enumerate(arrays)})


class _Stack:
    """Samples whose tensors have equal shapes."""

    def __init__(self, like: dict[str, np.ndarray], block_bytes: int):
        self.sample_bytes = sum(tensor.nbytes for tensor in like.values())
        # Memory for a whole block, from Arrow's pool, which reuses pages without zeroing them.
        capacity = min(_MAX_BLOCK_SAMPLES, -(-block_bytes // max(1, self.sample_bytes)))
        self.buffers = {name: pa.allocate_buffer(capacity * tensor.nbytes) for name, tensor in like.items()}
        self.arrays = {
            name: np.frombuffer(buffer, dtype=like[name].dtype).reshape(capacity, *like[name].shape)
            for name, buffer in self.buffers.items()
        }
        self.rows: list[int] = []

    def add(self, tensors: dict[str, np.ndarray], row: int) -> int:
        """Return the number of bytes added."""
        for name, tensor in tensors.items():
            self.arrays[name][len(self.rows)] = tensor
        self.rows.append(row)
        return self.sample_bytes

    def binary(self) -> list[pa.Array]:
        """Return the bytes of each tensor as one value, without a copy."""
        sizes = [len(self.rows) * array[0].nbytes for array in self.arrays.values()]
        offsets = [pa.py_buffer(np.array([0, size], dtype=np.int64)) for size in sizes]
        return [
            pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offset, buffer.slice(0, size)])
            for offset, buffer, size in zip(offsets, self.buffers.values(), sizes, strict=True)
        ]


@dataclass(frozen=True)
class Block:
    """A block that `BlockBuilder` built."""

    header: BlockHeader
    stacks: list[dict[str, np.ndarray]]
    shapes: list[str]  # of each stack's tensors; samples of equal shapes fit in one batch
    place: dict[int, tuple[int, int]]  # row -> (stack, index in it)


def unpack(table: pa.Table) -> Block:
    """Return the block in a table. Its arrays are views of the table's memory."""
    header: BlockHeader = json.loads(table["header"][0].as_py())
    stacks: list[dict[str, np.ndarray]] = []
    place: dict[int, tuple[int, int]] = {}
    column = 0
    for number, stack in enumerate(header["stacks"]):
        arrays = {}
        for name, dtype, shape in stack["tensors"]:
            # From the array's buffers, because a scalar's `as_buffer` copies.
            value = table[f"tensor_{column}"].chunk(0)
            _, offsets, values = value.buffers()
            start, stop = np.frombuffer(offsets, dtype=np.int64)[value.offset : value.offset + 2].tolist()
            arrays[name] = np.frombuffer(values.slice(start, stop - start), dtype=dtype).reshape(len(stack["rows"]), *shape)
            column += 1
        stacks.append(arrays)
        place |= {row: (number, index) for index, row in enumerate(stack["rows"])}
    return Block(header, stacks, [str(stack["tensors"]) for stack in header["stacks"]], place)


class ShardSource(Datasource):
    """A Ray Data source of read tasks, each of one or more groups."""

    def __init__(self, tasks: Sequence[Sequence[Group]], config: DataConfig, seed: int, block_bytes: int = BLOCK_BYTES):
        super().__init__()
        self._tasks, self._config, self._seed, self._block_bytes = tasks, config, seed, block_bytes

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        config, seed, block_bytes = self._config, self._seed, self._block_bytes

        def task(groups: Sequence[Group]) -> Callable[[], Iterator[pa.Table]]:
            return lambda: (block for group in groups for block in read_group(group, config, seed, block_bytes))

        return [ReadTask(task(groups), unknown) for groups in self._tasks]


def data_context() -> ray.data.DataContext:
    """Return a copy of the current context for datasets whose blocks have one row that cannot be split."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # blocks stay as they are
    # Without the lines about every dataset's start and end, and the warning that progress bars are off.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return context
