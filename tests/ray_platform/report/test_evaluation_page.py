"""An evaluation's page: complete, well-formed, closed to what the web wrote, and robust to what an evaluation may lack."""

import copy
import math

import pytest

from ray_platform.report.evaluation import evaluation_page
from tests.support.evaluation_details import BASELINE, CAPTIONS, OWN, PUBLISHED, SETS, class_names, evaluation
from tests.support.html_page import EVIL, Page, check_poison_is_text, poisoned


@pytest.fixture(scope="module")
def details():
    return evaluation()


@pytest.fixture(scope="module")
def small(details):
    """The same with one small set for zero-shot classification, whose page takes a fraction of the time."""
    return details | {"zero_shot": details["zero_shot"][:2]}


@pytest.fixture(scope="module")
def page(details):
    return Page(evaluation_page(details))


def test_the_table_has_every_result_of_every_dataset(page, details):
    results = {(result["set"], result["model"]): result for result in details["zero_shot"]}
    published = [dict(zip((*SETS, "mean"), values, strict=True)) for values in PUBLISHED.values()]
    for name, (num_classes, num_images, main_metric, *_) in SETS.items():
        own, baseline = results[name, OWN], results[name, BASELINE]
        main = own["metrics"][main_metric]
        row, *_ = page.rows_of(name + f"{num_classes:,} classes · {num_images:,} images")
        assert row[2:] == [
            f"{100 * main:.1f}",
            f"{round(100 * (main - published[0][name]), 1):+.1f}".replace("-", "−"),
            f"{100 * baseline['metrics'][main_metric]:.1f}",
            *(f"{100 * values[name]:.1f}" for values in published),
            *(f"{100 * own['metrics'][metric]:.1f}" for metric in ("acc1", "acc5", "mean_per_class_recall")),
            "11" if name == "food101" else "0",
        ]
    (means,) = page.rows_of("mean of 12 sets")
    assert means[2:7] == ["66.5", "+1.6", "64.7", "64.9", "75.0"]
    own, baseline = (page.rows_of(name) for name in (OWN, BASELINE))
    assert own[0] == [OWN, "joint", "40,000", "num steps 10 · num draws 4 · guidance 0.0", details["models"][0]["pretrained"]]
    assert baseline[0] == [BASELINE, "clip", "–", "", "/models/clip-vit-base-patch32"]
    assert len(own) == len(baseline) == 1 + len(SETS) + 2  # retrieval has two datasets


def test_better_and_worse_are_marked(page):
    cells = [attrs.get("class") for tag, attrs in page.tags if tag == "td"]
    assert cells.count("num up") == 1 + 10
    assert cells.count("num down") == 2 + 1  # and the images that could not be read
    assert cells.count("num best") == 4  # FID, FID ∞, KID and alignment
    assert next(row[4] for row in page.rows if row[0] == "5") == "0.3132"


def test_bars_are_as_long_as_their_values(page, details):
    own, baseline = (result for result in details["zero_shot"] if result["set"] == "vtab/eurosat")
    styles = set(page.attributes("style"))
    for one, other in zip(own["per_class"], baseline["per_class"], strict=True):
        assert f"width:{100 * one['recall']:.2f}%" in styles
        assert f"left:{100 * other['recall']:.2f}%" in styles
    assert f"width:{100 * own['metrics']['acc1']:.1f}%" in styles
    titles = page.attributes("title")
    assert all(name in page.text for name in class_names(1000))
    for one in details["zero_shot"][-1]["per_class"][::97]:
        assert any(title.startswith(f"{one['class']}: ") for title in titles)
    assert "1 class without images." in page.text  # of SUN397


def test_every_image_and_every_point_is_there(page, details):
    own = [result for result in details["zero_shot"] if result["model"] == OWN]
    images = sum(len(mix["examples"]) for result in own for mix in result["confusions"])
    retrieved = sum(6 * 5 + 6 for result in details["retrieval"] if result["model"] == OWN)
    assert page.count("img") == images + retrieved + sum(len(point["samples"]) for point in details["quality"])
    assert page.count("circle") == len(details["curve"]) + len(details["quality"])
    assert f"50 steps, 8 draws: acc1 {100 * details['curve'][-1]['acc1']:.1f} %" in page.text  # a tooltip
    assert {link.removeprefix("#") for link in page.attributes("href")} == set(page.attributes("id"))


def test_failures_and_lost_images_come_first(page, details, small):
    for failure in details["failures"]:
        assert page.text.index(failure) < page.text.index("mean over 12 zero-shot sets") < page.text.index("Zero-shot classif")
    assert "11 of food101" in page.text
    assert f"food101: 11 images could not be read by {OWN}, {BASELINE}" in page.text  # the same ones are listed once
    assert page.text.count("0.tar/s0000009 image_undecodable") == 1
    assert "and 1 more" in page.text
    clean = copy.deepcopy(small) | {"failures": []}
    for result in clean["zero_shot"]:
        result |= {"num_unreadable": 0, "unreadable": []}
    assert "Everything that was requested was measured" in Page(evaluation_page(clean)).text


def test_markup_stays_text(details):
    spared = {"created", "jpeg", "png", "main_metric", "models"}
    few = details | {"zero_shot": [r for r in details["zero_shot"] if r["set"] in ("vtab/cifar10", "food101")]}
    evil = poisoned(few, spared, {"published_retrieval", "means"})
    evil["published"] = {model + EVIL: {name if name == "mean" else name + EVIL: value for name, value in values.items()}
                         for model, values in few["published"].items()}  # fmt: skip
    page = check_poison_is_text(evaluation_page(evil), 300)
    for each in (CAPTIONS[0], "vtab/cifar10", OWN, "0.tar/s0000000", "truck"):
        assert f"{each}{EVIL}" in "".join(page.texts)
    assert f"0.tar/s0000000{EVIL}" in page.attributes("title")


def test_texts_of_any_script_and_length(small, page):
    assert "قطة تجلس على نافذة في الشتاء" in page.text
    longest = max(CAPTIONS, key=len)
    texts = "".join(page.texts)
    assert longest[:600] + "…" in texts
    assert longest not in texts
    odd = copy.deepcopy(small)
    odd["retrieval"][0]["examples"][0]["caption"] = "half a pair \ud83d, a nul \x00 and a line\nbreak"
    evaluation_page(odd).encode("utf-8")
    assert not [attrs for tag, attrs in page.tags if tag in ("figcaption", "h1") and attrs.get("dir") != "auto"]


def test_a_section_without_data_is_left_out(small):
    everything = {"zero-shot", "sets", "retrieval", "quality", "curve"}
    sections = {"zero_shot": {"zero-shot", "sets"}, "retrieval": {"retrieval"}, "quality": {"quality"}, "curve": {"curve"}}
    parts = {"published", "published_retrieval", "means", "failures"}  # of sections
    for missing in (*({field} for field in sections), parts):
        page = Page(evaluation_page({key: value for key, value in small.items() if key not in missing}))
        left = everything.difference(*(sections.get(field, ()) for field in missing))
        assert {name for name in page.attributes("id") if not name.startswith("set-")} == left
        assert {link for link in page.attributes("href") if not link.startswith("#set-")} == {f"#{name}" for name in left}
    header = {key: small[key] for key in ("title", "created", "code_version", "seconds", "models")}
    page = Page(evaluation_page(header | {"failures": ["cars: gone"]}))
    assert "1 failure cars: gone" in page.text
    assert not page.attributes("id")


def test_undefined_values_are_dashes(details):
    odd = copy.deepcopy(details)
    odd["zero_shot"][0] |= {"per_class": [{"class": "only", "count": 0, "recall": None}], "confusions": [], "chance": 1.0}
    odd["zero_shot"][0]["metrics"] = {"acc1": math.nan, "acc5": None, "mean_per_class_recall": math.nan}
    odd["means"] = {OWN: None, BASELINE: None}
    odd["quality"][2]["metrics"] |= {"fid": math.nan, "alignment": None}
    odd["curve"][0]["acc1"] = math.nan
    page = Page(evaluation_page(odd))
    (row,) = page.rows_of("vtab/cifar101 class ·")
    assert (row[2:5], row[7:10]) == (["–", "–", "89.4"], ["–"] * 3)
    (means,) = page.rows_of("mean of the 12 sets above")
    assert means[2:7] == ["–", "–", "64.7", "64.9", "75.0"]
    assert "nan" not in page.text.lower()
    assert page.count("circle") == len(details["curve"]) + len(details["quality"]) - 2


def test_datasets_are_compared_with_what_was_measured_on_them(details):
    few = details | {"zero_shot": [r for r in details["zero_shot"] if r["set"] in ("cars", "food101")], "means": {OWN: None}}
    less = few | {"zero_shot": [r for r in few["zero_shot"] if (r["set"], r["model"]) != ("cars", OWN)]}
    page = Page(evaluation_page(less | {"means": details["means"] | {OWN: None}}))
    (row,) = page.rows_of("cars196 classes")
    assert row[2:] == ["–", "–", "59.7", "59.6", "77.9", "–", "–", "–", "0"]
    assert f"Classes and confusions of {BASELINE}." in page.text
    (means,) = Page(evaluation_page(few)).rows_of("mean of the 2 sets above")
    assert means[2:7] == ["71.2", "−0.6", "71.8", "71.8", f"{100 * (0.779 + 0.930) / 2:.1f}"]
    unpublished = details | {"zero_shot": [result | {"set": "mine"} for result in details["zero_shot"][:2]], "means": {}}
    page = Page(evaluation_page(unpublished | {"retrieval": [], "quality": [], "curve": []}))
    assert page.rows_of("mine10 classes")[0][2:] == ["91.3", "89.4", "91.3", "99.9", "90.6", "0"]
    assert "published" not in page.text
    assert "mean over 1 zero-shot set" in page.text


def test_images_that_could_not_be_fetched_leave_their_places_empty(small):
    def without(value):
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if key != "jpeg"}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    bare = Page(evaluation_page(without(small)))
    assert bare.count("img") == sum(len(point["samples"]) for point in small["quality"])
    assert bare.attributes("title") == Page(evaluation_page(small)).attributes("title")


def test_different_protocols_are_not_drawn_as_one_line(small):
    mixed = copy.deepcopy(small)
    mixed["quality"][3]["protocol"]["resize"] = "bilinear"
    page = Page(evaluation_page(mixed))
    assert 'resize: "tf1_bilinear" and "bilinear"' in page.text
    assert "FID against" not in page.text
    assert "protocol at guidance 1, 1.5, 2, 5, 7.5" in page.text


def test_without_alignment_distances_are_drawn_against_guidance(small):
    alone = copy.deepcopy(small)
    for point in alone["quality"]:
        point["metrics"] = {
            "fd_efficientnet_lite0": point["metrics"]["fid"], "fd_efficientnet_lite0_infinity": 1.0,
            "kid_efficientnet_lite0": 0.25, "kid_efficientnet_lite0_std": 0.0625,
        }  # fmt: skip
    page = Page(evaluation_page(alone))
    assert "FD-efficientnet_lite0 against guidance scale" in page.text
    assert "FD-efficientnet_lite0 ∞ ↓" in page.text
    assert page.text.count("0.2500 ± 0.0625") == 6
    assert "alignment" not in page.text
    alone["quality"] = alone["quality"][:1]
    assert "against guidance" not in Page(evaluation_page(alone)).text
