"""Who reads which shard when: pure arithmetic, the same on every rank and in every run.

Each epoch shuffles the shards by (seed, epoch); rank r takes those at r, r + world_size, … of that order. A rank's
items run on over the epochs without end, so nothing waits at an epoch's border.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ray_platform.contracts import ConfigError, Position
from ray_platform.data.catalog import Shard

START = Position()
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One shard in one epoch, read by one rank."""

    number: int  # counts this rank's items over all epochs; `Position.item`
    epoch: int
    shard: Shard
    skip: int  # samples of it that were consumed before; `Position.order`


def items_per_epoch(num_shards: int, rank: int, world_size: int) -> int:
    """How many of an epoch's shards are `rank`'s. Raises ConfigError when a rank would have none."""
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of world_size {world_size}; ranks count from 0")
    if world_size > num_shards:
        raise ConfigError(
            f"{world_size} workers but only {num_shards} shards: a worker would have nothing to read; "
            "use fewer workers or write the data as more shards"
        )
    return len(range(rank, num_shards, world_size))


def plan(shards: Sequence[Shard], seed: int, rank: int, world_size: int, start: Position = START) -> Iterator[Item]:
    """`rank`'s items from `start` on, without end. Over the ranks of one world_size, each shard is in every epoch once.

    Raises ConfigError, at once, when world_size exceeds the number of shards.
    """
    per_epoch = items_per_epoch(len(shards), rank, world_size)

    def items() -> Iterator[Item]:
        number = start.item
        while True:
            epoch, first = divmod(number, per_epoch)
            own = shuffled(shards, seed, epoch)[rank::world_size]
            for shard in own[first:]:
                yield Item(number, epoch, shard, start.order if number == start.item else 0)
                number += 1

    return items()


def shuffled(values: Sequence[T], *seeds: object) -> list[T]:
    """`values` in an order that depends on `seeds` alone, whatever the process, platform or numpy version."""
    order = list(values)
    # A text as seed goes through SHA-512, so neighbouring seeds give unrelated orders.
    random.Random("/".join(map(str, seeds))).shuffle(order)
    return order
