"""The reading plan: which rank reads which unit when. Pure arithmetic, equal on every rank and in every run.

Each epoch of a pool shuffles its units by (seed, epoch), and deals them to the ranks such that all have about the same number of
samples. Units stay whole, so when the ranks together have consumed the samples of one epoch, at most half of the largest unit per
rank is unread, and as many samples of the next epoch were read instead. The difference does not grow with the epochs. The plan
contains what a *base* ledger leaves: a run that resumes with another world_size takes what was consumed as its new base and
distributes the rest. How a rank mixes its pools is in `stream`.
"""

import heapq
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from ray_platform.contracts import ConfigError, MixtureState
from ray_platform.data.catalog import Catalog, ShardRange
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger, Ranges
from ray_platform.placement import can_autoscale, describe_nodes, total_resources
from ray_platform.units import plural


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
    mixture: MixtureState = field(default_factory=MixtureState)  # of this rank, where it resumes with the same world_size


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
    num_reads = sum(config.reads_per_pool)
    needed = world_size * (worker_cpus + num_reads * config.cpus_per_read)
    total = total_resources(config.placement).get("CPU", 0.0)
    if needed > total and not can_autoscale():
        raise ConfigError(
            f"data.cpus_per_read: {world_size} workers with {worker_cpus:g} CPUs and {num_reads} reads of "
            f"{config.cpus_per_read:g} each (data.reads_per_rank, at least one for each of data.weights) need {needed:g} CPUs, "
            f"but {describe_nodes(config.placement)} has {total:g}; lower one of these or give the cluster more CPUs"
        )


def check_world_size(catalog: Catalog, world_size: int) -> None:
    """Raise ConfigError if a rank would have nothing to read."""
    if world_size > sum(catalog.num_units):
        raise ConfigError(
            f"train.num_workers: {world_size} workers but only {plural(len(catalog.shards), 'shard')}; "
            "use fewer workers or write the data as more shards"
        )


def groups(catalog: Catalog, reader: Reader, size: int, num_streams: int, pool: int = 0) -> Iterator[Group]:
    """Yield the rank's groups of a pool, of at most `size` items, without end: per window, at most one for each read stream.

    Windows do not depend on what was consumed since `base`; only the items that are left in them do.
    """
    window = -1
    for epoch, units in _rank_epochs(catalog, reader, pool):
        for start in range(0, len(units), size * num_streams):
            window += 1
            for number in range(num_streams):
                # If there are fewer items than streams, another stream gets the first item in each window.
                dealt = units[start : start + size * num_streams][(number - window) % num_streams :: num_streams]
                left = tuple(
                    Item(pool, epoch, unit, catalog.pools[pool][unit], reader.consumed.ranges(pool, epoch, unit))
                    for unit in dealt
                    if not reader.consumed.is_complete(pool, epoch, unit)
                )
                if left:
                    yield Group(window, number, left)


def _rank_epochs(catalog: Catalog, reader: Reader, pool: int) -> Iterator[tuple[int, list[int]]]:
    """Yield (epoch, the rank's units in reading order) without end. Samples of two epochs are not mixed."""
    sizes = np.array([catalog.estimated_samples(unit) for unit in catalog.pools[pool]])
    loads = [(0.0, rank) for rank in range(reader.world_size)]  # heap of the samples dealt so far
    for epoch in count(reader.base.first_epoch[pool]):
        is_left = np.zeros(len(sizes), dtype=bool)
        is_left[reader.base.remaining(pool, epoch)] = True
        order = np.array(shuffled(range(len(sizes)), reader.seed, pool, epoch))
        order = order[is_left[order]]
        left = sizes.copy()
        for unit, ranges in reader.base.started(pool, epoch).items():
            left[unit] -= sum(stop - start for start, stop in ranges)
        left = np.maximum(left[order], 1.0)
        # The smallest units come last and even out the rest. Units of about the same size are dealt in random order.
        dealt = np.empty(len(order), dtype=np.int64)  # rank of each unit
        by_size = np.argsort(-np.frexp(left)[1], kind="stable")
        for place, samples in zip(by_size.tolist(), left[by_size].tolist(), strict=True):
            load, dealt[place] = loads[0]
            heapq.heapreplace(loads, (load + samples, loads[0][1]))
        yield epoch, order[dealt == reader.rank].tolist()


def shuffled(values: Sequence[int], *seeds: object) -> list[int]:
    """Return `values` in an order that depends only on `seeds`, not on the process, the platform or numpy's version."""
    order = list(values)
    # A text as seed is hashed with SHA-512, so neighboring seeds give unrelated orders.
    random.Random("/".join(map(str, seeds))).shuffle(order)
    return order
