"""Who reads what when: pure arithmetic, the same on every rank and in every run.

Each epoch of a pool shuffles its units by (seed, epoch). One endless sequence takes from the pools in proportion to
their weights, and rank r reads the items r, r + world_size, … of it. It begins with what a *base* ledger leaves: a run that
goes on at another world_size takes what was consumed as its new base, and shares out the rest.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from ray_platform.contracts import ConfigError
from ray_platform.data.catalog import Catalog, ShardRange
from ray_platform.data.ledger import Ledger, Ranges


@dataclass(frozen=True)
class Item:
    """One unit in one epoch of its pool, read by one rank."""

    pool: int
    epoch: int
    number: int  # of the unit in its pool
    unit: ShardRange
    consumed: Ranges  # what need not be read of it


@dataclass(frozen=True)
class Reader:
    """Which part of the data one rank reads, from where on."""

    seed: int
    rank: int
    world_size: int
    base: Ledger  # the plan begins with what this leaves
    consumed: Ledger  # of the plan, what need not be read any more; at first the same as `base`


@dataclass(frozen=True)
class Group:
    """Items that one task reads. The groups of a window, one a lane, are read side by side and merged into one order."""

    window: int
    lane: int
    items: tuple[Item, ...]


def check_world_size(catalog: Catalog, world_size: int) -> None:
    """Raises ConfigError when a rank would have nothing to read."""
    if world_size > sum(catalog.num_units):
        raise ConfigError(
            f"{world_size} workers but only {len(catalog.shards)} shards: a worker would have nothing to read; "
            "use fewer workers or write the data as more shards"
        )


def groups(catalog: Catalog, reader: Reader, size: int, lanes: int) -> Iterator[Group]:
    """The rank's items without end, up to `size` a group, without what was consumed; window after window.

    A window does not depend on what was consumed since `base`, only which of its items are left.
    """
    own = islice(_sequence(catalog, reader.seed, reader.base), reader.rank, None, reader.world_size)
    for window, items in enumerate(_windows(own, size * lanes)):
        for lane in range(lanes):
            # Where there are fewer items than lanes, another lane gets the first in each window.
            dealt = items[(lane - window) % lanes :: lanes]
            left = tuple(
                Item(pool, epoch, number, catalog.pools[pool][number], reader.consumed.ranges(pool, epoch, number))
                for pool, epoch, number in dealt
                if not reader.consumed.is_complete(pool, epoch, number)
            )
            if left:
                yield Group(window, lane, left)


def _windows(items: Iterator[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """At most `size` items each, of one epoch of their pool: its samples are not mixed with the next epoch's."""
    window: list[tuple[int, int, int]] = []
    for pool, epoch, number in items:
        if len(window) == size or any(pool == other and epoch != other_epoch for other, other_epoch, _ in window):
            yield window
            window = []
        window.append((pool, epoch, number))


def _sequence(catalog: Catalog, seed: int, base: Ledger) -> Iterator[tuple[int, int, int]]:
    """(pool, epoch, unit) of all ranks, without end: always of the pool that is furthest behind its weight."""
    pools = [_pool_units(len(units), seed, pool, base) for pool, units in enumerate(catalog.pools)]
    progress = [0.0] * len(pools)
    while True:
        pool = min(range(len(pools)), key=progress.__getitem__) if len(pools) > 1 else 0
        epoch, number = next(pools[pool])
        progress[pool] += catalog.estimated_samples(catalog.pools[pool][number]) / catalog.weights[pool]
        yield pool, epoch, number


def _pool_units(num_units: int, seed: int, pool: int, base: Ledger) -> Iterator[tuple[int, int]]:
    epoch = base.first_epoch[pool]
    while True:
        left = set(base.remaining(pool, epoch).tolist())
        yield from ((epoch, number) for number in shuffled(range(num_units), seed, pool, epoch) if number in left)
        epoch += 1


def shuffled(values: Sequence[int], *seeds: object) -> list[int]:
    """`values` in an order that depends on `seeds` alone, whatever the process, platform or numpy version."""
    order = list(values)
    # A text as seed goes through SHA-512, so neighbouring seeds give unrelated orders.
    random.Random("/".join(map(str, seeds))).shuffle(order)
    return order
