"""CIFAR's original files: pickles of Python 2.

They are read by an unpickler that creates only plain values and arrays of bytes, and without numpy's own functions: a pickle can
make those create an array of objects from bytes, which are then followed as pointers.
"""

import codecs
import functools
import io
import pickle
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from ray_platform import storage
from ray_platform.contracts import DataError, describe_error
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.classes import classification_schema, load_templates
from ray_platform.evaluate.samples import IMAGES_PER_SLICE, DatasetSlice, RawSample
from ray_platform.evaluate.sets import ClassTexts, EvaluationSet, build_set

IMAGE_FILES = {"vtab/cifar10": "test_batch", "vtab/cifar100": "test"}  # the file with the test images
_NAMES = {"vtab/cifar10": ("batches.meta", "label_names"), "vtab/cifar100": ("meta", "fine_label_names")}
_SHAPE = (3, 32, 32)
_MAX_BYTES = 2**28  # CIFAR's files with test images have 31 million bytes


def _latin1(text: str, encoding: str) -> bytes:
    """Decode bytes that Python 3 wrote into a pickle for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return codecs.encode(text, "latin1")


class _Dtype:
    """Stands for numpy's dtype; only bytes are allowed."""

    def __init__(self, kind: str | bytes, *flags: Any) -> None:
        if kind not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"an array of {str(kind)[:20]!r} instead of u1")

    def __setstate__(self, state: Any) -> None:
        """Ignore byte order and the like, which bytes do not have."""


class _Array:
    """Stands for numpy's array; its state is (version, shape, dtype, is in Fortran's order, bytes)."""

    def __init__(self, *like: Any) -> None:
        self.pixels = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that does not consist of bytes")
        self.pixels = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _Ndarray:
    """Stands for numpy's class itself, which a pickle names and never calls."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _latin1,
}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _ALLOWED[module, name]


def _load(set_name: str, url: str) -> dict[str, Any]:
    """Return the dictionary in a file, with strings as keys. Raises DataError for any other content, and StorageError."""
    data = storage.read_small(url, _MAX_BYTES)
    try:
        values = _SafeUnpickler(io.BytesIO(data), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in values.items()}
    except Exception as error:  # garbage makes pickle raise nearly any exception
        raise DataError(
            f"{set_name}: {url} is not one of CIFAR's files ({describe_error(error)}); download the set again"
        ) from None


@functools.lru_cache(maxsize=1)  # the next slice of a replica is often in the same file
def _load_images(set_name: str, url: str, size: int) -> tuple[np.ndarray, list[int]]:
    """Return images [N, 32, 32, 3] uint8 and N labels. Raises DataError and StorageError."""
    values = _load(set_name, url)
    array, labels = values.get("data"), values.get("labels", values.get("fine_labels"))
    pixels = array.pixels if isinstance(array, _Array) else np.empty(0)
    num_images, rest = divmod(pixels.size, int(np.prod(_SHAPE)))
    if rest or not isinstance(labels, list) or len(labels) != num_images or not num_images:
        raise DataError(
            f"{set_name}: {url} does not hold images of 3 x 32 x 32 bytes with one label each; download the set again"
        )
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"{set_name}: {url} has labels that are not integers; download the set again")
    return pixels.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1), labels


@dataclass(frozen=True)
class CifarSlice(DatasetSlice):
    """Images start..stop of a file."""

    url: str
    size: int
    start: int
    stop: int

    def read(self) -> list[RawSample | RejectedSample]:
        set_name = self.schema.set_name
        pixels, labels = _load_images(set_name, self.url, self.size)
        return [
            RawSample(f"{IMAGE_FILES[set_name]}/{index:05d}", _encode(pixels[index]), labels[index])
            for index in range(self.start, self.stop)
        ]


def _encode(pixels: np.ndarray) -> bytes:
    """Return an uncompressed PNG: samples are encoded images, and this is the cheapest encoding."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def open_cifar(set_name: str, url: str) -> EvaluationSet:
    """Return the test images of `cifar-10-batches-py` or `cifar-100-python`. Raises DataError for files of another kind."""
    meta_file, field = _NAMES[set_name]
    meta_url, images_url = storage.join(url, meta_file), storage.join(url, IMAGE_FILES[set_name])
    names = _load(set_name, meta_url).get(field)
    if not isinstance(names, list):
        raise DataError(f"{set_name}: {meta_url} has no list {field!r}; download the set again")
    classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    schema = classification_schema(set_name, classes, meta_url)
    (file,) = storage.list_files(images_url)
    count = len(_load_images(set_name, images_url, file.size)[1])
    slices: list[DatasetSlice] = []
    for start in range(0, count, IMAGES_PER_SLICE):
        stop = min(start + IMAGES_PER_SLICE, count)
        name = f"{IMAGE_FILES[set_name]}[{start}:{stop}]"
        slices.append(CifarSlice(schema, len(slices), name, stop - start, images_url, file.size, start, stop))
    texts = ClassTexts(classes, load_templates(set_name, {}))
    return build_set(schema, url, "torchvision", texts, [(IMAGE_FILES[set_name], file.size)], slices, count)
