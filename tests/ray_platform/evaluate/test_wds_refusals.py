"""What is wrong with an export: samples that are told, sets that are refused."""

from pathlib import Path

import pytest

from ray_platform.contracts import DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.find import open_set
from ray_platform.evaluate.sets import REGISTRY
from ray_platform.evaluate.slices import RawSample
from tests.support.evaluation_sets import class_names, encoded, picture, read, write_one, write_retrieval, write_wds


def own(folder: Path, count: int = 6, **fields) -> Path:
    """A set that the registry does not know, of three classes."""
    values = {"labels": [i % 3 for i in range(count)], "classes": ["a", "b", "c"], "templates": ["a {c}"]} | fields
    return write_wds(folder, "mine", [picture(seed) for seed in range(count)], **values)


def write_tar(url: Path, members, build_tar) -> None:
    url.write_bytes(build_tar(members))


def refused(name: str, url: Path) -> str:
    with pytest.raises(DataError) as raised:
        read(open_set(name, str(url)))
    message = str(raised.value)
    assert "\n" not in message
    return message


# -------------------------------------------------------------------------------------------------------------- rejects


def test_what_cannot_be_used_is_told(tmp_path, build_tar):
    folder = own(tmp_path)
    good = encoded(picture(0), "PNG")
    members = [
        ("good.png", good), ("good.cls", b" 2\n"),
        ("no_image.cls", b"1"),
        ("no_label.png", good), ("no_label.json", b"{}"),
        ("no_number.png", good), ("no_number.cls", b"cat"),
        ("fraction.png", good), ("fraction.cls", b"1.0"),
        ("twice.png", good), ("twice.cls", b"1"), ("twice.cls", b"2"),
        ("last.webp", good), ("last.cls", b"0"),
    ]  # fmt: skip
    write_tar(folder / "test" / "0.tar", members, build_tar)
    assert [(sample.key, getattr(sample, "cause", sample)) for sample in read(open_set("mine", str(folder)))] == [
        ("0.tar/good", RawSample("0.tar/good", good, 2)),
        ("0.tar/no_image", "image_missing"),
        ("0.tar/no_label", "label_missing"),
        ("0.tar/no_number", "label_invalid"),
        ("0.tar/fraction", "label_invalid"),
        ("0.tar/twice", "key_repeated"),
        ("0.tar/last", RawSample("0.tar/last", good, 0)),
    ]


def test_captions_that_are_no_text_are_told(tmp_path, build_tar):
    folder = write_retrieval(tmp_path, "flickr30k", 1)
    write_tar(folder / "test" / "0.tar", [("0.png", encoded(picture(0), "PNG")), ("0.txt", b"\xff\xfe")], build_tar)
    assert read(open_set("flickr30k", str(folder))) == [RejectedSample("0.tar/0", "caption_not_utf8")]


def test_a_truncated_tar_gives_what_precedes_the_cut(tmp_path):
    folder = own(tmp_path, 12, samples_a_shard=6)
    tar = folder / "test" / "0.tar"
    tar.write_bytes(tar.read_bytes()[:6000])
    samples = read(open_set("mine", str(folder)))
    assert RejectedSample("0.tar/", "tar_truncated") in samples
    kept = [sample.key for sample in samples if isinstance(sample, RawSample)]
    assert kept == ["0.tar/s0000000", *(f"1.tar/s{i:07d}" for i in range(6, 12))]


def test_a_file_that_is_no_tar_is_told(tmp_path):
    folder = own(tmp_path)
    (folder / "test" / "0.tar").write_bytes(b"<html>404</html>" * 100)
    assert read(open_set("mine", str(folder))) == [RejectedSample("0.tar/", "tar_truncated")]


def test_a_tar_that_is_gone_is_told(tmp_path):
    folder = own(tmp_path, 12, samples_a_shard=6)
    found = open_set("mine", str(folder))
    (folder / "test" / "0.tar").unlink()
    first, *rest = read(found)
    assert first == RejectedSample("0.tar/", "shard_missing")
    assert len(rest) == 6


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("label", [3, -1, 1000])
def test_a_label_without_a_class(tmp_path, label):
    folder = own(tmp_path, labels=[0, 1, 2, label, 1, 2])
    assert refused("mine", folder) == (
        f"mine: sample 0.tar/s0000003 has label {label}, but {folder}/classnames.txt names 3 classes (0 to 2); "
        "correct the class list, or fetch the set again"
    )


@pytest.mark.parametrize("text", [None, b"", b"\n \n"])
def test_an_image_without_captions(tmp_path, build_tar, text):
    folder = write_retrieval(tmp_path, "flickr30k", 1)
    members = [("0.png", encoded(picture(0), "PNG"))] + ([("0.txt", text)] if text is not None else [])
    write_tar(folder / "test" / "0.tar", members, build_tar)
    assert refused("flickr30k", folder) == (
        "flickr30k: sample 0.tar/0 has no caption, and retrieval needs one for every image; write its .txt with a caption a "
        "line, or fetch the set again"
    )


def test_a_tar_without_samples(tmp_path, build_tar):
    folder = own(tmp_path)
    write_tar(folder / "test" / "0.tar", [("README", b"x")], build_tar)
    assert refused("mine", folder) == f"mine: {folder}/test/0.tar holds no samples; fetch the set again"
    (folder / "test" / "0.tar").write_bytes(b"")
    assert refused("mine", folder) == f"mine: {folder}/test/0.tar is empty (0 bytes); fetch the set again"


def test_a_tar_that_changes_under_an_evaluation(tmp_path):
    folder = own(tmp_path)
    found, tar = open_set("mine", str(folder)), folder / "test" / "0.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes() + b"\0" * 512)
    with pytest.raises(DataError, match=rf"{tar}: changed since it was listed \({size + 512} bytes instead of {size}\)"):
        read(found)


def test_missing_and_extra_shards(tmp_path):
    folder = own(tmp_path, 12, samples_a_shard=1)
    counted = folder / "test" / "nshards.txt"
    (folder / "test" / "10.tar").unlink()
    assert refused("mine", folder) == (
        f"mine: of the 12 shards that {counted} counts, {folder}/test/10.tar is missing; fetch the set again"
    )
    (folder / "test" / "9.tar").unlink()
    assert f"{folder}/test/9.tar and 1 more are missing" in refused("mine", folder)
    counted.write_text("8")
    assert refused("mine", folder) == (
        f"mine: {folder}/test/8.tar is none of the 8 shards that {counted} counts (0.tar to 7.tar); remove it, or correct "
        "the count"
    )
    (folder / "test" / "8.tar").unlink()
    (folder / "test" / "11.tar").unlink()
    assert len(read(open_set("mine", str(folder)))) == 8


def test_without_a_count_the_tars_that_are_there_are_the_set(tmp_path):
    folder = own(tmp_path, 4, samples_a_shard=1)
    (folder / "test" / "nshards.txt").unlink()
    assert len(read(open_set("mine", str(folder)))) == 4


@pytest.mark.parametrize("text", ["", "many", "-1", "0", "1.5"])
def test_a_count_that_is_none(tmp_path, text):
    folder = own(tmp_path)
    (folder / "test" / "nshards.txt").write_text(text)
    assert refused("mine", folder) == (
        f"mine: {folder}/test/nshards.txt must have the number of shards, but says {text!r}; correct it, or fetch the set again"
    )


def test_class_lists(tmp_path):
    folder = write_one(tmp_path, "vtab/cifar10")
    names = folder / "classnames.txt"
    names.write_bytes(b"\xef\xbb\xbf" + names.read_bytes().replace(b"\n", b"\r\n") + b"\r\n\n")
    assert open_set("vtab/cifar10", str(folder)).classes == class_names("vtab/cifar10")  # as Windows writes it
    names.write_text("airplane\nbird\n")
    assert refused("vtab/cifar10", folder) == (
        f"vtab/cifar10: {names} names 2 classes, but the set has 10; correct the list, or fetch the set again"
    )
    names.write_text("\n")
    assert refused("vtab/cifar10", folder) == (
        f"vtab/cifar10: {names} names no class; it must have a class a line, in label order"
    )
    names.write_bytes(b"\xff")
    assert refused("vtab/cifar10", folder) == f"{names}: is not UTF-8; write it again as UTF-8"
    names.unlink()
    assert refused("vtab/cifar10", folder) == (
        f"vtab/cifar10: {folder} has test/*.tar but no classnames.txt; write it, a class a line in label order"
    )


def test_templates(tmp_path):
    folder = write_one(tmp_path, "vtab/pets")
    templates = folder / "zeroshot_classification_templates.txt"
    templates.write_text("my {c}\n")
    assert open_set("vtab/pets", str(folder)).templates == ("my {c}",)
    templates.write_text("my {c}\na photo\n")
    assert refused("vtab/pets", folder) == (
        f"vtab/pets: {templates} has a template without \"{{c}}\", which stands for the class: 'a photo'"
    )
    templates.write_text("")
    assert refused("vtab/pets", folder) == (
        f'vtab/pets: {templates} has no templates; write one a line, such as "a photo of a {{c}}."'
    )
    templates.unlink()
    assert open_set("vtab/pets", str(folder)).templates == REGISTRY["vtab/pets"].templates


def test_an_own_set_without_templates(tmp_path):
    folder = own(tmp_path, templates=())
    assert refused("mine", folder) == (
        "mine: there is no zeroshot_classification_templates.txt beside its classnames.txt, and the set is none that the "
        'project knows; write one, such as "a photo of a {c}."'
    )


def test_types_of_sets(tmp_path):
    folder = write_one(tmp_path, "vtab/cifar10")
    kind = folder / "dataset_type.txt"
    kind.write_text("multilabel\n")
    assert refused("vtab/cifar10", folder) == (
        f"vtab/cifar10: {kind} says 'multilabel'; only classification and retrieval sets can be evaluated"
    )
    kind.write_text("retrieval\n")
    assert refused("vtab/cifar10", folder) == (
        f"vtab/cifar10: is a set for zeroshot_classification, but {kind} says 'retrieval'; fetch the set again"
    )
    kind.write_text("Classification\n")
    assert open_set("vtab/cifar10", str(folder)).task == "zeroshot_classification"
    captions = write_retrieval(tmp_path, "flickr30k", 2)
    (captions / "dataset_type.txt").unlink()
    assert refused("flickr30k", captions) == (
        "flickr30k: is a set for zeroshot_retrieval, but there is no dataset_type.txt, which would say so; fetch the set again"
    )
