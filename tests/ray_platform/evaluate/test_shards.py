"""WebDataset-style tars: samples, slices, and errors in a set."""

import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ray_platform import storage
from ray_platform.data.causes import RejectedSample
from ray_platform.data.decode import rgb
from ray_platform.evaluate import sets, shards
from ray_platform.evaluate.discovery import open_evaluation_set, open_image_set
from ray_platform.evaluate.sets import KNOWN_SETS, RawSample, read_slice
from tests.support.evaluation_sets import (
    class_names,
    contents,
    encoded,
    error_of,
    error_of_set,
    keys_or_causes,
    open_own,
    picture,
    read,
    write_one,
    write_own,
    write_retrieval,
    write_wds,
)  # fmt: skip

REAL = Path(find_spec("foolbox").origin).parent / "data"


def test_retrieval_captions(tmp_path):
    captions = [["a cat", "two lines\nin one caption", "größe ✓"], ["one only"], ["a", "b"]]
    folder = write_wds(tmp_path, "flickr30k", [picture(seed) for seed in range(3)], captions=captions)
    data = open_evaluation_set("flickr30k", str(folder))
    assert (data.task, data.classes, data.templates) == ("zeroshot_retrieval", (), ())
    assert [list(sample.captions) for sample in read(data)] == captions
    assert all(sample.label == -1 for sample in read(data))


def test_images_of_all_formats_of_the_exporter(tmp_path):
    images = [encoded(picture(seed), kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP"))]
    folder = write_wds(tmp_path, "mine", images, labels=[0, 1, 2], classes=["a", "b", "c"], templates=["{c}"])
    assert [content for _, _, content in contents(open_own(folder))] == images


def test_real_photographs_in_slices(tmp_path, monkeypatch):
    paths = sorted(REAL.glob("imagenet_*.jpg"))
    labels, images = [int(path.stem.rpartition("_")[2]) for path in paths], [path.read_bytes() for path in paths]
    folder = write_wds(tmp_path, "imagenet1k", images, labels=labels, classes=class_names("imagenet1k"))
    monkeypatch.setattr(shards, "_MIN_SAMPLE_BYTES", 1000)
    data = open_evaluation_set("imagenet1k", str(folder))
    assert len(data.slices) == 12  # slice borders lie inside images
    assert [content for _, _, content in contents(data)] == images
    assert [data.classes[sample.label] for sample in read(data)][:3] == ["Bullmastiff", "folding chair", "beaker"]


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """CIFAR-100's export in five tars, and all of its samples."""
    folder = write_one(tmp_path_factory.mktemp("hundred"), "vtab/cifar100", samples_per_shard=23)
    data = open_evaluation_set("vtab/cifar100", str(folder))
    assert (data.num_files, data.known_images) == (5, 100)
    samples = contents(data)
    assert [(key, label) for key, label, _ in samples] == [(f"{i // 23}.tar/s{i:07d}", i) for i in range(100)]
    assert np.array_equal(rgb(samples[57][2]), picture(57))
    return folder, samples


@pytest.mark.parametrize("images_per_slice", [1, 2, 5, 22, 128])
def test_slices_have_each_sample_once_and_in_order_in_any_folder(hundred, tmp_path, monkeypatch, images_per_slice):
    folder, samples = hundred
    monkeypatch.setattr(sets, "IMAGES_PER_SLICE", images_per_slice)
    data = open_evaluation_set("vtab/cifar100", str(folder))
    assert contents(data) == samples
    copy = open_evaluation_set("vtab/cifar100", str(shutil.copytree(folder, tmp_path / "deeper" / "copy")))
    assert [part.name for part in copy.slices] == [part.name for part in data.slices]
    assert copy.digest == data.digest
    sent = pickle.dumps(data.slices[3])
    assert len(sent) < 1000
    assert read_slice(pickle.loads(sent)) == read_slice(data.slices[3])


def test_slices_have_about_as_many_images_whatever_their_size(tmp_path, monkeypatch):
    """Applies to a known set whose expected number of images is registered."""
    images = [encoded(picture(seed, 20, 30)) for seed in range(50)]
    write_wds(tmp_path, "flickr30k", images * 20, captions=[[f"{i}"] for i in range(1000)], samples_per_shard=600)
    data = open_evaluation_set("flickr30k", str(tmp_path / "wds_flickr30k"))
    counts = [len(read_slice(part)) for part in data.slices]
    assert sum(counts) == 1000
    assert all(90 < count < 170 for count in counts)
    assert [part.estimated_images for part in data.slices] == pytest.approx(counts, abs=8)


def test_the_images_of_any_local_set_are_estimated(tmp_path):
    """Otherwise `eval --limit` would have no effect on a set of tiny images."""
    images = [encoded(picture(seed, 20, 30)) for seed in range(50)]
    folder = write_wds(tmp_path, "mine", images * 20, labels=[0] * 1000, classes=["a"], templates=["{c}"], samples_per_shard=600)
    assert sum(part.estimated_images for part in open_own(folder).slices) == pytest.approx(1000, rel=0.02)


def test_a_slice_in_which_no_sample_begins_is_empty(tmp_path, monkeypatch):
    image = encoded(picture(0, 300, 400), "PNG")
    folder = write_wds(tmp_path, "mine", [image], labels=[0], classes=["a"], templates=["{c}"])
    monkeypatch.setattr(shards, "NOMINAL_BYTES", 20_000)
    monkeypatch.setattr(sets, "IMAGES_PER_SLICE", 1)
    counts = [len(read_slice(part)) for part in open_own(folder).slices]
    assert len(counts) > 5
    assert (counts[0], sum(counts)) == (1, 1)


def test_images_of_an_export_and_of_training_shards(tmp_path, shard_folder):
    data = open_image_set(str(write_own(tmp_path)))
    assert (data.task, data.known, data.classes) == ("images", None, ())
    assert [(sample.label, sample.captions) for sample in read(data)] == [(-1, ())] * 6
    samples = read(open_image_set(str(shard_folder)))
    assert [sample.key for sample in samples][19:22] == ["00000.tar/00019", "00001.tar/00020", "00001.tar/00021"]
    assert len(samples) == 60
    assert len(read(open_image_set(f"{shard_folder}/0000[01].tar"))) == 25
    assert len(read(open_image_set(f"{shard_folder}/{{00001..00003}}.tar"))) == 19
    for part in ("part-1", "part-0"):
        shutil.copytree(shard_folder, tmp_path / part)
    keys = [sample.key for sample in read(open_image_set(f"{tmp_path}/part-*/00003.tar"))]
    assert keys == ["part-0/00003.tar/00038", "part-1/00003.tar/00038"]


def test_samples_that_cannot_be_used_are_rejected_with_their_cause(tmp_path, build_tar):
    folder, image = write_own(tmp_path), encoded(picture(0), "PNG")
    members = [
        ("good.png", image), ("good.cls", b" 2\n"),
        ("no_image.cls", b"1"),
        ("no_label.png", image), ("no_label.json", b"{}"),
        ("no_number.png", image), ("no_number.cls", b"cat"),
        ("fraction.png", image), ("fraction.cls", b"1.0"),
        ("twice.png", image), ("twice.cls", b"1"), ("twice.cls", b"2"),
    ]  # fmt: skip
    (folder / "test" / "0.tar").write_bytes(build_tar(members))
    first, *others = read(open_own(folder))
    assert first == RawSample("0.tar/good", image, 2)
    assert [(sample.key.removeprefix("0.tar/"), sample.cause) for sample in others] == [
        ("no_image", "image_missing"),
        ("no_label", "label_missing"),
        ("no_number", "label_invalid"),
        ("fraction", "label_invalid"),
        ("twice", "key_repeated"),
    ]
    captions = write_retrieval(tmp_path, "flickr30k", 1)
    (captions / "test" / "0.tar").write_bytes(build_tar([("0.png", image), ("0.txt", b"\xff\xfe")]))
    assert read(open_evaluation_set("flickr30k", str(captions))) == [RejectedSample("0.tar/0", "caption_not_utf8")]
    for text in ([], [("0.txt", b"\n \n")]):
        (captions / "test" / "0.tar").write_bytes(build_tar([("0.png", image), *text]))
        assert error_of_set("flickr30k", captions).startswith("flickr30k: sample 0.tar/0 has no caption")


def test_a_tar_that_is_truncated_damaged_or_gone_loses_only_its_own_samples(tmp_path):
    folder = write_own(tmp_path, 12, samples_per_shard=6)
    tar, rest = folder / "test" / "0.tar", [f"1.tar/s{i:07d}" for i in range(6, 12)]
    tar.write_bytes(tar.read_bytes()[:6000])
    assert keys_or_causes(open_own(folder)) == ["0.tar/s0000000", "tar_truncated", *rest]
    tar.write_bytes(b"<html>404</html>" * 100)
    data = open_own(folder)
    assert keys_or_causes(data) == ["shard_not_a_tar", *rest]
    tar.unlink()
    assert keys_or_causes(data) == ["shard_missing", *rest]


@pytest.mark.parametrize("label", [3, -1, 1000])
def test_a_label_without_a_class(tmp_path, label):
    folder = write_own(tmp_path, labels=[0, 1, 2, label, 1, 2])
    message = error_of_set("mine", folder)
    assert message.startswith(f"mine: sample 0.tar/s0000003 has label {label}, but {folder}/classnames.txt names 3 classes")


def test_a_tar_without_samples_or_that_changes(tmp_path, build_tar):
    folder = write_own(tmp_path)
    data, tar = open_own(folder), folder / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)
    assert f"{tar}: changed since it was listed" in error_of(read, data)
    tar.write_bytes(build_tar([("README", b"x")]))
    assert f"mine: {tar} has no samples" in error_of_set("mine", folder)
    tar.write_bytes(b"")
    assert f"mine: {tar} is empty" in error_of_set("mine", folder)


def test_the_images_of_a_known_set_are_counted_by_the_headers_of_its_tars(tmp_path, build_tar):
    def counts() -> tuple[int | None, int]:
        data = open_evaluation_set("vtab/cifar10", str(folder))
        return data.known_images, sum(isinstance(sample, RawSample) for sample in read(data))

    folder, image = write_one(tmp_path, "vtab/cifar10", samples_per_shard=4), encoded(picture(0), "PNG")
    (folder / "test" / "2.tar").write_bytes(
        build_tar([("a.tif", image), ("a.cls", b"1"), ("b.cls", b"2"), ("v1.5_7.png", image), ("v1.5_7.cls", b"3")])
    )
    assert counts() == (10, 10)
    first = folder / "test" / "0.tar"
    content = first.read_bytes()
    for damaged in (content[:6000], b"<html>404</html>" * 100, content[:512] + b"\xff" * 5000):
        first.write_bytes(damaged)
        count, num_readable = counts()
        assert 6 <= num_readable == count < 10
    assert open_evaluation_set("mine", str(write_own(tmp_path))).known_images is None


def test_missing_and_extra_shards(tmp_path):
    folder = write_own(tmp_path, 12, samples_per_shard=1)
    assert [part.name for part in open_own(folder).slices] == [f"{number}.tar" for number in range(12)]
    counted = folder / "test" / "nshards.txt"
    for number, words in ((10, "test/10.tar is missing"), (9, "test/9.tar and 1 more are missing")):
        (folder / "test" / f"{number}.tar").unlink()
        assert f"{counted} counts 12 shards, but {folder}/{words}" in error_of_set("mine", folder)
    counted.write_text("11")
    (folder / "test" / "9.tar").touch()
    (folder / "test" / "10.tar").touch()
    assert f"(0.tar to 10.tar), but there is also {folder}/test/11.tar" in error_of_set("mine", folder)
    for text in ("", "many", "-1", "0", "1.5"):
        counted.write_text(text)
        assert f"{counted} is {text!r} instead of the number of shards" in error_of_set("mine", folder)
    counted.unlink()
    for number in (9, 10):
        (folder / "test" / f"{number}.tar").unlink()
    assert len(read(open_own(folder))) == 10


def test_class_lists_and_templates(tmp_path):
    folder = write_one(tmp_path, "vtab/cifar10")
    names, templates = folder / "classnames.txt", folder / "zeroshot_classification_templates.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")  # as written on Windows
    templates.write_text("my {c}\n")
    data = open_evaluation_set("vtab/cifar10", str(folder))
    assert (data.classes, data.templates) == (class_names("vtab/cifar10"), ("my {c}",))
    for text, words in (("my {c}\na photo\n", "has a template without"), ("", "has no templates")):
        templates.write_text(text)
        assert f"{templates} {words}" in error_of_set("vtab/cifar10", folder)
    templates.unlink()
    assert open_evaluation_set("vtab/cifar10", str(folder)).templates == KNOWN_SETS["vtab/cifar10"].templates
    for content, words in (
        (b"airplane\nbird\n", " names 2 classes"),
        (b"\n", " has no class names"),
        (b"\xff", ": is not UTF-8"),
    ):
        names.write_bytes(content)
        assert f"{names}{words}" in error_of_set("vtab/cifar10", folder)
    names.unlink()
    assert "no classnames.txt" in error_of_set("vtab/cifar10", folder)
    own = open_evaluation_set("mine", str(write_own(tmp_path, templates=())))
    assert own.templates == KNOWN_SETS["imagenet1k"].templates
    assert len(own.templates) == 80


def test_types_of_sets(tmp_path):
    folder = write_one(tmp_path, "vtab/cifar10")
    kind = folder / "dataset_type.txt"
    kind.write_text("Classification\n")
    assert open_evaluation_set("vtab/cifar10", str(folder)).task == "zeroshot_classification"
    for text, words in (("multilabel", f"{kind} is 'multilabel'"), ("retrieval", f"zeroshot_classification, but {kind} is")):
        kind.write_text(f"{text}\n")
        assert words in error_of_set("vtab/cifar10", folder)
    captions = write_retrieval(tmp_path, "flickr30k", 2)
    (captions / "dataset_type.txt").unlink()
    assert "is a set for zeroshot_retrieval, but there is no dataset_type.txt" in error_of_set("flickr30k", captions)


@pytest.mark.s3
def test_a_set_in_s3_and_that_s3_loses_or_forbids(s3_url, tmp_path, monkeypatch):
    url, folder = f"{s3_url}/lost/wds_flickr30k", write_retrieval(tmp_path, "flickr30k", 4, samples_per_shard=2)
    storage.put_folder(folder, url)
    local, data = open_evaluation_set("flickr30k", str(folder)), open_evaluation_set("flickr30k", f"{url}/")
    assert data.url == url
    assert [part.name for part in data.slices] == [part.name for part in local.slices]
    assert contents(data) == contents(local)
    storage.delete(f"{url}/test/0.tar")
    assert keys_or_causes(data) == ["shard_missing", "1.tar/s0000002", "1.tar/s0000003"]
    assert f"{url}/test/0.tar is missing" in error_of_set("flickr30k", url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(storage.StorageError, match="rejects the credentials"):
        keys_or_causes(data)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ray_platform.retry.RETRY_SECONDS", 0.5)
    assert set(keys_or_causes(data)) == {"shard_unavailable"}
