"""Sets in the folders that torchvision's datasets create, which have the splits of published scores. Read without torchvision.

CIFAR's files are pickles; they are read by an unpickler that creates only plain values and bytes, without numpy's own functions:
a pickle can make those create an array of objects from bytes, which are then followed as pointers.
"""

import codecs
import functools
import io
import json
import pickle
import posixpath
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.io
from PIL import Image

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, describe_error
from ray_platform.evaluate import sets
from ray_platform.evaluate.image_files import MAX_FILE_BYTES, LabeledNames, build_image_set, list_images
from ray_platform.evaluate.sets import ClassTexts, DatasetSlice, EvaluationSet, RawSample, Samples, SlicePart
from ray_platform.storage import StoredFile

OpenFolder = Callable[[str, str, Mapping[str, str]], EvaluationSet]  # (name of the set, folder, files of class names, templates)


class TorchvisionLayout(NamedTuple):
    """Where torchvision puts a set, and the function that opens it there."""

    folders: tuple[str, ...]  # the data are in one of these folders below the set's own
    marker: str  # a file that identifies the layout
    open_folder: OpenFolder


def open_torchvision(set_name: str, url: str, overrides: Mapping[str, str]) -> EvaluationSet | None:
    """Return the test split in one of torchvision's folders; None when there is none.

    `overrides` are the URLs of a classnames.txt and of a file of templates, by the names that they have in other layouts.

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
    layout = _LAYOUTS.get(set_name, TorchvisionLayout((), "", _open_cifar))
    for inside in layout.folders:
        folder = storage.join(url, inside).rstrip("/")
        if storage.exists(storage.join(folder, layout.marker)):
            return layout.open_folder(set_name, folder, overrides)
    return None


def _open_index(
    read_index: Callable[[str], tuple[Sequence[str], LabeledNames]],
    source: str,
    images: str,
    set_name: str,
    folder: str,
    overrides: Mapping[str, str],
) -> EvaluationSet:
    """Return the set in a folder.

    `read_index(folder)` returns the classes, in label order, and the samples of the test split. `source` is the file with the
    class names, `images` a pattern of the names of all images.
    """
    source = storage.join(folder, source)
    try:
        names, samples = read_index(folder)
    except DataError:
        raise
    except Exception as error:  # garbage makes scipy raise nearly any exception
        raise DataError(
            f"{set_name}: {storage.join(folder, _LAYOUTS[set_name].marker)} or a file next to it is not as torchvision's dataset "
            f"writes it ({describe_error(error)}); download the set again"
        ) from None
    texts = _class_texts(set_name, names, source, overrides)
    if invalid := [(name, label) for name, label in samples if not 0 <= label < len(names)]:
        raise DataError(
            f"{set_name}: {folder}/{invalid[0][0]} has label {invalid[0][1]}, but {source} names {len(names)} classes; "
            "download the set again"
        )
    return build_image_set(set_name, folder, "torchvision", texts, samples, list_images(folder, images))


def _class_texts(set_name: str, names: Sequence[str], source: str, overrides: Mapping[str, str]) -> ClassTexts:
    """Return the class names, by default the published ones of `names` from the file `source`, and the templates."""
    if url := overrides.get(sets.CLASSES_FILE):
        return sets.class_texts(set_name, sets.read_lines(url), url, overrides)
    return sets.class_texts(set_name, sets.to_published_names(set_name, names, source), source, overrides)


def _mat(folder: str, name: str) -> dict:
    return scipy.io.loadmat(io.BytesIO(storage.read_small(storage.join(folder, name))), squeeze_me=True)


def _cars(folder: str) -> tuple[Sequence[str], LabeledNames]:
    annotations = _mat(folder, "cars_test_annos_withlabels.mat")["annotations"]
    names = [str(name) for name in _mat(folder, "devkit/cars_meta.mat")["class_names"]]
    return names, [(f"cars_test/{one['fname']}", int(one["class"]) - 1) for one in annotations]


def _flowers(folder: str) -> tuple[Sequence[str], LabeledNames]:
    """The files have no class names; the known set's are in the order of the labels."""
    labels, numbers = _mat(folder, "imagelabels.mat")["labels"], _mat(folder, "setid.mat")["tstid"].tolist()
    samples = [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in numbers]
    return sets.KNOWN_SETS["vtab/flowers"].classes, samples


def _food(folder: str) -> tuple[Sequence[str], LabeledNames]:
    names = json.loads(storage.read_small(storage.join(folder, "meta/test.json")))
    classes = sorted(names)
    return classes, [(f"images/{name}.jpg", label) for label, dish in enumerate(classes) for name in names[dish]]


def _sun(folder: str) -> tuple[Sequence[str], LabeledNames]:
    """The class of `a/abbey/sun_1.jpg` is "/a/abbey" in ClassName.txt. All images belong to the test split."""
    lines = sets.read_lines(storage.join(folder, "ClassName.txt"))
    labels = {line.strip("/"): label for label, line in enumerate(lines)}
    names = [name for name in sorted(list_images(folder)) if posixpath.basename(name).startswith("sun_")]
    return [line[3:] for line in lines], [(name, labels[posixpath.dirname(name)]) for name in names]


def _textures(folder: str) -> tuple[Sequence[str], LabeledNames]:
    names = sets.read_lines(storage.join(folder, "labels/test1.txt"))
    classes = sorted({posixpath.dirname(name) for name in names})
    return classes, [(f"images/{name}", classes.index(posixpath.dirname(name))) for name in names]


def _aircraft(folder: str) -> tuple[Sequence[str], LabeledNames]:
    classes = sets.read_lines(storage.join(folder, "data/variants.txt"))
    labels = {name: label for label, name in enumerate(classes)}
    lines = [line.split(" ", 1) for line in sets.read_lines(storage.join(folder, "data/images_variant_test.txt"))]
    return classes, [(f"data/images/{number}.jpg", labels[variant]) for number, variant in lines]


def _pets(folder: str) -> tuple[Sequence[str], LabeledNames]:
    """Lines are `Abyssinian_201 1 1 1`: the image, its breed counted from 1, and two fields that are not needed."""
    lines = [line.split() for line in sets.read_lines(storage.join(folder, "annotations/test.txt")) if not line.startswith("#")]
    samples = [(f"images/{name}.jpg", int(breed) - 1) for name, breed, *_ in lines]
    names = {label: posixpath.basename(name).rpartition("_")[0] for name, label in samples}
    return [names[label].replace("_", " ") for label in sorted(names)], samples


# --- CIFAR ----------------------------------------------------------------------------------------------------------------------

CIFAR_IMAGES = {"vtab/cifar10": "test_batch", "vtab/cifar100": "test"}  # the file with the test images
_CIFAR_NAMES = {"vtab/cifar10": ("batches.meta", "label_names"), "vtab/cifar100": ("meta", "fine_label_names")}
_CIFAR_SHAPE = (3, 32, 32)


class _Stub:
    """Stands for numpy's array, whose state is (version, shape, dtype, is in Fortran's order, bytes), and for its dtype."""

    def __init__(self, *arguments: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _dtype(kind: str | bytes, *flags: Any) -> _Stub:
    if kind not in ("u1", b"u1", "|u1", b"|u1"):
        raise pickle.UnpicklingError(f"an array of {str(kind)[:20]!r} instead of u1")
    return _Stub()


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes that Python 3 wrote into a pickle for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return codecs.encode(text, "latin1")


class _SafeUnpickler(pickle.Unpickler):
    allowed: Mapping[tuple[str, str], Callable] = {
        ("numpy", "ndarray"): _Stub,
        ("numpy", "dtype"): _dtype,
        ("numpy.core.multiarray", "_reconstruct"): _Stub,
        ("numpy._core.multiarray", "_reconstruct"): _Stub,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return self.allowed[module, name]


def _load_cifar(set_name: str, url: str) -> dict:
    """Return the dictionary in a file, with strings as keys. Raises DataError for any other content, and StorageError."""
    data = storage.read_small(url, MAX_FILE_BYTES)
    try:
        values = _SafeUnpickler(io.BytesIO(data), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in values.items()}
    except Exception as error:  # garbage makes pickle raise nearly any exception
        raise DataError(
            f"{set_name}: {url} is not one of CIFAR's files ({describe_error(error)}); download the set again"
        ) from None


@functools.lru_cache(maxsize=1)  # the next slice of a replica is often in the same file
def _load_cifar_images(set_name: str, file: StoredFile) -> tuple[np.ndarray, list[int]]:
    """Return images [N, 32, 32, 3] uint8 and N labels. Raises DataError and StorageError."""
    values = _load_cifar(set_name, file.url)
    match values.get("data"), values.get("labels", values.get("fine_labels")):
        case _Stub(state=(_, _, _, False, bytes(content))), list(labels) if (
            labels and len(content) == len(labels) * np.prod(_CIFAR_SHAPE) and all(isinstance(label, int) for label in labels)
        ):
            return np.frombuffer(content, dtype=np.uint8).reshape(-1, *_CIFAR_SHAPE).transpose(0, 2, 3, 1), labels
    raise DataError(
        f"{set_name}: {file.url} does not hold images of 3 x 32 x 32 bytes with one integer as the label of each; "
        "download the set again"
    )


def _open_cifar(set_name: str, url: str, overrides: Mapping[str, str]) -> EvaluationSet:
    """Return the test images of `cifar-10-batches-py` or `cifar-100-python`. Raises DataError for files of another kind."""
    (meta_file, field), images_file = _CIFAR_NAMES[set_name], CIFAR_IMAGES[set_name]
    meta_url, images_url = storage.join(url, meta_file), storage.join(url, images_file)
    names = _load_cifar(set_name, meta_url).get(field)
    if not isinstance(names, list):
        raise DataError(f"{set_name}: {meta_url} has no list {field!r}; download the set again")
    classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
    texts = _class_texts(set_name, classes, meta_url, overrides)
    (file,) = storage.list_files(images_url)
    count = len(_load_cifar_images(set_name, file)[1])
    parts = []
    for start in range(0, count, sets.IMAGES_PER_SLICE):
        stop = min(start + sets.IMAGES_PER_SLICE, count)
        read = functools.partial(_read_cifar, file, start, stop)
        parts.append(SlicePart(f"{images_file}[{start}:{stop}]", stop - start, read))
    return sets.build_set(set_name, "zeroshot_classification", url, "torchvision", {images_file: file}, parts, texts, count)


def _read_cifar(file: StoredFile, start: int, stop: int, part: DatasetSlice) -> Samples:
    """Return images start..stop as uncompressed PNGs: samples are encoded images, and this is the cheapest encoding."""
    pixels, labels = _load_cifar_images(part.schema.set_name, file)
    samples: Samples = []
    for index in range(start, stop):
        buffer = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(pixels[index])).save(buffer, "PNG", compress_level=0)
        samples.append(RawSample(f"{CIFAR_IMAGES[part.schema.set_name]}/{index:05d}", buffer.getvalue(), labels[index]))
    return samples


# --- The table of torchvision's layouts -----------------------------------------------------------------------------------------


def _index(read_index: Callable[[str], tuple[Sequence[str], LabeledNames]], source: str, images: str) -> OpenFolder:
    return functools.partial(_open_index, read_index, source, images)


_LAYOUTS = {
    "vtab/cifar10": TorchvisionLayout(("", "cifar-10-batches-py"), CIFAR_IMAGES["vtab/cifar10"], _open_cifar),
    "vtab/cifar100": TorchvisionLayout(("", "cifar-100-python"), CIFAR_IMAGES["vtab/cifar100"], _open_cifar),
    "cars": TorchvisionLayout(
        ("", "stanford_cars"), "cars_test_annos_withlabels.mat", _index(_cars, "devkit/cars_meta.mat", "cars_test/*")
    ),
    "vtab/flowers": TorchvisionLayout(("", "flowers-102"), "setid.mat", _index(_flowers, "imagelabels.mat", "jpg/*")),
    "food101": TorchvisionLayout(("", "food-101"), "meta/test.json", _index(_food, "meta/test.json", "images/*/*")),
    "sun397": TorchvisionLayout(("", "SUN397"), "ClassName.txt", _index(_sun, "ClassName.txt", "**")),
    "vtab/dtd": TorchvisionLayout(
        ("", "dtd", "dtd/dtd"), "labels/test1.txt", _index(_textures, "labels/test1.txt", "images/*/*")
    ),
    "fgvc_aircraft": TorchvisionLayout(
        ("", "fgvc-aircraft-2013b"), "data/images_variant_test.txt", _index(_aircraft, "data/variants.txt", "data/images/*")
    ),
    "vtab/pets": TorchvisionLayout(
        ("", "oxford-iiit-pet"), "annotations/test.txt", _index(_pets, "annotations/test.txt", "images/*")
    ),
}
_WITHOUT_SPLIT = {
    "vtab/caltech101": ("101_ObjectCategories", "caltech101/101_ObjectCategories"),
    "vtab/eurosat": ("2750", "eurosat/2750"),
}
