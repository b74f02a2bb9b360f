"""The page of an evaluation is complete and well-formed, escapes untrusted text, and handles missing parts."""

import copy
import functools
import json
import math

import pytest

from ray_platform.report.evaluation import evaluation_page
from tests.support.evaluation_details import BASELINE, CAPTIONS, OWN, SETS, class_names, evaluation
from tests.support.html_page import EVIL, Page, check_poison_is_text, poisoned


@pytest.fixture
def details():
    return copy.deepcopy(evaluation())


def with_every_image(details):
    for result in details["zero_shot"]:
        result |= {"num_unreadable": 0, "unreadable": []}
    return details


def page_of(details):
    return _page(json.dumps(details))


@functools.cache  # several tests read the page of the same details, and its charts take most of a second
def _page(details):
    return Page(evaluation_page(json.loads(details)))


def test_the_tables_have_every_result(details):
    page = page_of(details)
    for name, (num_classes, num_images, main_metric, own, baseline, *published) in SETS.items():
        metrics = next(result["metrics"] for result in details["zero_shot"] if result["set"] == name)
        shortfall = "11 images could not be read" if name == "food101" else ""
        (row,) = page.rows_of(name + f"{num_classes:,} classes · {num_images:,} images{shortfall}")
        compared = [
            f"{round(100 * (own - published[0]), 1):+.1f}".replace("-", "−"),
            *(f"{100 * value:.1f}" for value in published),
        ]
        if shortfall:
            compared = ["–"] * len(compared)
        assert row[2:] == [
            f"{100 * own:.1f}",
            compared[0],
            f"{100 * baseline:.1f}",
            *compared[1:],
            *(f"{100 * metrics[metric]:.1f}" for metric in ("acc1", "acc5", "mean_per_class_recall")),
            "11" if name == "food101" else "0",
        ]
        assert metrics[main_metric] == own
    means = [[SETS[name][3 + column] for name in SETS if name != "food101"] for column in range(4)]
    own_mean, baseline_mean, b32, l14 = (100 * sum(values) / 4 for values in means)
    difference = f"{round(own_mean - b32, 1):+.1f}".replace("-", "−")
    cells = [f"{own_mean:.1f}", difference, f"{baseline_mean:.1f}", f"{b32:.1f}", f"{l14:.1f}"]
    assert page.rows_of("mean of the 4 complete sets above")[0][2:7] == cells
    own, baseline = (page.rows_of(name) for name in (OWN, BASELINE))
    assert own[0] == [OWN, "joint", "40,000", "num steps 10 · num draws 4 · guidance 0.0", "s3://models/run/export"]
    assert baseline[0] == [BASELINE, "clip", "–", "", "/models/clip-vit-base-patch32"]
    assert len(own) == len(baseline) == 1 + 1 + len(SETS) + 1  # the list of models, the ranking, the sets, and retrieval
    cells = [attrs.get("class") for tag, attrs in page.tags if tag == "td"]
    assert (cells.count("num up"), cells.count("num down")) == (4, 2)  # including the mean and the images that could not be read
    assert cells.count("num best") == 3 + 4  # FID, FID ∞ and alignment; KID is the same at all scales


def test_every_class_image_and_point_is_there(details):
    page = page_of(details)
    styles, titles = page.attributes("style"), page.attributes("title")
    own, baseline = (result for result in details["zero_shot"] if result["set"] == "vtab/cifar10")
    for one, other in zip(own["per_class"], baseline["per_class"], strict=True):
        assert f"width:{100 * one['recall']:.2f}%" in styles
        assert f"left:{100 * other['recall']:.2f}%" in styles
    assert all(name in page.text for name in class_names(1000))
    assert any(title.startswith(f"{class_names(1000)[-1]}: ") for title in titles)
    assert "1 class without images." in page.text
    num_predictions = 10 + 5 * 8  # on the first screen, and in the card of each set
    assert page.count("img") == 5 * 3 * 3 + len(CAPTIONS) * 5 + 1 + 4 * len(CAPTIONS) + num_predictions
    assert page.count("circle") == len(details["curve"]) + len(details["quality"])
    assert f"50 steps, 2 draws: acc1 {100 * details['curve'][-1]['acc1']:.1f} %" in page.text  # a tooltip
    assert {link.removeprefix("#") for link in page.attributes("href")} == set(page.attributes("id"))
    for result in details["zero_shot"]:
        for confusion in result["confusions"]:
            confusion["examples"] = [{"key": example["key"]} for example in confusion["examples"]]  # image could not be fetched
    assert page_of(details).attributes("title") == titles


def test_predictions_are_on_the_first_screen_in_turn_from_all_sets(details):
    of_sets = [result for result in details["zero_shot"] if result["model"] == OWN]
    for number, result in enumerate(of_sets):
        for example in result["examples"]:
            example["key"] = f"set {number}, {example['key']}"
    of_sets[1]["examples"] = of_sets[1]["examples"][:5]  # one set without incorrect predictions
    page = page_of(details)
    titles = [title for title in page.attributes("title") if title.startswith("set ")][:10]
    assert [title.split(",")[0] for title in titles] == [f"set {n}" for n in (0, 1, 2, 3, 4, 0, 2, 3, 4, 0)]
    text = page.text[: page.text.index("Zero-shot classification")]
    first = of_sets[0]["examples"][0]["predicted"]
    assert f"{first[0]['name']} 1. {first[0]['name']} ✓ 2. {first[1]['name']} 3. {first[2]['name']}" in text
    assert text.index("Correct") < text.index("Incorrect")
    for result in details["zero_shot"]:
        del result["examples"]  # a model that only generates, or an earlier release
    assert "Incorrect" not in page_of(details).text


def test_files_are_linked_relative_to_the_page(details):
    details["zero_shot"][0]["set"] = details["zero_shot"][1]["set"] = "my/set #1"
    page = Page(evaluation_page(details, "../../"))
    links = [link for link in page.attributes("href") if not link.startswith("#")]
    assert links[:2] == ["../../results.csv", "../../details.json"]
    folder = "DiffDis-step-40000"
    assert {
        f"../../results/{folder}/my-set%20%231.json",
        f"../../predictions/{folder}/my-set%20%231.parquet",
        f"../../predictions/{folder}/my-set%20%231-confusion.npz",
        f"../../results/{folder}/flickr30k.json",
    } < set(links)
    assert len(links) == 2 + 3 * len(details["zero_shot"]) + len(details["retrieval"])


def test_failures_and_lost_images_come_first(details):
    text = page_of(details).text
    warning = "1 warning " + details["warnings"][0]
    for problem in (details["failures"][0], "food101 is incomplete: 11 images could not be read", warning):
        assert text.index(problem) < text.index("mean over 4 complete zero-shot sets") < text.index("Zero-shot classif")
    assert f"food101: 11 images could not be read by {OWN}, {BASELINE}" in text  # the same ones are listed once
    assert text.count("0.tar/s0000009 image_undecodable") == 1
    assert "and 1 more" in text
    page = page_of(with_every_image(details) | {"failures": [], "warnings": []})
    assert "Everything that was requested was measured" in page.text
    assert "warning" not in page.text


def test_a_set_that_lacks_images_is_in_no_mean_and_not_compared(details):
    sizes = {"num_expected": 8041, "num_missing": 41, "num_unreadable": 0, "is_complete": False}
    for result in with_every_image(details)["zero_shot"]:
        result |= sizes | {"n": 8000} if result["set"] == "cars" else {}
    details["retrieval"][0] |= {"num_expected": 1000, "num_missing": 2, "is_complete": False}
    page = page_of(details | {"failures": []})
    assert "2 incomplete sets" in page.text
    assert "cars is incomplete: 41 of 8,041 images are missing. It is in no mean, and not compared" in page.text
    assert "Everything that was requested" not in page.text
    (row,) = page.rows_of("cars196 classes · 8,000 images41 of 8,041 images are missing")
    assert row[2:7] == ["57.2", "–", "59.7", "–", "–"]
    assert page.rows_of("mean of the 4 complete sets above")
    assert len(page.rows_of("CLIP ViT-L/14, published")) == 1, "nothing published is compared with flickr30k"
    assert len(page_of(evaluation()).rows_of("CLIP ViT-L/14, published")) == 2


def test_the_sizes_and_warnings_of_distances(details):
    for point in details["quality"]:
        point |= {"n": 100, "num_reference": {"inception": 40504}, "warnings": ["FID: 100 generated images say little"]}
    page = page_of(details)
    assert page.text.count("FID: 100 generated images say little") == 1
    assert page.rows_of("1")[0][-3:-1] == ["100", "40,504"]


def test_texts_of_any_script_and_length_stay_text(details):
    evil = poisoned(details, {"created", "jpeg", "png", "main_metric", "models"}, {"published_retrieval", "means"})
    evil["published_sources"] = {"source" + EVIL: {model + EVIL: "name" + EVIL for model in details["published"]}}
    evil["published"] = {model + EVIL: {name if name == "mean" else name + EVIL: value for name, value in values.items()}
                         for model, values in details["published"].items()}  # fmt: skip
    page = check_poison_is_text(evaluation_page(evil), 2000)
    texts = "".join(page.texts)
    assert all(f"{each}{EVIL}" in texts for each in (CAPTIONS[1], "vtab/cifar10", OWN, "0.tar/s0000000", "🦜 parrot"))
    longest = max(CAPTIONS, key=len)
    assert longest[:600] + "…" in texts
    assert longest not in texts
    assert not [attrs for tag, attrs in page.tags if tag in ("figcaption", "h1") and attrs.get("dir") != "auto"]
    details["retrieval"][0]["examples"][0]["caption"] = "half a pair \ud83d, a nul \x00 and a line\nbreak"
    evaluation_page(details).encode("utf-8")


def test_a_section_without_data_is_left_out(details):
    details["zero_shot"] = details["zero_shot"][:2]
    everything = {"zero-shot", "sets", "retrieval", "quality", "curve"}
    missing = {"zero_shot": {"zero-shot", "sets"}, "retrieval": {"retrieval"}, "quality": {"quality"}, "curve": {"curve"}}
    for field in (*missing, "published", "published_retrieval", "means", "failures"):
        page = page_of({key: value for key, value in details.items() if key != field})
        left = everything - missing.get(field, set())
        assert {name for name in page.attributes("id") if not name.startswith("set-")} == left
        assert {link for link in page.attributes("href") if not link.startswith("#set-")} == {f"#{name}" for name in left}
    header = {key: details[key] for key in ("title", "created", "code_version", "seconds", "models")}
    page = page_of(header | {"failures": ["cars: gone"]})
    assert "1 failure cars: gone" in page.text
    assert not page.attributes("id")


def test_undefined_and_missing_values_are_dashes(details):
    with_every_image(details)
    details["zero_shot"][0] |= {"per_class": [{"class": "only", "count": 0, "recall": None}], "confusions": [], "chance": 1.0}
    details["zero_shot"][0]["metrics"] = {"acc1": math.nan, "acc5": None, "mean_per_class_recall": math.nan}
    details["zero_shot"].pop(2)  # this model's result on cars
    details |= {"means": {OWN: None, BASELINE: None}}
    details["quality"][2]["metrics"] |= {"fid": math.nan, "alignment": None}
    details["curve"][0]["acc1"] = math.nan
    page = page_of(details)
    (row,) = page.rows_of("vtab/cifar101 class ·")
    assert (row[2:5], row[7:10]) == (["–", "–", "89.4"], ["–"] * 3)
    assert page.rows_of("cars196 classes")[0][2:] == ["–", "–", "59.7", "59.6", "77.9", "–", "–", "–", "0"]
    assert f"Classes and confusions of {BASELINE}." in page.text
    assert page.rows_of("mean of the 5 sets above")[0][2:7] == ["–", "–", "76.7", "76.7", "87.0"]
    assert "nan" not in page.text.lower()
    assert page.count("circle") == len(details["curve"]) + len(details["quality"]) - 2


def test_means_are_over_what_was_measured(details):
    with_every_image(details)
    few = details | {"zero_shot": [r for r in details["zero_shot"] if r["set"] in ("cars", "food101")], "means": {OWN: None}}
    (means,) = page_of(few).rows_of("mean of the 2 sets above")
    assert means[2:7] == ["71.2", "−0.6", "71.8", "71.8", f"{100 * (0.779 + 0.930) / 2:.1f}"]
    unpublished = details | {"zero_shot": [result | {"set": "mine"} for result in details["zero_shot"][:2]], "means": {}}
    page = page_of(unpublished | {"retrieval": [], "quality": [], "curve": []})
    assert page.rows_of("mine10 classes")[0][2:] == ["91.3", "89.4", "91.3", "99.9", "90.6", "0"]
    assert "published" not in page.text


def test_published_models_are_ranked_with_the_results_and_have_their_source(details):
    details["published"]["SigLIP"] = {"cars": 0.9, "food101": 0.9, "vtab/cifar10": 0.99, "vtab/pets": 0.99, "imagenet1k": 0.99}
    details["published"]["partial"] = {"cars": 0.95}
    page = page_of(details)
    header, *rows = page.rows[page.rows.index(next(row for row in page.rows if row[-1] == "mean")) :][:7]
    assert header == ["model", "vtab/cifar10", "cars", "vtab/pets", "imagenet1k", "mean"]  # food101 is incomplete
    order = ["SigLIP, published", "CLIP ViT-L/14, published", OWN, "CLIP ViT-B/32, published", BASELINE, "partial, published"]
    assert [row[0] for row in rows] == order
    assert rows[0][1:] == ["99.0", "90.0", "99.0", "99.0", "96.8"]
    assert rows[-1][1:] == ["–", "95.0", "–", "–", "–"]
    assert page.text.count("Published figures: a table of open_clip (CLIP ViT-B/32: ViT-B-32, openai; CLIP ViT-L/14") == 2
    assert "the paper: 1.65 points more" in page.text
    (cars,) = page.rows_of("cars196 classes")
    assert len(cars) == len(page_of(evaluation()).rows_of("cars196 classes")[0]), "no column for every published model"


def test_only_points_of_one_protocol_are_one_line(details):
    assert "FID against alignment, by guidance scale" in page_of(details).text
    details["quality"][3]["protocol"]["resize"] = "bilinear"
    text = page_of(details).text
    assert 'resize: "tf1_bilinear" and "bilinear"' in text
    assert "FID against" not in text
    assert "protocol at guidance 1, 2, 3" in text


def test_without_alignment_distances_are_drawn_against_guidance(details):
    for point in details["quality"]:
        point["metrics"] = {"fd_lite0": 9.5, "fd_lite0_infinity": 1.0, "kid_lite0": 0.25, "kid_lite0_std": 0.0625}
    text = page_of(details).text
    assert "FD-lite0 against guidance scale" in text
    assert "FD-lite0 ∞ ↓" in text
    assert text.count("0.2500 ± 0.0625") == 4
    assert "alignment" not in text
    assert "against guidance" not in page_of(details | {"quality": details["quality"][:1]}).text
