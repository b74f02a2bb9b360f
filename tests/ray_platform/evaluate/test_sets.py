"""The published sets match CLIP_benchmark's lists; also covers class order, image counts and digests."""

import json
import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest

from ray_platform.contracts import DataError
from ray_platform.evaluate.discovery import open_evaluation_set
from ray_platform.evaluate.sets import (
    KNOWN_SETS,
    PAPER_SETS,
    PUBLISHED,
    PUBLISHED_RETRIEVAL,
    PUBLISHED_SOURCES,
    check_counts,
    class_texts,
    to_published_names,
)
from tests.support.evaluation_sets import CIFAR10, error_of, picture, write_one, write_wds

CLIP_BENCHMARK = Path(find_spec("clip_benchmark").origin).parent / "datasets"
TEMPLATES = json.loads((CLIP_BENCHMARK / "en_zeroshot_classification_templates.json").read_text())
CLASS_NAMES = json.loads((CLIP_BENCHMARK / "en_classnames.json").read_text())
# Classes, images and metric from DataComp's tasklist.yml.
TWELVE = {
    "vtab/cifar10": (10, 10000, "acc1"),
    "vtab/cifar100": (100, 10000, "acc1"),
    "vtab/caltech101": (102, 6085, "mean_per_class_recall"),
    "cars": (196, 8041, "acc1"),
    "vtab/flowers": (102, 6149, "mean_per_class_recall"),
    "food101": (101, 25250, "acc1"),
    "sun397": (397, 108754, "acc1"),
    "vtab/dtd": (47, 1880, "acc1"),
    "fgvc_aircraft": (100, 3333, "mean_per_class_recall"),
    "vtab/pets": (37, 3669, "mean_per_class_recall"),
    "vtab/eurosat": (10, 5400, "acc1"),
    "imagenet1k": (1000, 50000, "acc1"),
}
HUGGING_FACE_EUROSAT = [
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential", "River",
    "SeaLake",
]  # fmt: skip


def test_the_sets_are_those_of_the_paper():
    assert {name: (k.num_classes, k.num_images, k.main_metric) for name, k in KNOWN_SETS.items() if k.num_classes} == TWELVE
    assert list(TWELVE) == list(PAPER_SETS)
    retrieval = {name: known.num_images for name, known in KNOWN_SETS.items() if known.task == "zeroshot_retrieval"}
    assert retrieval == {"flickr30k": 1000, "mscoco_captions": 5000}
    listed = re.search(r"^all_imagenet_wordnet_ids = \[(.*)\]", (CLIP_BENCHMARK / "builder.py").read_text(), re.MULTILINE)[1]
    assert list(KNOWN_SETS["imagenet1k"].class_folders) == re.findall(r"n\d{8}", listed)


@pytest.mark.parametrize("name", PAPER_SETS)
def test_templates_and_classes_are_clip_benchmarks(name):
    known, short = KNOWN_SETS[name], name.rpartition("/")[2]
    assert list(known.templates) == TEMPLATES[short]
    # Caltech has two class orders; this is VTAB's. The names of other sets are those of the datasets.
    expected = CLASS_NAMES.get("caltech101_vtab" if name == "vtab/caltech101" else short)
    assert expected is None or list(known.classes) == expected
    assert len(known.classes) == known.num_classes
    assert len(set(known.classes)) == known.num_classes or name == "imagenet1k"  # which has two "missile"
    # The original files list these classes in the order of their names.
    joined = [one.replace(" ", "_") if name == "food101" else one for one in known.classes]
    assert name not in ("vtab/cifar100", "food101", "vtab/dtd", "fgvc_aircraft") or joined == sorted(joined)


def test_published_figures_have_their_means():
    assert list(PUBLISHED)[:2] == ["CLIP ViT-B/32", "CLIP ViT-L/14"]  # which have columns of their own in reports
    for model, expected in (("CLIP ViT-B/32", 0.649), ("CLIP ViT-L/14", 0.750)):
        assert PUBLISHED[model]["mean"] == pytest.approx(expected, abs=0.0005)
    for figures in PUBLISHED.values():
        assert list(figures) == [*PAPER_SETS, "mean"]
        assert mean(figures[name] for name in PAPER_SETS) == pytest.approx(figures["mean"], abs=1e-9)
    assert [name for names in PUBLISHED_SOURCES.values() for name in names] == list(PUBLISHED) == list(PUBLISHED_RETRIEVAL)
    for figures in (figures for sets in PUBLISHED_RETRIEVAL.values() for figures in sets.values()):
        for way in ("image", "text"):
            recalls = [figures[f"{way}_retrieval_recall@{k}"] for k in (1, 5, 10)]
            assert recalls == sorted(recalls)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("vtab/eurosat", HUGGING_FACE_EUROSAT),
        ("vtab/pets", [n.lower().replace(" ", "_") for n in CLASS_NAMES["pets"]]),
        ("vtab/flowers", [flower.title() for flower in CLASS_NAMES["flowers"]]),
        ("food101", [name.replace(" ", "_") for name in KNOWN_SETS["food101"].classes]),
        ("sun397", [name.replace(" outdoor", "/outdoor").replace(" ", "_") for name in KNOWN_SETS["sun397"].classes]),
        ("cars", [name.replace("/", "-") for name in KNOWN_SETS["cars"].classes]),  # as the name of a folder
        ("vtab/cifar100", [name.replace("_", " ").replace("crab", "cra") for name in KNOWN_SETS["vtab/cifar100"].classes]),
        ("vtab/caltech101", ["airplanes" if name == "airplane" else name for name in CLASS_NAMES["caltech101_vtab"]]),
        ("imagenet1k", [f"{name}, any more names" for name in CLASS_NAMES["imagenet1k"]]),
    ],
)
def test_other_spellings_in_the_same_order_become_the_published_names(name, own):
    assert to_published_names(name, own, "names") == KNOWN_SETS[name].classes


def test_the_names_of_a_set_that_is_not_known_stay_as_they_are():
    assert to_published_names("mine", ["a_b", "c"], "names") == ("a_b", "c")


@pytest.mark.parametrize(
    ("name", "pair"), [("food101", ("cheese plate", "cheesecake")), ("sun397", ("jail indoor", "jail cell"))]
)
def test_two_classes_that_copies_have_in_either_order(name, pair):
    classes = list(KNOWN_SETS[name].classes)
    assert tuple(classes[classes.index(pair[0]) :][:2]) == pair
    swapped = moved(classes, classes.index(pair[0]), classes.index(pair[1]))
    assert to_published_names(name, [one.replace(" ", "_") for one in swapped], "names") == tuple(swapped)
    assert class_texts(name, swapped, "names", {}).classes == tuple(swapped)


def moved(classes: Sequence[str], first: int, second: int) -> list[str]:
    """Return classes with two of them swapped."""
    places = list(range(len(classes)))
    places[first], places[second] = second, first
    return [classes[place] for place in places]


@pytest.mark.parametrize("name", PAPER_SETS)
def test_another_order_of_the_classes_is_rejected(name):
    """In every layout and spelling: all of them pass their classes to `class_texts` or `to_published_names`."""
    published = KNOWN_SETS[name].classes
    last = len(published) - 1
    for spell, check in ((str, class_texts), (str.upper, to_published_names), (lambda name: name.replace(" ", "_"), class_texts)):
        classes = [spell(one) for one in published]
        more = ({},) if check is class_texts else ()
        check(name, classes, "/data/names", *more)
        for wrong, first in (
            (classes[1:] + classes[:1], 0),
            (moved(classes, last - 1, last), last - 1),
            (moved(classes, 1, last // 2), 1),
        ):
            message = error_of(check, name, wrong, "/data/names", *more, kind=DataError)
            assert message.startswith(f"{name}: /data/names has its classes in another order than the published set: ")
            assert f": class {first} is {wrong[first]!r} instead of {published[first]!r}, and " in message


@pytest.mark.parametrize(
    ("name", "own", "words"),
    [
        ("vtab/caltech101", CLASS_NAMES["caltech101"], "class 0 is 'background' instead of 'accordion'"),
        ("vtab/flowers", sorted(CLASS_NAMES["flowers"]), "class 0 is 'air plant' instead of 'pink primrose'"),
        ("vtab/eurosat", HUGGING_FACE_EUROSAT[::-1], "class 0 is 'SeaLake' instead of 'annual crop land'"),
        ("vtab/eurosat", moved(HUGGING_FACE_EUROSAT, 1, 8), "class 1 is 'River' instead of 'forest', and 2 are"),
        (
            "vtab/flowers",
            [f"{label + 1}" for label in range(102)],
            "has other names than the published set, such as '1' for 'pink",
        ),
    ],
)
def test_lists_of_other_sources_in_another_order_or_with_other_names(name, own, words):
    assert words in error_of(to_published_names, name, own, "/data/names", kind=DataError)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("mine", [], "mine: f.txt has no class names"),
        ("mine", ["a", "", "b"], "mine: f.txt has an empty name for class 1"),
        ("vtab/cifar10", CIFAR10[:9], "vtab/cifar10: f.txt names 9 classes, but the set has 10"),
    ],
)
def test_class_lists_that_cannot_be_the_sets(name, classes, message):
    assert message in error_of(class_texts, name, classes, "f.txt", {}, kind=DataError)


def test_the_number_of_images_is_checked(tmp_path):
    data = open_evaluation_set("vtab/cifar10", str(write_one(tmp_path, "vtab/cifar10")))
    check_counts(data, 10_000, 0, allow_short=False)
    check_counts(data, 9_990, 10, allow_short=True)
    for num_rejected, words in ((0, ""), (10, " and 10 could not be used")):
        message = error_of(check_counts, data, 9_990, num_rejected, allow_short=False, kind=DataError)
        assert f"9,990 images were read{words}, but the set has 10,000: {data.url} is incomplete" in message
    for num_read, num_rejected, allow_short in ((10_001, 0, True), (9_999, 2, False)):
        message = error_of(check_counts, data, num_read, num_rejected, allow_short, kind=DataError)
        assert f"{num_read:,} images were read" in message
        assert "another split" in message
    own = write_wds(tmp_path, "mine", [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
    check_counts(open_evaluation_set("mine", str(own)), 1, 0, allow_short=False)  # the expected number of images is unknown


def test_the_digest_tells_other_data_but_not_another_place(tmp_path):
    def digest(place: str, height: int = 24, **fields) -> str:
        images = [picture(0), picture(1, height)]
        values = {"labels": [0, 1], "classes": ["a", "b"], "templates": ["a {c}"]} | fields
        return digest_at_time_0(write_wds(tmp_path / place, "mine", images, **values))

    first = digest("one")
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert digest("two/deeper") == first
    others = {
        digest("classes", classes=["a", "c"]),
        digest("templates", templates=["the {c}"]),
        digest("shards", samples_per_shard=1),
        digest("size", height=200),
    }
    assert len(others | {first}) == 5


def digest_at_time_0(folder: Path) -> str:
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    return open_evaluation_set("mine", str(folder)).digest
