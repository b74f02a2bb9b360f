"""The page: well-formed, complete, closed to what the web wrote, and good for whatever an evaluation may lack."""

import copy
import math
import re

import pytest

from ray_platform.report.evaluation import report_page
from tests.support.evaluation_details import BASELINE, CAPTIONS, OWN, PUBLISHED, SETS, class_names, evaluation
from tests.support.html_page import EVIL, Page

NAMES = {"class", "true", "predicted", "key", "cause", "caption", "text", "title", "code_version", "name", "pretrained", "task"}


@pytest.fixture(scope="module")
def details():
    return evaluation()


@pytest.fixture(scope="module")
def html(details):
    return report_page(details)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_table_has_every_figure_of_every_set(page, details):
    results = {(result["set"], result["model"]): result for result in details["zero_shot"]}
    published = [dict(zip((*SETS, "mean"), figures, strict=True)) for figures in PUBLISHED.values()]
    for name, (num_classes, num_images, main_metric, *_) in SETS.items():
        own, baseline = results[name, OWN], results[name, BASELINE]
        main = own["metrics"][main_metric]
        row, *_ = page.rows_of(name + f"{num_classes:,} classes · {num_images:,} images")
        difference = round(100 * (main - published[0][name]), 1)
        assert row[2:] == [
            f"{100 * main:.1f}",
            f"{difference:+.1f}".replace("-", "−"),
            f"{100 * baseline['metrics'][main_metric]:.1f}",
            *(f"{100 * figures[name]:.1f}" for figures in published),
            *(f"{100 * own['metrics'][metric]:.1f}" for metric in ("acc1", "acc5", "mean_per_class_recall")),
            "11" if name == "food101" else "0",
        ]
    (means,) = page.rows_of("mean of 12 sets")
    assert means[2:7] == ["66.5", "+1.6", "64.7", "64.9", "75.0"]
    assert f"{100 * details['means'][OWN]:.1f}" == "66.5"


def test_better_and_worse_are_coloured_and_the_best_is_bold(html):
    assert '<td class="num up">+1.5</td>' in html
    assert '<td class="num down">−2.4</td>' in html
    assert re.findall(r'<td class="num best">([\d.]+)', html) == [
        "13.39",
        "12.08",
        "0.0059",
        "0.3168",
    ]  # least, but most alignment


def test_the_bars_are_as_long_as_figures_and_the_lines_across_are_the_baselines(html, details):
    own, baseline = (result for result in details["zero_shot"] if result["set"] == "vtab/eurosat")
    assert html.count('<b style="left:') == sum(
        len(r["per_class"]) if len(r["per_class"]) <= 60 else 24 for r in details["zero_shot"][::2]
    )
    for one, other in zip(own["per_class"], baseline["per_class"], strict=True):
        bar = f'<i style="width:{100 * one["recall"]:.2f}%"></i><b style="left:{100 * other["recall"]:.2f}%"></b>'
        assert html.count(bar) == 1
    share = own["metrics"]["acc1"]
    assert f'<i class="fill" style="width:{100 * share:.1f}%"></i><i class="chance" style="width:10.0%"></i>' in html


def test_every_model_is_described_and_has_its_figures_in_every_card(page, details):
    own, baseline = (page.rows_of(name) for name in (OWN, BASELINE))
    assert own[0] == [OWN, "joint", "40,000", "num steps 10 · num draws 4 · guidance 0.0", details["models"][0]["pretrained"]]
    assert baseline[0] == [BASELINE, "clip", "–", "", "/models/clip-vit-base-patch32"]
    assert len(own) == len(baseline) == 1 + len(SETS) + 2  # retrieval has two sets
    last = details["zero_shot"][-1]
    figures = [f"{100 * last['metrics'][metric]:.1f}" for metric in ("acc1", "acc5", "mean_per_class_recall")]
    assert baseline[len(SETS)] == [BASELINE, *figures, "50,000", "0", "9.3 min"]
    flickr = page.rows_of("CLIP ViT-L/14, published")[0]
    assert flickr[1:7] == ["65.0", "87.2", "92.0", "85.2", "97.4", "99.2"]
    assert own[-2][1:8] == ["61.0", "83.0", "90.0", "81.0", "95.0", "98.0", "0"]


def test_quality_has_every_figure_and_its_whole_protocol(page, details):
    rows = [row for row in page.rows if row[0] in ("1", "1.5", "2", "3", "5", "7.5") and len(row) == 7]
    assert len(rows) == 6
    for row, point in zip(rows, details["quality"], strict=True):
        figures = point["metrics"]
        kid = f"{figures['kid']:.4f} ± {figures['kid_std']:.4f}"
        assert row[1:6] == [
            f"{figures['fid']:.2f}",
            f"{figures['fid_infinity']:.2f}",
            kid,
            f"{figures['alignment']:.4f}",
            "30,000",
        ]
    protocol = details["quality"][0]["protocol"]
    assert page.rows_of("prompts.file") == [["prompts.file", protocol["prompts"]["file"]]]
    assert page.rows_of("reference.n") == [["reference.n", "40504"]]
    assert page.rows_of("digest") == [["digest", protocol["digest"]]]


def test_all_classes_all_pictures_and_the_curve_are_there(page, html, details):
    imagenet = next(result for result in details["zero_shot"] if result["set"] == "imagenet1k")
    assert all(name in page.text for name in class_names(1000))
    titles = page.attributes("title")
    for one in imagenet["per_class"][::97]:
        assert any(t.startswith(f"{one['class']}: {100 * one['recall']:.1f} % of 50 images") for t in titles)
    own = [result for result in details["zero_shot"] if result["model"] == OWN]
    pictures = sum(len(mix["examples"]) for result in own for mix in result["confusions"])
    retrieved = sum(6 * 5 + 6 for result in details["retrieval"] if result["model"] == OWN)
    assert html.count("<img ") == pictures + retrieved + sum(len(point["samples"]) for point in details["quality"])
    assert sum(tag == "circle" for tag, _ in page.tags) == len(details["curve"]) + len(details["quality"])
    point = details["curve"][-1]
    assert f"50 steps, 8 draws: acc1 {100 * point['acc1']:.1f} %" in page.text  # what a pointer shows
    assert "1 class without images." in page.text  # of SUN397


def test_nothing_is_loaded_and_every_link_leads_somewhere(page, html):
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    assert all(source.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for source in page.attributes("src"))
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert "@import" not in html
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in page.attributes("href")} == set(ids)


def test_failures_and_lost_images_come_first(page, details):
    for failure in details["failures"]:
        assert (
            page.text.index(failure)
            < page.text.index("mean over 12 zero-shot sets")
            < page.text.index("Zero-shot classification")
        )
    assert "images that could not be read, and count as wrong: 11 of food101" in page.text
    assert f"food101: 11 images could not be read by {OWN}, {BASELINE}" in page.text  # the same ones: said once
    assert page.text.count("0.tar/s0000009 image_undecodable") == 1
    assert "and 1 more" in page.text
    clean = copy.deepcopy(details) | {"failures": []}
    for result in clean["zero_shot"]:
        result |= {"num_unreadable": 0, "unreadable": []}
    assert "Everything that was asked for was measured" in Page(report_page(clean)).text


def poisoned(value, field=""):
    """Every name that people or the web gave, ending in markup."""
    if isinstance(value, dict):
        if field in ("published", "means", "published_retrieval"):
            return {key + EVIL: poisoned_sets(inner, field) for key, inner in value.items()}
        return {key: poisoned(inner, "protocol" if field == "protocol" else key) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, field) for inner in value]
    names = {*NAMES, "set", "model", "alignment_by", "failures", "protocol"}
    return value + EVIL if isinstance(value, str) and field in names else value


def poisoned_sets(value, field):
    if not isinstance(value, dict):
        return value
    return {key if key == "mean" else key + EVIL: inner for key, inner in value.items()}


def test_nothing_of_the_web_is_taken_for_markup(page, details):
    evil = poisoned(copy.deepcopy(details))
    html = report_page(evil)
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 3000
    assert "<script" not in html
    dangerous = Page(html)
    # Tag by tag the same page, with the same attributes: only texts differ.
    assert [(tag, list(attrs)) for tag, attrs in dangerous.tags] == [(tag, list(attrs)) for tag, attrs in page.tags]
    assert dangerous.attributes("src") == page.attributes("src")
    assert dangerous.attributes("style") == page.attributes("style")
    for each in (f"{CAPTIONS[0]}{EVIL}", f"vtab/cifar10{EVIL}", f"{OWN}{EVIL}", f"0.tar/s0000000{EVIL}", f"truck{EVIL}"):
        assert each in dangerous.text
    assert f"0.tar/s0000000{EVIL}" in dangerous.attributes("title")


def test_texts_of_any_writing_and_length(details, page):
    assert "قطة تجلس على نافذة في الشتاء" in page.text
    longest = max(CAPTIONS, key=len)
    assert len(longest) > 1000
    assert longest[:600] + "…" in page.text
    assert longest not in page.text
    odd = copy.deepcopy(details)
    odd["retrieval"][0]["examples"][0]["caption"] = "half a pair \ud83d, a nul \x00 and a line\nbreak"
    report_page(odd).encode("utf-8")
    directed = [attrs for tag, attrs in page.tags if tag in ("figcaption", "h1") and attrs.get("dir") != "auto"]
    assert not directed


@pytest.mark.parametrize(
    ("field", "anchors"),
    [
        ("zero_shot", {"zero-shot", "sets"}), ("retrieval", {"retrieval"}), ("quality", {"quality"}), ("curve", {"curve"}),
        ("published", set()), ("published_retrieval", set()), ("means", set()), ("failures", set()),
    ],
)  # fmt: skip
def test_a_section_without_data_is_left_out(details, field, anchors):
    everything = {"zero-shot", "sets", "retrieval", "quality", "curve"}
    for less in ({key: value for key, value in details.items() if key != field}, details | {field: type(details[field])()}):
        page = Page(report_page(less))
        assert {name for name in page.attributes("id") if not name.startswith("set-")} == everything - anchors
        assert {link for link in page.attributes("href") if not link.startswith("#set-")} == {
            f"#{a}" for a in everything - anchors
        }


def test_a_page_of_failures_alone(details):
    nothing = {key: details[key] for key in ("title", "created", "code_version", "seconds", "models")} | {
        "failures": ["cars: gone"]
    }
    page = Page(report_page(nothing))
    assert "1 failure" in page.text
    assert "cars: gone" in page.text
    assert not page.attributes("id")


def test_what_is_not_defined_is_a_dash(details):
    odd = copy.deepcopy(details)
    one = odd["zero_shot"][0]
    one |= {"per_class": [{"class": "only", "count": 0, "recall": None}], "confusions": [], "chance": 1.0}
    one["metrics"] = {"acc1": math.nan, "acc5": None, "mean_per_class_recall": math.nan}
    odd["means"] = {OWN: None, BASELINE: None}
    odd["quality"][2]["metrics"] |= {"fid": math.nan, "alignment": None}
    odd["curve"][0]["acc1"] = math.nan
    page = Page(report_page(odd))
    (row,) = page.rows_of("vtab/cifar101 class ·")
    assert (row[2:5], row[7:10]) == (["–", "–", "89.4"], ["–"] * 3)
    (means,) = page.rows_of("mean of the 12 sets above")
    assert means[2:7] == ["–", "–", "64.7", "64.9", "75.0"]
    assert "nan" not in page.text.lower().replace("finance", "")
    assert sum(tag == "circle" for tag, _ in page.tags) == len(details["curve"]) + len(details["quality"]) - 2


def test_a_set_that_only_a_baseline_has(details):
    less = details | {"zero_shot": [r for r in details["zero_shot"] if (r["set"], r["model"]) != ("cars", OWN)]}
    less["means"] = details["means"] | {OWN: None}
    page = Page(report_page(less))
    (row,) = page.rows_of("cars196 classes")
    assert row[2:] == ["–", "–", "59.7", "59.6", "77.9", "–", "–", "–", "0"]
    assert f"Classes and confusions of {BASELINE}." in page.text
    assert (
        report_page(details).count('<b style="left:') - report_page(less).count('<b style="left:') == 24
    )  # it is not beside itself


def test_a_part_of_the_sets_is_compared_with_that_part(details):
    few = ("cars", "food101")
    less = details | {"zero_shot": [r for r in details["zero_shot"] if r["set"] in few], "means": {OWN: None, BASELINE: None}}
    (means,) = Page(report_page(less)).rows_of("mean of the 2 sets above")
    assert means[2:7] == ["71.2", "−0.6", "71.8", "71.8", f"{100 * (0.779 + 0.930) / 2:.1f}"]


def test_sets_of_ones_own_are_compared_with_nothing_that_was_published(details):
    mine = [result | {"set": "mine"} for result in details["zero_shot"][:2]]
    page = Page(report_page(details | {"zero_shot": mine, "means": {}, "retrieval": [], "quality": [], "curve": []}))
    (row,) = page.rows_of("mine10 classes")
    assert row[2:] == ["91.3", "89.4", "91.3", "99.9", "90.6", "0"]
    assert all("published" not in text for text in page.texts)
    assert "mean over 1 zero-shot set" in page.text


def test_pictures_that_could_not_be_fetched_leave_their_place_empty(details, page):
    def without(value):
        if isinstance(value, dict):
            return {key: without(inner) for key, inner in value.items() if key != "jpeg"}
        return [without(inner) for inner in value] if isinstance(value, list) else value

    bare = Page(report_page(without(details)))
    assert sum(tag == "img" for tag, _ in bare.tags) == sum(len(point["samples"]) for point in details["quality"])
    assert bare.attributes("title") == page.attributes("title")


def test_figures_of_different_protocols_are_not_drawn_as_one_line(details):
    mixed = copy.deepcopy(details)
    mixed["quality"][3]["protocol"]["resize"] = "bilinear"
    page = Page(report_page(mixed))
    assert 'protocol resize: "tf1_bilinear" and "bilinear"; figures of different protocols cannot be compared' in page.text
    assert "FID against" not in page.text
    assert "protocol at guidance 1, 1.5, 2, 5, 7.5" in page.text
    assert "protocol at guidance 3" in page.text


def test_without_a_judge_of_alignment_distances_are_drawn_against_guidance(details):
    alone = copy.deepcopy(details)
    for point in alone["quality"]:
        point["metrics"] = {
            "fd_efficientnet_lite0": point["metrics"]["fid"], "fd_efficientnet_lite0_infinity": 1.0,
            "kid_efficientnet_lite0": 0.25, "kid_efficientnet_lite0_std": 0.0625,
        }  # fmt: skip
    page = Page(report_page(alone))
    assert "FD-efficientnet_lite0 against guidance scale" in page.text
    assert "FD-efficientnet_lite0 ∞ ↓" in page.text
    assert "KID-efficientnet_lite0 ↓" in page.text
    assert page.text.count("0.2500 ± 0.0625") == 6
    assert "alignment" not in page.text
    assert "FID" not in page.text
    alone["quality"] = alone["quality"][:1]
    assert "against guidance" not in Page(report_page(alone)).text
