import json
import shutil
from pathlib import Path

import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data import catalog as catalogs
from ray_platform.data import tar
from ray_platform.data.catalog import Catalog, build_catalog, difference, to_json
from ray_platform.data.causes import RejectedSample
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import Item
from ray_platform.data.source import open_samples
from tests.ray_platform.conftest import samples_of, tar_of, write_shards
from tests.support.messages import check_message

ENCODERS = {"vae": "a", "text": "b"}
COMPLETE = {"encoders": ENCODERS, "settings": {}, "complete": True, "shards": {"00000.arrow": 3, "00001.arrow": 4}}


def catalog_of(*sources, cached=None, **fields) -> Catalog:
    return build_catalog(DataConfig(sources=tuple(str(source) for source in sources), **fields), cached)


def error_of(*sources, **fields) -> str:
    """Return the one-line error with which sources are rejected."""
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
    """A copy of the shards that tests may modify."""
    return Path(shutil.copytree(shard_folder, tmp_path / "data"))


def test_a_folder_is_its_tars_sorted_by_name(data, shard_folder):
    catalog = catalog_of(shard_folder)
    assert [shard.name for shard in catalog.shards] == [f"{number:05d}.tar" for number in range(5)]
    assert [shard.url for shard in catalog.shards] == [str(shard_folder / shard.name) for shard in catalog.shards]
    assert all(shard.size == (shard_folder / shard.name).stat().st_size for shard in catalog.shards)
    assert [unit.shard for unit in catalog.pools[0]] == list(catalog.shards)
    assert all(unit.is_whole_shard for unit in catalog.pools[0])
    assert (catalog.weights, catalog.num_units, catalog.manifest) == ((1.0,), (5,), None)
    # Sidecar files are ignored, and a shard that is listed twice counts once.
    (data / "00000.parquet").write_bytes(b"x")
    assert catalog_of(data, data / "0000[01].tar", data / "{00001..00002}.tar").num_units == (5,)


def test_shards_with_the_same_file_name_stay_apart(shard_folder, tmp_path):
    for part in ("part-1", "part-0"):
        shutil.copytree(shard_folder, tmp_path / part)
    shards = catalog_of(tmp_path / "part-1", tmp_path / "part-0").shards
    assert [shard.name for shard in shards[:2]] == ["part-0/00000.tar", "part-0/00001.tar"]
    assert len({shard.name for shard in shards}) == 10


def test_the_digest_changes_with_the_data_but_not_with_its_place(shard_folder, data):
    digests = [catalog_of(data).digest]
    assert digests == [catalog_of(shard_folder).digest]
    (data / "00004.tar").rename(data / "00005.tar")
    digests.append(catalog_of(data).digest)
    (data / "00005.tar").write_bytes(b"\0" * 1024)
    digests.append(catalog_of(data).digest)
    (data / "00005.tar").unlink()
    assert len({*digests, catalog_of(data).digest}) == 4


def test_changes_are_described_in_a_line(data):
    saved = to_json(catalog_of(data))
    assert difference(saved, catalog_of(data)) == ""
    (data / "00001.tar").unlink()
    (data / "00003.tar").unlink()
    shutil.copy(data / "00000.tar", data / "00007.tar")
    (data / "00002.tar").write_bytes(b"\0" * 1024)
    changed = catalog_of(data)
    assert difference(saved, changed) == "1 added (00007.tar), 2 removed (00001.tar, …), 1 resized (00002.tar)"
    weighted = catalog_of(data / "0000[0-2].tar", data / "0000[3-9].tar", weights=(1, 2))
    assert "data.weights" in difference(to_json(changed), weighted)


def test_sources_without_shards(tmp_path, shard_folder):
    assert "data.sources: empty" in error_of()
    assert "nowhere: no such file or folder" in error_of(tmp_path / "nowhere")
    assert "it is empty" in error_of(shard_folder, tmp_path)
    for name in ("a.parquet", "b.parquet", "README"):
        (tmp_path / name).write_bytes(b"x")
    assert "it contains 2 × .parquet, 1 × no suffix, such as README" in error_of(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    assert "its shards are empty files" in error_of(tmp_path)
    (tmp_path / "part-1").mkdir()
    (tmp_path / "part-1" / "0.tar.gz").write_bytes(b"x")
    check_message("a source of compressed tars", error_of(tmp_path / "part-1"), SOURCE=tmp_path)
    (tmp_path / "part-1" / "0.tar").write_bytes(b"x")
    check_message("a source whose shards are in subfolders", error_of(tmp_path), SOURCE=tmp_path)
    assert len(catalog_of(f"{tmp_path}/*/*.tar").shards) == 1


@pytest.mark.parametrize("source", ["", "*", "{00000..00002}.tar"])
def test_links_are_followed_and_a_broken_one_is_a_lost_shard(tmp_path, shard_folder, caplog, source):
    for name, target in (("00000", "00000"), ("00001", "00002"), ("00002", "gone")):
        (tmp_path / f"{name}.tar").symlink_to(shard_folder / f"{target}.tar")
    catalog = catalog_of(str(tmp_path / source))
    sizes = [(shard_folder / name).stat().st_size for name in ("00000.tar", "00002.tar")]
    assert [shard.size for shard in catalog.shards] == [*sizes, 0]
    check_message("a link to nothing in a source, in the log", caplog.messages[0], SOURCE=tmp_path)
    (record,) = open_samples(Item(0, 0, 0, catalog.pools[0][2], []), DataConfig(retry_seconds=0), 0).records
    assert record == RejectedSample("00002.tar/", "shard_missing")


# --------------------------------------------------------------------------------------------------------------- counts


def test_counts_come_from_the_sidecars_of_img2dataset_and_are_read_once_per_run(data, monkeypatch):
    counts = (20, 5, 13, 1, 21)
    for number, count in enumerate(counts):
        assert catalog_of(data).num_samples is None
        (data / f"{number:05d}_stats.json").write_text(json.dumps({"count": 99, "successes": count, "failed_to_download": 7}))
    catalog = catalog_of(data)
    assert tuple(shard.num_samples for shard in catalog.shards) == counts
    assert catalog.num_samples == 60
    assert tuple(catalog.estimated_samples(unit) for unit in catalog.pools[0]) == counts
    # Next to the shards, whatever the pattern is.
    for pattern in ("data/*.tar", "data/{00000..00004}.tar", "*/0000?.tar", "data/*"):
        assert catalog_of(data.parent / pattern).shards == catalog.shards
    assert [shard.num_samples for shard in catalog_of(data / "00002.tar").shards] == [13]

    (data / "00003_stats.json").unlink()
    cached = to_json(catalog_of(data))
    (data / "00003_stats.json").write_text('{"successes": 8}')
    shutil.copy(data / "00004.tar", data / "00002.tar")
    read, read_many = [], storage.read_many
    monkeypatch.setattr(catalogs.storage, "read_many", lambda urls: read.extend(urls) or read_many(urls))
    assert catalog_of(data, cached=cached).shards[3].num_samples == 8
    # Only the sidecars of shards with an unknown count or a changed size are read.
    assert [Path(url).name for url in read] == ["00002_stats.json", "00003_stats.json"]


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
    # The estimate uses the bytes per sample of the known shards.
    unit, known = catalog.pools[0][0], catalog.shards[1]
    assert catalog.estimated_samples(unit) == pytest.approx(unit.shard.size / (known.size / 5))


# ------------------------------------------------------------------------------------------------------ pools and parts


def test_weighted_sources_are_pools(shard_folder):
    catalog = catalog_of(shard_folder / "{00003..00004}.tar", shard_folder / "0000[0-2].tar", weights=(3, 1))
    assert catalog.weights == (0.75, 0.25)
    assert [[unit.shard.name for unit in pool] for pool in catalog.pools] == [
        ["00003.tar", "00004.tar"],
        ["00000.tar", "00001.tar", "00002.tar"],
    ]
    assert catalog.shards == catalog_of(shard_folder).shards
    twice = (shard_folder, shard_folder / "00001.tar")
    assert "00001.tar: is in two of the data.sources" in error_of(*twice, weights=(1, 1))


def test_a_large_shard_is_read_in_parts(tmp_path):
    (tmp_path / "large.tar").write_bytes(tar_of(samples_of(0, 36, size=160)))
    parts = catalog_of(tmp_path, max_read_mb=1)
    (whole,) = catalog_of(tmp_path).pools[0]
    size = whole.shard.size
    assert [(unit.start, unit.stop) for unit in parts.pools[0]] == [(0, 2**20), (2**20, 2 * 2**20), (2 * 2**20, size)]
    assert not any(unit.is_whole_shard for unit in parts.pools[0])
    estimated = sum(parts.estimated_samples(unit) for unit in parts.pools[0])
    assert estimated == pytest.approx(catalog_of(tmp_path).estimated_samples(whole))
    assert "data.max_read_mb" in difference(to_json(parts), catalog_of(tmp_path))

    def keys(units) -> list[str]:
        opened = [open_samples(Item(0, 0, 0, unit, []), DataConfig(image_size=8), 0) for unit in units]
        return [unit.sample(place).key for unit in opened for place in range(len(unit))]

    assert keys(parts.pools[0]) == keys([whole]) == [f"large.tar/{number:05d}" for number in range(36)]


def test_files_of_a_sample_that_are_apart_in_a_large_shard_are_joined(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tar, "_MIN_STEP_BYTES", 2**20)  # several reads before and after each part
    ordered = samples_of(0, 36, size=160)
    orders = {
        "images first": ordered[::2] + ordered[1::2],
        "captions first": ordered[1::2] + ordered[::2],
        "one caption apart": [ordered[0], *ordered[2:], ordered[1]],
    }
    for order, members in orders.items():
        folder = write_shards(tmp_path / order, {"large.tar": tar_of(members)})
        for max_read_mb in (9, 1):
            config = DataConfig(sources=(str(folder),), image_size=8, max_read_mb=max_read_mb)
            opened = [open_samples(Item(0, 0, 0, unit, []), config, 0) for unit in build_catalog(config).pools[0]]
            samples = [unit.sample(place) for unit in opened for place in range(len(unit))]
            good = sorted(sample.caption for sample in samples if not isinstance(sample, RejectedSample))
            causes = {sample.cause for sample in samples if isinstance(sample, RejectedSample)} - {"ignored_part"}
            if order == "one caption apart" and max_read_mb == 1:  # so few are not worth reading the shard several times
                assert (len(good), causes) == (35, {"files_apart"})
            else:
                assert (good, causes) == (sorted(f"sample {number}" for number in range(36)), set())
            warnings = [line for line in caplog.messages if f"{folder}/large.tar" in line and "data.max_read_mb" in line]
            assert len(warnings) == (order != "one caption apart" and max_read_mb == 1)


# ---------------------------------------------------------------------------------------------------------- precomputed


@pytest.mark.parametrize("pattern", ["", "*.arrow", "*", "{00000..00001}.arrow", "00000.arrow", "../*/*.arrow"])
def test_precomputed_shards_come_with_their_manifest_and_counts(tmp_path, pattern):
    folder = precomputed(tmp_path / "made", COMPLETE)
    (folder / "00000.arrow").write_bytes(b"x" * (2**20 + 1))
    catalog = catalog_of(f"{folder}/{pattern}", max_read_mb=1)
    assert catalog.manifest == COMPLETE
    assert {(shard.name, shard.num_samples) for shard in catalog.shards} <= {("00000.arrow", 3), ("00001.arrow", 4)}
    assert all(unit.is_whole_shard for unit in catalog.pools[0])


def test_tars_and_precomputed_shards_do_not_mix(shard_folder, data, tmp_path):
    folder = precomputed(tmp_path / "made", COMPLETE)
    assert "both .tar shards" in error_of(shard_folder, folder)
    shutil.copy(folder / "00000.arrow", data)
    assert "both .tar shards" in error_of(data)
    assert len(catalog_of(data / "*.tar").shards) == 5


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        (None, "{folder}/manifest.json: is missing"),
        *((broken, "{folder}/manifest.json: is not a manifest") for broken in ("", "{", "[]", "{}", "\xff", '"x"')),
        (COMPLETE | {"shards": {"00000.arrow": "3"}}, "{folder}/manifest.json: is not a manifest"),
        ({"encoders": ENCODERS, "settings": {}, "complete": False}, "{folder}: precomputing it did not finish"),
        (COMPLETE | {"shards": {"00000.arrow": 3}}, "{folder}/00001.arrow: is not in the manifest.json of its folder"),
    ],
)
def test_manifests_of_no_use(tmp_path, manifest, message):
    folder = precomputed(tmp_path / "made", manifest)
    assert error_of(folder).startswith(message.format(folder=folder))


def test_shards_of_different_encoders(tmp_path):
    one = precomputed(tmp_path / "one", COMPLETE)
    other = precomputed(tmp_path / "other", COMPLETE | {"encoders": ENCODERS | {"vae": "c"}})
    same = precomputed(tmp_path / "same", COMPLETE | {"version": 2})
    assert f"{one} and {other} were precomputed with different encoders" in error_of(one, other)
    assert "different encoders" in error_of(tmp_path / "o*" / "*.arrow")
    cropped = precomputed(tmp_path / "cropped", COMPLETE | {"settings": {"crop": "random"}})
    assert "different encoders or settings" in error_of(one, cropped)
    assert len(catalog_of(one, same).shards) == 4


# ------------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.s3
def test_shards_in_s3(s3_url, shard_folder, tmp_path):
    for part in ("part-0", "part-1"):
        storage.put_folder(shard_folder, f"{s3_url}/catalog/{part}")
    storage.write_bytes(f"{s3_url}/catalog/part-0/00000_stats.json", b'{"successes": 20}')
    catalog = catalog_of(f"{s3_url}/catalog/part-0")
    one = catalog.shards[0]
    assert (one.url, one.name, one.num_samples) == (f"{s3_url}/catalog/part-0/00000.tar", "00000.tar", 20)
    assert catalog.digest == catalog_of(shard_folder).digest
    both = catalog_of(f"{s3_url}/catalog/*/00000.tar")
    assert [shard.name for shard in both.shards] == ["part-0/00000.tar", "part-1/00000.tar"]
    assert {shard.name for shard in catalog_of(f"{s3_url}/catalog/part-0", shard_folder).shards} >= {one.url}

    storage.put_folder(precomputed(tmp_path / "made", COMPLETE), f"{s3_url}/precomputed/made")
    for source in ("made", "made/*.arrow", "m*/*.arrow"):
        assert catalog_of(f"{s3_url}/precomputed/{source}").manifest == COMPLETE
    storage.put_folder(precomputed(tmp_path / "bare"), f"{s3_url}/bare")
    assert f"{s3_url}/bare/manifest.json: is missing" in error_of(f"{s3_url}/bare/*.arrow")


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    "fields",
    [
        {"sources": "s3://bucket"},
        {"sources": ("s3://key:secret@bucket/x",)},
        {"weights": (1.0,), "sources": ("a", "b")},
        {"weights": (1.0, 0.0), "sources": ("a", "b")},
        {"weights": 1.0},
        {"image_size": 0},
        {"size_step": 0},
        {"aspect_ratios": 1.0},
        {"aspect_ratios": (1.0, 0.0)},
        {"aspect_ratios": (1.0, float("nan"))},
        {"max_skipped_fraction": 1.0},
        {"max_skipped_fraction": -0.1},
        {"reads_per_rank": 0},
        {"interleave": 0},
        {"max_read_mb": 0},
        {"cpus_per_read": -1.0},
        {"retry_seconds": -1.0},
    ],
)
def test_a_config_that_cannot_work_names_the_field(fields):
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(fields))}") as raised:
        DataConfig(**fields)
    assert "secret" not in str(raised.value)
