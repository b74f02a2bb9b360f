import logging
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pytest

from ray_platform import storage
from ray_platform.contracts import Batch, ConfigError, DataError, Position
from ray_platform.data.catalog import Shard, list_shards
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import START, items_per_epoch, plan
from ray_platform.data.stream import Tally, inspect_first_samples, read_item, rebatch, stream

CONFIG = DataConfig(image_size=8)
NUM_SAMPLES = 60  # in shard_folder


@pytest.fixture(scope="module")
def shards(shard_folder) -> tuple[Shard, ...]:
    return list_shards([str(shard_folder)])


@pytest.fixture
def write_shards(tmp_path, build_tar):
    """write_shards({name: members or bytes}) -> the shards."""

    def write(contents) -> tuple[Shard, ...]:
        for name, content in contents.items():
            (tmp_path / name).write_bytes(content if isinstance(content, bytes) else build_tar(content))
        return list_shards([str(tmp_path)])

    return write


def without_ray(shards, config=CONFIG, *, batch_size, num_batches, seed=0, rank=0, world_size=1, start=START):
    """The same stream, from its plain parts."""
    tally = Tally(rank, config.max_skipped_share, start.item, items_per_epoch(len(shards), rank, world_size))
    items = plan(shards, seed, rank, world_size, start)
    blocks = chain.from_iterable(read_item(item, seed, config.image_size) for item in items)
    return list(islice(rebatch(blocks, batch_size, tally), num_batches))


def with_ray(shards, config=CONFIG, *, batch_size, num_batches, seed=0, rank=0, world_size=1, start=START):
    return list(
        stream(
            shards,
            config,
            batch_size=batch_size,
            seed=seed,
            rank=rank,
            world_size=world_size,
            start=start,
            num_batches=num_batches,
        )
    )


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        np.testing.assert_array_equal(batch.images, other.images)
        assert (batch.captions, batch.keys, batch.position) == (other.captions, other.keys, other.position)


def captions_of(batches: list[Batch]) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


def test_two_ranks_cover_every_epoch_exactly(shards):
    for epoch in range(3):
        seen = Counter()
        for rank in range(2):
            for item in islice(plan(shards, 5, rank, 2), 20):
                if item.epoch == epoch:
                    seen.update(key for block in read_item(item, 5, 8) for key in block["key"])
        assert len(seen) == NUM_SAMPLES
        assert set(seen.values()) == {1}


def test_epochs_follow_each_other_in_other_orders(shards):
    batches = without_ray(shards, batch_size=NUM_SAMPLES, num_batches=3)
    orders = [tuple(batch.captions) for batch in batches]
    assert len(set(orders)) == 3
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert [batch.position.item for batch in batches] == [4, 9, 14]


def test_within_a_shard_the_order_is_another_in_each_epoch_and_seed(shards):
    orders = {
        (seed, item.epoch): tuple(chain.from_iterable(block["key"] for block in read_item(item, seed, 8)))
        for seed in (0, 1)
        for item in islice(plan(shards[:1], seed, 0, 1), 2)
    }
    assert len(set(orders.values())) == 4


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_a_stream_resumes_with_the_very_next_sample(shards, batch_size):
    whole = without_ray(shards, batch_size=batch_size, num_batches=25)
    for done in (1, 8, 24):
        rest = without_ray(shards, batch_size=batch_size, num_batches=25 - done, start=whole[done - 1].position)
        assert_same(rest, whole[done:])


def test_the_stream_does_not_depend_on_where_blocks_end(shards, monkeypatch):
    whole = without_ray(shards, batch_size=9, num_batches=10)
    monkeypatch.setattr("ray_platform.data.stream.BLOCK_SAMPLES", 4)
    assert_same(without_ray(shards, batch_size=9, num_batches=10), whole)


def test_rejects_are_counted_as_of_the_batch_and_shown_by_key(write_shards, build_samples, caplog):
    members = build_samples(0, 40)
    members[1] = ("00000.txt", b"")
    members[20] = ("00010.png", b"no image")
    shards = write_shards({"a.tar": members})
    with caplog.at_level(logging.WARNING):
        batches = without_ray(shards, DataConfig(image_size=8, max_skipped_share=0.5), batch_size=2, num_batches=190)
    assert "a.tar/00000: caption_empty" in caplog.text
    assert "a.tar/00010: image_undecodable; further ones are only counted" in caplog.text
    assert len(caplog.records) == 6
    assert batches[-1].skipped == {"caption_empty": 10, "image_undecodable": 10}
    totals = [sum(batch.skipped.values()) for batch in batches]
    assert totals == sorted(totals)
    for number, (batch, total) in enumerate(zip(batches, totals, strict=True)):
        # Every sample up to the batch's last was either in a batch or skipped.
        samples = batch.position.item * 40 + batch.position.order
        assert samples == total + 2 * (number + 1)


def test_too_many_rejects_stop_the_run(write_shards, build_samples):
    members = build_samples(0, 150)
    for number in range(0, 300, 30):
        members[number] = (members[number][0], b"no image")
    shards = write_shards({"a.tar": members, "b.tar": build_samples(200, 150)})
    message = r"rank 0 had to skip \d+ of \d+ samples \(image_undecodable \d\.\d%\), more than data.max_skipped_share = 2"
    with pytest.raises(DataError, match=message):
        without_ray(shards, DataConfig(image_size=8, max_skipped_share=0.02), batch_size=10, num_batches=30)
    assert without_ray(shards, DataConfig(image_size=8, max_skipped_share=0.1), batch_size=10, num_batches=30)


def test_few_samples_are_judged_after_a_whole_epoch(write_shards, build_samples):
    members = build_samples(0, 10)
    members[0] = ("00000.png", b"no image")
    shards = write_shards({"a.tar": members})
    assert len(without_ray(shards, batch_size=9, num_batches=1)) == 1
    with pytest.raises(DataError, match=r"skip 1 of 10 samples \(image_undecodable 10\.0%\)"):
        without_ray(shards, batch_size=9, num_batches=2)


def test_an_epoch_without_a_good_sample_ends(write_shards):
    shards = write_shards({"a.tar": [("README", b"x")], "b.tar": b"\xab" * 3000})
    with pytest.raises(DataError, match=r"2 of 2 samples \(.*shard_empty 50.0%.*\)"):
        without_ray(shards, batch_size=1, num_batches=1)


def test_inspection_is_a_dry_run(write_shards, build_samples, shards):
    members = build_samples(0, 10)
    members[0] = ("00000.png", b"no image")
    found = inspect_first_samples(write_shards({"a.tar": members}), CONFIG, 5)
    assert (found.good, found.rejected) == (4, {"image_undecodable": 1})
    assert (found.example.key, found.example.caption) == ("a.tar/00001", "sample 1")
    assert inspect_first_samples(shards, CONFIG, 100).good == 20
    with pytest.raises(DataError, match=r"none of its first 1 samples can be used \(1 × image_undecodable\)"):
        inspect_first_samples(write_shards({"a.tar": members}), CONFIG, 1)


@pytest.mark.usefixtures("ray_cluster")
class TestWithRay:
    def test_it_is_what_the_plain_parts_give(self, shards):
        for rank in range(2):
            whole = with_ray(shards, batch_size=7, num_batches=12, seed=3, rank=rank, world_size=2)
            assert_same(whole, without_ray(shards, batch_size=7, num_batches=12, seed=3, rank=rank, world_size=2))
            rest = with_ray(shards, batch_size=7, num_batches=7, seed=3, rank=rank, world_size=2, start=whole[4].position)
            assert_same(rest, whole[5:])

    def test_batches_are_exact_and_the_callers_own(self, shards):
        for batch in with_ray(shards, batch_size=64, num_batches=2):
            assert batch.images.shape == (64, 8, 8, 3)
            assert batch.images.dtype == np.uint8
            assert batch.images.flags.writeable
            assert len(batch.captions) == len(batch.keys) == 64

    def test_one_dataset_after_the_other(self, shards, monkeypatch):
        monkeypatch.setattr("ray_platform.data.stream.DATASET_ITEMS", 3)
        assert_same(with_ray(shards, batch_size=30, num_batches=6), without_ray(shards, batch_size=30, num_batches=6))

    def test_resuming_at_the_very_end_of_an_item(self, shards):
        whole = without_ray(shards, batch_size=5, num_batches=40)
        later, start = next((n + 1, b.position) for n, b in enumerate(whole) if b.position.order == 20)
        assert_same(with_ray(shards, batch_size=5, num_batches=40 - later, start=start), whole[later:])

    def test_bad_shards_between_good_ones(self, write_shards, build_samples):
        good = {f"{number}.tar": build_samples(number * 100, 50) for number in range(3)}
        shards = write_shards({**good, "empty.tar": [], "garbage.tar": b"\xab" * 3000})
        batches = with_ray(shards, batch_size=50, num_batches=4)
        assert set(captions_of(batches[:3])) == {f"sample {n}" for first in (0, 100, 200) for n in range(first, first + 50)}
        assert batches[3].skipped.keys() == {"shard_empty", "tar_truncated"}

    def test_no_good_sample_at_all(self, write_shards):
        shards = write_shards({f"{number}.tar": [] for number in range(3)})
        with pytest.raises(DataError, match=r"shard_empty 100\.0%"):
            with_ray(shards, batch_size=50, num_batches=1)

    def test_a_shard_that_went_away_is_named_in_one_line(self, write_shards, build_samples):
        shards = write_shards({"a.tar": build_samples(0, 5), "b.tar": build_samples(5, 5)})
        Path(shards[1].url).unlink()
        with pytest.raises(DataError, match=r"b\.tar: no such file or folder; correct the path$"):
            with_ray(shards, batch_size=5, num_batches=4)

    def test_a_stream_can_be_left_early(self, shards):
        batches = stream(shards, CONFIG, batch_size=2, seed=0, rank=0, world_size=1, num_batches=10**9)
        assert next(batches).position == Position(0, 2)
        batches.close()

    def test_what_cannot_work_is_said_at_once(self, shards):
        with pytest.raises(ConfigError, match="6 workers but only 5 shards"):
            stream(shards, CONFIG, batch_size=2, seed=0, rank=0, world_size=6, num_batches=1)
        greedy = DataConfig(image_size=8, reads_per_rank=3, cpus_per_read=1.0)
        with pytest.raises(ConfigError, match=r"each need 6 CPUs, but the cluster has 4; lower one of these"):
            stream(shards, greedy, batch_size=2, seed=0, rank=0, world_size=2, num_batches=1)

    def test_two_workers_on_a_full_cluster(self, shards):
        """As in training: each rank in an actor, and actors and reads together just fit."""
        import ray

        def read(rank: int) -> list[str]:
            return captions_of(with_ray(shards, config, batch_size=5, num_batches=20, rank=rank, world_size=2))

        config = DataConfig(image_size=8, cpus_per_read=0.5)

        @ray.remote(num_cpus=1)
        class Worker:
            def run(self, rank: int) -> list[str]:
                return read(rank)

        workers = [Worker.remote() for _ in range(2)]
        found = ray.get([worker.run.remote(rank) for rank, worker in enumerate(workers)])
        for rank in range(2):
            expected = without_ray(shards, config, batch_size=5, num_batches=20, rank=rank, world_size=2)
            assert found[rank] == captions_of(expected)
        for worker in workers:
            ray.kill(worker)

    @pytest.mark.s3
    def test_from_s3(self, s3_url, shard_folder, shards, monkeypatch):
        """In a worker whose environment holds the credentials, as a pod's does; its reads inherit them."""
        import os

        import ray

        storage.put_folder(shard_folder, f"{s3_url}/stream")
        remote = list_shards([f"{s3_url}/stream/{{00000..00004}}.tar"])
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        read = ray.remote(num_cpus=0, runtime_env={"env_vars": environment})(with_ray)
        batches = ray.get(read.remote(remote, batch_size=16, num_batches=8))
        assert_same(batches, without_ray(shards, batch_size=16, num_batches=8))
