"""Parquet files as Hugging Face's `datasets` writes them: the schema's metadata name images, labels and classes."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_platform import storage
from ray_platform.data.causes import RejectedSample
from ray_platform.data.decode import rgb
from ray_platform.evaluate import shards
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.sets import KNOWN_SETS, read_slice
from tests.support.evaluation_sets import CIFAR10, class_names, contents, encoded, error_of_set, picture, read

CAT_DOG = {"label": ("cat", "dog")}


def build_table(images, labels: dict, features: dict | None, image_column: str = "image") -> pa.Table:
    """`features`: ClassLabel column -> names; None for a schema that Hugging Face did not write."""
    struct = pa.array(
        [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
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


def write_own(folder: Path, count: int = 4, **fields) -> Path:
    table = build_table(images_of(count), {"label": [i % 2 for i in range(count)]}, CAT_DOG)
    return write(folder, "test-00000-of-00001.parquet", table, **fields)


@pytest.mark.parametrize("inside", ["data", "", "plain_text"])
def test_a_known_set(tmp_path, inside):
    labels = [i * 3 % 10 for i in range(25)]
    folder = tmp_path / "cifar10" / inside
    for number, (start, stop) in enumerate(((0, 15), (15, 25))):
        table = build_table(images_of(stop - start, start), {"label": labels[start:stop]}, {"label": CIFAR10}, "img")
        write(folder, f"test-0000{number}-of-00002-0123456789abcdef.parquet", table, rows_per_group=4)
    write(folder, "train-00000-of-00001.parquet", build_table(images_of(1, 900), {"label": [0]}, {"label": CIFAR10}, "img"))
    (tmp_path / "cifar10" / "README.md").write_text("---")
    data = find_evaluation_set([str(tmp_path)], "vtab/cifar10")
    assert (data.layout, data.url, data.classes) == ("parquet", str(folder), CIFAR10)
    assert (data.templates, data.known_images, data.num_files) == (KNOWN_SETS["vtab/cifar10"].templates, 25, 2)
    samples = read(data)
    assert [sample.label for sample in samples] == labels
    assert [sample.key for sample in samples[14:16]] == [
        "test-00000-of-00002-0123456789abcdef.parquet/14", "test-00001-of-00002-0123456789abcdef.parquet/0",
    ]  # fmt: skip
    assert all(np.array_equal(rgb(sample.image), picture(i)) for i, sample in enumerate(samples))


@pytest.mark.parametrize("images_per_slice", [1, 4, 256])
@pytest.mark.parametrize("rows_per_group", [1, 3, 100])
def test_slices_have_each_row_once_and_in_order(tmp_path, monkeypatch, images_per_slice, rows_per_group):
    folder = str(write_own(tmp_path / "mine", 20, rows_per_group=rows_per_group))
    whole = contents(open_evaluation_set("mine", folder))
    monkeypatch.setattr(shards, "IMAGES_PER_SLICE", images_per_slice)
    data = open_evaluation_set("mine", folder)
    assert contents(data) == whole
    assert [len(read_slice(part)) for part in data.slices] == [part.estimated_images for part in data.slices]
    assert len(data.slices) == -(-20 // min(20, -(-images_per_slice // rows_per_group) * rows_per_group))


def test_names_and_templates_of_the_users_own_set(tmp_path):
    data = open_evaluation_set("mine", str(write_own(tmp_path / "mine")))
    assert (data.classes, data.templates) == (("cat", "dog"), ("a photo of a {c}.",))
    (tmp_path / "mine" / "classnames.txt").write_text("a cat\na dog\n")
    (tmp_path / "mine" / "zeroshot_classification_templates.txt").write_text("this is {c}\n")
    data = open_evaluation_set("mine", str(tmp_path / "mine"))
    assert (data.classes, data.templates) == (("a cat", "a dog"), ("this is {c}",))


def test_the_fine_labels_of_several_levels(tmp_path):
    fine, coarse = class_names("vtab/cifar100"), [f"group {i}" for i in range(20)]
    labels = {"coarse_label": [1, 2], "fine_label": [50, 99]}
    table = build_table(images_of(2), labels, {"coarse_label": coarse, "fine_label": fine})
    write(tmp_path / "cifar100" / "data", "test-00000-of-00001.parquet", table)
    data = find_evaluation_set([str(tmp_path)], "vtab/cifar100")
    assert (data.classes, [sample.label for sample in read(data)]) == (fine, [50, 99])
    makers, variants = [f"maker {i}" for i in range(30)], class_names("fgvc_aircraft")
    labels = {"manufacturer": [1, 2], "variant": [7, 8]}
    table = build_table(images_of(2), labels, {"manufacturer": makers, "variant": variants})
    write(tmp_path / "fgvc_aircraft", "test.parquet", table)
    data = find_evaluation_set([str(tmp_path)], "fgvc_aircraft")
    assert (data.classes, [sample.label for sample in read(data)]) == (variants, [7, 8])


def test_names_and_order_of_the_published_set(tmp_path):
    names = [f"{name}, its Latin name" for name in KNOWN_SETS["imagenet1k"].classes]
    table = build_table(images_of(3), {"label": [0, 1, 999]}, {"label": names})
    folder = write(tmp_path / "imagenet-1k" / "data", "validation-00000-of-00001.parquet", table)
    unlabelled = build_table(images_of(3), {"label": [-1, -1, -1]}, {"label": names})
    write(folder, "test-00000-of-00001.parquet", unlabelled)
    data = find_evaluation_set([str(tmp_path)], "imagenet1k")
    assert data.classes == KNOWN_SETS["imagenet1k"].classes
    assert [sample.label for sample in read(data)] == [0, 1, 999]
    # The validation split of other sets is used when there is no test split.
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
    assert [sample.label for sample in read(open_evaluation_set("mine", str(folder)))] == [0, 1]
    write(folder, "test.parquet", pa.table({"picture": pa.array(images_of(2), pa.binary()), "label": [1, 0]}))
    samples = contents(open_evaluation_set("mine", str(folder)))
    assert [sample[1:] for sample in samples] == [(1, images_of(2)[0]), (0, images_of(2)[1])]


def test_rows_and_files_that_cannot_be_used_are_rejected_with_their_cause(tmp_path):
    table = build_table([images_of(1)[0], None, images_of(1)[0]], {"label": [1, 0, None]}, CAT_DOG)
    folder = write(tmp_path / "mine", "test.parquet", table)
    data = open_evaluation_set("mine", str(folder))
    assert [getattr(sample, "cause", sample.key) for sample in read(data)] == [
        "test.parquet/0", "image_missing", "label_missing",
    ]  # fmt: skip
    (folder / "test.parquet").write_bytes(b"x" * 1000)
    assert [sample.cause for sample in read(data)] == ["shard_unreadable"]
    (folder / "test.parquet").unlink()
    assert read(data) == [RejectedSample(f"{data.slices[0].name}/", "shard_missing")]


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_without_a_class(tmp_path, label):
    folder = write(tmp_path / "mine", "test.parquet", build_table(images_of(2), {"label": [0, label]}, CAT_DOG))
    assert f"sample test.parquet/1 has label {label}, but {folder}/test.parquet names 2" in error_of_set("mine", folder)


def test_files_that_cannot_be_used(tmp_path):
    table = build_table(images_of(1), {"label": [0]}, CAT_DOG)
    for number in (0, 2):
        folder = write(tmp_path / "mine" / "data", f"test-0000{number}-of-00003.parquet", table)
    assert f"{folder} has 2 test files instead of 3" in error_of_set("mine", tmp_path / "mine")
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "test.parquet").write_bytes(b"<html>404</html>")
    assert "test.parquet is not a parquet file" in error_of_set("mine", tmp_path / "page")
    for columns in ({"text": ["a"], "label": [1]}, {"image": pa.array([b"a"]), "label": ["cat"]}):
        folder = write(tmp_path / "columns", "test.parquet", pa.table(columns))
        assert f"test.parquet has the columns {', '.join(columns)}; " in error_of_set("mine", folder)
    folder = write(tmp_path / "empty", "test.parquet", build_table([], {"label": []}, CAT_DOG))
    assert f"{folder} has no images" in error_of_set("mine", folder)


@pytest.mark.s3
def test_parquet_in_s3(s3_url, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "IMAGES_PER_SLICE", 5)
    write_own(tmp_path / "mine" / "data", 20, rows_per_group=5)
    storage.put_folder(tmp_path, f"{s3_url}/parquet")
    local, remote = open_evaluation_set("mine", str(tmp_path / "mine")), find_evaluation_set([f"{s3_url}/parquet"], "mine")
    assert (remote.digest, remote.url, len(remote.slices)) == (local.digest, f"{s3_url}/parquet/mine/data", 4)
    assert contents(remote) == contents(local)
    storage.delete(f"{s3_url}/parquet/mine/data/test-00000-of-00001.parquet")
    assert {sample.cause for sample in read(remote)} == {"shard_missing"}
