"""Folders of torchvision's datasets, in layouts derived from its source code, and what a pickle among them may contain."""

import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.data.decode import rgb
from ray_platform.evaluate import sets, torchvision_folders
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.sets import KNOWN_SETS
from tests.support.evaluation_sets import CIFAR10, class_names, error_of, error_of_set, picture, read, write_image

# Each function writes a test split and some images of a train split, which must not be read. It returns the folder of the set and
# the labels by file name.


def label_of(name: str, i: int) -> int:
    """Return a label. As in the real files, images are not sorted by class."""
    return i * 7 % KNOWN_SETS[name].num_classes


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def write_split(folder: Path, labels: dict[str, int], train: str = "") -> tuple[Path, dict[str, int]]:
    for seed, name in enumerate([*labels, *([train] if train else [])]):
        write_image(folder / name, seed % 50)
    return folder, labels


def write_cars(root: Path):
    folder = root / "stanford_cars"
    labels = {f"cars_test/{i + 1:05d}.jpg": label_of("cars", i) for i in range(196)}
    kind = np.dtype([("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
    rows = [(30, label + 1, Path(name).name) for name, label in labels.items()]
    (folder / "devkit").mkdir(parents=True)
    scipy.io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": np.array([rows], dtype=kind)})
    names = np.array([list(class_names("cars"))], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    return write_split(folder, labels, "cars_train/00001.jpg")


def write_flowers(root: Path):
    folder, tested = root / "flowers-102", range(2, 205, 2)  # odd numbers are training images
    all_labels = [label_of("vtab/flowers", i) + 1 for i in range(204)]
    labels = {f"jpg/image_{number:05d}.jpg": all_labels[number - 1] - 1 for number in tested}
    folder.mkdir()
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([all_labels], dtype=np.uint8)})
    scipy.io.savemat(folder / "setid.mat", {"tstid": np.array([tested]), "trnid": np.array([range(1, 204, 2)])})
    return write_split(folder, labels, "jpg/image_00001.jpg")


def write_food(root: Path):
    names = [name.replace(" ", "_") for name in class_names("food101")]
    write_lines(root / "food-101" / "meta" / "test.json", [json.dumps({name: [f"{name}/12"] for name in reversed(names)})])
    labels = {f"images/{name}/12.jpg": label for label, name in enumerate(names)}
    return write_split(root / "food-101", labels, f"images/{names[0]}/13.jpg")


def write_sun(root: Path):
    names = [f"/{name[0]}/{name.replace(' outdoor', '/outdoor').replace(' ', '_')}" for name in class_names("sun397")]
    write_lines(root / "SUN397" / "ClassName.txt", names)
    return write_split(root / "SUN397", {f"{name[1:]}/sun_{label}.jpg": label for label, name in enumerate(names)})


def write_textures(root: Path):
    folder, names = root / "dtd" / "dtd", class_names("vtab/dtd")
    files = [(label_of("vtab/dtd", i), f"_{i:04d}.jpg") for i in range(50)]
    labels = {f"images/{names[label]}/{names[label]}{ending}": label for label, ending in files}
    write_lines(folder / "labels" / "test1.txt", [name.removeprefix("images/") for name in labels])
    write_lines(folder / "labels" / "test2.txt", [])
    return write_split(folder, labels, f"images/{names[0]}/{names[0]}_9999.jpg")


def write_aircraft(root: Path):
    folder, variants = root / "fgvc-aircraft-2013b", class_names("fgvc_aircraft")
    labels = {f"data/images/{1000 + i:07d}.jpg": label_of("fgvc_aircraft", i) for i in range(100)}
    write_lines(folder / "data" / "variants.txt", variants)
    lines = [f"{Path(name).stem} {variants[label]}" for name, label in labels.items()]
    write_lines(folder / "data" / "images_variant_test.txt", lines)
    return write_split(folder, labels)


def write_pets(root: Path):
    folder, breeds = root / "oxford-iiit-pet", [name.replace(" ", "_") for name in KNOWN_SETS["vtab/pets"].classes]
    numbers = [(i, label_of("vtab/pets", i)) for i in range(37)]
    labels = {f"images/{breeds[label] if i % 2 else breeds[label].lower()}_{i + 200}.jpg": label for i, label in numbers}
    write_lines(folder / "annotations" / "test.txt", [f"{Path(name).stem} {label + 1} 1 1" for name, label in labels.items()])
    return write_split(folder, labels, "images/Abyssinian_1.jpg")


WRITERS = {
    "cars": write_cars,
    "vtab/flowers": write_flowers,
    "food101": write_food,
    "sun397": write_sun,
    "vtab/dtd": write_textures,
    "fgvc_aircraft": write_aircraft,
    "vtab/pets": write_pets,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_test_split_of_torchvisions_folders(tmp_path, name):
    folder, labels = WRITERS[name](tmp_path)
    data, known = find_evaluation_set([str(tmp_path)], name), KNOWN_SETS[name]
    assert (data.url, data.layout, data.task, data.known) == (str(folder), "torchvision", "zeroshot_classification", known)
    assert (data.templates, data.classes) == (known.templates, known.classes)
    samples = read(data)
    assert {sample.key: sample.label for sample in samples} == labels
    assert (len(samples), data.known_images, data.num_files) == (len(labels),) * 3
    for sample in samples[::17]:
        assert bytes(sample.image) == (folder / sample.key).read_bytes()


@pytest.mark.parametrize("inside", ["dtd/dtd", "dtd", ""])
def test_the_folder_itself_may_be_given_or_one_above_it(tmp_path, inside):
    folder, _ = write_textures(tmp_path)
    assert open_evaluation_set("vtab/dtd", str(tmp_path / inside)).url == str(folder)


def test_an_image_that_the_index_names_and_that_is_not_there(tmp_path):
    folder, labels = write_pets(tmp_path)
    (folder / (lost := sorted(labels)[5])).unlink()
    data = find_evaluation_set([str(tmp_path)], "vtab/pets")
    assert data.known_images == 36
    assert [sample for sample in read(data) if isinstance(sample, RejectedSample)] == [RejectedSample(lost, "shard_missing")]


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("vtab/pets", "annotations/test.txt", b"Abyssinian_7 cat 1 1", "annotations/test.txt or a file next to it"),
        ("vtab/pets", "annotations/test.txt", b"Abyssinian_7 1 1 1", "names 1 classes, but the set has 37"),
        ("cars", "devkit/cars_meta.mat", b"MATLAB, but no more", "MatReadError"),
        ("food101", "meta/test.json", b"[", "JSONDecodeError"),
        ("fgvc_aircraft", "data/images_variant_test.txt", b"0001000 Concorde", "KeyError: 'Concorde'"),
    ],
)
def test_an_index_that_cannot_be_read(tmp_path, name, file, content, words):
    folder, _ = WRITERS[name](tmp_path)
    (folder / file).write_bytes(content)
    message = error_of_set(name, tmp_path, DataError)
    assert message.startswith(f"{name}: {folder}/")
    assert words in message


def test_a_label_beyond_the_classes(tmp_path):
    folder, _ = write_flowers(tmp_path)
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.full((1, 204), 200, dtype=np.uint8)})
    assert "image_00002.jpg has label 199, but" in error_of_set("vtab/flowers", tmp_path, DataError)


@pytest.mark.parametrize(
    ("name", "folder"), [("vtab/caltech101", "caltech101/101_ObjectCategories"), ("vtab/eurosat", "eurosat/2750")]
)
def test_sets_of_which_torchvision_has_no_test_split(tmp_path, name, folder):
    write_image(tmp_path / folder / "Forest" / "Forest_1.jpg", 0)
    message = error_of(find_evaluation_set, [str(tmp_path)], name, kind=ConfigError)
    assert message.startswith(f"{name}: {tmp_path}/{folder} is torchvision's layout, which has no test split")
    assert error_of_set(name, tmp_path / folder.partition("/")[0], ConfigError) == message


# --- CIFAR ----------------------------------------------------------------------------------------------------------------------


def python2(value) -> bytes:
    """Pickle a value as Python 2 and its numpy wrote CIFAR's files: byte strings, and the array's bytes as a byte string."""
    if isinstance(value, int):
        return b"K" + bytes([value])
    if isinstance(value, bytes):
        return b"T" + struct.pack("<i", len(value)) + value
    if isinstance(value, list):
        return b"](" + b"".join(map(python2, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(python2(part) for item in value.items() for part in item) + b"u"
    shape = b"".join(b"M" + struct.pack("<H", length) for length in value.shape)
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return array + b"(K\x01" + shape + b"\x86" + dtype + b"\x89" + python2(value.tobytes()) + b"tb"


def cifar_pixels(count: int) -> np.ndarray:
    """Return pixels [count, 3072], one color plane after another."""
    return np.stack([picture(seed, 32, 32).transpose(2, 0, 1).ravel() for seed in range(count)])


def write_cifar(root: Path, name: str = "vtab/cifar10", count: int = 30, classes: Sequence[str] = ()) -> list[int]:
    folder, prefix = ("cifar-10-batches-py", b"") if name == "vtab/cifar10" else ("cifar-100-python", b"fine_")
    labels = [i * 7 % KNOWN_SETS[name].num_classes for i in range(count)]
    images = {b"data": cifar_pixels(count), prefix + b"labels": labels, b"coarse_labels": [0] * count}
    meta = {prefix + b"label_names": [class_name.encode() for class_name in classes or class_names(name)]}
    (root / folder).mkdir(parents=True)
    for file, content in zip(("test_batch", "batches.meta") if not prefix else ("test", "meta"), (images, meta), strict=True):
        (root / folder / file).write_bytes(b"\x80\x02" + python2(content) + b".")
    return labels


@pytest.mark.parametrize("name", ["vtab/cifar10", "vtab/cifar100"])
@pytest.mark.parametrize("images_per_slice", [256, 7])
def test_cifars_original_files(tmp_path, monkeypatch, name, images_per_slice):
    labels = write_cifar(tmp_path, name)
    monkeypatch.setattr(sets, "IMAGES_PER_SLICE", images_per_slice)
    data = find_evaluation_set([str(tmp_path)], name)
    assert (data.classes, data.templates) == (class_names(name), KNOWN_SETS[name].templates)
    assert (data.known_images, data.layout, len(data.slices)) == (30, "torchvision", -(-30 // images_per_slice))
    samples = read(data)
    assert [sample.label for sample in samples] == labels
    assert samples[3].key == ("test_batch/00003" if name == "vtab/cifar10" else "test/00003")
    for i, sample in enumerate(samples):
        assert np.array_equal(rgb(sample.image), picture(i, 32, 32))


@pytest.mark.parametrize("protocol", [2, 4])
def test_cifar_pickled_again_by_a_newer_python(tmp_path, protocol):
    write_cifar(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    values = {"data": cifar_pixels(5), "labels": [1, 2, 3, 4, 5], b"batch_label": b"testing"}
    (folder / "test_batch").write_bytes(pickle.dumps(values, protocol=protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CIFAR10)}, protocol=protocol))
    samples = read(open_evaluation_set("vtab/cifar10", str(folder)))
    assert [sample.label for sample in samples] == [1, 2, 3, 4, 5]
    assert np.array_equal(rgb(samples[4].image), picture(4, 32, 32))


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (pickle.dumps({"data": Path("x")}), "it refers to pathlib.PosixPath"),
        (b"cos\nsystem\n(S'echo'\ntR.", "it refers to os.system"),
        (b"c_codecs\nencode\n(Va\nVhex\ntR.", "text in hex"),
        (b"", "EOFError"),
        (pickle.dumps({"data": np.zeros((2, 3072))}, protocol=2), "an array of 'f8'"),
        (pickle.dumps([1]), "AttributeError"),
        (pickle.dumps({"labels": [1]}), "does not hold images of 3 x 32 x 32 bytes"),
        (pickle.dumps({"data": cifar_pixels(2), "labels": [1]}), "does not hold images"),
        (pickle.dumps({"data": cifar_pixels(2), "labels": [1, "cat"]}), "does not hold images"),
        (pickle.dumps({"data": cifar_pixels(2)[:, :100], "labels": [1, 2]}), "does not hold images"),
    ],
)
@pytest.mark.parametrize("file", ["test_batch", "batches.meta"])
def test_pickles_of_anything_else(tmp_path, content, cause, file):
    write_cifar(tmp_path, count=1)
    path = tmp_path / "cifar-10-batches-py" / file
    path.write_bytes(content)
    message = error_of_set("vtab/cifar10", tmp_path, DataError)
    assert message.startswith(f"vtab/cifar10: {path} ")
    assert ("has no list 'label_names'" if "images" in cause and file != "test_batch" else cause) in message


@pytest.mark.s3
def test_torchvisions_folders_in_s3(s3_url, tmp_path, monkeypatch):
    monkeypatch.setattr(sets, "IMAGES_PER_SLICE", 7)
    for write in (write_cifar, write_pets, write_cars):
        write(tmp_path)
    storage.put_folder(tmp_path, f"{s3_url}/torchvision")
    for name in ("vtab/cifar10", "vtab/pets", "cars"):
        local, remote = (find_evaluation_set([root], name) for root in (str(tmp_path), f"{s3_url}/torchvision/"))
        assert remote.classes == local.classes
        assert read(remote) == read(local)
    remote = find_evaluation_set([f"{s3_url}/torchvision"], "vtab/cifar10")
    torchvision_folders._load_cifar_images.cache_clear()
    storage.delete(f"{s3_url}/torchvision/cifar-10-batches-py/test_batch")
    assert read(remote)[0] == RejectedSample("test_batch[0:7]/", "shard_missing")
