"""Evaluation sets are found by name, root and layout; also covers folders of links and the listing."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.discovery import find_evaluation_set, open_evaluation_set, open_image_set, render_listing
from ray_platform.evaluate.sets import CLASSES_FILE, KNOWN_SETS, PAPER_SETS, TEMPLATES_FILE
from tests.ray_platform.evaluate.test_image_files import write_classes
from tests.ray_platform.evaluate.test_parquet import build_table, write
from tests.ray_platform.evaluate.test_torchvision_folders import write_cifar, write_lines
from tests.support.evaluation_sets import (
    CIFAR10,
    class_names,
    encoded,
    error_of,
    error_of_set,
    picture,
    read,
    write_image,
    write_one,
    write_retrieval,
    write_wds,
)  # fmt: skip

# Folders that DataComp's download_evalsets.py writes. Its CIFAR-10 has no VTAB prefix.
DATACOMP = {name: f"wds_{name.replace('/', '-')}_test" for name in PAPER_SETS} | {"vtab/cifar10": "wds_cifar10_test"}


@pytest.mark.parametrize("name", PAPER_SETS)
def test_each_of_the_twelve_is_found_by_either_name(tmp_path, name):
    known = KNOWN_SETS[name]
    folder = write_wds(tmp_path / "a", name, [picture(0)], labels=[1], classes=class_names(name))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / DATACOMP[name]).symlink_to(folder)
    for root, url in (("a", folder), ("b", tmp_path / "b" / DATACOMP[name])):
        data = find_evaluation_set([str(tmp_path / root)], name)
        assert (data.url, data.layout, data.task, data.known) == (str(url), "wds", "zeroshot_classification", known)
        assert (data.classes, data.templates, [sample.label for sample in read(data)]) == (
            class_names(name),
            known.templates,
            [1],
        )


def test_other_sets_of_the_same_short_name_are_ignored(tmp_path):
    """wds_caltech101 and wds_eurosat are also CLIP_benchmark sets, but with all images and a different class order."""
    for name in ("caltech101", "eurosat"):
        write_wds(tmp_path, name, [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
        assert "not found below" in error_of(find_evaluation_set, [str(tmp_path)], f"vtab/{name}")


def write_parquet(root: Path) -> None:
    write(root / "cifar10", "test.parquet", build_table([encoded(picture(0), "PNG")], {"label": [1]}, {"label": CIFAR10}))


WRITERS = {
    "wds": lambda root: write_one(root, "vtab/cifar10"),
    "parquet": write_parquet,
    "image folder": lambda root: write_classes(root / "mine", CIFAR10),
    "torchvision": write_cifar,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_files_with_class_names_and_templates_replace_those_of_any_layout(tmp_path, layout):
    WRITERS[layout](tmp_path)
    name = "mine" if layout == "image folder" else "vtab/cifar10"
    files = {CLASSES_FILE: tmp_path / "names.txt", TEMPLATES_FILE: tmp_path / "templates.txt"}
    write_lines(files[CLASSES_FILE], [f"small {each}" for each in CIFAR10])
    write_lines(files[TEMPLATES_FILE], ["one {c}", "two {c}"])
    overrides = {file: str(path) for file, path in files.items()}
    data, other = find_evaluation_set([str(tmp_path)], name, overrides), find_evaluation_set([str(tmp_path)], name)
    assert (data.layout, data.classes, data.templates) == (
        layout,
        tuple(f"small {each}" for each in CIFAR10),
        ("one {c}", "two {c}"),
    )
    assert (data.classes_source, data.templates_source) == tuple(overrides.values())
    assert sorted(other.classes) == sorted(CIFAR10)
    assert (len(other.templates), len({data.digest, other.digest})) == (80 if name == "mine" else 18, 2)
    for file, lines, words in (
        (CLASSES_FILE, CIFAR10[:9], "names.txt names 9 classes"),
        (TEMPLATES_FILE, ["one"], 'templates.txt has a template without "{c}"'),
    ):
        write_lines(files[file], lines)
        assert words in error_of(find_evaluation_set, [str(tmp_path)], name, {file: overrides[file]}, kind=DataError)


def test_the_first_root_that_has_a_set_is_used(tmp_path):
    (tmp_path / "none" / "eurosat" / "2750" / "Forest").mkdir(parents=True)  # torchvision's layout, which has no test split
    for folder in ("one", "two"):
        write_one(tmp_path / folder, "vtab/cifar10")
    write_one(tmp_path / "two", "vtab/eurosat")
    none, one, two = (str(tmp_path / folder) for folder in ("none", "one", "two"))
    assert find_evaluation_set([one, two], "vtab/cifar10").url == f"{one}/wds_vtab-cifar10"
    assert find_evaluation_set([two, one], "vtab/cifar10").url == f"{two}/wds_vtab-cifar10"
    assert find_evaluation_set([none, one, two], "vtab/eurosat").url == f"{two}/wds_vtab-eurosat"
    assert "has no test split" in error_of(find_evaluation_set, [none, one], "vtab/eurosat", kind=ConfigError)
    (tmp_path / "one" / "wds_vtab-cifar10" / "test" / "0.tar").unlink()
    assert "0.tar is missing" in error_of(find_evaluation_set, [one, two], "vtab/cifar10", kind=DataError), "not skipped"


def test_a_set_of_the_users_own_is_found_by_its_folders_name(tmp_path):
    for name in ("my/birds", "pets2"):
        write_wds(tmp_path, name, [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
    assert find_evaluation_set([str(tmp_path)], "my/birds").url == f"{tmp_path}/wds_my-birds"
    assert find_evaluation_set([str(tmp_path)], "wds_pets2").url == f"{tmp_path}/wds_pets2"
    (tmp_path / "empty").mkdir()
    message = error_of(find_evaluation_set, [str(tmp_path)], "empty")
    assert message.startswith(f"empty: not found below {tmp_path}; looked for wds_empty, wds_empty_test, empty; ")


def write_parquet(folder: Path, classes: Sequence[str]) -> Path:
    table = build_table([encoded(picture(0), "PNG")], {"label": [1]}, {"label": classes})
    return write(folder / "data", "test-00000-of-00001.parquet", table).parent


def write_cifar_files(folder: Path, classes: Sequence[str]) -> Path:
    write_cifar(folder, classes=classes)
    return folder


def write_with_class_list(folder: Path, classes: Sequence[str]) -> Path:
    write_classes(folder, CIFAR10)
    write_lines(folder / "classnames.txt", classes)
    return folder


LAYOUTS = {
    "wds": lambda folder, classes: write_wds(folder, "cifar10", [picture(0)], labels=[1], classes=classes),
    "torchvision": write_cifar_files,
    "parquet": write_parquet,
    "image folder": write_with_class_list,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_classes_in_another_order_are_rejected_in_every_layout(tmp_path, layout):
    folder = LAYOUTS[layout](tmp_path / "right", [name.title() for name in CIFAR10])
    assert open_evaluation_set("vtab/cifar10", str(folder)).layout == layout
    swapped = (*CIFAR10[:3], "deer", "cat", *CIFAR10[5:])
    for place, classes, pair in (
        ("reversed", CIFAR10[::-1], "class 0 is 'truck' instead of 'airplane'"),
        ("shifted", CIFAR10[1:] + CIFAR10[:1], "class 0 is 'automobile' instead of 'airplane'"),
        ("swapped", swapped, "class 3 is 'deer' instead of 'cat'"),
    ):
        folder = LAYOUTS[layout](tmp_path / place, classes)
        assert pair in error_of_set("vtab/cifar10", folder, DataError)


def test_folders_that_do_not_exist_or_have_no_known_layout(tmp_path):
    assert "cars: not found" in error_of(find_evaluation_set, [str(tmp_path)], "cars", kind=ConfigError)
    assert f"{tmp_path}/no: no such folder" in error_of(find_evaluation_set, [str(tmp_path / "no")], "cars", kind=ConfigError)
    assert "data_roots" in error_of(find_evaluation_set, [], "cars", kind=ConfigError)
    (tmp_path / "a.txt").write_text("x")
    message = error_of_set("vtab/cifar10", tmp_path, ConfigError)
    assert message.startswith(f"vtab/cifar10: {tmp_path} has no known layout (1 other files, such as a.txt); ")
    assert "no such folder" in error_of_set("mine", tmp_path / "no", ConfigError)


def test_a_set_of_another_task(tmp_path):
    folder = write_wds(tmp_path / "a", "mscoco_captions", [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
    assert "is a set for zeroshot_retrieval" in error_of_set("mscoco_captions", folder, DataError)
    write_image(tmp_path / "b" / "cat" / "0.png", 0)
    assert "no known layout" in error_of_set("flickr30k", tmp_path / "b", ConfigError)


def test_paths_may_be_relative(tmp_path, monkeypatch):
    folder = write_one(tmp_path, "vtab/cifar10")
    monkeypatch.chdir(tmp_path)
    for data in (open_evaluation_set("vtab/cifar10", "wds_vtab-cifar10/"), find_evaluation_set(["."], "vtab/cifar10")):
        assert data.url == str(folder)
        assert len(read(data)) == 10
    assert find_evaluation_set([f"file://{tmp_path}"], "vtab/cifar10").url == str(folder)


def test_links_to_tars_as_in_hugging_faces_cache_and_to_classes_and_images(tmp_path):
    real, snapshot = write_one(tmp_path / "real", "vtab/cifar10", samples_per_shard=4), tmp_path / "snapshots" / "main"
    (snapshot / "test").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in real.rglob("*") if path.is_file())):
        blob = path.rename(tmp_path / f"{number:040x}")
        (snapshot / path.relative_to(real)).symlink_to(blob)
    data = open_evaluation_set("vtab/cifar10", str(snapshot))
    assert data.num_files == 3
    assert [sample.key for sample in read(data)] == [f"{i // 4}.tar/s{i:07d}" for i in range(10)]
    (tmp_path / "mine").mkdir()
    for seed, name in enumerate(("a", "b")):
        write_image(tmp_path / "there" / name / "0.jpg", seed)
        (tmp_path / "mine" / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "b" / "link.jpg").symlink_to(tmp_path / "there" / "a" / "0.jpg")
    (tmp_path / "there" / "b" / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "there" / "b" / "circle").symlink_to(tmp_path / "there" / "b")
    for data in (open_evaluation_set("mine", str(tmp_path / "mine")), open_image_set(str(tmp_path / "mine"))):
        assert [sample.key for sample in read(data)] == ["a/0.jpg", "b/0.jpg", "b/gone.jpg", "b/link.jpg"]
        assert [sample.cause for sample in read(data) if isinstance(sample, RejectedSample)] == ["shard_missing"]


def test_the_listing(tmp_path):
    write_one(tmp_path, "vtab/cifar10", samples_per_shard=4)
    (write_one(tmp_path, "vtab/pets") / "test" / "0.tar").unlink()
    header, *lines = render_listing([str(tmp_path)], dict.fromkeys(KNOWN_SETS, "")).splitlines()
    assert open_evaluation_set("imagenet1k", str(write_one(tmp_path / "other", "imagenet1k"))).warnings == ()  # has two "missile"
    assert header.split() == ["set", "where", "layout", "files", "size", "classes", "images", "metric"]
    rows = {line.split()[0]: line.split() for line in lines[:14]}
    assert list(rows) == list(KNOWN_SETS)
    assert rows["vtab/cifar10"][1:4] == [f"{tmp_path}/wds_vtab-cifar10", "wds", "3"]
    assert rows["vtab/cifar10"][5:] == ["kB", "10", "10,000", "acc1"]
    assert rows["cars"][1:] == ["not", "found", "196", "8,041", "acc1"]
    assert rows["vtab/pets"][1] == "rejected"
    notes = {line.split(": ")[1]: line for line in lines[14:]}
    assert list(notes) == [name for name in KNOWN_SETS if name != "vtab/cifar10"]
    assert notes["vtab/pets"].startswith("rejected: vtab/pets: ")
    assert f"not found below {tmp_path}; looked for wds_cars, wds_cars_test, stanford_cars, cars; " in notes["cars"]
    assert f"hf download clip-benchmark/wds_cars --repo-type dataset --local-dir {tmp_path}/wds_cars" in notes["cars"]
    own = write_wds(tmp_path / "own", "mine", [picture(0)], labels=[0], classes=["a", "a"], templates=["{c}"])
    header, *lines = render_listing([str(tmp_path)], {"mine": str(own), "vtab/cifar10": "", "birds": ""}).splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["mine", str(own)],
        ["vtab/cifar10", f"{tmp_path}/wds_vtab-cifar10"],
        ["birds", "not"],
    ]
    assert [line.partition(":")[0] for line in lines[3:]] == ["warning", "not found"]


@pytest.mark.s3
def test_sets_in_s3(s3_url, tmp_path):
    write_one(tmp_path, "vtab/cifar10")
    write_retrieval(tmp_path, "flickr30k", 4)
    storage.put_folder(tmp_path, f"{s3_url}/found/sets")
    data = find_evaluation_set([f"{s3_url}/found/sets"], "vtab/cifar10")
    assert (data.url, data.classes) == (f"{s3_url}/found/sets/wds_vtab-cifar10", CIFAR10)
    storage.write_bytes(f"{data.url}/test/0.tar", (tmp_path / "wds_vtab-cifar10" / "test" / "0.tar").read_bytes())
    assert find_evaluation_set([f"{s3_url}/found/sets"], "vtab/cifar10").digest == data.digest, "the same ETag"
    storage.write_bytes(f"{data.url}/test/0.tar", (tmp_path / "wds_vtab-cifar10" / "test" / "0.tar").read_bytes()[:-1] + b"x")
    assert find_evaluation_set([f"{s3_url}/found/sets"], "vtab/cifar10").digest != data.digest, "the same size"
    table = render_listing([f"{s3_url}/found/sets", str(tmp_path)], {"vtab/cifar10": "", "flickr30k": "", "cars": ""})
    assert [table.count(f"{s3_url}/found/sets/wds_{name} ") for name in ("vtab-cifar10", "flickr30k", "cars")] == [1, 1, 0]
    assert f"{s3_url}/found/other: no such folder" in error_of(find_evaluation_set, [f"{s3_url}/found/other"], "vtab/cifar10")
