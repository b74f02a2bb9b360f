"""CIFAR's original files, and pickles of anything else."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.data.decode import rgb
from ray_platform.evaluate import image_files
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set
from ray_platform.evaluate.sets import KNOWN_SETS
from tests.support.evaluation_sets import CIFAR10, class_names, error_of_set, picture, read


class Python2:
    """Pickles as Python 2 and its numpy wrote CIFAR's files: short byte strings, and the array's bytes as one more."""

    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")

    def text(self, value: bytes) -> "Python2":
        self.out += b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value
        return self

    def number(self, value: int) -> "Python2":
        self.out += b"K" + bytes([value])
        return self

    def numbers(self, values) -> "Python2":
        self.out += b"]("
        for value in values:
            self.number(value)
        self.out += b"e"
        return self

    def array(self, pixels: np.ndarray) -> "Python2":
        self.out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        self.out += b"(K\x01" + b"M" + struct.pack("<H", pixels.shape[0]) + b"M" + struct.pack("<H", pixels.shape[1]) + b"\x86"
        self.out += b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        self.out += b"\x89"
        self.text(pixels.tobytes())
        self.out += b"tb"
        return self

    def write(self, path: Path) -> None:
        path.write_bytes(bytes(self.out + b"."))


def cifar_pixels(count: int) -> np.ndarray:
    """[count, 3072], the planes of colours one after the other."""
    return np.stack([picture(seed, 32, 32).transpose(2, 0, 1).ravel() for seed in range(count)])


def write_cifar(root: Path, name: str, count: int = 30) -> list[int]:
    """As the real files are."""
    ten = name == "vtab/cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    folder.mkdir(parents=True)
    labels = [i * 7 % (10 if ten else 100) for i in range(count)]
    test = Python2()
    test.out += b"}("
    test.text(b"data").array(cifar_pixels(count)).text(b"labels" if ten else b"fine_labels").numbers(labels)
    if not ten:
        test.text(b"coarse_labels").numbers([0] * count)
    test.out += b"u"
    test.write(folder / ("test_batch" if ten else "test"))
    meta = Python2()
    meta.out += b"}("
    meta.text(b"label_names" if ten else b"fine_label_names")
    meta.out += b"]("
    for class_name in class_names(name):
        meta.text(class_name.encode())
    meta.out += b"eu"
    meta.write(folder / ("batches.meta" if ten else "meta"))
    return labels


@pytest.mark.parametrize("name", ["vtab/cifar10", "vtab/cifar100"])
@pytest.mark.parametrize("images_per_slice", [256, 7])
def test_cifars_original_files(tmp_path, monkeypatch, name, images_per_slice):
    labels = write_cifar(tmp_path, name)
    monkeypatch.setattr(image_files, "IMAGES_PER_SLICE", images_per_slice)
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
    write_cifar(tmp_path, "vtab/cifar10")
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
        (b"cbuiltins\neval\n(S'1'\ntR.", "it refers to builtins.eval"),
        (b"c_codecs\nencode\n(Va\nVhex\ntR.", "text in hex"),
        (b"", "EOFError"),
        (b"\x80\x02", "EOFError"),
        (pickle.dumps({"data": np.zeros((2, 3072))}, protocol=2), "an array of 'f8'"),
        (pickle.dumps([1]), "AttributeError"),
    ],
)
def test_pickles_of_anything_else(tmp_path, content, cause):
    write_cifar(tmp_path, "vtab/cifar10")
    for name in ("test_batch", "batches.meta"):
        path = tmp_path / "cifar-10-batches-py" / name
        before = path.read_bytes()
        path.write_bytes(content)
        message = error_of_set("vtab/cifar10", tmp_path / "cifar-10-batches-py", DataError)
        assert message.startswith(f"vtab/cifar10: {path} is not one of CIFAR's files (")
        assert cause in message
        path.write_bytes(before)


@pytest.mark.parametrize(
    "values",
    [{"labels": [1]}, {"data": cifar_pixels(2), "labels": [1]}, {"data": cifar_pixels(2)[:, :100], "labels": [1, 2]}],
)
def test_cifar_files_without_cifars_images(tmp_path, values):
    write_cifar(tmp_path, "vtab/cifar10")
    path = tmp_path / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps(values))
    assert f"{path} does not hold images of 3 x 32 x 32 bytes" in error_of_set("vtab/cifar10", tmp_path, DataError)


@pytest.mark.s3
def test_cifar_in_s3(s3_url, tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "IMAGES_PER_SLICE", 7)
    write_cifar(tmp_path, "vtab/cifar10")
    storage.put_folder(tmp_path, f"{s3_url}/cifar")
    local, remote = find_evaluation_set([str(tmp_path)], "vtab/cifar10"), find_evaluation_set([f"{s3_url}/cifar"], "vtab/cifar10")
    assert (remote.digest, remote.url) == (local.digest, f"{s3_url}/cifar/cifar-10-batches-py")
    assert read(remote) == read(local)
    image_files._load_cifar_images.cache_clear()
    storage.delete(f"{s3_url}/cifar/cifar-10-batches-py/test_batch")
    assert read(remote)[0] == RejectedSample("test_batch[0:7]/", "shard_missing")
