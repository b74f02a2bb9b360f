import json
import shutil
from pathlib import Path

import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data import catalog as catalogs
from ray_platform.data.catalog import Catalog, build_catalog, difference, to_json
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import Item
from ray_platform.data.source import open_samples

ENCODERS = {"vae": "a", "text": "b"}
COMPLETE = {"encoders": ENCODERS, "settings": {}, "complete": True, "shards": {"00000.arrow": 3, "00001.arrow": 4}}


def catalog_of(*sources, cached=None, **fields) -> Catalog:
    return build_catalog(DataConfig(sources=tuple(str(source) for source in sources), **fields), cached)


def refused(*sources, **fields) -> str:
    """The one line in which sources are refused."""
    with pytest.raises(DataError) as raised:
        catalog_of(*sources, **fields)
    message = str(raised.value)
    assert "\n" not in message
    return message


def precomputed(folder: Path, manifest=None) -> Path:
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{number:05d}.arrow").write_bytes(b"x" * 10)
    if manifest is not None:
        (folder / "manifest.json").write_text(manifest if isinstance(manifest, str) else json.dumps(manifest))
    return folder


@pytest.fixture
def data(shard_folder, tmp_path) -> Path:
    """A copy of the shards, to be changed."""
    return Path(shutil.copytree(shard_folder, tmp_path / "data"))


def test_a_folder_is_its_tars_sorted_by_name(shard_folder):
    catalog = catalog_of(shard_folder)
    assert [shard.name for shard in catalog.shards] == [f"{number:05d}.tar" for number in range(5)]
    assert [shard.url for shard in catalog.shards] == [str(shard_folder / shard.name) for shard in catalog.shards]
    assert all(shard.size == (shard_folder / shard.name).stat().st_size for shard in catalog.shards)
    assert [unit.shard for unit in catalog.pools[0]] == list(catalog.shards)
    assert all(unit.whole for unit in catalog.pools[0])
    assert (catalog.weights, catalog.num_units, catalog.manifest) == ((1.0,), (5,), None)
    assert catalog.num_bytes == sum(shard.size for shard in catalog.shards)


def test_sidecars_do_not_count_and_neither_does_naming_a_shard_twice(data):
    (data / "00000.parquet").write_bytes(b"x")
    twice = catalog_of(data, data / "0000[01].tar", data / "{00001..00002}.tar")
    assert twice == catalog_of(data)
    assert len(twice.shards) == 5


def test_shards_of_the_same_file_name_keep_apart(shard_folder, tmp_path):
    for part in ("part-1", "part-0"):
        shutil.copytree(shard_folder, tmp_path / part)
    shards = catalog_of(tmp_path / "part-1", tmp_path / "part-0").shards
    assert [shard.name for shard in shards[:2]] == ["part-0/00000.tar", "part-0/00001.tar"]
    assert len({shard.name for shard in shards}) == 10


def test_the_digest_tells_other_data_but_not_another_place(shard_folder, data):
    before = catalog_of(shard_folder).digest
    assert catalog_of(data).digest == before

    (data / "00004.tar").rename(data / "00005.tar")
    renamed = catalog_of(data).digest
    (data / "00005.tar").write_bytes(b"\0" * 1024)
    resized = catalog_of(data).digest
    (data / "00005.tar").unlink()
    removed = catalog_of(data).digest
    assert len({before, renamed, resized, removed}) == 4


def test_what_changed_is_said_in_a_line(data):
    saved = to_json(catalog_of(data))
    assert difference(saved, catalog_of(data)) == ""
    (data / "00001.tar").unlink()
    (data / "00003.tar").unlink()
    shutil.copy(data / "00000.tar", data / "00007.tar")
    (data / "00002.tar").write_bytes(b"\0" * 1024)
    changed = catalog_of(data)
    assert difference(saved, changed) == "1 added (00007.tar), 2 removed (00001.tar, …), 1 resized (00002.tar)"
    assert "data.weights" in difference(
        to_json(changed), catalog_of(data / "0000[0-2].tar", data / "0000[3-9].tar", weights=(1, 2))
    )


def test_no_shards(tmp_path):
    assert "data.sources: empty" in refused()
    assert "nowhere: no such file or folder" in refused(tmp_path / "nowhere")
    assert "it is empty" in refused(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "b.parquet").write_bytes(b"x")
    (tmp_path / "README").write_bytes(b"x")
    assert "it contains 2 × .parquet, 1 × no suffix, such as README" in refused(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert "its shards are empty files" in refused(tmp_path)


def test_one_bad_source_among_good_ones_is_not_passed_over(shard_folder, tmp_path):
    assert "no .tar shards in it" in refused(shard_folder, tmp_path)


# --------------------------------------------------------------------------------------------------------------- counts


def test_counts_come_from_the_sidecars_of_img2dataset(data):
    assert catalog_of(data).num_samples is None
    for number, count in enumerate((20, 5, 13, 1, 21)):
        (data / f"{number:05d}_stats.json").write_text(json.dumps({"count": 99, "successes": count, "failed_to_download": 7}))
    catalog = catalog_of(data)
    assert [shard.num_samples for shard in catalog.shards] == [20, 5, 13, 1, 21]
    assert catalog.num_samples == 60
    assert [catalog.estimated_samples(unit) for unit in catalog.pools[0]] == [20, 5, 13, 1, 21]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b'{"successes": null}', b'{"successes": Infinity}', b'{"successes": -3}', b"\xff", b"[" * 99_999],
)
def test_a_broken_sidecar_leaves_the_count_unknown(data, content):
    (data / "00000_stats.json").write_bytes(content)
    (data / "00001_stats.json").write_text('{"successes": 5}')
    catalog = catalog_of(data)
    assert [shard.num_samples for shard in catalog.shards[:2]] == [-1, 5]
    assert catalog.num_samples is None
    # By the size of those that are known.
    unit, known = catalog.pools[0][0], catalog.shards[1]
    assert catalog.estimated_samples(unit) == pytest.approx(unit.shard.size / (known.size / 5))


def test_counts_are_read_once_a_run(data, monkeypatch):
    for number in range(3):
        (data / f"{number:05d}_stats.json").write_text('{"successes": 7}')
    cached = to_json(catalog_of(data))
    (data / "00003_stats.json").write_text('{"successes": 8}')
    shutil.copy(data / "00004.tar", data / "00002.tar")
    asked = []
    read_many = storage.read_many
    monkeypatch.setattr(catalogs.storage, "read_many", lambda urls: asked.extend(urls) or read_many(urls))
    assert [shard.num_samples for shard in catalog_of(data, cached=cached).shards] == [7, 7, 7, 8, -1]
    # What was unknown, and what changed its size since.
    assert [Path(url).name for url in asked] == ["00002_stats.json", "00003_stats.json"]


# ------------------------------------------------------------------------------------------------------ pools and parts


def test_weighted_sources_are_pools(shard_folder):
    catalog = catalog_of(shard_folder / "{00003..00004}.tar", shard_folder / "0000[0-2].tar", weights=(3, 1))
    assert catalog.weights == (0.75, 0.25)
    assert [[unit.shard.name for unit in pool] for pool in catalog.pools] == [
        ["00003.tar", "00004.tar"],
        ["00000.tar", "00001.tar", "00002.tar"],
    ]
    assert catalog.shards == catalog_of(shard_folder).shards


def test_a_shard_in_two_weighted_sources_is_refused(shard_folder):
    sources = (shard_folder, shard_folder / "00001.tar")
    assert "00001.tar: is in two of the data.sources" in refused(*sources, weights=(1, 1))


def test_a_large_shard_is_read_in_parts(build_tar, build_samples, tmp_path):
    (tmp_path / "large.tar").write_bytes(build_tar(build_samples(0, 36, size=160)))
    config = DataConfig(sources=(str(tmp_path),), max_read_mb=1, image_size=8)
    parts = build_catalog(config)
    (whole,) = catalog_of(tmp_path).pools[0]
    size = whole.shard.size
    assert [(unit.start, unit.stop) for unit in parts.pools[0]] == [(0, 2**20), (2**20, 2 * 2**20), (2 * 2**20, size)]
    assert not any(unit.whole for unit in parts.pools[0])
    assert sum(parts.estimated_samples(unit) for unit in parts.pools[0]) == pytest.approx(
        catalog_of(tmp_path).estimated_samples(whole)
    )
    assert "data.max_read_mb" in difference(to_json(parts), catalog_of(tmp_path))

    def keys(units) -> list[str]:
        opened = [open_samples(Item(0, 0, number, unit, ()), config, 0) for number, unit in enumerate(units)]
        return [unit.sample(place).key for unit in opened for place in range(len(unit))]

    assert keys(parts.pools[0]) == keys([whole]) == [f"large.tar/{number:05d}" for number in range(36)]


# ---------------------------------------------------------------------------------------------------------- precomputed


@pytest.mark.parametrize("pattern", ["", "*.arrow", "*", "{00000..00001}.arrow", "00000.arrow", "../*/*.arrow"])
def test_precomputed_shards_come_with_their_manifest(tmp_path, pattern):
    manifest = COMPLETE
    folder = precomputed(tmp_path / "made", manifest)
    catalog = catalog_of(f"{folder}/{pattern}", max_read_mb=1)
    assert catalog.manifest == manifest
    assert {shard.name for shard in catalog.shards} <= {"00000.arrow", "00001.arrow"}


def test_precomputed_shards_are_never_cut(tmp_path):
    folder = precomputed(tmp_path / "made", COMPLETE)
    (folder / "00000.arrow").write_bytes(b"x" * (2**20 + 1))
    assert all(unit.whole for unit in catalog_of(folder, max_read_mb=1).pools[0])


def test_tars_and_precomputed_shards_do_not_mix(shard_folder, data, tmp_path):
    made = precomputed(tmp_path / "made", COMPLETE)
    assert "both .tar shards" in refused(shard_folder, made)
    shutil.copy(made / "00000.arrow", data)
    assert "both .tar shards" in refused(data)
    assert len(catalog_of(data / "*.tar").shards) == 5


def test_precomputed_shards_without_a_manifest(tmp_path):
    folder = precomputed(tmp_path / "made")
    message = refused(folder / "*.arrow")
    assert message.startswith(f"{folder}/manifest.json: is missing")
    assert "jobs/precompute.py" in message


@pytest.mark.parametrize("manifest", ["", "{", "[]", "{}", "\xff", '"x"'])
def test_a_manifest_that_is_none(tmp_path, manifest):
    assert "manifest.json: is not a manifest" in refused(precomputed(tmp_path / "made", manifest))


def test_an_unfinished_precomputation(tmp_path):
    folder = precomputed(tmp_path / "made", {"encoders": ENCODERS, "settings": {}, "complete": False})
    assert refused(folder).startswith(f"{folder}: precomputing it did not finish")


def test_counts_of_precomputed_shards_come_from_the_manifest(tmp_path):
    folder = precomputed(tmp_path / "made", COMPLETE)
    assert [shard.num_samples for shard in catalog_of(folder).shards] == [3, 4]
    (folder / "00002.arrow").write_bytes(b"left by another run")
    assert f"{folder}/00002.arrow: is not in the manifest.json of its folder" in refused(folder)
    assert catalog_of(folder / "{00000..00001}.arrow").num_samples == 7


def test_shards_of_different_encoders(tmp_path):
    one = precomputed(tmp_path / "one", COMPLETE)
    other = precomputed(tmp_path / "other", COMPLETE | {"encoders": ENCODERS | {"vae": "c"}})
    same = precomputed(tmp_path / "same", COMPLETE | {"version": 2})
    assert f"{one} and {other} were precomputed with different encoders" in refused(one, other)
    assert "different encoders" in refused(tmp_path / "o*" / "*.arrow")
    cropped = precomputed(tmp_path / "cropped", COMPLETE | {"settings": {"crop": "random"}})
    assert "different encoders or settings" in refused(one, cropped)
    assert len(catalog_of(one, same).shards) == 4


# ------------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.s3
def test_shards_in_s3(s3_url, shard_folder):
    storage.put_folder(shard_folder, f"{s3_url}/catalog/part-0")
    storage.put_folder(shard_folder, f"{s3_url}/catalog/part-1")
    storage.write_bytes(f"{s3_url}/catalog/part-0/00000_stats.json", b'{"successes": 20}')
    catalog = catalog_of(f"{s3_url}/catalog/part-0")
    one = catalog.shards[0]
    assert (one.url, one.name, one.num_samples) == (f"{s3_url}/catalog/part-0/00000.tar", "00000.tar", 20)
    assert catalog.digest == catalog_of(shard_folder).digest
    both = catalog_of(f"{s3_url}/catalog/*/00000.tar")
    assert [shard.name for shard in both.shards] == ["part-0/00000.tar", "part-1/00000.tar"]
    assert {shard.name for shard in catalog_of(f"{s3_url}/catalog/part-0", shard_folder).shards} >= {one.url}


@pytest.mark.s3
def test_precomputed_shards_in_s3(s3_url, tmp_path):
    manifest = COMPLETE
    storage.put_folder(precomputed(tmp_path / "made", manifest), f"{s3_url}/precomputed/made")
    for source in ("made", "made/*.arrow", "m*/*.arrow"):
        assert catalog_of(f"{s3_url}/precomputed/{source}").manifest == manifest
    storage.put_folder(precomputed(tmp_path / "bare"), f"{s3_url}/bare")
    assert f"{s3_url}/bare/manifest.json: is missing" in refused(f"{s3_url}/bare/*.arrow")


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"sources": "s3://bucket"}, "sources"),
        ({"sources": ("s3://key:secret@bucket/x",)}, "sources"),
        ({"sources": ("a", "b"), "weights": (1.0,)}, "weights"),
        ({"sources": ("a", "b"), "weights": (1.0, 0.0)}, "weights"),
        ({"weights": 1.0}, "weights"),
        ({"image_size": 0}, "image_size"),
        ({"size_step": 0}, "size_step"),
        ({"aspect_ratios": 1.0}, "aspect_ratios"),
        ({"aspect_ratios": (1.0, 0.0)}, "aspect_ratios"),
        ({"aspect_ratios": (1.0, float("nan"))}, "aspect_ratios"),
        ({"max_skipped_share": 1.0}, "max_skipped_share"),
        ({"max_skipped_share": -0.1}, "max_skipped_share"),
        ({"reads_per_rank": 0}, "reads_per_rank"),
        ({"interleave": 0}, "interleave"),
        ({"max_read_mb": 0}, "max_read_mb"),
        ({"cpus_per_read": -1.0}, "cpus_per_read"),
        ({"retry_seconds": -1.0}, "retry_seconds"),
    ],
)
def test_configs_that_cannot_work_name_the_field(fields, named):
    with pytest.raises(ConfigError, match=rf"data\.{named}") as raised:
        DataConfig(**fields)
    assert "secret" not in str(raised.value)
