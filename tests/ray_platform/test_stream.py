import logging
import os
import re
import time
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import ray

from ray_platform import storage
from ray_platform.contracts import Batch, ConfigError, ConsumedRange, DataError
from ray_platform.data.catalog import Catalog, build_catalog
from ray_platform.data.causes import check_skipped
from ray_platform.data.config import DataConfig
from ray_platform.data.filters import FilterConfig
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import groups
from ray_platform.data.stream import reading_context, stream
from ray_platform.train.checkpointing import add_counts
from tests.ray_platform.conftest import png, samples_of, tar_of, write_shards
from tests.support.messages import check_message
from tests.support.streams import plain_stream, reader_of

NUM_SAMPLES = 60  # in shard_folder


def config_of(folder, **fields) -> DataConfig:
    return DataConfig(**({"sources": (str(folder),), "image_size": 8, "retry_seconds": 1.0} | fields))


def without_ray(catalog, config, reader, *, batch_size, num_batches, **block_bytes) -> list[Batch]:
    return list(islice(plain_stream(catalog, config, reader, batch_size, **block_bytes), num_batches))


def with_ray(catalog, config, reader, *, batch_size, num_batches) -> list[Batch]:
    return list(stream(catalog, config, reader, batch_size=batch_size, num_batches=num_batches))


def after(catalog, batches) -> Ledger:
    ledger = Ledger(catalog.num_units)
    ledger.add(consumed for batch in batches for consumed in batch.consumed)
    return ledger


def assert_same(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.tensors["image"].tobytes() == other.tensors["image"].tobytes()
        assert (batch.captions, batch.keys, batch.consumed) == (other.captions, other.keys, other.consumed)


def captions_of(batches: list[Batch]) -> list[str]:
    return [caption for batch in batches for caption in batch.captions]


@pytest.fixture(scope="module")
def config(shard_folder) -> DataConfig:
    return config_of(shard_folder)


@pytest.fixture(scope="module")
def catalog(config) -> Catalog:
    return build_catalog(config)


@pytest.fixture
def write(tmp_path):
    """Return write({name: members or bytes}, **DataConfig fields), which writes shards to a new folder.

    write returns (catalog, config).
    """

    def written(contents, **fields):
        config = config_of(write_shards(tmp_path, contents), **fields)
        return build_catalog(config), config

    return written


def test_every_epoch_has_all_samples_in_another_order_that_mixes_shards(catalog, config):
    batches = without_ray(catalog, config, reader_of(catalog), batch_size=NUM_SAMPLES, num_batches=3)
    assert len({batch.captions for batch in batches}) == 3
    assert all(sorted(batch.captions) == sorted(f"sample {n}" for n in range(NUM_SAMPLES)) for batch in batches)
    shards = [key.partition("/")[0] for key in batches[0].keys[:20]]
    assert len(set(shards)) > 1
    assert shards != sorted(shards)


@pytest.mark.parametrize(
    "fields", [{}, {"crop": "random", "aspect_ratios": (0.5, 1, 2), "size_step": 4}], ids=["square", "buckets"]
)
@pytest.mark.parametrize("batch_size", [1, 7])
def test_a_stream_resumes_with_the_very_same_bytes(write, fields, batch_size):
    shapes = [(16, 16), (30, 12), (10, 24)]
    samples = [
        [(f"{n:03d}.png", png(n, shapes[n % 3]) if n % 9 else b"no image"), (f"{n:03d}.txt", f"sample {n}".encode())]
        for n in range(60)
    ]
    shards = {f"{s}.tar": [member for sample in samples[s::4] for member in sample] for s in range(4)}
    catalog, config = write(shards, max_skipped_fraction=0.5, **fields)
    whole = without_ray(catalog, config, reader_of(catalog), batch_size=batch_size, num_batches=25)
    for done in (1, 8, 24):
        reader = reader_of(catalog, consumed=Ledger.from_bytes(after(catalog, whole[:done]).to_bytes()))
        assert_same(without_ray(catalog, config, reader, batch_size=batch_size, num_batches=25 - done), whole[done:])
    if fields:
        assert {batch.tensors["image"].shape[1:3] for batch in whole} == {(8, 8), (12, 4), (4, 12)}


def test_the_stream_does_not_depend_on_where_blocks_end(catalog, config):
    whole = without_ray(catalog, config, reader_of(catalog), batch_size=9, num_batches=10)
    assert_same(without_ray(catalog, config, reader_of(catalog), batch_size=9, num_batches=10, block_bytes=600), whole)


def test_one_read_of_four_shards_gives_the_stream_of_two_reads_of_two(catalog, config):
    """The demo's one read per rank, instead of the default's two, must not change what it learns."""
    two, one = (replace(config, reads_per_rank=reads, interleave=shards) for reads, shards in ((2, 2), (1, 4)))
    streams = [without_ray(catalog, used, reader_of(catalog), batch_size=9, num_batches=20) for used in (two, one)]
    assert_same(*streams)


def test_reads_are_few_samples_ahead_even_of_tiny_images(catalog, config):
    """The object store would hold 300,000 of the demo's images for each read, which decoded that many at the start."""
    for fields, reads in (({}, 1), ({"deterministic": False, "reads_per_rank": 3}, 3)):
        limits = reading_context(catalog, replace(config, **fields), world_size=2).execution_options.resource_limits
        assert limits.object_store_memory == reads * 4096 * 8 * 8 * 3
    precomputed = replace(catalog, manifest={"complete": True})  # its samples have other sizes than images
    assert reading_context(precomputed, config, world_size=2).execution_options.resource_limits.object_store_memory == float(
        "inf"
    )


def test_rejects_are_counted_as_of_the_batch_and_shown_by_key(write, caplog):
    members = samples_of(0, 40)
    members[1] = ("00000.txt", b"")
    members[20] = ("00010.png", b"no image")
    catalog, config = write({"a.tar": members}, max_skipped_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        batches = without_ray(catalog, config, reader_of(catalog), batch_size=2, num_batches=190)
    assert "a.tar/00000: caption_empty" in caplog.text
    assert "a.tar/00010: image_undecodable; further ones are only counted" in caplog.text
    assert len(caplog.records) == 6
    assert batches[-1].skipped == {"caption_empty": 10, "image_undecodable": 10}
    consumed = 0
    for number, batch in enumerate(batches, 1):
        # Every sample consumed so far was either in a batch or skipped.
        consumed += sum(part.stop - part.start for part in batch.consumed)
        assert consumed == sum(batch.skipped.values()) + 2 * number


def test_filtered_samples_are_counted_but_are_not_bad(write):
    members = [*samples_of(0, 60), *samples_of(60, 60, size=20)]
    catalog, config = write({"a.tar": members}, filters=FilterConfig(min_size=20), max_skipped_fraction=0.0)
    (batch,) = without_ray(catalog, config, reader_of(catalog), batch_size=60, num_batches=1)
    assert set(batch.captions) == {f"sample {n}" for n in range(60, 120)}
    assert batch.skipped.keys() == {"filtered_size"}


@pytest.mark.parametrize("pattern", ["", "*.tar", "{0..1}.tar"])
@pytest.mark.parametrize("has_counts", [True, False])
def test_weights_are_fractions_of_what_a_real_mixture_delivers(tmp_path, pattern, has_counts):
    """Of samples of 30 and of 1 kB, where a filter drops 70 % of one source. Estimates by bytes gave 25 and 75 %."""
    counts = {f"{shard}_stats.json": b'{"successes": 20}' for shard in range(2 * has_counts)}
    write_shards(tmp_path / "large", {f"{s}.tar": samples_of(20 * s, 20, size=100) for s in range(2)} | counts)
    small = {f"{s}.tar": [*samples_of(100 * s, 6, size=20), *samples_of(100 * s + 50, 14, size=16)] for s in range(2)}
    write_shards(tmp_path / "small", small | counts)
    sources = f"{tmp_path}/large/{pattern}", f"{tmp_path}/small/{pattern}"
    config = config_of("", sources=sources, weights=(0.5, 0.5), filters=FilterConfig(min_size=20))
    catalog = build_catalog(config)
    assert catalog.num_samples == (80 if has_counts else None)
    ranks = [without_ray(catalog, config, reader_of(catalog, rank, 2), batch_size=5, num_batches=8) for rank in range(2)]
    from_large = sum(key.startswith("large/") for batches in ranks for batch in batches for key in batch.keys)
    assert from_large == pytest.approx(40, abs=2)


def check(catalog, config, world_size=1, batch_size=10, max_epochs=1.0, past=()):
    """Read up to some epochs with all ranks in step, judge the losses at every step as a run does, and return their causes."""
    streams = [plain_stream(catalog, config, reader_of(catalog, rank, world_size), batch_size) for rank in range(world_size)]
    steps, good = 0, 0
    while True:
        batches = [next(stream) for stream in streams]
        steps, good = steps + 1, good + world_size * batch_size
        skipped = add_counts(*(batch.skipped for batch in batches), dict(past))
        epoch_samples = sum(batch.epoch_samples for batch in batches) / world_size
        check_skipped("the run", skipped, good, epoch_samples, config.max_skipped_fraction, batches[0].skip_details)
        if good + sum(skipped.values()) >= max_epochs * epoch_samples:
            return skipped


def test_too_many_rejects_stop_the_run(write):
    members = samples_of(0, 150)
    for number in range(0, 300, 30):
        members[number] = (members[number][0], b"no image")
    catalog, strict = write({"a.tar": members, "b.tar": samples_of(200, 150)}, max_skipped_fraction=0.02)
    with pytest.raises(
        DataError, match=r"had to skip [78] of 300 samples \(image_undecodable 2.\d%\), more than data.max_skipped_fraction"
    ):
        check(catalog, strict)
    assert check(catalog, config_of(strict.sources[0], max_skipped_fraction=0.1))["image_undecodable"] > 6


def test_data_without_a_good_sample_ends_the_run(write):
    catalog, config = write({"a.tar": [("README", b"x")], "b.tar": [("0.jpg", b"broken"), ("0.txt", b"a")]})
    with pytest.raises(DataError, match=r"rank 0 found no good sample in 11 shards in a row, up to [ab].tar/") as raised:
        without_ray(catalog, config, reader_of(catalog), batch_size=1, num_batches=1)
    check_message("11 shards in a row without a good sample", raised.value)
    # Where nearly everything may be lost, a longer sequence of losses is a coincidence.
    shards = {f"{n:03}.tar": samples_of(n, 1) if n % 30 == 0 else b"" for n in range(90)}
    catalog, config = write(shards, max_skipped_fraction=0.98)
    assert without_ray(catalog, config, reader_of(catalog), batch_size=1, num_batches=6)[-1].skipped["shard_empty"] > 50


def test_a_lost_shard_counts_for_its_samples_and_is_consumed(write, caplog):
    catalog, config = write({f"{n}.tar": samples_of(100 * n, 20) for n in range(6)}, max_skipped_fraction=0.3)
    last_read = next(groups(catalog, reader_of(catalog), 6, 1)).items[-1].unit.shard
    Path(last_read.url).unlink()
    batches = without_ray(catalog, config, reader_of(catalog), batch_size=51, num_batches=2)
    assert batches[-1].skipped == {"shard_missing": 20}
    error = f"{last_read.url}: no such file"  # as storage reports it
    assert f"{last_read.name}/: shard_missing ({error}" in caplog.text
    skipped = next(line for line in caplog.messages if "shard_missing" in line)
    check_message("one shard is missing, in the log", skipped, SOURCE=config.sources[0], SHARD=last_read.name)
    with pytest.raises(DataError, match=f"; shard_missing: {re.escape(error)}"):
        check_skipped("the run", batches[-1].skipped, 20, 40, 0.1, batches[-1].skip_details)
    assert batches[-1].epoch_samples == 120
    assert after(catalog, batches).first_epoch == [1]
    # A resume left five samples in between: they waited for others of their shape.
    Path(catalog.shards[0].url).unlink()
    left = after(catalog, [])
    left.add(ConsumedRange(0, 0, 0, start, start + 2, 20) for start in range(0, 15, 3))
    resumed = without_ray(catalog, config, reader_of(catalog, consumed=left), batch_size=80, num_batches=1)
    assert resumed[-1].skipped == {"shard_missing": 40}


LOST_SHARDS = {
    "shard_missing": "a training with a fifth of its shards deleted",
    "shard_empty": "a training with a fifth of its shards empty",
    "shard_not_a_tar": "a training with HTML pages for a fifth of its shards",
    "tar_truncated": "a training with a fifth of its shards truncated",
}
LOST = {
    "shard_missing": None,
    "shard_empty": b"",
    "shard_not_a_tar": b"<html>404</html>" * 10,
    "tar_truncated": tar_of(samples_of(0, 10))[:2600],  # with one sample
}


@pytest.mark.parametrize(("cause", "has_counts"), [*((cause, False) for cause in LOST), ("shard_not_a_tar", True)])
def test_lost_shards_are_judged_against_an_epoch_of_all_ranks(write, cause, has_counts, caplog):
    """One of 25 shards stops no run, even if it is read first; five of them stop it, whatever is wrong with them."""
    shards = {f"{n:03}.tar": samples_of(4 * n, 4) for n in range(25)}
    if has_counts:
        shards |= {f"{n:03}_stats.json": b'{"successes": 4}' for n in range(25)}
    catalog, config = write(shards)
    first = next(groups(catalog, reader_of(catalog, 0, 2), 1, 1)).items[0].unit
    damage(first.shard.url, LOST[cause])
    assert first.known_samples == (4 if has_counts else -1)
    catalog = catalog if LOST[cause] is None else build_catalog(config)
    assert check(catalog, config, 2, batch_size=2) == {cause: 4 - (cause == "tar_truncated")}

    for shard in catalog.shards[::5]:
        damage(shard.url, LOST[cause])
    catalog = catalog if LOST[cause] is None else build_catalog(config)
    with pytest.raises(DataError, match=rf"the run had to skip \d+ of \d+ samples \({cause} \d+.\d%\).*; {cause}: ") as raised:
        check(catalog, config, 2, batch_size=2)
    if not has_counts:
        check_message(LOST_SHARDS[cause], raised.value, SOURCE=config.sources[0])
    if cause == "shard_not_a_tar":
        check_message("a shard that is not a tar, in the log", next(line for line in caplog.messages if cause in line))
    # What was lost before a resume counts, too.
    with pytest.raises(DataError, match="shard_forbidden"):
        check(catalog, config, past={"shard_forbidden": 6}, max_epochs=0.01)


def damage(url: str, content: bytes | None) -> None:
    if content is None:
        Path(url).unlink(missing_ok=True)
    else:
        Path(url).write_bytes(content)


@pytest.mark.parametrize("read", [without_ray, pytest.param(with_ray, marks=pytest.mark.ray)])
def test_a_shard_that_changed_under_the_run_is_named(write, read, request):
    if read is with_ray:
        request.getfixturevalue("ray_cluster")
    catalog, config = write({"a.tar": samples_of(0, 50)})
    Path(catalog.shards[0].url).write_bytes(tar_of(samples_of(0, 90)))
    with pytest.raises(DataError, match=r"a\.tar: changed since it was listed.*start over$"):
        read(catalog, config, reader_of(catalog), batch_size=5, num_batches=4)


@pytest.mark.usefixtures("ray_cluster")
class TestWithRay:
    def test_it_is_what_the_plain_parts_give(self, config, shard_folder):
        sources = str(shard_folder / "0000[01].tar"), str(shard_folder / "0000[2-4].tar")
        mixed = config_of("", sources=sources, weights=(3.0, 1.0))
        for rank, used in enumerate([config, mixed]):
            catalog = build_catalog(used)
            reader = reader_of(catalog, rank, 2, seed=3)
            whole = with_ray(catalog, used, reader, batch_size=7, num_batches=12)
            assert all(batch.tensors["image"].flags.writeable for batch in whole)
            assert_same(whole, without_ray(catalog, used, reader, batch_size=7, num_batches=12))
            reader = reader_of(catalog, rank, 2, seed=3, consumed=after(catalog, whole[:5]))
            reader = replace(reader, mixture=whole[4].mixture)
            assert_same(with_ray(catalog, used, reader, batch_size=7, num_batches=7), whole[5:])

    def test_one_dataset_after_the_other(self, catalog, config, monkeypatch):
        monkeypatch.setattr("ray_platform.data.stream.DATASET_GROUPS", 3)
        reader = reader_of(catalog)
        whole = with_ray(catalog, config, reader, batch_size=30, num_batches=6)
        assert_same(whole, without_ray(catalog, config, reader, batch_size=30, num_batches=6))

    @pytest.mark.slow
    def test_not_deterministic_is_still_exact(self, catalog, shard_folder):
        config = config_of(shard_folder, deterministic=False, interleave=1)
        # Eight epochs: a slow read may keep later epochs incomplete, but a lost sample would keep its epoch incomplete forever.
        batches = with_ray(catalog, config, reader_of(catalog), batch_size=6, num_batches=80)
        assert after(catalog, batches).first_epoch >= [3]  # raises if a sample occurred twice in an epoch
        times = Counter(captions_of(batches))
        assert len(times) == 60
        assert min(times.values()) >= 3

    @pytest.mark.slow
    def test_a_stream_can_be_left_early(self, catalog, config):
        batches = stream(catalog, config, reader_of(catalog), batch_size=2, num_batches=10**9)
        assert len(next(batches).captions) == 2
        batches.close()

    def test_what_cannot_work_is_reported_at_once(self, catalog, config, shard_folder):
        with pytest.raises(ConfigError, match="6 workers but only 5 shards"):
            stream(catalog, config, reader_of(catalog, 0, 6), batch_size=2, num_batches=1)
        greedy = config_of(shard_folder, reads_per_rank=3, cpus_per_read=1.0)
        with pytest.raises(ConfigError, match=r"need 6 CPUs, but the cluster has 4; lower one of these"):
            stream(catalog, greedy, reader_of(catalog, 0, 2), batch_size=2, num_batches=1)

    @pytest.mark.slow
    def test_two_workers_on_a_full_cluster(self, catalog, shard_folder):
        """As in training, each rank is an actor, and actors and reads together use all CPUs."""
        config = config_of(shard_folder, cpus_per_read=0.5)

        @ray.remote(num_cpus=1)
        class Worker:
            def run(self, rank: int) -> list[str]:
                return captions_of(with_ray(catalog, config, reader_of(catalog, rank, 2), batch_size=5, num_batches=20))

        workers = [Worker.remote() for _ in range(2)]
        found = ray.get([worker.run.remote(rank) for rank, worker in enumerate(workers)])
        for rank in range(2):
            expected = without_ray(catalog, config, reader_of(catalog, rank, 2), batch_size=5, num_batches=20)
            assert found[rank] == captions_of(expected)
        for worker in workers:
            ray.kill(worker)


class Consumer:
    """Actor that consumes a stream."""

    def __init__(self, catalog, config):
        self.batches = stream(catalog, config, reader_of(catalog), batch_size=6, num_batches=10**9)

    def take(self, count):
        return list(islice(self.batches, count))


@pytest.mark.s3
@pytest.mark.usefixtures("ray_cluster")
class TestFromS3:
    @pytest.fixture
    def consumer(self, s3_url, shard_folder):
        """A stream in an actor whose environment has the credentials, like a pod's; its reads inherit them."""
        storage.put_folder(shard_folder, f"{s3_url}/stream")
        environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        source = f"{s3_url}/stream/{{00000..00004}}.tar"
        config = config_of(source, interleave=1, reads_per_rank=1, retry_seconds=60.0)
        remote = ray.remote(num_cpus=0, runtime_env={"env_vars": environment})(Consumer)
        actor = remote.remote(build_catalog(config), config)
        yield actor
        ray.kill(actor)

    def test_it_is_what_a_folder_gives(self, consumer, catalog, shard_folder):
        config = config_of(shard_folder, interleave=1, reads_per_rank=1)
        expected = without_ray(catalog, config, reader_of(catalog), batch_size=6, num_batches=20)
        assert_same(ray.get(consumer.take.remote(20)), expected)

    @pytest.mark.slow
    def test_a_server_that_is_killed_and_comes_back_costs_time_but_no_sample(self, consumer, catalog, s3_server):
        batches = ray.get(consumer.take.remote(2))
        s3_server.stop()
        try:
            pending = consumer.take.remote(60)  # six epochs: more than can have been prefetched
            time.sleep(2)
        finally:
            s3_server.start()
        batches += ray.get(pending)
        assert batches[-1].skipped == {}
        assert after(catalog, batches).first_epoch >= [6]
