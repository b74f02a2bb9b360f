"""Webdataset-style sets: what is read, slices of tars, and what is wrong with an export."""

import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_platform import storage
from ray_platform.data.causes import RejectedSample
from ray_platform.data.decode import rgb
from ray_platform.evaluate import shards
from ray_platform.evaluate.discovery import open_evaluation_set, open_image_set
from ray_platform.evaluate.sets import KNOWN_SETS, PAPER_SETS, RawSample, read_slice
from tests.support.evaluation_sets import (
    class_names,
    contents,
    encoded,
    error_of,
    error_of_set,
    picture,
    read,
    write_one,
    write_own,
    write_retrieval,
    write_wds,
)  # fmt: skip

REAL = Path(find_spec("foolbox").origin).parent / "data"


def open_own(folder: Path):
    return open_evaluation_set("mine", str(folder))


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", PAPER_SETS)
def test_each_of_the_twelve_in_its_exports_layout(tmp_path, name):
    known, folder = KNOWN_SETS[name], write_one(tmp_path, name)
    data = open_evaluation_set(name, str(folder))
    assert (data.name, data.task, data.layout, data.known) == (name, "zeroshot_classification", "wds", known)
    assert (data.classes, data.templates) == (class_names(name), known.templates)
    assert (data.url, data.num_files, data.known_images) == (str(folder), 1, None)
    samples = read(data)
    assert [(sample.key, sample.label) for sample in samples] == [(f"0.tar/s{i:07d}", i) for i in range(known.num_classes)]
    assert all(np.array_equal(rgb(samples[i].image), picture(i)) for i in range(0, len(samples), 50))


def test_retrieval_captions(tmp_path):
    captions = [["a cat", "two lines\nin one caption", "größe ✓"], ["one only"], ["a", "b"]]
    data = open_evaluation_set(
        "flickr30k", str(write_wds(tmp_path, "flickr30k", [picture(seed) for seed in range(3)], captions=captions))
    )
    assert (data.task, data.classes, data.templates) == ("zeroshot_retrieval", (), ())
    assert [list(sample.captions) for sample in read(data)] == captions
    assert all(sample.label == -1 for sample in read(data))


def test_images_of_all_formats_of_the_exporter(tmp_path):
    images = [encoded(picture(seed), kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP"))]
    folder = write_wds(tmp_path, "mine", images, labels=[0, 1, 2], classes=["a", "b", "c"], templates=["{c}"])
    assert [content for _, _, content in contents(open_own(folder))] == images


def test_real_photographs_in_slices(tmp_path, monkeypatch):
    paths = sorted(REAL.glob("imagenet_*.jpg"))
    labels = [int(path.stem.rpartition("_")[2]) for path in paths]
    images = [path.read_bytes() for path in paths]
    folder = write_wds(tmp_path, "imagenet1k", images, labels=labels, classes=class_names("imagenet1k"))
    monkeypatch.setattr(shards, "_MIN_SAMPLE_BYTES", 1000)
    data = open_evaluation_set("imagenet1k", str(folder))
    assert len(data.slices) == 12  # borders lie inside images
    assert [content for _, _, content in contents(data)] == images
    assert [data.classes[sample.label] for sample in read(data)][:3] == ["Bullmastiff", "folding chair", "beaker"]


# --------------------------------------------------------------------------------------------------------------- slices


@pytest.fixture(scope="module")
def hundred(tmp_path_factory):
    """CIFAR-100's export in five tars, and all its samples."""
    folder = write_one(tmp_path_factory.mktemp("hundred"), "vtab/cifar100", samples_per_shard=23)
    whole = contents(open_evaluation_set("vtab/cifar100", str(folder)))
    assert len(whole) == 100
    return folder, whole


@given(images_per_slice=st.integers(1, 256))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_slices_have_each_sample_once_and_in_order(hundred, images_per_slice):
    folder, whole = hundred
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "IMAGES_PER_SLICE", images_per_slice)
        data = open_evaluation_set("vtab/cifar100", str(folder))
        assert contents(data) == whole
    assert all(part.read.args[2] % 512 == 0 for part in data.slices)


def test_slices_have_about_128_images_whatever_their_size(tmp_path):
    """For a set of which the expected number of images exists."""
    images = [picture(seed, 40, 60) for seed in range(1000)]
    write_wds(tmp_path, "flickr30k", images, captions=[[f"{i}"] for i in range(1000)], samples_per_shard=600)
    data = open_evaluation_set("flickr30k", str(tmp_path / "wds_flickr30k"))
    counts = [len(read_slice(part)) for part in data.slices]
    assert sum(counts) == 1000
    assert all(90 < count < 170 for count in counts)
    assert [part.estimated_images for part in data.slices] == pytest.approx(counts, abs=8)


def test_slices_do_not_depend_on_the_folder_and_can_be_pickled(hundred, tmp_path, monkeypatch):
    folder, _ = hundred
    monkeypatch.setattr(shards, "IMAGES_PER_SLICE", 5)
    shutil.copytree(folder, tmp_path / "deeper" / "copy")
    first, second = (open_evaluation_set("vtab/cifar100", str(place)) for place in (folder, tmp_path / "deeper" / "copy"))
    assert [part.name for part in first.slices] == [part.name for part in second.slices]
    assert first.digest == second.digest
    sent = pickle.dumps(first.slices[3])
    assert len(sent) < 1000
    assert read_slice(pickle.loads(sent)) == read_slice(first.slices[3])


def test_the_tenth_tar_comes_after_the_ninth(tmp_path):
    data = open_own(write_own(tmp_path, 12, samples_per_shard=1))
    assert [part.name for part in data.slices] == [f"{number}.tar" for number in range(12)]


def test_a_slice_in_which_no_sample_begins_is_empty(tmp_path, monkeypatch):
    image = encoded(picture(0, 300, 400), "PNG")
    folder = write_wds(tmp_path, "mine", [image], labels=[0], classes=["a"], templates=["{c}"])
    monkeypatch.setattr(shards, "NOMINAL_BYTES", 20_000)
    monkeypatch.setattr(shards, "IMAGES_PER_SLICE", 1)
    counts = [len(read_slice(part)) for part in open_own(folder).slices]
    assert len(counts) > 5
    assert (counts[0], sum(counts)) == (1, 1)


# ---------------------------------------------------------------------------------------- the images of tars, without labels


def test_images_of_an_export_and_of_training_shards(tmp_path, shard_folder):
    data = open_image_set(str(write_own(tmp_path)))
    assert (data.task, data.known, data.classes) == ("images", None, ())
    assert [(sample.label, sample.captions) for sample in read(data)] == [(-1, ())] * 6
    shards = read(open_image_set(str(shard_folder)))
    assert [sample.key for sample in shards][19:22] == ["00000.tar/00019", "00001.tar/00020", "00001.tar/00021"]
    assert len(shards) == 60
    assert len(read(open_image_set(f"{shard_folder}/0000[01].tar"))) == 25
    assert len(read(open_image_set(f"{shard_folder}/{{00001..00003}}.tar"))) == 19
    for part in ("part-1", "part-0"):
        shutil.copytree(shard_folder, tmp_path / part)
    keys = [sample.key for sample in read(open_image_set(f"{tmp_path}/part-*/00003.tar"))]
    assert keys == ["part-0/00003.tar/00038", "part-1/00003.tar/00038"]


# -------------------------------------------------------------------------------------------------------- damaged exports


def test_samples_that_cannot_be_used_are_rejected_with_their_cause(tmp_path, build_tar):
    folder, image = write_own(tmp_path), encoded(picture(0), "PNG")
    members = [
        ("good.png", image), ("good.cls", b" 2\n"),
        ("no_image.cls", b"1"),
        ("no_label.png", image), ("no_label.json", b"{}"),
        ("no_number.png", image), ("no_number.cls", b"cat"),
        ("fraction.png", image), ("fraction.cls", b"1.0"),
        ("twice.png", image), ("twice.cls", b"1"), ("twice.cls", b"2"),
        ("last.webp", image), ("last.cls", b"0"),
    ]  # fmt: skip
    (folder / "test" / "0.tar").write_bytes(build_tar(members))
    assert [(sample.key, getattr(sample, "cause", sample)) for sample in read(open_own(folder))] == [
        ("0.tar/good", RawSample("0.tar/good", image, 2)),
        ("0.tar/no_image", "image_missing"),
        ("0.tar/no_label", "label_missing"),
        ("0.tar/no_number", "label_invalid"),
        ("0.tar/fraction", "label_invalid"),
        ("0.tar/twice", "key_repeated"),
        ("0.tar/last", RawSample("0.tar/last", image, 0)),
    ]
    captions = write_retrieval(tmp_path, "flickr30k", 1)
    (captions / "test" / "0.tar").write_bytes(build_tar([("0.png", image), ("0.txt", b"\xff\xfe")]))
    assert read(open_evaluation_set("flickr30k", str(captions))) == [RejectedSample("0.tar/0", "caption_not_utf8")]


def test_a_tar_that_is_truncated_damaged_or_gone_loses_only_its_own_samples(tmp_path):
    folder = write_own(tmp_path, 12, samples_per_shard=6)
    tar, rest = folder / "test" / "0.tar", [f"1.tar/s{i:07d}" for i in range(6, 12)]
    tar.write_bytes(tar.read_bytes()[:6000])
    samples = read(open_own(folder))
    assert RejectedSample("0.tar/", "tar_truncated") in samples
    assert [sample.key for sample in samples if isinstance(sample, RawSample)] == ["0.tar/s0000000", *rest]
    tar.write_bytes(b"<html>404</html>" * 100)
    data = open_own(folder)
    assert read(data)[0] == RejectedSample("0.tar/", "tar_truncated")
    tar.unlink()
    first, *others = read(data)
    assert first == RejectedSample("0.tar/", "shard_missing")
    assert [sample.key for sample in others] == rest


@pytest.mark.parametrize("label", [3, -1, 1000])
def test_a_label_without_a_class(tmp_path, label):
    folder = write_own(tmp_path, labels=[0, 1, 2, label, 1, 2])
    message = error_of_set("mine", folder)
    assert message.startswith(f"mine: sample 0.tar/s0000003 has label {label}, but {folder}/classnames.txt names 3 classes")


@pytest.mark.parametrize("text", [None, b"\n \n"])
def test_an_image_without_captions(tmp_path, build_tar, text):
    folder = write_retrieval(tmp_path, "flickr30k", 1)
    members = [("0.png", encoded(picture(0), "PNG"))] + ([("0.txt", text)] if text is not None else [])
    (folder / "test" / "0.tar").write_bytes(build_tar(members))
    assert error_of_set("flickr30k", folder).startswith("flickr30k: sample 0.tar/0 has no caption")


def test_a_tar_without_samples_or_that_changes(tmp_path, build_tar):
    folder = write_own(tmp_path)
    data, tar = open_own(folder), folder / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)
    assert f"{tar}: changed since it was listed" in error_of(read, data)
    tar.write_bytes(build_tar([("README", b"x")]))
    assert f"mine: {tar} has no samples" in error_of_set("mine", folder)
    tar.write_bytes(b"")
    assert f"mine: {tar} is empty" in error_of_set("mine", folder)


def test_missing_and_extra_shards(tmp_path):
    folder = write_own(tmp_path, 12, samples_per_shard=1)
    counted = folder / "test" / "nshards.txt"
    for number, words in ((10, "test/10.tar is missing"), (9, "test/9.tar and 1 more are missing")):
        (folder / "test" / f"{number}.tar").unlink()
        assert f"{counted} counts 12 shards, but {folder}/{words}" in error_of_set("mine", folder)
    counted.write_text("8")
    assert f"(0.tar to 7.tar), but there is also {folder}/test/8.tar" in error_of_set("mine", folder)
    (folder / "test" / "8.tar").unlink()
    (folder / "test" / "11.tar").unlink()
    assert len(read(open_own(folder))) == 8
    for text in ("", "many", "-1", "0", "1.5"):
        counted.write_text(text)
        assert f"{counted} is {text!r} instead of the number of shards" in error_of_set("mine", folder)
    counted.unlink()
    assert len(read(open_own(folder))) == 8


def test_class_lists_and_templates(tmp_path):
    folder = write_one(tmp_path, "vtab/cifar10")
    names, templates = folder / "classnames.txt", folder / "zeroshot_classification_templates.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")  # as Windows writes it
    templates.write_text("my {c}\n")
    data = open_evaluation_set("vtab/cifar10", str(folder))
    assert (data.classes, data.templates) == (class_names("vtab/cifar10"), ("my {c}",))
    templates.write_text("my {c}\na photo\n")
    assert f"{templates} has a template without" in error_of_set("vtab/cifar10", folder)
    templates.write_text("")
    assert f"{templates} has no templates" in error_of_set("vtab/cifar10", folder)
    templates.unlink()
    assert open_evaluation_set("vtab/cifar10", str(folder)).templates == KNOWN_SETS["vtab/cifar10"].templates
    for content, words in ((b"airplane\nbird\n", "names 2 classes"), (b"\n", "has no class names"), (b"\xff", "is not UTF-8")):
        names.write_bytes(content)
        assert f"{names}{': ' if content == bytes([255]) else ' '}{words}" in error_of_set("vtab/cifar10", folder)
    names.unlink()
    assert "no classnames.txt" in error_of_set("vtab/cifar10", folder)
    assert "no zeroshot_classification_templates.txt" in error_of_set("mine", write_own(tmp_path, templates=()))


def test_types_of_sets(tmp_path):
    folder = write_one(tmp_path, "vtab/cifar10")
    kind = folder / "dataset_type.txt"
    kind.write_text("Classification\n")
    assert open_evaluation_set("vtab/cifar10", str(folder)).task == "zeroshot_classification"
    kind.write_text("multilabel\n")
    assert f"{kind} is 'multilabel'" in error_of_set("vtab/cifar10", folder)
    kind.write_text("retrieval\n")
    assert f"is a set for zeroshot_classification, but {kind} is 'retrieval'" in error_of_set("vtab/cifar10", folder)
    captions = write_retrieval(tmp_path, "flickr30k", 2)
    (captions / "dataset_type.txt").unlink()
    assert "is a set for zeroshot_retrieval, but there is no dataset_type.txt" in error_of_set("flickr30k", captions)


# ------------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.s3
def test_an_export_in_s3(s3_url, hundred, monkeypatch):
    folder, whole = hundred
    storage.put_folder(folder, f"{s3_url}/sets/wds_vtab-cifar100")
    monkeypatch.setattr(shards, "IMAGES_PER_SLICE", 10)
    local, remote = (open_evaluation_set("vtab/cifar100", u) for u in (str(folder), f"{s3_url}/sets/wds_vtab-cifar100/"))
    assert remote.url == f"{s3_url}/sets/wds_vtab-cifar100"
    assert (remote.classes, remote.templates, remote.digest) == (local.classes, local.templates, local.digest)
    assert [part.name for part in remote.slices] == [part.name for part in local.slices]
    assert contents(remote) == whole


@pytest.mark.s3
def test_a_set_that_s3_loses_or_forbids(s3_url, tmp_path, monkeypatch, forget_s3_sessions):
    url = f"{s3_url}/lost/wds_flickr30k"
    storage.put_folder(write_retrieval(tmp_path, "flickr30k", 4, samples_per_shard=2), url)
    data = open_evaluation_set("flickr30k", url)
    storage.delete(f"{url}/test/0.tar")
    causes = [getattr(sample, "cause", sample.key) for sample in read(data)]
    assert causes == ["shard_missing", "1.tar/s0000002", "1.tar/s0000003"]
    assert f"{url}/test/0.tar is missing" in error_of_set("flickr30k", url)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_s3_sessions()
    assert {sample.cause for sample in read(data)} == {"shard_forbidden"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget_s3_sessions()
    monkeypatch.setattr("ray_platform.retry.RETRY_SECONDS", 0.5)
    assert {sample.cause for sample in read(data)} == {"shard_unavailable"}
