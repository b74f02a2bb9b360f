"""One subfolder per class, and images without labels."""

from pathlib import Path

import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate import image_files
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set, open_image_set
from ray_platform.evaluate.sets import KNOWN_SETS
from tests.support.evaluation_sets import error_of, error_of_set, read, write_image

IMAGENET = KNOWN_SETS["imagenet1k"].class_folders


def write_classes(root: Path, names, images_per_class: int = 2) -> Path:
    for label, name in enumerate(names):
        for i in range(images_per_class):
            write_image(root / name / f"{i}.jpg", label * images_per_class + i)
    return root


def test_a_folder_of_the_users_own_classes(tmp_path):
    root = write_classes(tmp_path / "pets", ["dog", "cat", "great ape"])
    (root / "README").write_text("x")
    write_image(root / "cat" / "deeper" / "last.JPEG", 9)
    write_image(root / ".hidden" / "0.jpg", 9)
    data = open_evaluation_set("mine", str(root))
    assert (data.layout, data.classes, data.templates) == ("image folder", ("cat", "dog", "great ape"), ("a photo of a {c}.",))
    assert [(sample.key, sample.label) for sample in read(data)] == [
        ("cat/0.jpg", 0), ("cat/1.jpg", 0), ("cat/deeper/last.JPEG", 0), ("dog/0.jpg", 1), ("dog/1.jpg", 1),
        ("great ape/0.jpg", 2), ("great ape/1.jpg", 2),
    ]  # fmt: skip
    assert data.known_images == 7
    (root / "classnames.txt").write_text("a cat\na dog\na great ape\n")
    (root / "zeroshot_classification_templates.txt").write_text("this is {c}\n")
    data = open_evaluation_set("mine", str(root))
    assert (data.classes, data.templates) == (("a cat", "a dog", "a great ape"), ("this is {c}",))
    (root / "classnames.txt").write_text("a cat\n")
    assert f"{root}/classnames.txt names 1 classes, but there are 3 subfolders" in error_of_set("mine", root)


def test_a_known_set_as_a_folder_of_classes(tmp_path):
    root = write_classes(tmp_path / "pets", [name.replace(" ", "_") for name in KNOWN_SETS["vtab/pets"].classes], 1)
    data = open_evaluation_set("vtab/pets", str(root))
    assert (data.classes, data.templates) == (KNOWN_SETS["vtab/pets"].classes, KNOWN_SETS["vtab/pets"].templates)
    flowers = write_classes(tmp_path / "flowers", [f"{label + 1}" for label in range(102)], 1)  # sorted: 1, 10, 100, …
    assert "another order than the published set" in error_of_set("vtab/flowers", flowers)


@pytest.mark.parametrize("inside", ["val", "imagenet/val", "ILSVRC/Data/CLS-LOC/val"])
def test_imagenets_validation_folder(tmp_path, inside):
    root = write_classes(tmp_path / inside, IMAGENET, 1)
    write_image(root.parent / "train" / IMAGENET[0] / "0.jpg", 0)
    if inside == "val":
        data = open_evaluation_set("imagenet1k", str(root))
        assert open_evaluation_set("imagenet1k", str(tmp_path)).digest == data.digest
    else:
        data = find_evaluation_set([str(tmp_path)], "imagenet1k")
    assert (data.url, data.layout, data.classes) == (str(root), "image folder", KNOWN_SETS["imagenet1k"].classes)
    assert [sample.label for sample in read(data)] == list(range(1000))
    assert [part.estimated_images for part in data.slices] == [128] * 7 + [104]


def test_imagenet_folders_that_are_not_the_thousand(tmp_path):
    root = write_classes(tmp_path / "val", IMAGENET[:-1], 1)
    assert f"{root} must have the 1000 subfolders" in error_of_set("imagenet1k", root)
    write_classes(root, [IMAGENET[-1], "n99999999"], 1)
    assert "there is also n99999999" in error_of_set("imagenet1k", root)


@pytest.mark.parametrize("images_per_slice", [1, 5, 100])
def test_slices_have_each_file_once_and_in_order(tmp_path, monkeypatch, images_per_slice):
    root = write_classes(tmp_path / "mine", ["a", "b", "c"], 4)
    whole = read(open_evaluation_set("mine", str(root)))
    monkeypatch.setattr(image_files, "IMAGES_PER_SLICE", images_per_slice)
    data = open_evaluation_set("mine", str(root))
    assert read(data) == whole
    assert len(data.slices) == -(-12 // images_per_slice)


def test_names_with_the_characters_of_patterns(tmp_path):
    names = ["a/*.jpg", "a/image1.jpg", "a/image[1].jpg", "a/what?.jpg", "a/{b}.jpg", "ü ✓/größe.jpg"]
    for name in names:
        write_image(tmp_path / "mine" / name, 1)
    assert sorted(sample.key for sample in read(open_evaluation_set("mine", str(tmp_path / "mine")))) == names


def test_files_that_are_gone_or_cannot_be_read_do_not_affect_the_others(tmp_path):
    root = write_classes(tmp_path / "mine", ["a"], 4)
    data = open_evaluation_set("mine", str(root))
    (root / "a" / "1.jpg").unlink()
    (root / "a" / "2.jpg").unlink()
    (root / "a" / "2.jpg").mkdir()
    causes = [getattr(sample, "cause", "") for sample in read(data)]
    assert causes == ["", "shard_missing", "shard_unavailable", ""]


def test_images_of_any_folder(tmp_path):
    names = ["a/c.png", "a/d/e.WEBP", "b.jpg", "f.bmp"]
    for name in names:
        write_image(tmp_path / "some" / name, 1)
    (tmp_path / "some" / "notes.txt").write_text("x")
    data = open_image_set(str(tmp_path / "some"))
    assert (data.name, data.task, data.layout) == ("some", "images", "image files")
    assert [(sample.key, sample.label) for sample in read(data)] == [(name, -1) for name in names]


def test_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    for url, words in (
        (f"{tmp_path}/nowhere", "has no images (no such folder)"),
        (f"{tmp_path}/*.tar", "has no images (no files)"),
        (str(tmp_path), "has no images (1 other files, such as notes.txt)"),
    ):
        assert words in error_of(open_image_set, url, kind=ConfigError)


@pytest.mark.s3
def test_folders_in_s3(s3_url, tmp_path, monkeypatch):
    write_classes(tmp_path / "mine", ["a b", "größe", "c[1]"])
    storage.put_folder(tmp_path, f"{s3_url}/folders")
    local, remote = find_evaluation_set([str(tmp_path)], "mine"), find_evaluation_set([f"{s3_url}/folders/"], "mine")
    assert remote.digest == local.digest
    assert read(remote) == read(local)
    images = open_image_set(f"{s3_url}/folders/mine")
    assert [sample.key for sample in read(images)] == [f"{name}/{i}.jpg" for name in ("a b", "c[1]", "größe") for i in (0, 1)]
    storage.delete(f"{s3_url}/folders/mine/a b/1.jpg")
    assert read(images)[1] == RejectedSample("a b/1.jpg", "shard_missing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ray_platform.retry.RETRY_SECONDS", 0.5)
    assert {sample.cause for sample in read(images)} == {"shard_unavailable"}
