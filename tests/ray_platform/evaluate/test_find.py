import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.discovery import find_evaluation_set, find_sets, listing, open_evaluation_set
from ray_platform.evaluate.sets import PAPER_SETS, KNOWN_SETS
from ray_platform.evaluate.samples import read_slice
from tests.support.evaluation_sets import CIFAR10, picture, write_all_twelve, write_one, write_retrieval, write_wds

# What DataComp's download_evalsets.py calls its folders of the twelve. Its CIFAR-10 is not named after VTAB.
DATACOMP = {
    "vtab/cifar10": "wds_cifar10_test",
    "vtab/cifar100": "wds_vtab-cifar100_test",
    "vtab/caltech101": "wds_vtab-caltech101_test",
    "cars": "wds_cars_test",
    "vtab/flowers": "wds_vtab-flowers_test",
    "food101": "wds_food101_test",
    "sun397": "wds_sun397_test",
    "vtab/dtd": "wds_vtab-dtd_test",
    "fgvc_aircraft": "wds_fgvc_aircraft_test",
    "vtab/pets": "wds_vtab-pets_test",
    "vtab/eurosat": "wds_vtab-eurosat_test",
    "imagenet1k": "wds_imagenet1k_test",
}


def refused(kind, call, *arguments) -> str:
    with pytest.raises(kind) as raised:
        call(*arguments)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    return root, write_all_twelve(root)


def test_all_twelve_are_found(twelve):
    root, folders = twelve
    found = find_sets([str(root)], PAPER_SETS)
    assert list(found) == list(PAPER_SETS)
    assert {name: one.url for name, one in found.items()} == {name: str(folder) for name, folder in folders.items()}
    for name, one in found.items():
        assert sum(len(read_slice(part)) for part in one.slices) == KNOWN_SETS[name].num_classes


def test_datacomps_names(twelve, tmp_path):
    _, folders = twelve
    for name, called in DATACOMP.items():
        (tmp_path / called).symlink_to(folders[name])
    found = find_sets([str(tmp_path)], PAPER_SETS)
    assert {name: one.url for name, one in found.items()} == {name: str(tmp_path / called) for name, called in DATACOMP.items()}


def test_other_sets_of_the_same_short_name_are_left_alone(tmp_path):
    """wds_caltech101 and wds_eurosat are CLIP_benchmark's too, of all images and with another order of the classes."""
    for name in ("caltech101", "eurosat"):
        write_wds(tmp_path, name, [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
        assert "not found below" in refused(ConfigError, find_evaluation_set, [str(tmp_path)], f"vtab/{name}")


def test_the_first_root_that_has_a_set_counts(tmp_path):
    for place, count in (("one", 1), ("two", 2)):
        write_one(tmp_path / place, "vtab/cifar10", images_a_class=count)
    write_one(tmp_path / "two", "vtab/eurosat")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert find_evaluation_set([one, two], "vtab/cifar10").url == f"{one}/wds_vtab-cifar10"
    assert find_evaluation_set([two, one], "vtab/cifar10").url == f"{two}/wds_vtab-cifar10"
    assert find_evaluation_set([one, two], "vtab/eurosat").url == f"{two}/wds_vtab-eurosat"


def test_an_export_counts_before_other_layouts_and_one_without_the_split_is_no_hindrance(tmp_path):
    (tmp_path / "one" / "eurosat" / "2750" / "Forest").mkdir(parents=True)
    write_one(tmp_path / "two", "vtab/eurosat")
    roots = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert find_evaluation_set(roots, "vtab/eurosat").layout == "wds"
    assert "has no test split" in refused(ConfigError, find_evaluation_set, roots[:1], "vtab/eurosat")


def test_a_broken_set_is_not_passed_over(tmp_path):
    broken = write_one(tmp_path / "one", "vtab/cifar10")
    write_one(tmp_path / "two", "vtab/cifar10")
    (broken / "test" / "0.tar").unlink()
    roots = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert "0.tar is missing" in refused(DataError, find_evaluation_set, roots, "vtab/cifar10")


def test_an_own_set_by_its_folders_name(tmp_path):
    for name in ("my/birds", "pets2"):
        write_wds(tmp_path, name, [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
    assert find_evaluation_set([str(tmp_path)], "my/birds").url == f"{tmp_path}/wds_my-birds"
    assert find_evaluation_set([str(tmp_path)], "wds_pets2").url == f"{tmp_path}/wds_pets2"
    (tmp_path / "empty").mkdir()
    assert refused(ConfigError, find_evaluation_set, [str(tmp_path)], "empty") == (
        f"empty: not found below {tmp_path}; looked for wds_empty, wds_empty_test, empty; correct the roots, or leave the set out"
    )


def test_sets_that_are_nowhere(tmp_path):
    write_one(tmp_path, "vtab/cifar10")
    (tmp_path / "other").mkdir()
    roots = [str(tmp_path), str(tmp_path / "other")]
    assert refused(ConfigError, find_sets, roots, ["vtab/cifar10", "cars"]) == (
        f"cars: not found below {roots[0]}, {roots[1]}; looked for wds_cars, wds_cars_test, stanford_cars, cars; "
        "correct the roots, or leave the set out"
    )
    assert refused(ConfigError, find_sets, roots, ["cars", "vtab/cifar10", "flickr30k"]) == (
        f"cars, flickr30k: not found below {roots[0]}, {roots[1]}; the first one was looked for as wds_cars, wds_cars_test, "
        "stanford_cars, cars; correct the roots, or leave these sets out"
    )
    assert refused(ConfigError, find_sets, [str(tmp_path / "no")], ["cars"]) == (
        f"{tmp_path}/no: no such folder; name the folder or s3:// URL that has the sets"
    )
    assert refused(ConfigError, find_sets, [], ["cars"]) == (
        "cars: there is no folder to look in; name the folder or s3:// URL that has the sets"
    )


def test_a_folder_in_no_layout(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert refused(ConfigError, open_evaluation_set, "vtab/cifar10", str(tmp_path)) == (
        f"vtab/cifar10: {tmp_path} has no layout that is known: test/*.tar as CLIP_benchmark exports them, torchvision's "
        "folders, test-*.parquet, or a subfolder of images a class; there are 1 other files in it, such as a.txt"
    )
    assert refused(ConfigError, open_evaluation_set, "mine", str(tmp_path / "no")) == (
        f"mine: {tmp_path}/no: no such folder; correct the path"
    )


def test_a_set_of_another_task(tmp_path):
    folder = write_wds(tmp_path / "a", "mscoco_captions", [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
    assert "is a set for zeroshot_retrieval" in refused(DataError, open_evaluation_set, "mscoco_captions", str(folder))
    (tmp_path / "b" / "cat").mkdir(parents=True)
    (tmp_path / "b" / "cat" / "0.png").write_bytes(b"x")
    assert "has no layout that is known" in refused(ConfigError, open_evaluation_set, "flickr30k", str(tmp_path / "b"))


def test_paths_may_be_relative(tmp_path, monkeypatch):
    folder = write_one(tmp_path, "vtab/cifar10")
    monkeypatch.chdir(tmp_path)
    for found in (open_evaluation_set("vtab/cifar10", "wds_vtab-cifar10/"), find_evaluation_set(["."], "vtab/cifar10")):
        assert found.url == str(folder)
        assert found.slices[0].url == f"{folder}/test/0.tar"
    assert find_evaluation_set([f"file://{tmp_path}"], "vtab/cifar10").url == str(folder)


def test_the_listing(tmp_path):
    write_one(tmp_path, "vtab/cifar10", samples_a_shard=4)
    write_retrieval(tmp_path, "flickr30k", 2)
    broken = write_one(tmp_path, "vtab/pets")
    (broken / "test" / "0.tar").unlink()
    lines = listing([str(tmp_path)]).splitlines()
    assert lines[0].split() == ["set", "where", "layout", "files", "size", "classes", "images", "metric"]
    assert [line.split()[0] for line in lines[1:15]] == list(KNOWN_SETS)
    rows = {line.split()[0]: line.split() for line in lines[1:15]}
    assert rows["vtab/cifar10"] == [
        "vtab/cifar10", f"{tmp_path}/wds_vtab-cifar10", "wds", "3", *rows["vtab/cifar10"][4:6], "10", "10,000", "acc1",
    ]  # fmt: skip
    assert rows["vtab/cifar10"][5] == "kB"
    assert rows["cars"] == ["cars", "not", "found", "196", "8,041", "acc1"]
    assert rows["flickr30k"][-2:] == ["1,000", "image_retrieval_recall@1"]
    assert rows["vtab/pets"][1] == "refused"
    assert lines[15:] == [
        f"refused: vtab/pets: of the 1 shards that {broken}/test/nshards.txt counts, {broken}/test/0.tar is missing; "
        "fetch the set again"
    ]


@pytest.mark.s3
def test_sets_in_s3(s3_url, tmp_path):
    write_one(tmp_path, "vtab/cifar10")
    write_retrieval(tmp_path, "flickr30k", 4)
    storage.put_folder(tmp_path, f"{s3_url}/found/sets")
    found = find_sets([f"{s3_url}/found/sets"], ["vtab/cifar10", "flickr30k"])
    assert {name: one.url for name, one in found.items()} == {
        "vtab/cifar10": f"{s3_url}/found/sets/wds_vtab-cifar10", "flickr30k": f"{s3_url}/found/sets/wds_flickr30k",
    }  # fmt: skip
    assert found["vtab/cifar10"].classes == CIFAR10
    assert found["vtab/cifar10"].digest == find_evaluation_set([str(tmp_path)], "vtab/cifar10").digest
    table = listing([f"{s3_url}/found/sets", str(tmp_path)])
    assert table.count(f"{s3_url}/found/sets/wds_") == 2
    assert table.count("not found") == 12
    assert f"{s3_url}/found/other: no such folder" in refused(ConfigError, find_sets, [f"{s3_url}/found/other"], ["vtab/cifar10"])
