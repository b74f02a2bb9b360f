import shutil

import pytest

from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.catalog import digest, list_shards
from ray_platform.data.config import DataConfig


def test_a_folder_is_its_tars_sorted_by_name(shard_folder):
    shards = list_shards([str(shard_folder)])
    assert [shard.name for shard in shards] == [f"{number:05d}.tar" for number in range(5)]
    assert [shard.url for shard in shards] == [str(shard_folder / shard.name) for shard in shards]
    assert all(shard.size == (shard_folder / shard.name).stat().st_size for shard in shards)


def test_sidecars_do_not_count_and_neither_does_naming_a_shard_twice(shard_folder, tmp_path):
    shutil.copytree(shard_folder, tmp_path / "data")
    (tmp_path / "data" / "00000.parquet").write_bytes(b"x")
    twice = [str(tmp_path / "data"), str(tmp_path / "data" / "0000[01].tar"), str(tmp_path / "data" / "{00001..00002}.tar")]
    assert list_shards(twice) == list_shards(twice[:1])
    assert len(list_shards(twice)) == 5


def test_shards_of_the_same_file_name_keep_apart(shard_folder, tmp_path):
    for part in ("part-1", "part-0"):
        shutil.copytree(shard_folder, tmp_path / part)
    shards = list_shards([str(tmp_path / "part-1"), str(tmp_path / "part-0")])
    assert [shard.name for shard in shards[:2]] == ["part-0/00000.tar", "part-0/00001.tar"]
    assert len({shard.name for shard in shards}) == 10


def test_the_digest_tells_other_data_but_not_another_place(shard_folder, tmp_path):
    before = digest(list_shards([str(shard_folder)]))
    moved = shutil.copytree(shard_folder, tmp_path / "moved")
    assert digest(list_shards([str(moved)])) == before

    (moved / "00004.tar").rename(moved / "00005.tar")
    renamed = digest(list_shards([str(moved)]))
    (moved / "00005.tar").write_bytes(b"\0" * 1024)
    resized = digest(list_shards([str(moved)]))
    (moved / "00005.tar").unlink()
    removed = digest(list_shards([str(moved)]))
    assert len({before, renamed, resized, removed}) == 4


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match=r"data\.sources is empty"):
        list_shards([])
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        list_shards([str(tmp_path / "nowhere")])
    with pytest.raises(DataError, match="it is empty"):
        list_shards([str(tmp_path)])
    (tmp_path / "a.parquet").write_bytes(b"x")
    (tmp_path / "b.parquet").write_bytes(b"x")
    (tmp_path / "README").write_bytes(b"x")
    with pytest.raises(DataError, match=r"there are 2 × \.parquet, 1 × no suffix instead, such as README"):
        list_shards([str(tmp_path)])
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="its tars are empty files"):
        list_shards([str(tmp_path)])


def test_one_bad_source_among_good_ones_is_not_passed_over(shard_folder, tmp_path):
    with pytest.raises(DataError, match=r"no \.tar shards in it"):
        list_shards([str(shard_folder), str(tmp_path)])


@pytest.mark.s3
def test_shards_in_s3(s3_url, shard_folder):
    from ray_platform import storage

    storage.put_folder(shard_folder, f"{s3_url}/catalog/part-0")
    storage.put_folder(shard_folder, f"{s3_url}/catalog/part-1")
    (one, *_) = list_shards([f"{s3_url}/catalog/part-0"])
    assert (one.url, one.name) == (f"{s3_url}/catalog/part-0/00000.tar", "00000.tar")
    assert digest(list_shards([f"{s3_url}/catalog/part-0"])) == digest(list_shards([str(shard_folder)]))
    assert [shard.name for shard in list_shards([f"{s3_url}/catalog/*/00000.tar"])] == ["part-0/00000.tar", "part-1/00000.tar"]
    assert {shard.name for shard in list_shards([f"{s3_url}/catalog/part-0", str(shard_folder)])} >= {one.url}


@pytest.mark.parametrize(
    "fields",
    [
        {"sources": "s3://bucket"},
        {"image_size": 0},
        {"max_skipped_share": 1.0},
        {"max_skipped_share": -0.1},
        {"reads_per_rank": 0},
        {"cpus_per_read": -1.0},
    ],
)
def test_configs_that_cannot_work_name_the_field(fields):
    (name,) = fields
    with pytest.raises(ConfigError, match=rf"data\.{name}"):
        DataConfig(**fields)
