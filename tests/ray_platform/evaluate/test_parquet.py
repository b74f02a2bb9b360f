"""Parquet files as Hugging Face's `datasets` writes them: columns, classes, slices, and errors."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_platform import storage
from ray_platform.data.causes import RejectedSample
from ray_platform.data.decode import rgb
from ray_platform.evaluate import sets
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.sets import KNOWN_SETS, read_slice
from tests.support.evaluation_sets import (
    CIFAR10,
    class_names,
    contents,
    encoded,
    error_of_set,
    keys_or_causes,
    open_own,
    picture,
    read,
)  # fmt: skip

CAT_DOG = {"label": ("cat", "dog")}


def build_table(images, labels: dict, features: dict | None, image_column: str = "image") -> pa.Table:
    """Return a table. `features` maps ClassLabel columns to names; None means that Hugging Face did not write the schema."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    struct = pa.array([{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)], kind)
    table = pa.table({image_column: struct} | {name: pa.array(values, pa.int64()) for name, values in labels.items()})
    if features is None:
        return table
    info: dict = {image_column: {"_type": "Image"}}
    info |= {name: {"names": list(names), "_type": "ClassLabel"} for name, names in features.items()}
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": info}})})


def write(folder: Path, name: str, table: pa.Table, rows_per_group: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name, row_group_size=rows_per_group)
    return folder


def images_of(count: int, first: int = 0) -> list[bytes]:
    return [encoded(picture(seed), "PNG") for seed in range(first, first + count)]


def write_cats_and_dogs(folder: Path, count: int = 4, **fields) -> Path:
    table = build_table(images_of(count), {"label": [i % 2 for i in range(count)]}, CAT_DOG)
    return write(folder, "test-00000-of-00001.parquet", table, **fields)


@pytest.mark.parametrize("inside", ["data", "", "plain_text"])
def test_a_known_set(tmp_path, inside):
    labels, folder = [i * 3 % 10 for i in range(25)], tmp_path / "cifar10" / inside
    for number, (start, stop) in enumerate(((0, 15), (15, 25))):
        table = build_table(images_of(stop - start, start), {"label": labels[start:stop]}, {"label": CIFAR10}, "img")
        write(folder, f"test-0000{number}-of-00002-0123456789abcdef.parquet", table, rows_per_group=4)
    write(folder, "train-00000-of-00001.parquet", build_table(images_of(1, 900), {"label": [0]}, {"label": CIFAR10}, "img"))
    data = find_evaluation_set([str(tmp_path)], "vtab/cifar10")
    assert (data.layout, data.url, data.classes) == ("parquet", str(folder), CIFAR10)
    assert (data.templates, data.known_images, data.num_files) == (KNOWN_SETS["vtab/cifar10"].templates, 25, 2)
    samples = read(data)
    assert [sample.label for sample in samples] == labels
    assert samples[14].key == "test-00000-of-00002-0123456789abcdef.parquet/14"
    assert samples[15].key == "test-00001-of-00002-0123456789abcdef.parquet/0"
    assert all(np.array_equal(rgb(sample.image), picture(i)) for i, sample in enumerate(samples))


@pytest.mark.parametrize("images_per_slice", [1, 4, 256])
@pytest.mark.parametrize("rows_per_group", [1, 3, 100])
def test_slices_have_each_row_once_and_in_order(tmp_path, monkeypatch, images_per_slice, rows_per_group):
    folder = write_cats_and_dogs(tmp_path / "mine", 20, rows_per_group=rows_per_group)
    samples = contents(open_own(folder))
    monkeypatch.setattr(sets, "IMAGES_PER_SLICE", images_per_slice)
    data = open_own(folder)
    assert contents(data) == samples
    assert [len(read_slice(part)) for part in data.slices] == [part.estimated_images for part in data.slices]
    assert len(data.slices) == -(-20 // min(20, -(-images_per_slice // rows_per_group) * rows_per_group))


def test_names_and_templates_of_the_users_own_set(tmp_path):
    folder = write_cats_and_dogs(tmp_path / "mine")
    data = open_own(folder)
    assert (data.classes, data.templates) == (("cat", "dog"), KNOWN_SETS["imagenet1k"].templates)
    (folder / "classnames.txt").write_text("a cat\na dog\n")
    (folder / "zeroshot_classification_templates.txt").write_text("this is {c}\n")
    data = open_own(folder)
    assert (data.classes, data.templates) == (("a cat", "a dog"), ("this is {c}",))


@pytest.mark.parametrize(
    ("name", "coarse", "fine"), [("vtab/cifar100", "coarse_label", "fine_label"), ("fgvc_aircraft", "manufacturer", "variant")]
)
def test_the_fine_labels_of_several_levels(tmp_path, name, coarse, fine):
    features = {coarse: [f"group {i}" for i in range(20)], fine: class_names(name)}
    table = build_table(images_of(2), {coarse: [1, 2], fine: [50, 99]}, features)
    data = open_evaluation_set(name, str(write(tmp_path / "data", "test-00000-of-00001.parquet", table)))
    assert (data.classes, [sample.label for sample in read(data)]) == (class_names(name), [50, 99])


def test_names_and_order_of_the_published_set(tmp_path):
    names = [f"{name}, its Latin name" for name in KNOWN_SETS["imagenet1k"].classes]
    table = build_table(images_of(3), {"label": [0, 1, 999]}, {"label": names})
    folder = write(tmp_path / "imagenet-1k" / "data", "validation-00000-of-00001.parquet", table)
    unlabeled = build_table(images_of(3), {"label": [-1, -1, -1]}, {"label": names})
    write(folder, "test-00000-of-00001.parquet", unlabeled)
    data = find_evaluation_set([str(tmp_path)], "imagenet1k")
    assert data.classes == KNOWN_SETS["imagenet1k"].classes
    assert [sample.label for sample in read(data)] == [0, 1, 999]
    # Other sets fall back to the validation split if there is no test split.
    dishes = [name.replace(" ", "_") for name in class_names("food101")]
    table = build_table(images_of(1), {"label": [5]}, {"label": dishes})
    write(tmp_path / "food101", "validation-00000-of-00001.parquet", table)
    assert find_evaluation_set([str(tmp_path)], "food101").classes == class_names("food101")
    table = build_table(images_of(1), {"label": [0]}, {"label": sorted(KNOWN_SETS["vtab/flowers"].classes)})
    assert "another order" in error_of_set("vtab/flowers", write(tmp_path / "flowers", "test.parquet", table))


def test_a_schema_without_features(tmp_path):
    folder = write(tmp_path / "mine", "test.parquet", build_table(images_of(2), {"id": [7, 8], "label": [0, 1]}, None))
    assert f"write {folder}/classnames.txt" in error_of_set("mine", folder)
    (folder / "classnames.txt").write_text("a\nb\n")
    assert [sample.label for sample in read(open_own(folder))] == [0, 1]
    write(folder, "test.parquet", pa.table({"picture": pa.array(images_of(2), pa.binary()), "label": [1, 0]}))
    assert [sample[1:] for sample in contents(open_own(folder))] == [(1, images_of(2)[0]), (0, images_of(2)[1])]


def test_rows_and_files_that_cannot_be_used(tmp_path):
    table = build_table([*images_of(1), None, *images_of(1)], {"label": [1, 0, None]}, CAT_DOG)
    folder = write(tmp_path / "mine", "test.parquet", table)
    data = open_own(folder)
    assert keys_or_causes(data) == ["test.parquet/0", "image_missing", "label_missing"]
    (folder / "test.parquet").write_bytes(b"x" * 1000)
    assert keys_or_causes(data) == ["shard_unreadable"]
    assert "test.parquet is not a parquet file" in error_of_set("mine", folder)
    (folder / "test.parquet").unlink()
    assert read(data) == [RejectedSample("test.parquet[0:3]/", "shard_missing")]
    for columns in ({"text": ["a"], "label": [1]}, {"image": pa.array([b"a"]), "label": ["cat"]}):
        write(folder, "test.parquet", pa.table(columns))
        assert f"test.parquet has the columns {', '.join(columns)}; " in error_of_set("mine", folder)
    write(folder, "test.parquet", build_table([], {"label": []}, CAT_DOG))
    assert f"{folder} has no images" in error_of_set("mine", folder)
    write(folder, "test.parquet", build_table(images_of(2), {"label": [0, 2]}, CAT_DOG))
    assert f"sample test.parquet/1 has label 2, but {folder}/test.parquet names 2" in error_of_set("mine", folder)
    for number in (0, 2):
        write(tmp_path / "parts", f"test-0000{number}-of-00003.parquet", build_table(images_of(1), {"label": [0]}, CAT_DOG))
    assert "has 2 test files instead of 3" in error_of_set("mine", tmp_path / "parts")


@pytest.mark.s3
def test_parquet_in_s3(s3_url, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "IMAGES_PER_SLICE", 5)
    write_cats_and_dogs(tmp_path / "mine" / "data", 20, rows_per_group=5)
    storage.put_folder(tmp_path, f"{s3_url}/parquet")
    local, remote = open_own(tmp_path / "mine"), find_evaluation_set([f"{s3_url}/parquet"], "mine")
    assert (remote.url, len(remote.slices)) == (f"{s3_url}/parquet/mine/data", 4)
    assert contents(remote) == contents(local)
    storage.delete(f"{s3_url}/parquet/mine/data/test-00000-of-00001.parquet")
    assert set(keys_or_causes(remote)) == {"shard_missing"}
