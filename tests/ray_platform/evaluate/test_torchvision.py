"""The folders of torchvision's datasets, in layouts written from its sources."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.sets import KNOWN_SETS
from tests.support.evaluation_sets import class_names, error_of, error_of_set, read, write_image

# Each writes a test split with the labels `label_of` and the images `picture(i)`, and a train split, which must not be read.


def label_of(name: str, i: int) -> int:
    """As in the real files, images are not in the order of their classes."""
    return i * 7 % KNOWN_SETS[name].num_classes


def write_cars(root: Path) -> dict[str, int]:
    folder, labels = root / "stanford_cars", {}
    kind = np.dtype([("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
    rows = []
    for i in range(196):
        write_image(folder / "cars_test" / f"{i + 1:05d}.jpg", i)
        labels[f"cars_test/{i + 1:05d}.jpg"] = label_of("cars", i)
        rows.append((30, label_of("cars", i) + 1, f"{i + 1:05d}.jpg"))
    write_image(folder / "cars_train" / "00001.jpg", 999)
    (folder / "devkit").mkdir()
    scipy.io.savemat(folder / "cars_test_annos_withlabels.mat", {"annotations": np.array([rows], dtype=kind)})
    names = np.array([list(class_names("cars"))], dtype=object)
    scipy.io.savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    return labels


def write_flowers(root: Path) -> dict[str, int]:
    folder, labels = root / "flowers-102", {}
    for i in range(204):  # the odd ones are for training
        write_image(folder / "jpg" / f"image_{i + 1:05d}.jpg", i)
    in_file = [label_of("vtab/flowers", i) + 1 for i in range(204)]
    tested = list(range(2, 205, 2))
    scipy.io.savemat(folder / "imagelabels.mat", {"labels": np.array([in_file], dtype=np.uint8)})
    scipy.io.savemat(folder / "setid.mat", {"tstid": np.array([tested]), "trnid": np.array([range(1, 204, 2)])})
    for number in tested:
        labels[f"jpg/image_{number:05d}.jpg"] = in_file[number - 1] - 1
    return labels


def write_food(root: Path) -> dict[str, int]:
    folder, labels = root / "food-101", {}
    names = [f"dish_{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(101)]
    index: dict[str, list[str]] = {}
    for label, name in reversed(list(enumerate(names))):
        write_image(folder / "images" / name / "12.jpg", label)
        write_image(folder / "images" / name / "13.jpg", 999)
        index[name] = [f"{name}/12"]
        labels[f"images/{name}/12.jpg"] = label
    (folder / "meta").mkdir()
    (folder / "meta" / "test.json").write_text(json.dumps(index))
    return labels


def write_sun(root: Path) -> dict[str, int]:
    folder, labels = root / "SUN397", {}
    names = sorted(f"/{chr(97 + i % 26)}/place_{i}" + ("/outdoor" if i % 5 == 0 else "") for i in range(397))
    folder.mkdir()
    (folder / "ClassName.txt").write_text("".join(f"{name}\n" for name in names))
    for label, name in enumerate(names):
        write_image(folder / name[1:] / f"sun_{label}.jpg", label)
        labels[f"{name[1:]}/sun_{label}.jpg"] = label
    return labels


def write_textures(root: Path) -> dict[str, int]:
    folder, labels = root / "dtd" / "dtd", {}
    names = [f"texture-{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(47)]
    lines = []
    for i in range(94):
        label = label_of("vtab/dtd", i)
        write_image(folder / "images" / names[label] / f"{names[label]}_{i:04d}.jpg", i)
        if i < 50:
            lines.append(f"{names[label]}/{names[label]}_{i:04d}.jpg")
            labels[f"images/{lines[-1]}"] = label
    (folder / "labels").mkdir()
    (folder / "labels" / "test1.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "labels" / "test2.txt").write_text("")
    return labels


def write_aircraft(root: Path) -> dict[str, int]:
    folder, labels = root / "fgvc-aircraft-2013b" / "data", {}
    variants = [f"Boeing 7{i}-{i * 3}" for i in range(100)]
    lines = []
    for i in range(100):
        write_image(folder / "images" / f"{1000 + i:07d}.jpg", i)
        lines.append(f"{1000 + i:07d} {variants[label_of('fgvc_aircraft', i)]}")
        labels[f"data/images/{1000 + i:07d}.jpg"] = label_of("fgvc_aircraft", i)
    (folder / "variants.txt").write_text("".join(f"{name}\n" for name in variants))
    (folder / "images_variant_test.txt").write_text("".join(f"{line}\n" for line in lines))
    return labels


def write_pets(root: Path) -> dict[str, int]:
    folder, labels = root / "oxford-iiit-pet", {}
    lines = []
    for i in range(37):
        label = label_of("vtab/pets", i)
        breed = KNOWN_SETS["vtab/pets"].classes[label].replace(" ", "_")
        name = f"{breed if i % 2 else breed.lower()}_{i + 200}"
        write_image(folder / "images" / f"{name}.jpg", i)
        lines.append(f"{name} {label + 1} {1 + i % 2} 1")
        labels[f"images/{name}.jpg"] = label
    write_image(folder / "images" / "Abyssinian_1.jpg", 999)
    (folder / "annotations").mkdir()
    (folder / "annotations" / "test.txt").write_text("".join(f"{line}\n" for line in lines))
    return labels


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
    labels = WRITERS[name](tmp_path)
    data = find_evaluation_set([str(tmp_path)], name)
    assert (data.layout, data.task, data.known) == ("torchvision", "zeroshot_classification", KNOWN_SETS[name])
    assert data.templates == KNOWN_SETS[name].templates
    assert len(data.classes) == KNOWN_SETS[name].num_classes
    samples = read(data)
    assert {sample.key: sample.label for sample in samples} == labels
    assert (len(samples), data.known_images, data.num_files) == (len(labels),) * 3
    for sample in samples[::17]:
        assert bytes(sample.image) == (Path(data.url) / sample.key).read_bytes()


def test_class_names_of_torchvisions_folders(tmp_path):
    for write in WRITERS.values():
        write(tmp_path)
    classes = {name: find_evaluation_set([str(tmp_path)], name).classes for name in WRITERS}
    assert classes["cars"] == class_names("cars")
    assert classes["vtab/flowers"] == KNOWN_SETS["vtab/flowers"].classes
    assert classes["vtab/pets"] == KNOWN_SETS["vtab/pets"].classes
    assert classes["food101"][:2] == ("dish aa", "dish ab")
    assert classes["vtab/dtd"][-1] == "texture-bu"
    assert classes["fgvc_aircraft"][:2] == ("Boeing 70-0", "Boeing 71-3")
    assert classes["sun397"][0] == "place 0 outdoor"
    assert not any("/" in name or "_" in name for name in classes["sun397"])


@pytest.mark.parametrize("inside", ["dtd/dtd", "dtd", ""])
def test_the_folder_itself_may_be_given_or_one_above_it(tmp_path, inside):
    labels = write_textures(tmp_path)
    data = open_evaluation_set("vtab/dtd", str(tmp_path / inside))
    assert (data.url, len(read(data))) == (str(tmp_path / "dtd" / "dtd"), len(labels))


def test_an_image_that_the_index_names_and_that_is_not_there(tmp_path):
    labels = write_pets(tmp_path)
    lost = sorted(labels)[5]
    (tmp_path / "oxford-iiit-pet" / lost).unlink()
    data = find_evaluation_set([str(tmp_path)], "vtab/pets")
    assert data.known_images == 36
    assert [sample.key for sample in read(data) if sample == RejectedSample(lost, "shard_missing")] == [lost]
    assert len(read(data)) == 37


def test_an_index_that_cannot_be_read(tmp_path):
    write_pets(tmp_path)
    index = tmp_path / "oxford-iiit-pet" / "annotations" / "test.txt"
    lines = index.read_text().splitlines()
    index.write_text("\n".join([*lines, "Abyssinian_7 cat 1 1"]))
    assert f"vtab/pets: {index} or a file next to it" in error_of_set("vtab/pets", tmp_path, DataError)
    index.write_text("\n".join(lines[:20]))
    assert f"vtab/pets: {index} names 20 classes, but the set has 37" in error_of_set("vtab/pets", tmp_path, DataError)
    write_cars(tmp_path)
    (tmp_path / "stanford_cars" / "devkit" / "cars_meta.mat").write_bytes(b"MATLAB, but no more")
    assert "MatReadError" in error_of_set("cars", tmp_path, DataError)
    write_food(tmp_path)
    (tmp_path / "food-101" / "meta" / "test.json").write_text("[")
    assert "JSONDecodeError" in error_of_set("food101", tmp_path, DataError)


def test_a_label_beyond_the_classes(tmp_path):
    write_aircraft(tmp_path)
    (tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_test.txt").write_text("0001000 Concorde\n")
    assert "KeyError: 'Concorde'" in error_of_set("fgvc_aircraft", tmp_path, DataError)
    write_flowers(tmp_path)
    labels = {"labels": np.full((1, 204), 200, dtype=np.uint8)}
    scipy.io.savemat(tmp_path / "flowers-102" / "imagelabels.mat", labels)
    assert "image_00002.jpg has label 199, but" in error_of_set("vtab/flowers", tmp_path, DataError)


@pytest.mark.parametrize(
    ("name", "folder"), [("vtab/caltech101", "caltech101/101_ObjectCategories"), ("vtab/eurosat", "eurosat/2750")]
)
def test_sets_of_which_torchvision_has_no_test_split(tmp_path, name, folder):
    write_image(tmp_path / folder / "Forest" / "Forest_1.jpg", 0)
    message = error_of(find_evaluation_set, [str(tmp_path)], name, kind=ConfigError)
    assert message.startswith(f"{name}: {tmp_path}/{folder} is torchvision's layout, which has no test split")
    assert error_of_set(name, tmp_path / folder.partition("/")[0], ConfigError) == message


@pytest.mark.s3
def test_torchvisions_folders_in_s3(s3_url, tmp_path):
    for write in (write_pets, write_food, write_cars, write_textures):
        write(tmp_path)
    storage.put_folder(tmp_path, f"{s3_url}/torchvision")
    for name in ("vtab/pets", "food101", "cars", "vtab/dtd"):
        local, remote = (find_evaluation_set([root], name) for root in (str(tmp_path), f"{s3_url}/torchvision/"))
        assert (remote.digest, remote.classes) == (local.digest, local.classes)
        assert read(remote) == read(local)
