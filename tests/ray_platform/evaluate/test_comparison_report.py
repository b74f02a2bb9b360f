"""A comparison's page: its verdict, every figure, differences in their place, and whatever a comparison may lack."""

import copy
import re

import pytest

from ray_platform.report import metric_names
from ray_platform.report.comparison import comparison_page
from ray_platform.report.row_chart import Row, row_chart
from tests.support.comparison_details import ARMS, PAIRS, SCORES, SEEDS, comparison
from tests.support.html_page import EVIL, Page


@pytest.fixture(scope="module")
def details():
    return comparison()


@pytest.fixture(scope="module")
def html(details):
    return comparison_page(details)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_a_claim_that_holds_is_said_with_its_intervals(page, details):
    assert details["claim"]["holds"]
    assert "The claim holds" in page.text
    entry = details["paired"]["accuracy_joint_minus_alignment"]
    assert f"zero-shot accuracy: joint is above alignment by {100 * entry['mean']:.2f} points (95 % interval +" in page.text
    distance = details["paired"]["fd_joint_minus_generation"]["mean"]
    assert f"FD: joint is below generation by {-distance:.2f} (95 % interval −" in page.text
    assert "Null result" not in page.text


def test_a_null_result_is_said_plainly():
    page = Page(comparison_page(comparison(gain=0.0)))
    assert "Null result: the claim is not shown" in page.text
    assert page.text.count("which shows no difference") == 2
    assert "The claim holds" not in page.text


def test_the_opposite_is_said_too():
    html = comparison_page(comparison(gain=-2.0))
    page = Page(html)
    assert "The claim does not hold: the joint model is worse at one of the tasks, or at both" in page.text
    assert "FD: joint is above generation by " in page.text
    assert '<div class="card verdict stop">' in html


def test_one_seed_has_no_interval(html):
    page = Page(comparison_page(comparison(seeds=("0",))))
    assert "No verdict" in page.text
    assert page.text.count("(1 seed, no interval)") == 2
    assert "no difference" not in page.text
    assert "nan" not in page.text.lower()
    assert 'class="whisker"' not in comparison_page(comparison(seeds=("0",)))
    assert 'class="whisker"' in html


def test_the_table_has_mean_spread_and_cost_of_every_arm(page, details):
    (head,) = [row for row in page.rows if row[1:] == list(ARMS)]
    rows = {row[0]: dict(zip(ARMS, row[1:], strict=True)) for row in page.rows if len(row) == len(head)}
    assert set(rows["seeds"].values()) == {str(len(SEEDS))}
    arms = details["arms"]
    for metric in (*SCORES, "fd", "kid"):
        row = rows[f"{metric_names.title(metric)} {'↓' if metric in ('fd', 'kid') else '↑'}"]
        for name, cell in row.items():
            if metric not in arms[name]["mean"]:  # an arm that draws no images, or has no accuracy
                assert cell == "–"
                continue
            mean, std = arms[name]["mean"][metric], arms[name]["std"][metric]
            digits = {"fd": f"{mean:.2f} ± {std:.2f}", "kid": f"{mean:.4f} ± {std:.4f}"}
            assert cell == digits.get(metric, f"{100 * mean:.2f} % ± {100 * std:.2f}")
    assert set(rows["samples"].values()) == {"163,840"}
    assert all(took.endswith("min") for took in rows["training time"].values())
    assert rows["parameters"]["joint"] == "6.4 M"
    assert (rows["FLOPs"]["joint"], rows["FLOPs"]["clip"]) == ("1.4 P", "380 T")


def test_every_difference_has_its_dots_interval_and_figures(html, page, details):
    assert html.count('class="zero"') == len(PAIRS)
    dots = html.count('<i class="dot"')
    runs = sum(len(arm["mean"].keys() & {*SCORES, "fd", "kid"}) for arm in details["arms"].values())
    assert dots == len(SEEDS) * (len(PAIRS) + runs)
    entry = details["paired"]["fd_joint_minus_generation"]
    assert f"{entry['low']:.2f} to {entry['high']:.2f}".replace("-", "−") in page.text
    first, second = (details["arms"][arm]["seeds"]["1"]["fd"] for arm in ("joint", "generation"))
    assert f"seed 1: −{second - first:.2f}" in page.attributes("title")
    assert html.count('class="lane shown"') >= 2


def test_intervals_are_where_they_should_be():
    chart = row_chart([Row("a", "b", "shown", [(2.0, "x")], 3.0, (1.0, 5.0))], zero=True)
    places = [float(left) for left in re.findall(r'class="grid" style="left:([\d.]+)%', chart)]
    (zero,) = [float(left) for left in re.findall(r'class="zero" style="left:([\d.]+)%', chart)]
    left, width = map(float, re.search(r'class="whisker" style="left:([\d.]+)%;width:([\d.]+)%', chart).groups())
    unit = (places[-1] - places[0]) / 5
    assert zero == places[0] == 3
    assert left == pytest.approx(zero + unit, abs=0.02)
    assert width == pytest.approx(4 * unit, abs=0.02)
    assert float(re.search(r'class="dot" style="left:([\d.]+)%', chart)[1]) == pytest.approx(zero + 2 * unit, abs=0.02)
    assert float(re.search(r'<b style="left:([\d.]+)%', chart)[1]) == pytest.approx(zero + 3 * unit, abs=0.02)


def test_both_masks_are_side_by_side(page, details):
    assert "The masks side by side" in page.text
    assert ["mask", "one_way", "joint"] in page.rows
    assert page.rows_of("what was set")[0][2] == "objective.task joint, model.query_visibility joint, objective.num_draws 1"
    assert [row for row in page.rows_of("training time") if len(row) == 3]
    alone = copy.deepcopy(details)
    del alone["arms"]["joint_mask"]
    assert "side by side" not in Page(comparison_page(alone)).text


def test_images_of_one_caption_are_beside_each_other(page, html, details):
    assert html.count("<img ") == sum(len(grid["samples"]) for grid in details["grids"]) == 3 * 3 * 24
    sources = page.attributes("src")
    first = [grid for grid in details["grids"] if grid["seed"] == 0]
    for i in range(24):
        assert sources[3 * i : 3 * i + 3] == [f"data:image/png;base64,{grid['samples'][i]['png']}" for grid in first]
    assert html.count("<details open") == 1
    short = copy.deepcopy(details)
    short["grids"][0]["samples"] = short["grids"][0]["samples"][:5]
    assert comparison_page(short).count("<img ") == 3 * 3 * 24 - 19


def test_curves_have_the_colours_of_arms(html):
    assert html.count('<polyline class="line"') == len(SEEDS) * (4 + 3)
    assert html.count('style="color:var(--m1)"') == len(SEEDS)  # generation: FD alone


def test_failures_come_first(details):
    page = Page(comparison_page(details | {"failures": ["clip, seed 2: lost"]}))
    assert "1 failure" in page.text
    assert page.text.index("clip, seed 2: lost") < page.text.index("The claim holds")


def test_what_is_missing_is_left_out(details):
    least = {key: details[key] for key in ("title", "created", "seconds", "code_version", "command")}
    page = Page(comparison_page(least | {"arms": {}, "paired": {}, "claim": {"holds": False, "why": "no run was finished"}}))
    assert "No verdict" in page.text
    assert "no run was finished" in page.text
    assert page.attributes("id") == ["command"]
    for field, anchor in (("paired", "paired"), ("grids", "images"), ("curves", "curves"), ("config", "masks")):
        less = {key: value for key, value in details.items() if key != field}
        everything = {"arms", "paired", "runs", "masks", "curves", "images", "command"}
        assert set(Page(comparison_page(less)).attributes("id")) == everything - {anchor}


def test_an_arm_without_a_finished_run(details):
    odd = copy.deepcopy(details)
    odd["arms"]["clip"] = {"seeds": {}, "mean": {}, "std": {}}
    odd["paired"] = {key: entry for key, entry in odd["paired"].items() if "clip" not in key}
    odd["paired"]["fd_joint_minus_generation"] |= {"mean": None, "low": None, "high": None, "n": 0}
    page = Page(comparison_page(odd))
    assert page.rows_of("seeds")[0][1:] == ["3", "3", "3", "0", "3"]
    assert page.rows_of("zero-shot accuracy")[0][4] == "–"
    assert "FD: joint minus generation is – (0 seeds, no interval)" in page.text


def poisoned(value, field=""):
    """Every text that people gave, ending in markup; the names of arms too."""
    if isinstance(value, dict):
        spoilt = field in ("arms", "curves")
        return {
            (re.sub(r"$|(?=_minus_)", lambda _: EVIL, key) if field == "paired" else key + EVIL * spoilt): poisoned(
                inner, "" if spoilt else key
            )
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [poisoned(inner, field) for inner in value]
    spared = ("created", "png", "model.query_visibility", "query_visibility", "objective.task", "task")
    return value + EVIL if isinstance(value, str) and field not in spared else value


def test_nothing_of_the_web_is_taken_for_markup(page, details):
    evil = comparison_page(poisoned(details))
    assert "<script" not in evil
    assert evil.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 200
    dangerous = Page(evil)
    # The sentences of the claim are about arms of certain names, and go with them.
    assert {tag for tag, _ in dangerous.tags} == {tag for tag, _ in page.tags} - {"ul", "li"}
    assert dangerous.attributes("src") == page.attributes("src")
    assert EVIL not in "".join(dangerous.attributes("style"))


def test_nothing_is_loaded(page, html):
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "a"})
    assert all(source.startswith("data:image/png;base64,") for source in page.attributes("src"))
    assert "http" not in html
    assert "url(" not in html


@pytest.mark.parametrize(
    ("metric", "title", "text"),
    [
        ("eval/vtab/cifar10/acc1", "acc1, vtab/cifar10", "2.37 %"),
        ("eval/zero_shot_mean", "mean zero-shot accuracy", "2.37 %"),
        ("eval/flickr30k/image_retrieval_recall_at_1", "image retrieval R@1, flickr30k", "2.37 %"),
        ("eval/fd_efficientnet_lite0/guidance_3", "FD-efficientnet_lite0, guidance 3", "0.0237"),
        ("eval/fid_infinity/guidance_1.5", "FID ∞, guidance 1.5", "0.0237"),
        ("accuracy", "zero-shot accuracy", "2.37 %"),
        ("accuracy_heldout_style", "accuracy, heldout_style", "2.37 %"),
        ("retrieval_r1", "retrieval R@1", "2.37 %"),
        ("heldout/image_to_text_r1", "image to text R@1, heldout", "2.37 %"),
        ("kid", "KID", "0.0237"),
        ("anything", "anything", "0.0237"),
    ],
)
def test_names_of_figures(metric, title, text):
    assert metric_names.title(metric) == title
    assert metric_names.value_text(metric, 0.0237) == text
    assert metric_names.is_distance(metric) == any(name in title for name in ("FD", "FID", "KID"))
    assert metric_names.value_text(metric, None) == metric_names.difference_text(metric, float("nan")) == "–"
