"""CIFAR's own files: pickles of Python 2, read by an unpickler that makes nothing but plain values and one kind of array.

Not by numpy's own functions: a pickle can have them make an array of objects out of bytes, which are followed as pointers.
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
from ray_platform.evaluate.classes import classification, template_list
from ray_platform.evaluate.sets import EvaluationSet, make_set
from ray_platform.evaluate.slices import IMAGES_A_SLICE, RawSample, Slice

MARKERS = {"vtab/cifar10": "test_batch", "vtab/cifar100": "test"}  # the file with the test images
_NAMES = {"vtab/cifar10": ("batches.meta", "label_names"), "vtab/cifar100": ("meta", "fine_label_names")}
_SHAPE = (3, 32, 32)


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 3 writes for bytes into a pickle for Python 2."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"text in {encoding}")
    return codecs.encode(text, "latin1")


class _Dtype:
    """Stands for numpy's dtype: bytes, or nothing."""

    def __init__(self, kind: str | bytes, *flags: Any) -> None:
        if kind not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError(f"an array of {str(kind)[:20]!r}, where CIFAR has u1")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands for numpy's array: its state is (version, shape, dtype, is Fortran's order, bytes)."""

    def __init__(self, *like: Any) -> None:
        self.pixels = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple[int, tuple[int, ...], _Dtype, bool, bytes]) -> None:
        _, shape, dtype, fortran, content = state
        if not isinstance(dtype, _Dtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array that is not made of bytes")
        self.pixels = np.frombuffer(content, dtype=np.uint8).reshape(shape, order="F" if fortran else "C")


class _Ndarray:
    """Stands for numpy's class itself, which is named, but never called."""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _Ndarray,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("_codecs", "encode"): _latin1,
}
_LARGEST = 2**28  # bytes; CIFAR's files with test images have 31 million


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return _ALLOWED[module, name]


def _load(set_name: str, url: str) -> dict[str, Any]:
    """The dictionary in a file, with texts for keys. Raises DataError for any other content, StorageError."""
    data = storage.read_small(url, _LARGEST)
    try:
        values = _Unpickler(io.BytesIO(data), encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else str(key): value for key, value in values.items()}
    except Exception as error:  # garbage makes pickle raise nearly anything
        what = describe_error(error)
        raise DataError(f"{set_name}: {url} is no CIFAR file that can be trusted ({what}); fetch the set again") from None


@functools.lru_cache(maxsize=1)  # a worker's next slice is often of the same file
def _images(set_name: str, url: str, size: int) -> tuple[np.ndarray, list[int]]:
    """[N, 32, 32, 3] uint8 and N labels. Raises DataError, StorageError."""
    values = _load(set_name, url)
    array, labels = values.get("data"), values.get("labels", values.get("fine_labels"))
    pixels = array.pixels if isinstance(array, _Array) else None
    if (
        pixels is None
        or pixels.size % np.prod(_SHAPE)
        or not isinstance(labels, list)
        or len(labels) != pixels.size // np.prod(_SHAPE)
    ):
        raise DataError(
            f"{set_name}: {url} does not hold CIFAR's images of 3 x 32 x 32 bytes with a label each; fetch the set again"
        )
    if not all(isinstance(label, int) for label in labels):
        raise DataError(f"{set_name}: {url} has labels that are no whole numbers; fetch the set again")
    return pixels.reshape(-1, *_SHAPE).transpose(0, 2, 3, 1), labels


@dataclass(frozen=True)
class CifarSlice(Slice):
    """Images start..stop of a file."""

    url: str
    size: int
    start: int
    stop: int

    def read(self) -> list[RawSample | RejectedSample]:
        pixels, labels = _images(self.wanted.set_name, self.url, self.size)
        return [
            RawSample(f"{MARKERS[self.wanted.set_name]}/{place:05d}", _encoded(pixels[place]), labels[place])
            for place in range(self.start, self.stop)
        ]


def _encoded(pixels: np.ndarray) -> bytes:
    """Samples travel encoded; this one at the least cost."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def open_cifar(set_name: str, url: str) -> EvaluationSet:
    """The test images of `cifar-10-batches-py` or `cifar-100-python`. Raises DataError for files that are none of CIFAR's."""
    meta, field = _NAMES[set_name]
    meta_url, images_url = storage.join(url, meta), storage.join(url, MARKERS[set_name])
    names = _load(set_name, meta_url).get(field)
    if not isinstance(names, list):
        raise DataError(f"{set_name}: {meta_url} has no list {field!r}; fetch the set again")
    classes = tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    wanted = classification(set_name, classes, meta_url)
    (file,) = storage.list_files(images_url)
    count = len(_images(set_name, images_url, file.size)[1])
    slices: list[Slice] = []
    for start in range(0, count, IMAGES_A_SLICE):
        stop = min(start + IMAGES_A_SLICE, count)
        name = f"{MARKERS[set_name]}[{start}:{stop}]"
        slices.append(CifarSlice(wanted, len(slices), name, stop - start, images_url, file.size, start, stop))
    words = classes, template_list(set_name, None)
    return make_set(wanted, url, "torchvision", words, [(MARKERS[set_name], file.size)], slices, count)
