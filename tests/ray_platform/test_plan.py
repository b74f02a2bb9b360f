from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_platform.contracts import ConfigError, ConsumedRange
from ray_platform.data.catalog import Catalog, Shard, ShardRange
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader, check_world_size, groups, shuffled


def catalog_of(num_shards: int) -> Catalog:
    units = tuple(ShardRange(Shard(f"/data/{i:05d}.tar", 1, f"{i:05d}.tar", 10), 0, 1) for i in range(num_shards))
    return Catalog(tuple(unit.shard for unit in units), (units,), (1.0,))


def items_of(catalog, rank=0, world_size=1, *, count, seed=0, size=1, base=None, consumed=None):
    base = base or Ledger(catalog.num_units)
    planned = groups(catalog, Reader(seed, rank, world_size, base, consumed or base), size, 1)
    return list(islice((item for group in planned for item in group.items), count))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**40))
def test_every_epoch_reads_every_shard_exactly_once(num_shards, world_size, epochs, size, lanes, seed):
    catalog = catalog_of(num_shards)
    nothing = Ledger([num_shards])
    planned = [groups(catalog, Reader(seed, r, world_size, nothing, nothing), size, lanes) for r in range(world_size)]
    read: Counter[tuple[int, int]] = Counter()
    for _ in range(epochs * num_shards):  # far more turns than are needed
        read.update((item.epoch, item.number) for rank in planned for item in next(rank).items)
    assert set(read.values()) == {1}
    assert {(epoch, number) for epoch in range(epochs) for number in range(num_shards)} <= read.keys()


def test_epochs_and_seeds_differ():
    catalog = catalog_of(20)
    items, other = items_of(catalog, count=40), items_of(catalog, count=20, seed=1)
    orders = {tuple(item.number for item in part) for part in (items[:20], items[20:], other)}
    assert len(orders) == 3
    assert [item.epoch for item in items] == [0] * 20 + [1] * 20


def test_what_was_consumed_is_left_out_and_groups_stay_as_they_were():
    catalog = catalog_of(12)
    base = Ledger([12])
    whole = list(islice(groups(catalog, Reader(0, 1, 2, base, base), 3, 1), 4))
    consumed = base.copy()
    first, second = whole[0].items[1].number, whole[1].items[2].number
    consumed.add([ConsumedRange(0, 0, first, 0, 10, 10), ConsumedRange(0, 0, second, 2, 4, 10)])
    rest = list(islice(groups(catalog, Reader(0, 1, 2, base, consumed), 3, 1), 4))
    assert [[item.number for item in group.items] for group in rest] == [
        [item.number for item in group.items if item.number != first or item.epoch] for group in whole
    ]
    assert rest[1].items[2].consumed == [(2, 4)]


def test_lanes_share_out_each_window_and_no_window_crosses_an_epoch():
    catalog, nothing = catalog_of(7), Ledger([7])
    whole = list(islice(groups(catalog, Reader(0, 0, 1, nothing, nothing), 2, 2), 12))
    numbers = [[len(g.items) for g in whole if g.window == window] for window in range(4)]
    assert numbers == [[2, 2], [1, 2], [2, 2], [1, 2]]
    for window in range(4):
        assert {item.epoch for g in whole if g.window == window for item in g.items} == {window // 2}
    consumed = nothing.copy()
    consumed.add(ConsumedRange(0, 0, item.number, 0, 10, 10) for item in whole[0].items)
    rest = list(islice(groups(catalog, Reader(0, 0, 1, nothing, consumed), 2, 2), 11))
    assert rest == whole[1:]


def test_another_world_size_shares_out_what_is_left():
    catalog = catalog_of(9)
    base = Ledger([9])
    done = [item.number for item in items_of(catalog, 0, 3, count=3)]
    base.add([ConsumedRange(0, 0, number, 0, 10, 10) for number in done])
    found = [item for rank in range(2) for item in items_of(catalog, rank, 2, count=3, base=base)]
    assert sorted(item.number for item in found) == sorted(set(range(9)) - set(done))
    assert {item.epoch for item in found} == {0}


def test_the_order_is_part_of_what_a_checkpoint_means():
    # Ledgers in checkpoints count on it: if this changes, old runs resume with other samples.
    assert shuffled(range(8), 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]
    assert [item.number for item in items_of(catalog_of(8), count=8)] == [6, 7, 3, 1, 0, 2, 5, 4]


def test_more_workers_than_shards():
    with pytest.raises(ConfigError, match="3 workers but only 2 shards"):
        check_world_size(catalog_of(2), 3)
