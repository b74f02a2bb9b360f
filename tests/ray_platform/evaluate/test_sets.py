import json
import re
from dataclasses import replace
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
    check_counts,
    class_texts,
    to_published_names,
)
from tests.support.evaluation_sets import CIFAR10, error_of, picture, write_one, write_retrieval, write_wds

CLIP_BENCHMARK = Path(find_spec("clip_benchmark").origin).parent / "datasets"
TEMPLATES = json.loads((CLIP_BENCHMARK / "en_zeroshot_classification_templates.json").read_text())
CLASS_NAMES = json.loads((CLIP_BENCHMARK / "en_classnames.json").read_text())
HUGGING_FACE_EUROSAT = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential", "River",
    "SeaLake",
)  # fmt: skip


def short(name: str) -> str:
    return name.rpartition("/")[2]


# ------------------------------------------------------------------------------------------------------------- registry


def test_the_twelve_are_those_of_the_paper():
    """Classes, images and templates, as EVALUATION.md has them."""
    counts = {
        name: (KNOWN_SETS[name].num_classes, KNOWN_SETS[name].num_images, len(KNOWN_SETS[name].templates)) for name in PAPER_SETS
    }
    assert counts == {
        "vtab/cifar10": (10, 10000, 18),
        "vtab/cifar100": (100, 10000, 18),
        "vtab/caltech101": (102, 6085, 34),
        "cars": (196, 8041, 8),
        "vtab/flowers": (102, 6149, 1),
        "food101": (101, 25250, 1),
        "sun397": (397, 108754, 2),
        "vtab/dtd": (47, 1880, 8),
        "fgvc_aircraft": (100, 3333, 2),
        "vtab/pets": (37, 3669, 1),
        "vtab/eurosat": (10, 5400, 3),
        "imagenet1k": (1000, 50000, 80),
    }
    assert list(counts) == list(PAPER_SETS)
    per_class = {name for name in PAPER_SETS if KNOWN_SETS[name].main_metric == "mean_per_class_recall"}
    assert per_class == {"vtab/caltech101", "vtab/flowers", "fgvc_aircraft", "vtab/pets"}
    assert {KNOWN_SETS[name].main_metric for name in set(PAPER_SETS) - per_class} == {"acc1"}
    retrieval = {name: known.num_images for name, known in KNOWN_SETS.items() if known.task == "zeroshot_retrieval"}
    assert retrieval == {"flickr30k": 1000, "mscoco_captions": 5000}


@pytest.mark.parametrize("name", PAPER_SETS)
def test_templates_and_classes_are_clip_benchmarks(name):
    known = KNOWN_SETS[name]
    assert list(known.templates) == TEMPLATES[short(name)]
    assert all("{c}" in template for template in known.templates)
    if known.classes:
        # Of the two orders of Caltech's classes, that of VTAB.
        assert list(known.classes) == CLASS_NAMES["caltech101_vtab" if name == "vtab/caltech101" else short(name)]
        assert len(known.classes) == known.num_classes
    else:
        assert short(name) not in CLASS_NAMES  # they come with the data


def test_imagenet_folders_are_its_wordnet_ids():
    listed = re.search(r"^all_imagenet_wordnet_ids = \[(.*)\]", (CLIP_BENCHMARK / "builder.py").read_text(), re.MULTILINE)[1]
    assert list(KNOWN_SETS["imagenet1k"].class_folders) == re.findall(r"n\d{8}", listed)
    assert list(KNOWN_SETS["imagenet1k"].class_folders) == sorted(set(KNOWN_SETS["imagenet1k"].class_folders))
    assert len(set(KNOWN_SETS["imagenet1k"].classes)) == 998  # two names stand for two classes each


def test_published_figures_have_their_means():
    assert set(PUBLISHED) == {"CLIP ViT-B/32", "CLIP ViT-L/14"}
    for model, expected in (("CLIP ViT-B/32", 0.649), ("CLIP ViT-L/14", 0.750)):
        figures = PUBLISHED[model]
        assert figures["mean"] == expected
        assert list(figures) == [*PAPER_SETS, "mean"]
        assert mean(figures[name] for name in PAPER_SETS) == pytest.approx(expected, abs=0.0005)
    recalls = PUBLISHED_RETRIEVAL["CLIP ViT-L/14"]
    assert recalls["flickr30k"]["image_retrieval_recall@1"] == 0.650
    assert recalls["mscoco_captions"]["text_retrieval_recall@10"] == 0.866
    for figures in recalls.values():
        for way in ("image", "text"):
            at = [figures[f"{way}_retrieval_recall@{k}"] for k in (1, 5, 10)]
            assert at == sorted(at)


# --------------------------------------------------------------------------------------------------------- class orders


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("vtab/eurosat", HUGGING_FACE_EUROSAT),
        ("vtab/pets", [breed.lower().replace(" ", "_") for breed in CLASS_NAMES["pets"]]),
        ("vtab/flowers", [flower.title() for flower in CLASS_NAMES["flowers"]]),
    ],
)
def test_other_names_in_the_same_order_become_the_published_ones(name, own):
    assert to_published_names(name, own, "names") == KNOWN_SETS[name].classes


@pytest.mark.parametrize(
    ("name", "own", "strange"),
    [
        ("vtab/caltech101", CLASS_NAMES["caltech101"], ("'background' for 'accordion'", "66 in all")),
        ("vtab/flowers", sorted(CLASS_NAMES["flowers"]), ("'air plant' for 'pink primrose'", "99 in all")),
        ("vtab/pets", CLASS_NAMES["pets"][1:] + CLASS_NAMES["pets"][:1], ("'American Bulldog' for 'Abyssinian'", "33 in all")),
        ("imagenet1k", [*CLASS_NAMES["imagenet1k"][1:], "tench"], ("'goldfish' for 'tench'", "873 in all")),
    ],
)
def test_another_order_of_the_classes_is_rejected(name, own, strange):
    message = error_of(to_published_names, name, own, "/data/names", kind=DataError)
    assert message.startswith(f"{name}: /data/names has its classes in another order than the published set")
    assert all(words in message for words in strange)


def test_names_that_come_with_the_data_are_written_as_clip_benchmark_writes_them():
    assert to_published_names("food101", ["apple_pie", "waffles"], "") == ("apple pie", "waffles")
    assert to_published_names("sun397", ["abbey", "apartment_building/outdoor"], "") == ("abbey", "apartment building outdoor")
    assert to_published_names("vtab/cifar100", ["aquarium_fish"], "") == ("aquarium_fish",)
    assert to_published_names("mine", ["a_b"], "") == ("a_b",)


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


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.fixture
def cifar(tmp_path):
    return open_evaluation_set("vtab/cifar10", str(write_one(tmp_path, "vtab/cifar10")))


def test_the_number_of_images_is_checked(cifar, tmp_path):
    check_counts(cifar, 10_000, 0, allow_short=False)
    check_counts(cifar, 9_990, 10, allow_short=True)
    for num_rejected, words in ((0, ""), (10, " and 10 could not be used")):
        message = error_of(check_counts, cifar, 9_990, num_rejected, allow_short=False, kind=DataError)
        assert f"9,990 images were read{words}, but the set has 10,000: {cifar.url} is incomplete" in message
    for num_read, num_rejected in ((10_001, 0), (9_999, 2)):
        for allow_short in (False, True):
            message = error_of(check_counts, cifar, num_read, num_rejected, allow_short, kind=DataError)
            assert f"{num_read:,} images were read" in message
            assert "another split" in message
    own = write_wds(tmp_path, "mine", [picture(0)], labels=[0], classes=["a"], templates=["{c}"])
    check_counts(open_evaluation_set("mine", str(own)), 1, 0, allow_short=False)  # nothing is known about its number


# --------------------------------------------------------------------------------------------------------------- digest


def test_the_digest_tells_other_data_but_not_another_place(tmp_path):
    def digest(place: str, images, **fields) -> str:
        values = {"labels": [0, 1], "classes": ["a", "b"], "templates": ["a {c}"]} | fields
        return open_evaluation_set("mine", str(write_wds(tmp_path / place, "mine", images, **values))).digest

    images = [picture(0), picture(1)]
    first = digest("one", images)
    assert re.fullmatch("[0-9a-f]{16}", first)
    assert digest("two/deeper", images) == first
    others = {
        digest("classes", images, classes=["a", "c"]),
        digest("templates", images, templates=["the {c}"]),
        digest("shards", images, samples_per_shard=1),
        digest("size", [picture(0), picture(1, height=200)]),
    }
    assert len(others | {first}) == 5


def test_the_digest_does_not_depend_on_the_cut(tmp_path):
    found = open_evaluation_set("flickr30k", str(write_retrieval(tmp_path, "flickr30k", 3)))
    assert replace(found, slices=()).digest == found.digest
