"""Sets in the folders that torchvision's datasets make, read without torchvision: the splits that published scores go by."""

import io
import json
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.io

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, describe_error
from ray_platform.evaluate.classes import classification, published_names, read_lines, template_list
from ray_platform.evaluate.layouts import cifar, files
from ray_platform.evaluate.sets import REGISTRY, EvaluationSet


@dataclass(frozen=True)
class Index:
    """What the files beside the images say."""

    classes: Sequence[str]  # in label order
    classes_from: str
    samples: Sequence[tuple[str, int]]  # names below the set's folder, and labels
    images: str  # the pattern of all images' names below it


@dataclass(frozen=True)
class Layout:
    inside: tuple[str, ...]  # folders below the one that was found, in one of which the data lie
    marker: str  # a file that tells
    index: Callable[[str], Index]


def open_torchvision(set_name: str, url: str) -> EvaluationSet | None:
    """The test split in one of torchvision's folders; None where there is none.

    Raises DataError for an index that is no index, ConfigError for a set of which torchvision has no such split.
    """
    for folder in _WITHOUT_SPLIT.get(set_name, ()):
        if storage.exists(storage.join(url, folder)):
            raise ConfigError(
                f"{set_name}: {storage.join(url, folder)} is torchvision's layout, which has no test split; the published scores "
                f"are on VTAB's: give CLIP_benchmark's copy, wds_{set_name.replace('/', '-')}"
            )
    for inside in _CIFAR.get(set_name, ()):
        if storage.exists(storage.join(url, inside, cifar.MARKERS[set_name])):
            return cifar.open_cifar(set_name, storage.join(url, inside).rstrip("/"))
    layout = _LAYOUTS.get(set_name)
    for inside in layout.inside if layout else ():
        folder = storage.join(url, inside).rstrip("/")
        if layout and storage.exists(storage.join(folder, layout.marker)):
            return _indexed(set_name, folder, layout)
    return None


def _indexed(set_name: str, folder: str, layout: Layout) -> EvaluationSet:
    try:
        index = layout.index(folder)
    except DataError:
        raise
    except Exception as error:  # garbage makes scipy raise nearly anything
        what = describe_error(error)
        raise DataError(
            f"{set_name}: {storage.join(folder, layout.marker)} or a file beside it is not as torchvision's dataset has it "
            f"({what}); fetch the set again"
        ) from None
    classes = published_names(set_name, index.classes, index.classes_from)
    wanted = classification(set_name, classes, index.classes_from)
    if strange := [(name, label) for name, label in index.samples if not 0 <= label < len(classes)]:
        name, label = strange[0]
        raise DataError(
            f"{set_name}: {folder}/{name} has label {label}, but {index.classes_from} names {len(classes)} classes; "
            "fetch the set again"
        )
    words = classes, template_list(set_name, None)
    return files.files_set(wanted, folder, "torchvision", words, index.samples, files.image_sizes(folder, index.images))


def _mat(folder: str, name: str) -> dict:
    return scipy.io.loadmat(io.BytesIO(storage.read_small(storage.join(folder, name))), squeeze_me=True)


def _cars(folder: str) -> Index:
    annotations = _mat(folder, "cars_test_annos_withlabels.mat")["annotations"]
    names = [str(name) for name in _mat(folder, "devkit/cars_meta.mat")["class_names"]]
    samples = [(f"cars_test/{one['fname']}", int(one["class"]) - 1) for one in annotations]
    return Index(names, storage.join(folder, "devkit/cars_meta.mat"), samples, "cars_test/*")


def _flowers(folder: str) -> Index:
    """The file names no class: torchvision's users take them from the list that ships with CLIP_benchmark."""
    labels = _mat(folder, "imagelabels.mat")["labels"]
    ids = _mat(folder, "setid.mat")["tstid"]
    samples = [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in ids.tolist()]
    return Index(REGISTRY["vtab/flowers"].classes, storage.join(folder, "imagelabels.mat"), samples, "jpg/*")


def _food(folder: str) -> Index:
    names = json.loads(storage.read_small(storage.join(folder, "meta/test.json")))
    classes = sorted(names)
    samples = [(f"images/{name}.jpg", label) for label, class_name in enumerate(classes) for name in names[class_name]]
    return Index(classes, storage.join(folder, "meta/test.json"), samples, "images/*/*")


def _sun(folder: str) -> Index:
    """The class of `a/abbey/sun_1.jpg` is "/a/abbey" in ClassName.txt. All images are the test split."""
    lines = read_lines(storage.join(folder, "ClassName.txt"))
    labels = {line.strip("/"): label for label, line in enumerate(lines)}
    names = [name for name in sorted(files.image_sizes(folder)) if posixpath.basename(name).startswith("sun_")]
    samples = [(name, labels[posixpath.dirname(name)]) for name in names]
    return Index([line[3:] for line in lines], storage.join(folder, "ClassName.txt"), samples, "**")


def _textures(folder: str) -> Index:
    names = read_lines(storage.join(folder, "labels/test1.txt"))
    classes = sorted({posixpath.dirname(name) for name in names})
    samples = [(f"images/{name}", classes.index(posixpath.dirname(name))) for name in names]
    return Index(classes, storage.join(folder, "labels/test1.txt"), samples, "images/*/*")


def _aircraft(folder: str) -> Index:
    classes = read_lines(storage.join(folder, "data/variants.txt"))
    labels = {name: label for label, name in enumerate(classes)}
    lines = [line.split(" ", 1) for line in read_lines(storage.join(folder, "data/images_variant_test.txt"))]
    samples = [(f"data/images/{number}.jpg", labels[variant]) for number, variant in lines]
    return Index(classes, storage.join(folder, "data/variants.txt"), samples, "data/images/*")


def _pets(folder: str) -> Index:
    """Lines are `Abyssinian_201 1 1 1`: the image, its breed from 1 on, and what is of no use here."""
    lines = [line.split() for line in read_lines(storage.join(folder, "annotations/test.txt")) if not line.startswith("#")]
    samples = [(f"images/{name}.jpg", int(breed) - 1) for name, breed, *_ in lines]
    names = {label: posixpath.basename(name).rpartition("_")[0] for name, label in samples}
    classes = [names[label].replace("_", " ") for label in sorted(names)]
    return Index(classes, storage.join(folder, "annotations/test.txt"), samples, "images/*")


_LAYOUTS = {
    "cars": Layout(("", "stanford_cars"), "cars_test_annos_withlabels.mat", _cars),
    "vtab/flowers": Layout(("", "flowers-102"), "setid.mat", _flowers),
    "food101": Layout(("", "food-101"), "meta/test.json", _food),
    "sun397": Layout(("", "SUN397"), "ClassName.txt", _sun),
    "vtab/dtd": Layout(("", "dtd", "dtd/dtd"), "labels/test1.txt", _textures),
    "fgvc_aircraft": Layout(("", "fgvc-aircraft-2013b"), "data/images_variant_test.txt", _aircraft),
    "vtab/pets": Layout(("", "oxford-iiit-pet"), "annotations/test.txt", _pets),
}
_CIFAR = {"vtab/cifar10": ("", "cifar-10-batches-py"), "vtab/cifar100": ("", "cifar-100-python")}
_WITHOUT_SPLIT = {
    "vtab/caltech101": ("101_ObjectCategories", "caltech101/101_ObjectCategories"),
    "vtab/eurosat": ("2750", "eurosat/2750"),
}
