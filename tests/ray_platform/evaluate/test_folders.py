"""One subfolder a class, and images without labels."""

from pathlib import Path

import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.find import find_set, open_images, open_set
from ray_platform.evaluate.layouts import files
from ray_platform.evaluate.sets import REGISTRY
from tests.support.evaluation_sets import encoded, picture, read

IMAGENET = REGISTRY["imagenet1k"].class_folders


def refused(name: str, url: Path, kind=DataError) -> str:
    with pytest.raises(kind) as raised:
        read(open_set(name, str(url)))
    message = str(raised.value)
    assert "\n" not in message
    return message


def write_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(picture(seed), "JPEG"))


# ------------------------------------------------------------------------------------------------- a subfolder a class


def write_classes(root: Path, names, images_a_class: int = 2) -> Path:
    for label, name in enumerate(names):
        for i in range(images_a_class):
            write_image(root / name / f"{i}.jpg", label * images_a_class + i)
    return root


def test_an_own_folder_of_classes(tmp_path):
    root = write_classes(tmp_path / "pets", ["dog", "cat", "great ape"])
    (root / "README").write_text("x")
    write_image(root / "cat" / "deeper" / "last.JPEG", 9)
    write_image(root / ".hidden" / "0.jpg", 9)
    found = open_set("mine", str(root))
    assert (found.layout, found.classes, found.templates) == (
        "image folder", ("cat", "dog", "great ape"), ("a photo of a {c}.",),
    )  # fmt: skip
    assert [(sample.key, sample.label) for sample in read(found)] == [
        ("cat/0.jpg", 0), ("cat/1.jpg", 0), ("cat/deeper/last.JPEG", 0), ("dog/0.jpg", 1), ("dog/1.jpg", 1),
        ("great ape/0.jpg", 2), ("great ape/1.jpg", 2),
    ]  # fmt: skip
    assert found.known_images == 7


def test_names_and_templates_beside_the_classes(tmp_path):
    root = write_classes(tmp_path / "mine", ["n1", "n2"])
    (root / "classnames.txt").write_text("a cat\na dog\n")
    (root / "zeroshot_classification_templates.txt").write_text("this is {c}\n")
    found = open_set("mine", str(root))
    assert (found.classes, found.templates) == (("a cat", "a dog"), ("this is {c}",))
    (root / "classnames.txt").write_text("a cat\n")
    assert refused("mine", root) == (
        f"mine: {root}/classnames.txt names 1 classes, but there are 2 subfolders; write one name a subfolder, in the order of "
        "their names"
    )


def test_a_published_set_as_a_folder_of_classes(tmp_path):
    root = write_classes(tmp_path / "pets", [name.replace(" ", "_") for name in REGISTRY["vtab/pets"].classes])
    found = open_set("vtab/pets", str(root))
    assert (found.classes, found.templates) == (REGISTRY["vtab/pets"].classes, REGISTRY["vtab/pets"].templates)
    flowers = write_classes(tmp_path / "flowers", [f"{label + 1}" for label in range(102)], 1)  # sorted: 1, 10, 100, …
    assert refused("vtab/flowers", flowers) == (
        f"vtab/flowers: {flowers} (a subfolder a class) has its classes in another order than the published set, such as '1' for "
        "'pink primrose', and 102 in all; use CLIP_benchmark's copy of the set"
    )


@pytest.mark.parametrize("inside", ["val", "imagenet/val", "ILSVRC/Data/CLS-LOC/val"])
def test_imagenets_validation_folder(tmp_path, inside):
    root = write_classes(tmp_path / inside, IMAGENET, 1)
    write_image(root.parent / "train" / IMAGENET[0] / "0.jpg", 0)
    if inside == "val":
        assert open_set("imagenet1k", str(tmp_path)).digest == open_set("imagenet1k", str(root)).digest
    found = open_set("imagenet1k", str(root)) if inside == "val" else find_set([str(tmp_path)], "imagenet1k")
    assert (found.url, found.layout, found.classes) == (str(root), "image folder", REGISTRY["imagenet1k"].classes)
    assert [sample.label for sample in read(found)] == list(range(1000))
    assert [part.estimated_images for part in found.slices] == [128] * 7 + [104]


def test_imagenet_folders_that_are_not_the_thousand(tmp_path):
    root = write_classes(tmp_path / "val", IMAGENET[:-1], 1)
    assert refused("imagenet1k", root) == (
        f"imagenet1k: {root} must have the 1000 subfolders n01440764 to n15075141, but n15075141 is missing; "
        "sort the images into them"
    )
    write_classes(tmp_path / "val", [IMAGENET[-1], "n99999999"], 1)
    assert "but n99999999 is none of them; sort the images into them" in refused("imagenet1k", root)


@pytest.mark.parametrize("images_a_slice", [1, 2, 5, 100])
def test_slices_have_each_file_once_and_in_order(tmp_path, monkeypatch, images_a_slice):
    root = write_classes(tmp_path / "mine", ["a", "b", "c"], 4)
    whole = read(open_set("mine", str(root)))
    monkeypatch.setattr(files, "IMAGES_A_SLICE", images_a_slice)
    found = open_set("mine", str(root))
    assert read(found) == whole
    assert len(found.slices) == -(-12 // images_a_slice)


def test_names_that_patterns_are_made_of(tmp_path):
    for name in ("a/image[1].jpg", "a/image1.jpg", "a/what?.jpg", "a/{b}.jpg", "a/*.jpg", "ü ✓/größe.jpg"):
        write_image(tmp_path / "mine" / name, 1)
    assert sorted(sample.key for sample in read(open_set("mine", str(tmp_path / "mine")))) == [
        "a/*.jpg", "a/image1.jpg", "a/image[1].jpg", "a/what?.jpg", "a/{b}.jpg", "ü ✓/größe.jpg",
    ]  # fmt: skip


def test_files_that_are_gone_or_forbidden_are_told_and_the_others_read(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "mine", ["a"], 4)
    found = open_set("mine", str(root))
    (root / "a" / "1.jpg").unlink()
    (root / "a" / "2.jpg").unlink()
    (root / "a" / "2.jpg").mkdir()
    causes = [getattr(sample, "cause", "") for sample in read(found)]
    assert causes == ["", "shard_missing", "shard_unavailable", ""]


# ---------------------------------------------------------------------------------------------------- images, no labels


def test_images_of_any_folder(tmp_path):
    for name in ("b.jpg", "a/c.png", "a/d/e.WEBP", "f.bmp"):
        write_image(tmp_path / "some" / name, 1)
    (tmp_path / "some" / "notes.txt").write_text("x")
    found = open_images(str(tmp_path / "some"))
    assert (found.name, found.task, found.layout) == ("some", "images", "image files")
    assert [(sample.key, sample.label) for sample in read(found)] == [
        ("a/c.png", -1), ("a/d/e.WEBP", -1), ("b.jpg", -1), ("f.bmp", -1),
    ]  # fmt: skip


def test_no_images(tmp_path):
    with pytest.raises(ConfigError) as raised:
        open_images(str(tmp_path / "nowhere"))
    assert str(raised.value) == f"{tmp_path}/nowhere: holds no images: neither tars nor image files; there is no such folder"
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError) as raised:
        open_images(str(tmp_path))
    assert str(raised.value) == (
        f"{tmp_path}: holds no images: neither tars nor image files; there are 1 other files in it, such as notes.txt"
    )
    with pytest.raises(ConfigError, match="holds no images"):
        open_images(f"{tmp_path}/*.tar")


# ------------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.s3
def test_folders_in_s3(s3_url, tmp_path, monkeypatch):
    write_classes(tmp_path / "mine", ["a b", "größe", "c[1]"])
    storage.put_folder(tmp_path, f"{s3_url}/folders")
    here, there = find_set([str(tmp_path)], "mine"), find_set([f"{s3_url}/folders/"], "mine")
    assert there.digest == here.digest
    assert read(there) == read(here)
    images = open_images(f"{s3_url}/folders/mine")
    assert [sample.key for sample in read(images)] == [
        "a b/0.jpg", "a b/1.jpg", "c[1]/0.jpg", "c[1]/1.jpg", "größe/0.jpg", "größe/1.jpg",
    ]  # fmt: skip
    storage.delete(f"{s3_url}/folders/mine/a b/1.jpg")
    assert read(images)[1] == RejectedSample("a b/1.jpg", "shard_missing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ray_platform.retry.RETRY_SECONDS", 0.5)
    assert {sample.cause for sample in read(images)} == {"shard_unavailable"}
