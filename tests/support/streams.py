"""Build a rank's stream from its components, without Ray."""

from collections.abc import Iterator

from ray_platform.contracts import Batch
from ray_platform.data.catalog import Catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader, groups
from ray_platform.data.source import BLOCK_BYTES, read_group
from ray_platform.data.stream import Batcher, merged


def reader_of(catalog: Catalog, rank: int = 0, world_size: int = 1, *, seed: int = 0, consumed: Ledger | None = None) -> Reader:
    """Return a reader of all samples that were not consumed, with a plan over the full catalog."""
    base = Ledger(catalog.num_units)
    return Reader(seed, rank, world_size, base, consumed or base.copy())


def plain_stream(
    catalog: Catalog, config: DataConfig, reader: Reader, batch_size: int, block_bytes: int = BLOCK_BYTES
) -> Iterator[Batch]:
    """Yield the batches of `stream` endlessly."""

    def read_stream(pool: int, number: int):
        for group in groups(catalog, reader, config.interleave, config.reads_per_pool[pool], pool):
            if group.read_stream == number:
                yield from read_group(group, config, reader.seed, block_bytes)

    def samples(pool: int):
        return merged([read_stream(pool, number) for number in range(config.reads_per_pool[pool])])

    return Batcher(batch_size, catalog, config, reader).batches([samples(pool) for pool in range(len(catalog.pools))])
