import itertools
import pickle
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.evaluate.find import open_images, open_set
from ray_platform.evaluate.layouts import tars
from ray_platform.evaluate.sets import PAPER, REGISTRY
from ray_platform.evaluate.slices import read_slice, rgb
from tests.support.evaluation_sets import class_names, encoded, picture, read, write_one, write_retrieval, write_wds

REAL = Path(find_spec("foolbox").origin).parent / "data"


def own(folder: Path, count: int = 6, **fields) -> Path:
    """A set that the registry does not know, of three classes."""
    values = {"labels": [i % 3 for i in range(count)], "classes": ["a", "b", "c"], "templates": ["a {c}"]} | fields
    return write_wds(folder, "mine", [picture(seed) for seed in range(count)], **values)


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", PAPER)
def test_each_of_the_twelve_in_its_exports_layout(tmp_path, name):
    info, folder = REGISTRY[name], write_one(tmp_path, name)
    found = open_set(name, str(folder))
    assert (found.name, found.task, found.layout, found.info) == (name, "zeroshot_classification", "wds", info)
    assert (found.classes, found.templates) == (class_names(name), info.templates)
    assert (found.url, found.num_files, found.known_images) == (str(folder), 1, None)
    samples = read(found)
    assert [sample.key for sample in samples] == [f"0.tar/s{i:07d}" for i in range(info.num_classes)]
    assert [sample.label for sample in samples] == list(range(info.num_classes))
    assert all(np.array_equal(rgb(samples[i].image), picture(i)) for i in range(0, len(samples), 50))


def test_retrieval_captions(tmp_path):
    captions = [["a cat", "two lines\nin one caption", "größe ✓"], ["one only"], ["a", "b"]]
    folder = write_wds(tmp_path, "flickr30k", [picture(seed) for seed in range(3)], captions=captions)
    found = open_set("flickr30k", str(folder))
    assert (found.task, found.classes, found.templates) == ("zeroshot_retrieval", (), ())
    assert [list(sample.captions) for sample in read(found)] == captions
    assert all(sample.label == -1 for sample in read(found))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_images_of_all_formats_of_the_exporter(tmp_path, kind):
    images = [encoded(picture(seed), kind) for seed in range(3)]
    folder = write_wds(tmp_path, "mine", images, labels=[0, 1, 2], classes=["a", "b", "c"], templates=["{c}"])
    assert [bytes(sample.image) for sample in read(open_set("mine", str(folder)))] == images


@pytest.mark.parametrize(("prefix", "name", "count"), [("cifar10", "vtab/cifar10", 20), ("cifar100", "vtab/cifar100", 20)])
def test_real_images(tmp_path, prefix, name, count):
    paths = sorted(REAL.glob(f"{prefix}_*.png"))
    assert len(paths) == count
    labels = [int(path.stem.rpartition("_")[2]) for path in paths]
    write_wds(
        tmp_path, name, [path.read_bytes() for path in paths], labels=labels, classes=class_names(name),
        templates=REGISTRY[name].templates, samples_a_shard=7,
    )  # fmt: skip
    samples = read(open_set(name, str(tmp_path / f"wds_{name.replace('/', '-')}")))
    assert [sample.label for sample in samples] == labels
    assert [sample.key for sample in samples] == [f"{i // 7}.tar/s{i:07d}" for i in range(20)]
    assert all(rgb(sample.image).shape == (32, 32, 3) for sample in samples)


def test_real_photographs_in_slices(tmp_path, monkeypatch):
    paths = sorted(REAL.glob("imagenet_*.jpg"))
    labels = [int(path.stem.rpartition("_")[2]) for path in paths]
    folder = write_wds(
        tmp_path, "imagenet1k", [path.read_bytes() for path in paths], labels=labels, classes=class_names("imagenet1k")
    )
    monkeypatch.setattr(tars, "_LEAST_BYTES", 1000)
    found = open_set("imagenet1k", str(folder))
    assert len(found.slices) == 12  # a slice ends within images of 18 to 130 kB, larger than what is first read behind it
    assert [bytes(sample.image) for sample in read(found)] == [path.read_bytes() for path in paths]
    assert [found.classes[sample.label] for sample in read(found)][:3] == ["Bullmastiff", "folding chair", "beaker"]


# --------------------------------------------------------------------------------------------------------------- slices


@pytest.mark.parametrize("images_a_slice", [1, 2, 3, 7, 20, 61, 256])
def test_slices_have_each_sample_once_and_in_order(tmp_path, monkeypatch, images_a_slice):
    folder = write_one(tmp_path, "vtab/cifar100", samples_a_shard=23)
    whole = read(open_set("vtab/cifar100", str(folder)))
    assert len(whole) == 100
    monkeypatch.setattr(tars, "IMAGES_A_SLICE", images_a_slice)
    found = open_set("vtab/cifar100", str(folder))
    assert [(sample.key, sample.label) for sample in read(found)] == [(sample.key, sample.label) for sample in whole]
    assert [bytes(sample.image) for sample in read(found)] == [bytes(sample.image) for sample in whole]
    assert all(part.start % 512 == 0 for part in found.slices)
    for left, right in itertools.pairwise(found.slices):
        assert right.start == (left.stop if left.tar == right.tar else 0)


def test_a_slice_holds_about_128_images_whatever_their_size(tmp_path):
    """Of a set of which the expected count is there."""
    images = [picture(seed, 40, 60) for seed in range(1000)]
    names = [f"{i}" for i in range(1000)]
    write_wds(tmp_path, "flickr30k", images, captions=[[name] for name in names], samples_a_shard=600)
    found = open_set("flickr30k", str(tmp_path / "wds_flickr30k"))
    counts = [len(read_slice(part)) for part in found.slices]
    assert sum(counts) == 1000
    assert all(90 < count < 170 for count in counts)
    assert [part.estimated_images for part in found.slices] == pytest.approx(counts, abs=8)


def test_slices_do_not_depend_on_where_the_set_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "IMAGES_A_SLICE", 5)
    write_one(tmp_path / "one", "vtab/cifar100")
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deeper")
    first, second = (open_set("vtab/cifar100", str(tmp_path / place / "wds_vtab-cifar100")) for place in ("one", "two/deeper"))
    assert [part.name for part in first.slices] == [part.name for part in second.slices]
    assert len(first.slices) > 10
    assert [sample.key for sample in read(first)] == [sample.key for sample in read(second)]
    assert first.digest == second.digest


def test_slices_travel(tmp_path):
    found = open_set("mine", str(own(tmp_path)))
    (part,) = found.slices
    sent = pickle.dumps(part)
    assert len(sent) < 1000
    assert pickle.loads(sent) == part
    assert [sample.key for sample in read_slice(pickle.loads(sent))] == [sample.key for sample in read(found)]


def test_the_tenth_tar_comes_after_the_ninth(tmp_path):
    found = open_set("mine", str(own(tmp_path, 12, samples_a_shard=1)))
    assert [part.name for part in found.slices] == [f"{number}.tar" for number in range(12)]


def test_a_part_in_which_no_sample_begins_is_empty(tmp_path, monkeypatch):
    image = encoded(picture(0, 300, 400), "PNG")
    folder = write_wds(tmp_path, "mine", [image], labels=[0], classes=["a"], templates=["{c}"])
    monkeypatch.setattr(tars, "NOMINAL_BYTES", 20_000)
    monkeypatch.setattr(tars, "IMAGES_A_SLICE", 1)
    counts = [len(read_slice(part)) for part in open_set("mine", str(folder)).slices]
    assert len(counts) > 5
    assert (counts[0], sum(counts)) == (1, 1)


# ----------------------------------------------------------------------------------------------- tars for their images


def test_images_of_an_export_and_of_training_shards(tmp_path, shard_folder, build_tar):
    found = open_images(str(own(tmp_path)))
    assert (found.task, found.info, found.classes) == ("images", None, ())
    assert [(sample.label, sample.captions) for sample in read(found)] == [(-1, ())] * 6
    shards = open_images(str(shard_folder))
    assert [sample.key for sample in read(shards)][19:22] == ["00000.tar/00019", "00001.tar/00020", "00001.tar/00021"]
    assert len(read(shards)) == 60
    assert len(read(open_images(f"{shard_folder}/0000[01].tar"))) == 25
    assert len(read(open_images(f"{shard_folder}/{{00001..00003}}.tar"))) == 19
    assert [sample.key for sample in read(open_images(f"{shard_folder}/00003.tar"))] == ["00003.tar/00038"]


def test_tars_of_the_same_name_keep_apart(tmp_path, shard_folder):
    for part in ("part-1", "part-0"):
        shutil.copytree(shard_folder, tmp_path / part)
    keys = [sample.key for sample in read(open_images(f"{tmp_path}/part-*/00003.tar"))]
    assert keys == ["part-0/00003.tar/00038", "part-1/00003.tar/00038"]


# ------------------------------------------------------------------------------------------------------------------- S3


@pytest.mark.s3
def test_an_export_in_s3(s3_url, tmp_path, monkeypatch):
    folder = write_one(tmp_path, "vtab/cifar100", samples_a_shard=23)
    storage.put_folder(folder, f"{s3_url}/sets/wds_vtab-cifar100")
    monkeypatch.setattr(tars, "IMAGES_A_SLICE", 10)
    here, there = (open_set("vtab/cifar100", url) for url in (str(folder), f"{s3_url}/sets/wds_vtab-cifar100/"))
    assert there.url == f"{s3_url}/sets/wds_vtab-cifar100"
    assert (there.classes, there.templates, there.digest) == (here.classes, here.templates, here.digest)
    assert [part.name for part in there.slices] == [part.name for part in here.slices]
    assert len(there.slices) > 10
    for one, other in zip(read(there), read(here), strict=True):
        assert (one.key, one.label, bytes(one.image)) == (other.key, other.label, bytes(other.image))


@pytest.mark.s3
def test_a_set_that_s3_loses_or_refuses(s3_url, tmp_path, monkeypatch, forget_s3_sessions):
    folder = write_retrieval(tmp_path, "flickr30k", 4, samples_a_shard=2)
    storage.put_folder(folder, f"{s3_url}/lost/wds_flickr30k")
    found = open_set("flickr30k", f"{s3_url}/lost/wds_flickr30k")
    storage.delete(f"{s3_url}/lost/wds_flickr30k/test/0.tar")
    assert [getattr(sample, "cause", sample.key) for sample in read(found)] == [
        "shard_missing", "1.tar/s0000002", "1.tar/s0000003",
    ]  # fmt: skip
    message = refused_in_s3("flickr30k", f"{s3_url}/lost/wds_flickr30k")
    assert f"{s3_url}/lost/wds_flickr30k/test/0.tar is missing" in message
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_s3_sessions()
    assert {sample.cause for sample in read(found)} == {"shard_forbidden"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ray_platform.retry.RETRY_SECONDS", 0.5)
    forget_s3_sessions()
    assert {sample.cause for sample in read(found)} == {"shard_unavailable"}


def refused_in_s3(name: str, url: str) -> str:
    with pytest.raises(DataError) as raised:
        open_set(name, url)
    return str(raised.value)
