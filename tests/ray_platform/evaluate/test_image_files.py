"""Sets of image files: one subfolder per class, and images without labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.data.decode import FORMATS, rgb
from ray_platform.data.tar import ALL_IMAGE_SUFFIXES
from ray_platform.evaluate import sets
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set, open_image_set
from ray_platform.evaluate.sets import KNOWN_SETS, read_slice
from tests.support.evaluation_sets import class_names, encoded, error_of, error_of_set, picture, read, write_image

IMAGENET = KNOWN_SETS["imagenet1k"].class_folders


def write_classes(root: Path, names: Sequence[str], images_per_class: int = 1) -> Path:
    for label, name in enumerate(names):
        for i in range(images_per_class):
            write_image(root / name / f"{i}.jpg", label % 9)
    return root


def test_a_folder_of_the_users_own_classes(tmp_path):
    root = write_classes(tmp_path / "pets", ["dog", "cat", "great ape"], 2)
    (root / "README").write_text("x")
    write_image(root / "cat" / "deeper" / "last.JPEG", 9)
    write_image(root / ".hidden" / "0.jpg", 9)
    data = open_evaluation_set("mine", str(root))
    assert (data.layout, data.classes, data.templates) == (
        "image folder",
        ("cat", "dog", "great ape"),
        KNOWN_SETS["imagenet1k"].templates,
    )
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


@pytest.mark.parametrize(
    ("folders", "used"),
    [
        (("train", "val"), "val"),
        (("Train", "Test", "valid"), "Test"),
        (("validation",), "validation"),
        (("train", "test"), "test"),
    ],
)
def test_of_a_folder_with_splits_the_one_to_evaluate_on_is_used(tmp_path, folders, used):
    for seed, folder in enumerate(folders):
        write_classes(tmp_path / folder, ["robin", "wren"], seed + 1)
    (tmp_path / "classnames.txt").write_text("a robin\na wren\n")
    data, count = open_evaluation_set("birds", str(tmp_path)), folders.index(used) + 1
    assert (data.url, data.classes) == (f"{tmp_path}/{used}", ("a robin", "a wren"))
    assert [(sample.key, sample.label) for sample in read(data)] == [
        (f"{name}/{i}.jpg", label) for label, name in enumerate(("robin", "wren")) for i in range(count)
    ]


def test_a_folder_with_splits_of_which_none_can_be_evaluated_on(tmp_path):
    write_classes(tmp_path / "train", ["robin", "wren"])
    assert f"birds: {tmp_path} has the folders train, which are splits and not" in error_of_set("birds", tmp_path, DataError)
    write_image(tmp_path / "val" / "0.jpg", 0)  # without its class
    assert "has the folders train, val, which are splits and not classes" in error_of_set("birds", tmp_path, DataError)
    write_image(tmp_path / "test" / "0.jpg", 0)
    write_classes(tmp_path / "val", ["robin", "wren"])
    assert open_evaluation_set("birds", str(tmp_path)).url == f"{tmp_path}/val"
    write_image(tmp_path / "bird" / "0.jpg", 0)  # so these are names of classes
    assert open_evaluation_set("birds", str(tmp_path)).classes == ("bird", "test", "train", "val")


def test_classes_without_images_and_with_the_same_name_are_reported(tmp_path):
    root = write_classes(tmp_path / "birds", ["robin", "wren", "crow"])
    assert open_evaluation_set("birds", str(root)).warnings == ()
    for name in ("owl", ".cache"):
        (root / name).mkdir()
    (root / "classnames.txt").write_text("crow\nrobin\nrobin\n")
    repeated, empty = open_evaluation_set("birds", str(root)).warnings
    assert repeated.startswith(f"birds: {root}/classnames.txt names the class 'robin' more than once")
    assert empty == f"birds: {root} has subfolders without images, which are not classes of the set: owl"
    for seed in range(6):
        (root / f"x{seed}").mkdir()
    assert open_evaluation_set("birds", str(root)).warnings[1].endswith(": owl, x0, x1, x2, x3 and 2 more")


def test_a_known_set_as_a_folder_of_classes(tmp_path):
    root = write_classes(tmp_path / "pets", [name.replace(" ", "_") for name in KNOWN_SETS["vtab/pets"].classes])
    data = open_evaluation_set("vtab/pets", str(root))
    assert (data.classes, data.templates) == (KNOWN_SETS["vtab/pets"].classes, KNOWN_SETS["vtab/pets"].templates)
    flowers = write_classes(tmp_path / "flowers", [f"{label + 1}" for label in range(102)])  # sorted as text: 1, 10, 100, …
    assert "has other names than the published set" in error_of_set("vtab/flowers", flowers)
    cars = [name.replace("/", "-") for name in class_names("cars")]  # not in the order of these names
    data = open_evaluation_set("cars", str(write_classes(tmp_path / "cars", cars)))
    assert data.classes == class_names("cars")
    assert [(sample.key, sample.label) for sample in read(data)] == [
        (f"{cars[label]}/0.jpg", label) for label in sorted(range(196), key=cars.__getitem__)
    ]


def test_imagenets_validation_folder(tmp_path):
    root = write_classes(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / "val", IMAGENET[:-1])
    write_image(root.parent / "train" / IMAGENET[0] / "0.jpg", 0)
    assert f"{root} must have the 1000 subfolders" in error_of_set("imagenet1k", root)
    write_image(root / IMAGENET[-1] / "0.jpg", 0)
    data = find_evaluation_set([str(tmp_path)], "imagenet1k")
    assert open_evaluation_set("imagenet1k", str(root.parent)).digest == data.digest
    assert (data.url, data.layout, data.classes) == (str(root), "image folder", KNOWN_SETS["imagenet1k"].classes)
    assert [sample.label for sample in read_slice(data.slices[-1])] == list(range(896, 1000))
    write_image(root / "n99999999" / "0.jpg", 0)
    assert "there is also n99999999" in error_of_set("imagenet1k", root)


def test_slices_have_each_file_once_and_in_order(tmp_path, monkeypatch):
    root = write_classes(tmp_path / "mine", ["a", "b", "c"], 4)
    samples = read(open_evaluation_set("mine", str(root)))
    for images_per_slice in (1, 5):
        monkeypatch.setattr(sets, "IMAGES_PER_SLICE", images_per_slice)
        data = open_evaluation_set("mine", str(root))
        assert read(data) == samples
        assert len(data.slices) == -(-12 // images_per_slice)


def test_every_format_that_is_read_has_its_usual_endings():
    Image.init()
    usual = {ending[1:] for ending, name in Image.registered_extensions().items() if name in FORMATS}
    assert set(ALL_IMAGE_SUFFIXES) == usual


def test_tiff_images_are_read_and_other_formats_are_named(tmp_path):
    """EuroSAT comes as .tif. Before, such images were left out without a word if there were others."""
    for place, name in enumerate(("a/0.tif", "a/1.TIFF", "b/2.gif", "b/3.png")):
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(place), {"gif": "GIF", "png": "PNG"}.get(name[-3:], "TIFF")))
    (tmp_path / "mine" / "b" / "4.heic").write_bytes(b"x")
    (tmp_path / "mine" / "b" / "notes.txt").write_bytes(b"x")
    data = open_evaluation_set("mine", str(tmp_path / "mine"))
    samples = read(data)
    assert [(sample.key, sample.label) for sample in samples] == [("a/0.tif", 0), ("a/1.TIFF", 0), ("b/2.gif", 1), ("b/3.png", 1)]
    np.testing.assert_array_equal(rgb(samples[0].image), picture(0))
    (warning,) = data.warnings
    assert "has 1 images in formats that are not read, such as b/4.heic; convert them to PNG" in warning


def test_images_without_labels_whatever_their_names(tmp_path):
    names = ["a/*.jpg", "a/d/e.WEBP", "a/image1.png", "a/image[1].jpg", "a/what?.jpg", "a/{b}.jpg", "f.bmp", "ü ✓/größe.jpg"]
    for name in names:
        write_image(tmp_path / "some" / name, 1)
    (tmp_path / "some" / "notes.txt").write_text("x")
    data = open_image_set(str(tmp_path / "some"))
    assert (data.name, data.task, data.layout) == ("some", "images", "image files")
    assert [(sample.key, sample.label) for sample in read(data)] == [(name, -1) for name in names]


def test_files_that_are_gone_or_cannot_be_read_do_not_affect_the_others(tmp_path):
    root = write_classes(tmp_path / "mine", ["a"], 4)
    data = open_evaluation_set("mine", str(root))
    (root / "a" / "1.jpg").unlink()
    (root / "a" / "2.jpg").unlink()
    (root / "a" / "2.jpg").mkdir()
    assert [getattr(sample, "cause", "") for sample in read(data)] == ["", "shard_missing", "shard_unavailable", ""]


@pytest.mark.parametrize(
    ("url", "words"), [("nowhere", "no such folder"), ("*.tar", "no files"), ("", "1 other files, such as notes.txt")]
)
def test_no_images(tmp_path, url, words):
    (tmp_path / "notes.txt").write_text("x")
    assert f"has no images ({words})" in error_of(open_image_set, f"{tmp_path}/{url}", kind=ConfigError)


@pytest.mark.s3
def test_folders_in_s3(s3_url, tmp_path, monkeypatch):
    write_classes(tmp_path / "mine", ["a b", "größe", "c[1]"], 2)
    storage.put_folder(tmp_path, f"{s3_url}/folders")
    local, remote = find_evaluation_set([str(tmp_path)], "mine"), find_evaluation_set([f"{s3_url}/folders/"], "mine")
    assert read(remote) == read(local)
    images = open_image_set(f"{s3_url}/folders/mine")
    storage.delete(f"{s3_url}/folders/mine/a b/1.jpg")
    assert read(images)[1] == RejectedSample("a b/1.jpg", "shard_missing")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ray_platform.retry.RETRY_SECONDS", 0.5)
    assert {sample.cause for sample in read(images)} == {"shard_unavailable"}
