"""The plan by itself. test_ledger.py and test_stream.py test streams that use it."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_platform.contracts import ConfigError, ConsumedRange
from ray_platform.data import plan
from ray_platform.data.catalog import Catalog, Shard, ShardRange
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader, check_world_size, groups, shuffled
from ray_platform.data.stream import dataset_groups, enough_groups
from tests.support.streams import reader_of


def catalog_of(num_shards: int, sizes: Sequence[int] = ()) -> Catalog:
    sizes = sizes or [10] * num_shards
    units = tuple(ShardRange(Shard(f"/data/{i:05d}.tar", 1, f"{i:05d}.tar", sizes[i]), 0, 1) for i in range(num_shards))
    return Catalog(tuple(unit.shard for unit in units), (units,), (1.0,))


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**40))
def test_every_epoch_reads_every_shard_exactly_once(num_shards, world_size, epochs, size, num_streams, seed):
    catalog = catalog_of(num_shards)
    planned = [groups(catalog, reader_of(catalog, r, world_size, seed=seed), size, num_streams) for r in range(world_size)]
    read: Counter[tuple[int, int]] = Counter()
    for _ in range(epochs * num_shards):  # far more iterations than needed
        read.update((item.epoch, item.number) for rank in planned for item in next(rank).items)
    assert set(read.values()) == {1}
    assert {(epoch, number) for epoch in range(epochs) for number in range(num_shards)} <= read.keys()


def test_the_order_differs_by_epoch_and_seed_and_is_part_of_what_a_checkpoint_means():
    catalog = catalog_of(8)
    first, second, other = (
        [group.items[0].number for group in islice(groups(catalog, reader_of(catalog, seed=seed), 1, 1), start, start + 8)]
        for start, seed in ((0, 0), (8, 0), (0, 1))
    )
    assert first != second != other != first
    # Ledgers in checkpoints rely on this order: if it changes, old runs resume with other samples.
    assert first == [6, 7, 3, 1, 0, 2, 5, 4]
    assert shuffled(range(8), 0, 0) == [0, 2, 1, 4, 6, 7, 3, 5]


def test_a_rank_plans_few_epochs_ahead(monkeypatch):
    shuffles = []
    monkeypatch.setattr(plan, "shuffled", lambda values, *seeds: shuffles.append(seeds) or list(values))
    for num_samples, num_groups in ((10, 1024), (10_000, 105), (2**21, 8)):
        units = tuple(ShardRange(Shard(f"/{i}.tar", 1, f"{i}.tar", num_samples), 0, 1) for i in range(2000))
        large = Catalog(tuple(unit.shard for unit in units), (units,), (1.0,))
        assert dataset_groups(large, DataConfig(image_size=8)) == num_groups
    shuffles.clear()
    list(islice(groups(large, reader_of(large, 0, 100), 2, 1), num_groups))
    assert len(shuffles) == 1


def test_a_dataset_reads_no_more_groups_than_a_run_needs():
    """Tiny images fit in the object store by the epoch: the demo's readers decoded many times what its 640 steps consume."""
    units = tuple(ShardRange(Shard(f"/{i}.tar", 1, f"{i}.tar", 500), 0, 1) for i in range(10))
    catalog = Catalog(tuple(unit.shard for unit in units), (units,), (1.0,))
    reader = reader_of(catalog)
    planned = list(enough_groups(20_480, groups(catalog, reader, 4, 1)))
    assert [len(group.items) for group in planned] == [4, 4, 2] * 4 + [4]  # 20,000 samples in four epochs of three groups
    first = planned[0].items[0]
    reader.consumed.add([ConsumedRange(0, 0, first.number, 0, 300, 500)])
    assert len(list(enough_groups(2000, groups(catalog, reader, 4, 1)))) == 2  # the first group has 1,700 left


def test_read_streams_divide_each_window_and_no_window_crosses_an_epoch():
    catalog = catalog_of(7)
    whole = list(islice(groups(catalog, reader_of(catalog), 2, 2), 12))
    sizes = [[len(group.items) for group in whole if group.window == window] for window in range(4)]
    assert sizes == [[2, 2], [1, 2], [2, 2], [1, 2]]
    for window in range(4):
        assert {item.epoch for group in whole if group.window == window for item in group.items} == {window // 2}
    reader = reader_of(catalog)
    reader.consumed.add(ConsumedRange(0, 0, item.number, 0, 10, 10) for item in whole[0].items)
    assert list(islice(groups(catalog, reader, 2, 2), 11)) == whole[1:]


@pytest.mark.parametrize(("world_size", "limit"), [(2, 0.005), (4, 0.02), (7, 0.03)])
def test_an_epoch_of_unequal_shards_is_read_by_all_ranks_alike(world_size, limit):
    """By units alone, 5, 8 and 16 % were unread after the samples of an epoch, and more after three."""
    sizes = range(10, 1001, 50)
    catalog = catalog_of(20, sizes)
    for epochs in (1, 3):
        left = 0
        for rank in range(world_size):
            read = 0
            for group in groups(catalog, reader_of(catalog, rank, world_size), 2, 2):
                if group.items[0].epoch == epochs:
                    break
                read += sum(sizes[item.number] for item in group.items)
            left += max(0, read - epochs * sum(sizes) / world_size)
        assert left / sum(sizes) < limit


def test_the_rest_is_divided_among_another_number_of_ranks():
    """A shard of which nearly everything was consumed counts for what is left."""
    catalog = catalog_of(4, (1000, 100, 100, 100))
    base = Ledger(catalog.num_units)
    base.add([ConsumedRange(0, 0, 0, 0, 990, 1000)])
    dealt = []
    for rank in range(2):
        planned = groups(catalog, Reader(0, rank, 2, base, base.copy()), 8, 1)
        dealt.append(sorted(item.number for item in next(planned).items))
    assert sorted(map(len, dealt)) == [2, 2]
    assert sorted([*dealt[0], *dealt[1]]) == [0, 1, 2, 3]


def test_more_workers_than_shards():
    with pytest.raises(ConfigError, match="3 workers but only 2 shards"):
        check_world_size(catalog_of(2), 3)
