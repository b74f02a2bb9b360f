"""What a stream keeps in memory."""

from itertools import islice

import pyarrow as pa

from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import groups
from ray_platform.data.source import read_group
from ray_platform.data.stream import Batcher, merged
from tests.ray_platform.conftest import png, write_shards
from tests.support.streams import reader_of

BLOCK_BYTES = 15 * 64 * 64 * 3


def in_one_buffer(table: pa.Table) -> pa.Table:
    """Return a block whose columns share one buffer, as in Ray's shared memory."""
    with pa.BufferOutputStream() as sink:
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return pa.ipc.open_stream(sink.getvalue()).read_all()


def test_a_sample_that_waits_for_others_of_its_shape_does_not_keep_its_block(tmp_path):
    shapes, members = [(64, 64)] * 14 + [(32, 128)], []
    for number in range(150):
        members += [(f"{number:03}.png", png(number, shapes[number % 15])), (f"{number:03}.txt", b"a")]
    sources = (str(write_shards(tmp_path, {"a.tar": members})),)
    config = DataConfig(sources=sources, image_size=64, aspect_ratios=(1, 4))
    catalog = build_catalog(config)
    reader, before = reader_of(catalog), pa.total_allocated_bytes()
    blocks = (block for group in groups(catalog, reader, 1, 1) for block in read_group(group, config, 0, BLOCK_BYTES))
    batches = Batcher(12, catalog, config, reader).batches([merged([map(in_one_buffer, blocks)])])
    shapes = [batch.tensors["image"].shape[1:3] for batch in islice(batches, 11)]
    assert set(shapes) == {(64, 64)}
    assert pa.total_allocated_bytes() - before < 4 * BLOCK_BYTES
