"""The reading plan: which rank reads which unit when. Pure arithmetic, equal on every rank and in every run.

Each epoch of a pool shuffles its units by (seed, epoch). One endless sequence takes units from the pools in proportion to their
weights, and rank r reads the items r, r + world_size, … of it. The sequence contains what a *base* ledger leaves: a run that
resumes with another world_size takes what was consumed as its new base and distributes the rest.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice

from ray_platform.contracts import ConfigError
from ray_platform.data.catalog import Catalog, ShardRange
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger, Ranges
from ray_platform.placement import can_autoscale, describe_nodes, total_resources


@dataclass(frozen=True)
class Item:
    """One unit in one epoch of its pool, read by one rank."""

    pool: int
    epoch: int
    number: int  # of the unit in its pool
    unit: ShardRange
    consumed: Ranges  # samples that are not read again


@dataclass(frozen=True)
class Reader:
    """The part of the data that one rank reads, and where it starts."""

    seed: int
    rank: int
    world_size: int
    base: Ledger  # the plan starts with what this ledger leaves
    consumed: Ledger  # what is not read again; initially equal to `base`


@dataclass(frozen=True)
class Group:
    """Items that one task reads. The groups of a window, one per read stream, are read concurrently and merged in one order."""

    window: int
    read_stream: int
    items: tuple[Item, ...]


def check_cpus(config: DataConfig, world_size: int, worker_cpus: float) -> None:
    """Raise ConfigError if the reads of all ranks do not fit on the cluster, or on this machine, in addition to the workers.

    That would not just be slow: a read that waits for its rank to consume keeps its CPUs. If that rank waits for a read that got
    no CPUs, both wait forever.

    Args:
        config: the data.
        world_size: number of ranks.
        worker_cpus: CPUs of each worker on the nodes that read; 0 if those are other nodes.
    """
    needed = world_size * (worker_cpus + config.reads_per_rank * config.cpus_per_read)
    total = total_resources(config.placement).get("CPU", 0.0)
    if needed > total and not can_autoscale():
        raise ConfigError(
            f"data.cpus_per_read: {world_size} workers with {worker_cpus:g} CPUs and data.reads_per_rank = "
            f"{config.reads_per_rank} reads of {config.cpus_per_read:g} each need {needed:g} CPUs, but "
            f"{describe_nodes(config.placement)} has {total:g}; lower one of these or give the cluster more CPUs"
        )


def check_world_size(catalog: Catalog, world_size: int) -> None:
    """Raise ConfigError if a rank would have nothing to read."""
    if world_size > sum(catalog.num_units):
        raise ConfigError(
            f"train.num_workers: {world_size} workers but only {len(catalog.shards)} shards; "
            "use fewer workers or write the data as more shards"
        )


def groups(catalog: Catalog, reader: Reader, size: int, num_streams: int) -> Iterator[Group]:
    """Yield the rank's groups of at most `size` items without end: per window, at most one for each read stream.

    Windows do not depend on what was consumed since `base`; only the items that are left in them do.
    """
    rank_items = islice(_sequence(catalog, reader.seed, reader.base), reader.rank, None, reader.world_size)
    for window, items in enumerate(_windows(rank_items, size * num_streams)):
        for number in range(num_streams):
            # If there are fewer items than streams, another stream gets the first item in each window.
            dealt = items[(number - window) % num_streams :: num_streams]
            left = tuple(
                Item(pool, epoch, unit, catalog.pools[pool][unit], reader.consumed.ranges(pool, epoch, unit))
                for pool, epoch, unit in dealt
                if not reader.consumed.is_complete(pool, epoch, unit)
            )
            if left:
                yield Group(window, number, left)


def _windows(items: Iterator[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Yield at most `size` items at a time, of one epoch per pool: samples of two epochs are not mixed."""
    window: list[tuple[int, int, int]] = []
    for pool, epoch, unit in items:
        if len(window) == size or any(pool == other and epoch != other_epoch for other, other_epoch, _ in window):
            yield window
            window = []
        window.append((pool, epoch, unit))


def _sequence(catalog: Catalog, seed: int, base: Ledger) -> Iterator[tuple[int, int, int]]:
    """Yield (pool, epoch, unit) of all ranks without end, always of the pool that is furthest behind its weight."""
    pools = [_pool_units(len(units), seed, pool, base) for pool, units in enumerate(catalog.pools)]
    progress = [0.0] * len(pools)
    while True:
        pool = progress.index(min(progress))
        epoch, unit = next(pools[pool])
        progress[pool] += catalog.estimated_samples(catalog.pools[pool][unit]) / catalog.weights[pool]
        yield pool, epoch, unit


def _pool_units(num_units: int, seed: int, pool: int, base: Ledger) -> Iterator[tuple[int, int]]:
    for epoch in count(base.first_epoch[pool]):
        left = set(base.remaining(pool, epoch).tolist())
        yield from ((epoch, unit) for unit in shuffled(range(num_units), seed, pool, epoch) if unit in left)


def shuffled(values: Sequence[int], *seeds: object) -> list[int]:
    """Return `values` in an order that depends only on `seeds`, not on the process, the platform or numpy's version."""
    order = list(values)
    # A text as seed is hashed with SHA-512, so neighboring seeds give unrelated orders.
    random.Random("/".join(map(str, seeds))).shuffle(order)
    return order
