"""Our Ray Data source: one task reads, filters, decodes and resizes a group of units, and yields contiguous blocks.

A block is a table of one row: each tensor of its samples as one binary value, which crosses processes without a copy, and
a JSON header with all else. Ray neither splits nor joins such blocks, and images of several shapes fit in one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ray_platform import storage
from ray_platform.data import captions, decode
from ray_platform.data.causes import LOST, ErrorReason, RejectedSample, SampleError
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import Group, Item
from ray_platform.data.precomputed import PrecomputedSamples
from ray_platform.data.tar import Record, check_size, read_tar_slice

BLOCK_BYTES = 16 * 2**20
_MAX_BLOCK_SAMPLES = 512
_LARGEST_ARROW = 2**31  # bytes; jobs/precompute.py writes some megabytes a file


@dataclass(frozen=True)
class Sample:
    """What training sees of one sample."""

    key: str
    caption: str
    tensors: dict[str, np.ndarray]


class ShardSamples(Protocol):
    """An opened unit: its samples by their place in it."""

    def __len__(self) -> int: ...

    def sample(self, place: int) -> Sample | RejectedSample: ...


class TarSamples:
    """The samples of a tar, decoded when they are asked for."""

    def __init__(self, records: Sequence[Record | RejectedSample], config: DataConfig, seed: str):
        self.records, self.config, self.seed = records, config, seed

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, place: int) -> Sample | RejectedSample:
        return decode_record(self.records[place], self.config, self.seed)


class RejectedShard:
    """Stands for a unit that could not be read."""

    def __init__(self, key: str, cause: ErrorReason, consumed: int):
        self.reject, self.count = RejectedSample(key, cause), consumed + 1

    def __len__(self) -> int:
        return self.count

    def sample(self, place: int) -> RejectedSample:
        return self.reject


def decode_record(record: Record | RejectedSample, config: DataConfig, seed: str) -> Sample | RejectedSample:
    """Never raises for what is in the record."""
    if isinstance(record, RejectedSample):
        return record
    try:
        if record.repeated:
            raise SampleError("key_repeated")
        # Texts first: they cost nothing, an image does.
        caption = captions.caption(record.members, config)
        if cause := captions.filtered(record.members, config.filters):
            raise SampleError(cause)
        return Sample(record.key, caption, {"image": decode.image(record.members, config, f"{seed}/{record.key}")})
    except SampleError as unusable:
        return RejectedSample(record.key, unusable.cause)


def open_samples(item: Item, config: DataConfig, seed: int) -> ShardSamples:
    """Read a unit. One that storage does not give becomes a RejectedShard; DataError for one that is not what was catalogued."""
    shard = item.unit.shard
    try:
        return storage.with_retries(lambda: _read(item, config, f"{seed}/{item.epoch}"), config.retry_seconds)
    except storage.StorageError as error:
        return RejectedShard(f"{shard.name}/", LOST[error.kind], max((stop for _, stop in item.consumed), default=0))


def _read(item: Item, config: DataConfig, seed: str) -> ShardSamples:
    unit, shard = item.unit, item.unit.shard
    if shard.url.endswith(".arrow"):
        if shard.size > _LARGEST_ARROW:
            return RejectedShard(f"{shard.name}/", "shard_unreadable", max((stop for _, stop in item.consumed), default=0))
        encoded = storage.read_buffer(shard.url)
        check_size(shard.url, encoded.size, shard.size)
        return PrecomputedSamples.open(encoded, shard.name, Sample)
    return TarSamples(read_tar_slice(shard.url, shard.name, shard.size, unit.start, unit.stop), config, seed)


def reading_order(group: Group, units: Sequence[ShardSamples], seed: int) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """In which order a group's samples are read.

    Every sample draws a number from (seed, epoch, unit); each unit is read in the order of its numbers, and the units of a
    group, as the groups of a window, are merged by them. So what is left keeps its order when some of it is left out.

    Returns the numbers [N], ascending; [N, 2] (unit in the group, order in the unit), both without what was consumed; and
    for each unit order -> place.
    """
    sort_key, rows, places = [], [], []
    for index, (item, unit) in enumerate(zip(group.items, units, strict=True)):
        digest = hashlib.sha256(f"{seed}/{item.epoch}/{item.unit.shard.name}/{item.unit.start}".encode()).digest()
        numbers = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(len(unit))
        order = np.argsort(numbers, kind="stable")
        left = np.ones(len(unit), dtype=bool)
        for start, stop in item.consumed:
            left[start:stop] = False
        kept = np.flatnonzero(left)
        sort_key.append(numbers[order][kept])
        rows.append(np.stack([np.full(len(kept), index), kept], axis=1))
        places.append(order)
    merged = np.argsort(np.concatenate(sort_key), kind="stable")
    return np.concatenate(sort_key)[merged], np.concatenate(rows)[merged], places


def read_group(group: Group, config: DataConfig, seed: int, block_bytes: int = BLOCK_BYTES) -> Iterator[pa.Table]:
    """A group's samples, decoded, as blocks. Raises DataError."""
    torch.set_num_threads(1)  # as many tasks run at once as there are cores for them
    units = [open_samples(item, config, seed) for item in group.items]
    sort_key, order, places = reading_order(group, units, seed)
    totals = [len(unit) for unit in units]
    builder = BlockBuilder(group, totals, block_bytes)
    for number, (index, row) in zip(sort_key.tolist(), order.tolist(), strict=True):
        builder.add(index, row, number, units[index].sample(int(places[index][row])))
        if builder.full:
            yield builder.block()
            builder = BlockBuilder(group, totals, block_bytes)
    if builder.rows:
        yield builder.block()


class BlockBuilder:
    """Builds one block. Samples of equal shapes are written side by side as they come, into one contiguous array."""

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
    def full(self) -> bool:
        return self.num_bytes >= self.block_bytes or len(self.rows) == _MAX_BLOCK_SAMPLES

    def add(self, index: int, order: int, sort_key: float, sample: Sample | RejectedSample) -> None:
        """`order` is the sample's place in its item's order of reading, by the number that it has `sort_key`."""
        if isinstance(sample, RejectedSample):
            self.rows.append((index, order, sort_key, sample.key, "", sample.cause))
            return
        signature = tuple((name, t.dtype.str, t.shape) for name, t in sample.tensors.items())
        if signature not in self.stacks:
            self.stacks[signature] = _Stack(sample.tensors, self.block_bytes)
        self.num_bytes += self.stacks[signature].add(sample.tensors, len(self.rows))
        self.rows.append((index, order, sort_key, sample.key, sample.caption, ""))

    def block(self) -> pa.Table:
        """All that was added, as a table of one row."""
        names = ("item", "order", "sort_key", "key", "caption", "cause")
        header: dict[str, Any] = {"window": self.window, "items": self.items} | dict(
            zip(names, zip(*self.rows, strict=True), strict=True)
        )
        header["stacks"] = [{"tensors": tensors, "rows": stack.rows} for tensors, stack in self.stacks.items()]
        columns = {"header": pa.array([json.dumps(header)], pa.large_string())}
        arrays = [array for stack in self.stacks.values() for array in stack.binary()]
        return pa.table(columns | {f"tensor_{i}": array for i, array in enumerate(arrays)})


class _Stack:
    """Samples whose tensors have equal shapes."""

    def __init__(self, like: dict[str, np.ndarray], block_bytes: int):
        self.sample_bytes = sum(tensor.nbytes for tensor in like.values())
        # Room for a whole block, from Arrow's pool: what was freed comes back, without new pages to be zeroed.
        room = min(_MAX_BLOCK_SAMPLES, -(-block_bytes // max(1, self.sample_bytes)))
        self.buffers = {name: pa.allocate_buffer(room * tensor.nbytes) for name, tensor in like.items()}
        self.arrays = {
            name: np.frombuffer(buffer, dtype=like[name].dtype).reshape(room, *like[name].shape)
            for name, buffer in self.buffers.items()
        }
        self.rows: list[int] = []

    def add(self, tensors: dict[str, np.ndarray], row: int) -> int:
        """Returns the bytes that were added."""
        for name, tensor in tensors.items():
            self.arrays[name][len(self.rows)] = tensor
        self.rows.append(row)
        return self.sample_bytes

    def binary(self) -> list[pa.Array]:
        """The bytes of each tensor as one value, not copied."""
        sizes = [len(self.rows) * array[0].nbytes for array in self.arrays.values()]
        offsets = [pa.py_buffer(np.array([0, size], dtype=np.int64)) for size in sizes]
        return [
            pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offset, buffer.slice(0, size)])
            for offset, buffer, size in zip(offsets, self.buffers.values(), sizes, strict=True)
        ]


@dataclass(frozen=True)
class Block:
    """What a `BlockBuilder` packed."""

    header: dict[str, Any]
    stacks: list[dict[str, np.ndarray]]
    shapes: list[str]  # of each stack's tensors: equal for those that fit in one batch
    place: dict[int, tuple[int, int]]  # row -> (stack, index in it)


def unpack(table: pa.Table) -> Block:
    """The arrays are views of the table's memory."""
    header = json.loads(table["header"][0].as_py())
    stacks: list[dict[str, np.ndarray]] = []
    place: dict[int, tuple[int, int]] = {}
    column = 0
    for number, stack in enumerate(header["stacks"]):
        arrays = {}
        for name, dtype, shape in stack["tensors"]:
            # By its buffers: a scalar's `as_buffer` copies.
            value = table[f"tensor_{column}"].chunk(0)
            _, offsets, values = value.buffers()
            start, stop = np.frombuffer(offsets, dtype=np.int64)[value.offset : value.offset + 2].tolist()
            arrays[name] = np.frombuffer(values.slice(start, stop - start), dtype=dtype).reshape(len(stack["rows"]), *shape)
            column += 1
        stacks.append(arrays)
        place |= {row: (number, index) for index, row in enumerate(stack["rows"])}
    return Block(header, stacks, [str(stack["tensors"]) for stack in header["stacks"]], place)


class ShardSource(Datasource):
    """Ray Data read tasks, each of one or more groups, all in their order."""

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
