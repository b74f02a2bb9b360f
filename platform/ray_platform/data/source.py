"""The Ray Data source: one task reads, filters, decodes and resizes the samples of a group of units and yields them as blocks.

A block is a table with one row: each tensor of its samples as one binary value, which crosses processes without a copy, and a
JSON header with everything else. Ray neither splits nor joins such blocks, and images of several shapes fit in one.
"""

import functools
import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import torch
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data import captions, decode, filters
from ray_platform.data.causes import RejectedSample, SampleError, UnitCounts, lost_cause
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


@dataclass(frozen=True)
class ShardSamples:
    """The samples of an opened unit, by their places in it. Those of a tar are decoded on access."""

    records: Sequence[Record | Sample | RejectedSample]
    config: DataConfig
    seed: str  # of random crops
    is_part: bool = False  # the unit is a part of a large tar

    def __len__(self) -> int:
        return len(self.records)

    def sample(self, place: int) -> Sample | RejectedSample:
        """Return a sample. Never raises an error because of its content."""
        record = self.records[place]
        if not isinstance(record, Record):
            return record
        try:
            if record.cause:
                raise SampleError(record.cause)
            caption = captions.caption(record.members, self.config)
            filters.check(filters.Candidate(caption, record.members), self.config.filters, reads_image=False)
            image = decode.image(record.members, self.config, f"{self.seed}/{record.key}")
            return Sample(record.key, caption, {"image": image})
        except SampleError as error:
            # Each half of a sample whose files are not adjacent would be called incomplete.
            is_half = error.cause == "image_missing" or not record.members.keys() & {"txt", "json"}
            return RejectedSample(record.key, "files_apart" if self.is_part and is_half else error.cause, error.detail)


def open_samples(item: Item, config: DataConfig, seed: int) -> ShardSamples:
    """Read a unit. Raises DataError if the shard has changed.

    A unit that cannot be read is rejected at the place after what was consumed of it before, and at each place in between that a
    resume left, as samples that waited for others of their shape are.
    """
    shard, unit = item.unit.shard, item.unit
    records: Sequence[Record | Sample | RejectedSample]
    try:
        with storage.retrying_for(config.retry_seconds):
            if not shard.url.endswith(".arrow"):
                records = read_tar_slice(shard.url, shard.name, shard.size, unit.start, unit.stop)
            elif shard.size > _MAX_ARROW_BYTES:
                records = [RejectedSample(f"{shard.name}/", "shard_unreadable")]
            else:
                data = storage.read_buffer(shard.url)
                check_size(shard.url, data.size, shard.size)
                records = open_precomputed(data, f"{shard.name}/")
    except storage.StorageError as error:
        num_consumed = max((stop for _, stop in item.consumed), default=0)
        records = [RejectedSample(f"{shard.name}/", lost_cause(error), str(error))] * (num_consumed + 1)
    return ShardSamples(records, config, f"{seed}/{item.epoch}", is_part=not unit.is_whole_shard)


def open_precomputed(data: pa.Buffer, rejected_key: str) -> Sequence[Sample | RejectedSample]:
    """Return the samples of a precomputed shard, or one rejection if it is damaged or empty."""
    try:
        keys, texts, tensors = from_arrow(data)
    except (pa.ArrowInvalid, KeyError, ValueError, TypeError):
        return [RejectedSample(rejected_key, "shard_unreadable")]
    samples = [
        Sample(key, text, {name: array[place] for name, array in tensors.items()})
        for place, (key, text) in enumerate(zip(keys, texts, strict=True))
    ]
    return samples or [RejectedSample(rejected_key, "shard_empty")]


def reading_order(group: Group, units: Sequence[ShardSamples], seed: int) -> list[tuple[float, int, int, int]]:
    """Return (sort key, unit in the group, order in the unit, place in the unit) of what was not consumed, in reading order.

    Every sample has a random sort key that depends on (seed, epoch, unit). A unit is read in the order of its sort keys, and the
    units of a group, as the groups of a window, are merged by them. So the rest keeps its order when some of it is left out.
    """
    left: list[tuple[float, int, int, int]] = []
    for index, (item, unit) in enumerate(zip(group.items, units, strict=True)):
        digest = hashlib.sha256(f"{seed}/{item.epoch}/{item.unit.shard.name}/{item.unit.start}".encode()).digest()
        sort_keys = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(len(unit))
        places = np.argsort(sort_keys, kind="stable")
        is_left = np.ones(len(unit), dtype=bool)
        for start, stop in item.consumed:
            is_left[start:stop] = False
        orders = np.flatnonzero(is_left)
        places = places[orders]
        left += zip(sort_keys[places].tolist(), [index] * len(orders), orders.tolist(), places.tolist(), strict=True)
    return sorted(left)


def read_group(group: Group, config: DataConfig, seed: int, block_bytes: int = BLOCK_BYTES) -> Iterator[pa.Table]:
    """Yield a group's samples, decoded, as blocks. Raises DataError if a shard has changed."""
    torch.set_num_threads(1)  # as many tasks run at once as there are cores for them
    units = [open_samples(item, config, seed) for item in group.items]
    counts = [
        UnitCounts(item.pool, item.epoch, item.number, len(unit), item.unit.known_samples)
        for item, unit in zip(group.items, units, strict=True)
    ]
    rows: list[Row] = []
    tensors: list[dict[str, np.ndarray]] = []  # of each row; empty for a rejected sample
    num_bytes = 0
    for sort_key, index, order, place in reading_order(group, units, seed):
        sample = units[index].sample(place)
        if isinstance(sample, Sample):
            rows.append((group.window, sort_key, index, order, sample.key, sample.caption, ""))
            tensors.append(sample.tensors)
            num_bytes += sum(tensor.nbytes for tensor in sample.tensors.values())
        else:
            rows.append((group.window, sort_key, index, order, sample.key, sample.detail, sample.cause))
            tensors.append({})
        if num_bytes >= block_bytes or len(rows) == _MAX_BLOCK_SAMPLES:
            yield _pack(counts, rows, tensors)
            rows, tensors, num_bytes = [], [], 0
    if rows:
        yield _pack(counts, rows, tensors)


Row = tuple[int, float, int, int, str, str, str]  # the fields of ReadSample up to `cause`, with the unit's index in the group


@dataclass(frozen=True, slots=True)
class ReadSample:
    """A sample of a block."""

    window: int
    sort_key: float
    unit: UnitCounts
    order: int  # place in the reading order of the unit
    key: str
    caption: str  # of a rejection: its detail
    cause: str  # of a rejection; empty for a good sample
    tensors: dict[str, np.ndarray]  # views of the block's memory
    shape: str  # of the tensors; samples of equal shapes fit in one batch


def stack_arrays(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return `np.stack(arrays)` in memory of Arrow's pool, which reuses pages without zeroing them."""
    buffer = pa.allocate_buffer(len(arrays) * arrays[0].nbytes)
    return np.stack(arrays, out=np.frombuffer(buffer, arrays[0].dtype).reshape(len(arrays), *arrays[0].shape))


def _pack(counts: list[UnitCounts], rows: list[Row], tensors: list[dict[str, np.ndarray]]) -> pa.Table:
    """Return a block. Samples whose tensors have equal shapes share one array per tensor."""
    stacks: dict[tuple[tuple[str, str, tuple[int, ...]], ...], list[int]] = defaultdict(list)
    for row, arrays in enumerate(tensors):
        if arrays:
            stacks[tuple((name, array.dtype.str, array.shape) for name, array in arrays.items())].append(row)
    columns = [pa.array([json.dumps([counts, rows, list(stacks.items())])], pa.large_string())]
    for shapes, stacked in stacks.items():
        for name, _, _ in shapes:
            array = stack_arrays([tensors[row][name] for row in stacked])
            offsets = np.array([0, array.nbytes], dtype=np.int64)
            buffers = [None, pa.py_buffer(offsets), pa.py_buffer(array)]  # one value, without a copy
            columns.append(pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers))
    return pa.table(columns, ["header", *(f"tensor_{number}" for number in range(len(columns) - 1))])


def unpack(table: pa.Table) -> list[ReadSample]:
    """Return the samples of a block. Their arrays are views of the table's memory."""
    counts, rows, stacks = json.loads(table["header"][0].as_py())
    units = [UnitCounts(*count) for count in counts]
    tensors: list[dict[str, np.ndarray]] = [{} for _ in rows]
    shapes = [""] * len(rows)
    columns = iter(table.columns[1:])
    for signature, stacked in stacks:
        for name, dtype, shape in signature:
            # From the array's buffers, because a scalar's `as_buffer` copies.
            value = next(columns).chunk(0)
            _, offsets, values = value.buffers()
            start, stop = np.frombuffer(offsets, dtype=np.int64)[value.offset : value.offset + 2].tolist()
            array = np.frombuffer(values.slice(start, stop - start), dtype=dtype).reshape(len(stacked), *shape)
            for index, row in enumerate(stacked):
                tensors[row][name] = array[index]
                shapes[row] = str(signature)
    return [
        ReadSample(window, sort_key, units[unit], order, key, caption, cause, arrays, shape)
        for (window, sort_key, unit, order, key, caption, cause), arrays, shape in zip(rows, tensors, shapes, strict=True)
    ]


class ShardSource(Datasource):
    """A Ray Data source of read tasks, each of one or more groups."""

    def __init__(self, tasks: Sequence[Sequence[Group]], config: DataConfig, seed: int, block_bytes: int = BLOCK_BYTES):
        super().__init__()
        self.tasks, self._read = tasks, functools.partial(read_group, config=config, seed=seed, block_bytes=block_bytes)

    def estimate_inmemory_data_size(self) -> None:
        return None

    def get_read_tasks(self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(functools.partial(_read_groups, self._read, groups), unknown) for groups in self.tasks]


def _read_groups(read: Callable[[Group], Iterator[pa.Table]], groups: Sequence[Group]) -> Iterator[pa.Table]:
    return chain.from_iterable(map(read, groups))


@contextmanager
def data_errors() -> Iterator[None]:
    """Raise the DataError of a read task as itself, without the lines that Ray appends to its message."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, DataError):
            raise DataError(str(error.cause).splitlines()[0]) from None
        raise


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
