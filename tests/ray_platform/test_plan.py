from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_platform.contracts import ConfigError, Position
from ray_platform.data.catalog import Shard
from ray_platform.data.plan import items_per_epoch, plan, shuffled


def make_shards(count: int) -> list[Shard]:
    return [Shard(f"/data/{number:05d}.tar", 1, f"{number:05d}.tar") for number in range(count)]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 3), st.integers(0, 2**40))
def test_every_epoch_reads_every_shard_exactly_once(num_shards, world_size, epoch, seed):
    if world_size > num_shards:
        return
    shards, read = make_shards(num_shards), Counter()
    for rank in range(world_size):
        per_epoch = items_per_epoch(num_shards, rank, world_size)
        items = list(islice(plan(shards, seed, rank, world_size), per_epoch * (epoch + 1)))
        assert [item.number for item in items] == list(range(len(items)))
        assert [item.epoch for item in items] == sorted(item.epoch for item in items)
        read.update(item.shard for item in items if item.epoch == epoch)
    assert read == Counter(shards)


@given(st.integers(0, 50), st.integers(0, 1000))
def test_a_plan_goes_on_where_it_was_left(item, order):
    shards = make_shards(7)
    whole = list(islice(plan(shards, 3, 1, 2), 60))
    rest = list(islice(plan(shards, 3, 1, 2, Position(item, order)), 10))
    assert [(entry.number, entry.epoch, entry.shard) for entry in rest] == [
        (entry.number, entry.epoch, entry.shard) for entry in whole[item : item + 10]
    ]
    assert [entry.skip for entry in rest] == [order] + [0] * 9


def test_epochs_and_seeds_differ():
    shards = make_shards(20)
    first, second = (list(islice(plan(shards, 0, 0, 1), 40))[start : start + 20] for start in (0, 20))
    other = list(islice(plan(shards, 1, 0, 1), 20))
    orders = [tuple(item.shard.name for item in items) for items in (first, second, other)]
    assert len(set(orders)) == 3


def test_the_order_is_part_of_what_a_checkpoint_means():
    # Positions in checkpoints count on it: if this changes, old runs resume with other samples.
    assert shuffled(range(8), 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]
    assert shuffled("abcd", 1, 2, "00000.tar") == ["d", "c", "b", "a"]


def test_more_workers_than_shards():
    with pytest.raises(ConfigError, match="3 workers but only 2 shards"):
        plan(make_shards(2), 0, 0, 3)
    with pytest.raises(ConfigError, match="rank 2 is not one of world_size 2"):
        plan(make_shards(5), 0, 2, 2)
