"""Sets in the folders that torchvision's datasets create, read without torchvision: the splits of published scores."""

import io
import json
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import scipy.io

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, describe_error
from ray_platform.evaluate.classes import classification_schema, load_templates, read_lines, to_published_names
from ray_platform.evaluate.layouts import cifar, files
from ray_platform.evaluate.sets import KNOWN_SETS, ClassTexts, EvaluationSet


@dataclass(frozen=True)
class SplitIndex:
    """The content of the files next to the images."""

    classes: Sequence[str]  # in label order
    source: str  # the file with the class names
    samples: Sequence[tuple[str, int]]  # names below the set's folder, and labels
    images: str  # a pattern of the names of all images below it


@dataclass(frozen=True)
class TorchvisionLayout:
    """Where torchvision puts a set."""

    folders: tuple[str, ...]  # the data are in one of these folders below the set's own
    marker: str  # a file that identifies the layout
    read_index: Callable[[str], SplitIndex]


def open_torchvision(set_name: str, url: str) -> EvaluationSet | None:
    """Return the test split in one of torchvision's folders; None when there is none.

    Raises:
        DataError: The index cannot be read.
        ConfigError: Torchvision has no test split of the set.
    """
    for folder in _WITHOUT_SPLIT.get(set_name, ()):
        if storage.exists(storage.join(url, folder)):
            raise ConfigError(
                f"{set_name}: {storage.join(url, folder)} is torchvision's layout, which has no test split; published scores "
                f"are on VTAB's: use CLIP_benchmark's copy, wds_{set_name.replace('/', '-')}"
            )
    for inside in _CIFAR.get(set_name, ()):
        if storage.exists(storage.join(url, inside, cifar.IMAGE_FILES[set_name])):
            return cifar.open_cifar(set_name, storage.join(url, inside).rstrip("/"))
    layout = _LAYOUTS.get(set_name)
    for inside in layout.folders if layout else ():
        folder = storage.join(url, inside).rstrip("/")
        if layout and storage.exists(storage.join(folder, layout.marker)):
            return _open_index(set_name, folder, layout)
    return None


def _open_index(set_name: str, folder: str, layout: TorchvisionLayout) -> EvaluationSet:
    try:
        index = layout.read_index(folder)
    except DataError:
        raise
    except Exception as error:  # garbage makes scipy raise nearly any exception
        raise DataError(
            f"{set_name}: {storage.join(folder, layout.marker)} or a file next to it is not as torchvision's dataset writes it "
            f"({describe_error(error)}); download the set again"
        ) from None
    classes = to_published_names(set_name, index.classes, index.source)
    schema = classification_schema(set_name, classes, index.source)
    if invalid := [(name, label) for name, label in index.samples if not 0 <= label < len(classes)]:
        name, label = invalid[0]
        raise DataError(
            f"{set_name}: {folder}/{name} has label {label}, but {index.source} names {len(classes)} classes; "
            "download the set again"
        )
    texts = ClassTexts(classes, load_templates(set_name, {}))
    sizes = files.image_sizes(folder, index.images)
    return files.build_files_set(schema, folder, "torchvision", texts, index.samples, sizes)


def _mat(folder: str, name: str) -> dict:
    return scipy.io.loadmat(io.BytesIO(storage.read_small(storage.join(folder, name))), squeeze_me=True)


def _cars(folder: str) -> SplitIndex:
    annotations = _mat(folder, "cars_test_annos_withlabels.mat")["annotations"]
    names = [str(name) for name in _mat(folder, "devkit/cars_meta.mat")["class_names"]]
    samples = [(f"cars_test/{one['fname']}", int(one["class"]) - 1) for one in annotations]
    return SplitIndex(names, storage.join(folder, "devkit/cars_meta.mat"), samples, "cars_test/*")


def _flowers(folder: str) -> SplitIndex:
    """The files have no class names; the known set's are in the order of the labels."""
    labels = _mat(folder, "imagelabels.mat")["labels"]
    ids = _mat(folder, "setid.mat")["tstid"]
    samples = [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in ids.tolist()]
    return SplitIndex(KNOWN_SETS["vtab/flowers"].classes, storage.join(folder, "imagelabels.mat"), samples, "jpg/*")


def _food(folder: str) -> SplitIndex:
    names = json.loads(storage.read_small(storage.join(folder, "meta/test.json")))
    classes = sorted(names)
    samples = [(f"images/{name}.jpg", label) for label, class_name in enumerate(classes) for name in names[class_name]]
    return SplitIndex(classes, storage.join(folder, "meta/test.json"), samples, "images/*/*")


def _sun(folder: str) -> SplitIndex:
    """The class of `a/abbey/sun_1.jpg` is "/a/abbey" in ClassName.txt. All images belong to the test split."""
    lines = read_lines(storage.join(folder, "ClassName.txt"))
    labels = {line.strip("/"): label for label, line in enumerate(lines)}
    names = [name for name in sorted(files.image_sizes(folder)) if posixpath.basename(name).startswith("sun_")]
    samples = [(name, labels[posixpath.dirname(name)]) for name in names]
    return SplitIndex([line[3:] for line in lines], storage.join(folder, "ClassName.txt"), samples, "**")


def _textures(folder: str) -> SplitIndex:
    names = read_lines(storage.join(folder, "labels/test1.txt"))
    classes = sorted({posixpath.dirname(name) for name in names})
    samples = [(f"images/{name}", classes.index(posixpath.dirname(name))) for name in names]
    return SplitIndex(classes, storage.join(folder, "labels/test1.txt"), samples, "images/*/*")


def _aircraft(folder: str) -> SplitIndex:
    classes = read_lines(storage.join(folder, "data/variants.txt"))
    labels = {name: label for label, name in enumerate(classes)}
    lines = [line.split(" ", 1) for line in read_lines(storage.join(folder, "data/images_variant_test.txt"))]
    samples = [(f"data/images/{number}.jpg", labels[variant]) for number, variant in lines]
    return SplitIndex(classes, storage.join(folder, "data/variants.txt"), samples, "data/images/*")


def _pets(folder: str) -> SplitIndex:
    """Lines are `Abyssinian_201 1 1 1`: the image, its breed counted from 1, and two fields that are not needed."""
    lines = [line.split() for line in read_lines(storage.join(folder, "annotations/test.txt")) if not line.startswith("#")]
    samples = [(f"images/{name}.jpg", int(breed) - 1) for name, breed, *_ in lines]
    names = {label: posixpath.basename(name).rpartition("_")[0] for name, label in samples}
    classes = [names[label].replace("_", " ") for label in sorted(names)]
    return SplitIndex(classes, storage.join(folder, "annotations/test.txt"), samples, "images/*")


_LAYOUTS = {
    "cars": TorchvisionLayout(("", "stanford_cars"), "cars_test_annos_withlabels.mat", _cars),
    "vtab/flowers": TorchvisionLayout(("", "flowers-102"), "setid.mat", _flowers),
    "food101": TorchvisionLayout(("", "food-101"), "meta/test.json", _food),
    "sun397": TorchvisionLayout(("", "SUN397"), "ClassName.txt", _sun),
    "vtab/dtd": TorchvisionLayout(("", "dtd", "dtd/dtd"), "labels/test1.txt", _textures),
    "fgvc_aircraft": TorchvisionLayout(("", "fgvc-aircraft-2013b"), "data/images_variant_test.txt", _aircraft),
    "vtab/pets": TorchvisionLayout(("", "oxford-iiit-pet"), "annotations/test.txt", _pets),
}
_CIFAR = {"vtab/cifar10": ("", "cifar-10-batches-py"), "vtab/cifar100": ("", "cifar-100-python")}
_WITHOUT_SPLIT = {
    "vtab/caltech101": ("101_ObjectCategories", "caltech101/101_ObjectCategories"),
    "vtab/eurosat": ("2750", "eurosat/2750"),
}
