"""Parquet files as Hugging Face's `datasets` writes them: their schema's metadata tell which column is what."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.layouts import parquet
from ray_platform.evaluate.sets import KNOWN_SETS
from ray_platform.data.decode import rgb
from ray_platform.evaluate.samples import read_slice
from tests.support.evaluation_sets import CIFAR10, class_names, encoded, picture, read

CAT_DOG = {"label": ("cat", "dog")}


def table(images, labels: dict, features: dict | None, image_column: str = "image") -> pa.Table:
    """`features`: ClassLabel column -> names; None for a schema that Hugging Face did not write."""
    struct = pa.array(
        [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    made = pa.table({image_column: struct} | {name: pa.array(values, pa.int64()) for name, values in labels.items()})
    if features is None:
        return made
    info: dict = {image_column: {"_type": "Image"}}
    info |= {name: {"names": list(names), "_type": "ClassLabel"} for name, names in features.items()}
    return made.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": info}})})


def write(folder: Path, name: str, made: pa.Table, rows_a_group: int = 100) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(made, folder / name, row_group_size=rows_a_group)
    return folder


def images_of(count: int, first: int = 0) -> list[bytes]:
    return [encoded(picture(seed), "PNG") for seed in range(first, first + count)]


def own(folder: Path, count: int = 4, **fields) -> Path:
    made = table(images_of(count), {"label": [i % 2 for i in range(count)]}, CAT_DOG)
    return write(folder, "test-00000-of-00001.parquet", made, **fields)


def refused(name: str, url: Path) -> str:
    with pytest.raises((DataError, ConfigError)) as raised:
        read(open_evaluation_set(name, str(url)))
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("inside", ["data", "", "plain_text"])
def test_a_published_set(tmp_path, inside):
    labels = [i * 3 % 10 for i in range(25)]
    folder = tmp_path / "cifar10" / inside
    for number, (start, stop) in enumerate(((0, 15), (15, 25))):
        made = table(images_of(stop - start, start), {"label": labels[start:stop]}, {"label": CIFAR10}, "img")
        write(folder, f"test-0000{number}-of-00002-0123456789abcdef.parquet", made, rows_a_group=4)
    write(folder, "train-00000-of-00001.parquet", table(images_of(1, 900), {"label": [0]}, {"label": CIFAR10}, "img"))
    (tmp_path / "cifar10" / "README.md").write_text("---")
    found = find_evaluation_set([str(tmp_path)], "vtab/cifar10")
    assert (found.layout, found.url, found.classes) == ("parquet", str(folder), CIFAR10)
    assert (found.templates, found.known_images, found.num_files) == (KNOWN_SETS["vtab/cifar10"].templates, 25, 2)
    samples = read(found)
    assert [sample.label for sample in samples] == labels
    assert [sample.key for sample in samples[14:16]] == [
        "test-00000-of-00002-0123456789abcdef.parquet/14", "test-00001-of-00002-0123456789abcdef.parquet/0",
    ]  # fmt: skip
    assert all(np.array_equal(rgb(sample.image), picture(i)) for i, sample in enumerate(samples))


@pytest.mark.parametrize("images_a_slice", [1, 3, 4, 10, 256])
@pytest.mark.parametrize("rows_a_group", [1, 3, 100])
def test_slices_have_each_row_once_and_in_order(tmp_path, monkeypatch, images_a_slice, rows_a_group):
    folder = own(tmp_path / "mine", 20, rows_a_group=rows_a_group)
    whole = read(open_evaluation_set("mine", str(folder)))
    monkeypatch.setattr(parquet, "IMAGES_PER_SLICE", images_a_slice)
    found = open_evaluation_set("mine", str(folder))
    assert [(sample.key, sample.label, bytes(sample.image)) for sample in read(found)] == [
        (sample.key, sample.label, bytes(sample.image)) for sample in whole
    ]
    assert [len(read_slice(part)) for part in found.slices] == [part.estimated_images for part in found.slices]
    assert len(found.slices) == -(-20 // min(20, -(-images_a_slice // rows_a_group) * rows_a_group))


def test_an_own_set(tmp_path):
    found = open_evaluation_set("mine", str(own(tmp_path / "mine")))
    assert (found.classes, found.templates) == (("cat", "dog"), ("a photo of a {c}.",))
    (tmp_path / "mine" / "classnames.txt").write_text("a cat\na dog\n")
    (tmp_path / "mine" / "zeroshot_classification_templates.txt").write_text("this is {c}\n")
    found = open_evaluation_set("mine", str(tmp_path / "mine"))
    assert (found.classes, found.templates) == (("a cat", "a dog"), ("this is {c}",))


def test_the_fine_labels_of_several(tmp_path):
    names = class_names("vtab/cifar100")
    coarse = [f"group {i}" for i in range(20)]
    labels = {"coarse_label": [1, 2], "fine_label": [50, 99]}
    made = table(images_of(2), labels, {"coarse_label": coarse, "fine_label": names})
    write(tmp_path / "cifar100" / "data", "test-00000-of-00001.parquet", made)
    found = find_evaluation_set([str(tmp_path)], "vtab/cifar100")
    assert (found.classes, [sample.label for sample in read(found)]) == (names, [50, 99])
    makers, variants = [f"maker {i}" for i in range(30)], class_names("fgvc_aircraft")
    made = table(images_of(2), {"manufacturer": [1, 2], "variant": [7, 8]}, {"manufacturer": makers, "variant": variants})
    write(tmp_path / "fgvc_aircraft", "test.parquet", made)
    found = find_evaluation_set([str(tmp_path)], "fgvc_aircraft")
    assert (found.classes, [sample.label for sample in read(found)]) == (variants, [7, 8])


def test_names_of_the_published_set(tmp_path):
    names = [f"{name}, its Latin name" for name in KNOWN_SETS["imagenet1k"].classes]
    made = table(images_of(3), {"label": [0, 1, 999]}, {"label": names})
    folder = write(tmp_path / "imagenet-1k" / "data", "validation-00000-of-00001.parquet", made)
    unlabelled = table(images_of(3), {"label": [-1, -1, -1]}, {"label": names})
    write(folder, "test-00000-of-00001.parquet", unlabelled)
    found = find_evaluation_set([str(tmp_path)], "imagenet1k")
    assert found.classes == KNOWN_SETS["imagenet1k"].classes
    assert [sample.label for sample in read(found)] == [0, 1, 999]
    # Elsewhere, validation stands in for test where there is none.
    dishes = [name.replace(" ", "_") for name in class_names("food101")]
    write(tmp_path / "food101", "validation-00000-of-00001.parquet", table(images_of(1), {"label": [5]}, {"label": dishes}))
    assert find_evaluation_set([str(tmp_path)], "food101").classes == class_names("food101")


def test_another_order_of_the_classes_is_refused(tmp_path):
    names = sorted(KNOWN_SETS["vtab/flowers"].classes)
    folder = write(tmp_path / "flowers", "test.parquet", table(images_of(1), {"label": [0]}, {"label": names}))
    assert refused("vtab/flowers", folder) == (
        f"vtab/flowers: {folder}/test.parquet has its classes in another order than the published set, such as 'air plant' for "
        "'pink primrose', and 99 in all; use CLIP_benchmark's copy of the set"
    )


def test_a_schema_without_features(tmp_path):
    folder = write(tmp_path / "mine", "test.parquet", table(images_of(2), {"id": [7, 8], "label": [0, 1]}, None))
    assert refused("mine", folder) == (
        f"mine: {folder}/test.parquet does not name its classes; write a classnames.txt in {folder}, a class a line in label "
        "order"
    )
    (folder / "classnames.txt").write_text("a\nb\n")
    assert [sample.label for sample in read(open_evaluation_set("mine", str(folder)))] == [0, 1]
    plain = pa.table({"picture": pa.array(images_of(2), pa.binary()), "label": [1, 0]})
    write(folder, "test.parquet", plain)
    samples = read(open_evaluation_set("mine", str(folder)))
    assert [(sample.label, bytes(sample.image)) for sample in samples] == [(1, images_of(2)[0]), (0, images_of(2)[1])]


def test_what_cannot_be_used_is_told(tmp_path):
    made = table([images_of(1)[0], None, images_of(1)[0]], {"label": [1, 0, None]}, CAT_DOG)
    folder = write(tmp_path / "mine", "test.parquet", made)
    assert [getattr(sample, "cause", sample.key) for sample in read(open_evaluation_set("mine", str(folder)))] == [
        "test.parquet/0", "image_missing", "label_missing",
    ]  # fmt: skip


def test_a_file_that_is_gone_or_broken_is_told(tmp_path):
    folder = own(tmp_path / "mine", 100)
    found = open_evaluation_set("mine", str(folder))
    file = folder / "test-00000-of-00001.parquet"
    file.write_bytes(b"x" * 1000)
    assert [sample.cause for sample in read(found)] == ["shard_unreadable"]
    file.unlink()
    assert read(found) == [RejectedSample(f"{found.slices[0].name}/", "shard_missing")]


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_without_a_class(tmp_path, label):
    made = table(images_of(2), {"label": [0, label]}, CAT_DOG)
    folder = write(tmp_path / "mine", "test.parquet", made)
    assert refused("mine", folder) == (
        f"mine: sample test.parquet/1 has label {label}, but {folder}/test.parquet names 2 classes (0 to 1); "
        "correct the class list, or fetch the set again"
    )


def test_missing_files(tmp_path):
    made = table(images_of(1), {"label": [0]}, CAT_DOG)
    for number in (0, 2):
        folder = write(tmp_path / "mine" / "data", f"test-0000{number}-of-00003.parquet", made)
    assert refused("mine", tmp_path / "mine") == (
        f"mine: {folder} has 2 test files, of 3 by their names, such as test-00000-of-00003.parquet; fetch the set again"
    )


def test_a_file_that_is_no_parquet(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "test.parquet").write_bytes(b"<html>404</html>")
    message = refused("mine", tmp_path / "mine")
    assert message.startswith(f"mine: {tmp_path}/mine/test.parquet is no parquet file (Parquet magic bytes not found")
    assert message.endswith("; fetch the set again")


def test_columns_that_do_not_fit(tmp_path):
    folder = write(tmp_path / "mine", "test.parquet", pa.table({"text": ["a"], "label": [1]}))
    assert refused("mine", folder) == (
        f"mine: {folder}/test.parquet has the columns text, label; it needs one of encoded images and one of whole-number labels"
    )
    folder = write(tmp_path / "other", "test.parquet", pa.table({"image": pa.array([b"a"]), "label": ["cat"]}))
    assert refused("mine", folder) == (
        f"mine: {folder}/test.parquet has the columns image, label; it needs one of encoded images and one of whole-number labels"
    )


def test_an_empty_set(tmp_path):
    folder = write(tmp_path / "mine", "test.parquet", table([], {"label": []}, CAT_DOG))
    assert refused("mine", folder) == f"mine: {folder} holds no images; fetch the set again"


@pytest.mark.s3
def test_parquet_in_s3(s3_url, tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "IMAGES_PER_SLICE", 5)
    own(tmp_path / "mine" / "data", 20, rows_a_group=5)
    storage.put_folder(tmp_path, f"{s3_url}/parquet")
    here, there = open_evaluation_set("mine", str(tmp_path / "mine")), find_evaluation_set([f"{s3_url}/parquet"], "mine")
    assert (there.digest, there.url, len(there.slices)) == (here.digest, f"{s3_url}/parquet/mine/data", 4)
    for one, other in zip(read(there), read(here), strict=True):
        assert (one.key, one.label, bytes(one.image)) == (other.key, other.label, bytes(other.image))
    storage.delete(f"{s3_url}/parquet/mine/data/test-00000-of-00001.parquet")
    assert {sample.cause for sample in read(there)} == {"shard_missing"}
