"""The ledger by itself, and exactly-once delivery of the full data loader over random crashes and world sizes, without Ray."""

from collections import Counter
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_platform.contracts import ConsumedRange, DataError, MixtureState
from ray_platform.data import source
from ray_platform.data.catalog import Catalog, Shard, ShardRange
from ray_platform.data.causes import RejectedSample
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader
from tests.support.messages import check_message
from tests.support.streams import plain_stream

NUM_UNITS, TOTALS = (10, 1), (5, 1, 4, 1, 1, 1, 1, 1, 1, 2)  # units per pool; samples per unit


@st.composite
def ranges(draw) -> ConsumedRange:
    pool = draw(st.integers(0, 1))
    unit = draw(st.integers(0, NUM_UNITS[pool] - 1))
    start = draw(st.integers(0, TOTALS[unit] - 1))
    return ConsumedRange(pool, draw(st.integers(0, 2)), unit, start, draw(st.integers(start + 1, TOTALS[unit])), TOTALS[unit])


@settings(max_examples=200)
@given(st.lists(ranges(), max_size=60))
def test_a_ledger_is_the_set_of_the_consumed_samples(consumed):
    ledger, model = Ledger(NUM_UNITS), set()
    for part in consumed:
        samples = {(*part[:3], sample) for sample in range(part.start, part.stop)}
        if model & samples:
            with pytest.raises(ValueError, match="consumed twice"):
                ledger.add([part])
        else:
            kept, before = ledger.copy(), ledger.to_bytes()
            ledger.add([part])
            model |= samples
            assert kept.to_bytes() == before
        ledger = Ledger.from_bytes(ledger.to_bytes())
    for pool, num_units in enumerate(NUM_UNITS):
        done = [[all((pool, e, u, s) in model for s in range(TOTALS[u])) for u in range(num_units)] for e in range(3)]
        assert ledger.first_epoch[pool] == next((epoch for epoch in range(3) if not all(done[epoch])), 3)
        for epoch in range(3):
            assert ledger.remaining(pool, epoch).tolist() == [unit for unit in range(num_units) if not done[epoch][unit]]
            for unit in range(num_units):
                assert ledger.is_complete(pool, epoch, unit) == done[epoch][unit]
                if not done[epoch][unit]:
                    parts = ledger.ranges(pool, epoch, unit)
                    expected = {sample for *unit_, sample in model if unit_ == [pool, epoch, unit]}
                    assert [sample for start, stop in parts for sample in range(start, stop)] == sorted(expected)
                    assert all(stop < start for (_, stop), (start, _) in pairwise(parts))  # adjacent ranges are merged


class FakeUnit:
    """Unit whose sample keys include their epoch. Every fifth sample is bad, and samples have two shapes."""

    def __init__(self, item, size):
        self.name, self.size = f"{item.unit.shard.name}@{item.epoch}", size

    def __len__(self):
        return self.size

    def sample(self, place):
        key = f"{self.name}/{place}"
        if place % 5 == 4:
            return RejectedSample(key, "image_undecodable")
        return source.Sample(key, "", {"image": np.zeros((1, 1 + place % 2, 3), np.uint8)})


def catalog_of(pools: list[list[int]]) -> Catalog:
    """Return a catalog of shards with 40 kB per sample, with one pool for each list of sizes."""
    units = [
        tuple(ShardRange(Shard(f"/{p}-{i}.tar", size, f"{p}-{i}.tar", size), 0, size) for i, size in enumerate(sizes))
        for p, sizes in enumerate(pools)
    ]
    return Catalog(tuple(unit.shard for pool in units for unit in pool), tuple(units), (1 / len(pools),) * len(pools))


class Run:
    """A training run's use of the data loader: synchronized streams of all ranks, and checkpoints of their ledgers."""

    def __init__(self, catalog: Catalog, interleave: int, batch_size: int, reads_per_rank: int = 2):
        self.catalog, self.batch_size = catalog, batch_size
        sources = tuple(f"source {pool}" for pool in range(len(catalog.pools)))
        fields = {"image_size": 1, "interleave": interleave, "reads_per_rank": reads_per_rank, "max_skipped_fraction": 0.9}
        self.config = DataConfig(sources=sources, weights=catalog.weights, **fields)
        self.base = Ledger(catalog.num_units)
        self.consumed = self.base.copy()
        self.world_size = 0
        self.mixtures: list[MixtureState] = []  # per rank
        self.seen: Counter[str] = Counter()  # as of the last checkpoint
        self.keys: list[str] = []  # in the order of their steps

    def go_on(self, world_size: int, steps: int, lost_steps: int) -> None:
        """Resume, train, write a checkpoint after `steps`, and crash `lost_steps` later."""
        self.base, self.consumed = (Ledger.from_bytes(ledger.to_bytes()) for ledger in (self.base, self.consumed))
        if world_size != self.world_size:
            self.base, self.world_size, self.mixtures = self.consumed.copy(), world_size, [MixtureState()] * world_size
        streams = [self.batches(rank) for rank in range(world_size)]
        batches = [next(stream) for _ in range(steps) for stream in streams]
        for _ in range(lost_steps):
            for stream in streams:
                next(stream)
        if steps:
            self.mixtures = [batch.mixture for batch in batches[-world_size:]]
        self.consumed.add(part for batch in batches for part in batch.consumed)
        self.keys += [key for batch in batches for key in batch.keys]
        self.seen = Counter(self.keys)

    def batches(self, rank: int):
        reader = Reader(3, rank, self.world_size, self.base, self.consumed.copy(), self.mixtures[rank])
        return plain_stream(self.catalog, self.config, reader, self.batch_size)

    def good_keys(self, pool: int, epoch: int) -> set[str]:
        return {
            f"{unit.shard.name}@{epoch}/{place}"
            for unit in self.catalog.pools[pool]
            for place in range(unit.shard.size)
            if place % 5 != 4
        }


legs = st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(0, 3)), min_size=1, max_size=6)
pools = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=7), min_size=1, max_size=2)


@settings(max_examples=60)
@given(pools=pools, legs=legs, interleave=st.integers(1, 3), reads=st.integers(1, 3), batch_size=st.integers(1, 4))
def test_every_epoch_gives_every_sample_exactly_once_whatever_crashes(pools, legs, interleave, reads, batch_size):
    catalog = catalog_of(pools)
    run = Run(catalog, interleave, batch_size, reads)
    with mock.patch.object(source, "open_samples", lambda item, config, seed: FakeUnit(item, item.unit.shard.size)):
        for world_size, steps, lost in [*legs, (2, 25, 0)]:
            run.go_on(min(world_size, sum(catalog.num_units)), steps, lost)
    assert set(run.seen.values()) <= {1}, "a sample twice in an epoch"
    for pool, first_open in enumerate(run.consumed.first_epoch):
        for epoch in range(first_open):
            assert run.good_keys(pool, epoch) <= run.seen.keys(), "a sample lost from an epoch that is over"


@pytest.mark.parametrize("batch_size", [8, 3])
def test_weights_are_fractions_of_the_delivered_samples(batch_size):
    """Whatever the shards contain and the filters drop, with every number of ranks, and after every resume."""
    catalog = catalog_of([[10] * 5, [90, 30, 200]])
    # Without counts; the first source has larger samples.
    units = [[unit._replace(shard=unit.shard._replace(num_samples=-1)) for unit in pool] for pool in catalog.pools]
    catalog = Catalog(catalog.shards, tuple(map(tuple, units)), (0.7, 0.3))
    run = Run(catalog, 2, batch_size)

    class Filtered(FakeUnit):
        def sample(self, place):  # 70 % of the second source
            if self.name.startswith("1-") and place % 10 >= 3:
                return RejectedSample(self.name, "filtered_size")
            return super().sample(place)

    with mock.patch.object(source, "open_samples", lambda item, config, seed: Filtered(item, item.unit.shard.size)):
        for world_size, steps in ((2, 20), (2, 3), (3, 17), (1, 5)):
            run.go_on(world_size, steps, 1)
            first = sum(count for key, count in run.seen.items() if key.startswith("0-"))
            assert first == pytest.approx(0.7 * run.seen.total(), abs=6)
    assert set(run.seen.values()) == {1}
    assert run.consumed.first_epoch[0] >= 5


def test_a_source_of_which_everything_is_filtered_ends_the_run():
    catalog = catalog_of([[10] * 5, [10] * 5])
    run = Run(catalog, 2, 8)

    def opened(item, config, seed):
        unit = FakeUnit(item, 10)
        if item.pool == 1:
            unit.sample = lambda place: RejectedSample("1-0.tar/7", "filtered_similarity")
        return unit

    with mock.patch.object(source, "open_samples", opened), pytest.raises(DataError) as raised:
        run.go_on(1, 1, 0)
    check_message("one of data.weights' sources, of which a filter drops everything", raised.value)


def test_a_resumed_mixture_is_the_same_sample_for_sample():
    """Two shapes: a sample that waits for its batch keeps its turn."""
    catalog = catalog_of([[10] * 5, [90, 30, 200]])
    runs = [Run(catalog, 2, 3) for _ in range(2)]
    with mock.patch.object(source, "open_samples", lambda item, config, seed: FakeUnit(item, item.unit.shard.size)):
        runs[0].go_on(2, 40, 0)
        for steps in (1, 7, 32):
            runs[1].go_on(2, steps, 2)
    assert runs[0].keys == runs[1].keys
