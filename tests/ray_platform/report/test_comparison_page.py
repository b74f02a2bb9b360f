"""The page of a comparison has its verdict, all numbers and correctly placed differences, and handles missing parts."""

import json
from pathlib import Path

import pytest

from diffdis_platform.comparison.summary import CLAIM
from ray_platform.metric_registry import find_metric
from ray_platform.report.comparison import DotPlot, DotRow, comparison_page
from tests.support.html_page import EVIL, Page, check_poison_is_text, poisoned, saved_details

ROOT = Path(__file__).parents[3]


@pytest.fixture
def details():
    return saved_details("comparison")


def page_of(details):
    return Page(comparison_page(details, CLAIM))


def test_each_outcome_of_the_claim_has_its_sentence_and_its_intervals(details):
    page = page_of(details)
    entry = details["paired"]["accuracy_joint_minus_alignment"]
    assert CLAIM.holds in page.text
    assert f"zero-shot accuracy: joint is above alignment by {100 * entry['mean']:.2f} points (95 % interval +" in page.text
    assert f"FD: joint is below generation by {-details['paired']['fd_joint_minus_generation']['mean']:.1f} (95" in page.text
    null = page_of(saved_details("comparison_null"))
    assert CLAIM.not_shown in null.text
    assert null.text.count("which shows no difference") == 2
    unclear = {"fd_joint_minus_generation": saved_details("comparison_null")["paired"]["fd_joint_minus_generation"]}
    half = page_of(details | {"claim": {"holds": False, "why": ""}, "paired": details["paired"] | unclear})
    assert CLAIM.partly in half.text
    paired = {key: dict(zip(("low", "mean", "high", "n"), (-entry["high"], -entry["mean"], -entry["low"], 3), strict=True))
              for key, entry in details["paired"].items()}  # fmt: skip
    opposite = page_of(details | {"claim": {"holds": False, "why": ""}, "paired": paired})
    assert CLAIM.opposite in opposite.text
    assert "FD: joint is above generation by " in opposite.text
    one_seed = page_of(saved_details("comparison_one_seed"))
    assert CLAIM.undecided in one_seed.text
    assert one_seed.text.count("(1 seed, no interval)") == 2
    assert "whisker" not in one_seed.attributes("class")
    assert "nan" not in one_seed.text.lower()
    assert all(sentence not in Page(comparison_page(details)).text for sentence in (CLAIM.holds, "joint is above"))


def test_a_null_result_says_what_would_have_been_found_and_choices_are_named():
    details = saved_details("comparison_null")
    details["paired"]["fd_joint_minus_generation"]["detectable"] = 1.7
    text = page_of(details | {"selected_on": [0, 3]}).text
    assert "which shows no difference: one of 1.7 would have been found with a probability of 80 %" in text
    assert "Without the seeds on which settings were chosen: 0, 3." in text


def test_the_best_of_several_images_is_next_to_the_single_ones(details):
    interval = {"mean": -3.0, "low": -4.0, "high": -2.0, "n": 3}
    details["arms"]["joint"]["mean"] |= {"fd": 250.0, "fd_best_of_4": 247.0}
    details["best_of_4"] = {"fd_minus_random": interval, "arms": {"joint": {"fd_minus_random": interval}}}
    details["best_of_4"]["arms"]["generation"] = {"fd_minus_random": interval | {"low": None, "high": None}}
    page = page_of(details)
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 6}
    assert rows["joint"] == ["itself", "FD ↓", "250.0", "247.0", "−3.0 −4.0 to −2.0"]
    assert rows["generation"][0] == "clip"
    assert rows["generation"][-1] == "−3.00 no interval"
    assert "The best of 4 images" in page.text


def test_the_table_has_mean_spread_and_cost_of_every_arm(details):
    page, arms = page_of(details), details["arms"]
    rows = {row[0]: dict(zip(arms, row[1:], strict=True)) for row in page.rows if len(row) == 1 + len(arms)}
    for name in ("accuracy", "accuracy_heldout_style", "retrieval_r1", "fd", "kid"):
        metric = find_metric(name)
        for arm, cell in rows[f"{metric.label} {metric.arrow}"].items():
            if name not in arms[arm]["mean"]:  # an arm that generates no images, or has no accuracy
                assert cell == "–"
                continue
            mean, std = arms[arm]["mean"][name], arms[arm]["std"][name]
            texts = {"fd": f"{mean:.2f} ± {std:.2f}", "kid": f"{mean:.4f} ± {std:.4f}"}
            assert cell == texts.get(name, f"{100 * mean:.2f} % ± {100 * std:.2f}")
    assert set(rows["seeds"].values()) == {"3"}
    assert set(rows["samples"].values()) == {"163,840"}
    assert rows["parameters"]["joint"] == "6.4 M"
    assert (rows["FLOPs"]["joint"], rows["FLOPs"]["clip"]) == ("1.4 P", "380 T")


def test_every_difference_and_every_run_has_its_dots(details):
    page = page_of(details)
    classes = page.attributes("class")
    assert classes.count("zero") == len(details["paired"])
    runs = sum(len(arm["mean"].keys() - {"samples", "seconds", "parameters", "flops"}) for arm in details["arms"].values())
    assert classes.count("dot") == 3 * (len(details["paired"]) + runs)
    entry = details["paired"]["fd_joint_minus_generation"]
    decimals = 2 if (entry["high"] - entry["low"]) / 2 < 1 else 1  # two significant digits of the half width
    assert f"{entry['low']:.{decimals}f} to {entry['high']:.{decimals}f}".replace("-", "−") in page.text
    first, second = (details["arms"][arm]["seeds"]["1"]["fd"] for arm in ("joint", "generation"))
    assert f"seed 1: −{second - first:.{decimals}f}" in page.attributes("title")
    assert classes.count("lane favorable") >= 2
    plot = DotPlot([DotRow("a", ("b",), "", "", "favorable", [(2.0, "x")], 3.0, (1.0, 5.0))], has_zero=True)
    zero, one, two, five = (float(plot.left(value)) for value in (0, 1, 2, 5))
    assert (zero, five) == (3, 97)
    assert two - one == pytest.approx(one - zero, abs=0.02)
    assert float(plot.width(1.0, 5.0)) == pytest.approx(five - one, abs=0.02)
    assert (0, "0") in plot.labels


def test_masks_images_and_curves(details):
    page = page_of(details)
    assert ["mask", "one_way", "joint"] in page.rows
    assert page.rows_of("fields")[0][2] == "objective.task joint, model.query_visibility joint, objective.num_draws 1"
    assert page.count("img") == sum(len(grid["samples"]) for grid in details["grids"]) == 3 * 3 * 24
    first = [grid["samples"] for grid in details["grids"] if grid["seed"] == 0]
    for i in range(24):  # images with the same caption are next to each other
        sources = [f"data:image/png;base64,{samples[i]['png']}" for samples in first]
        assert page.attributes("src")[3 * i : 3 * i + 3] == sources
    assert sum(tag == "details" and "open" in attrs for tag, attrs in page.tags) == 1
    assert page.attributes("class").count("line") == 3 * (4 + 3)  # FD for three arms, accuracy for four
    details["curves"] = {arm: {seed: points[-1:] for seed, points in seeds.items()} for arm, seeds in details["curves"].items()}
    assert "line" not in page_of(details).attributes("class"), "single points are no curves"
    del details["arms"]["joint_mask"]
    details["grids"][0]["samples"] = details["grids"][0]["samples"][:5]
    less = page_of(details)
    assert "masks" not in less.attributes("id")
    assert less.count("img") == 3 * 3 * 24 - 19


def test_what_is_missing_is_left_out(details):
    header = {key: details[key] for key in ("title", "created", "seconds", "code_version", "command")}
    page = page_of(header | {"arms": {}, "claim": {"holds": False, "why": "no run was finished"}, "failures": ["clip: lost"]})
    assert page.text.index("1 failure clip: lost") < page.text.index(f"{CLAIM.undecided} no run was finished")
    assert page.attributes("id") == ["command"]
    everything = {"arms", "paired", "runs", "masks", "curves", "images", "command"}
    for field, anchor in (("paired", "paired"), ("grids", "images"), ("curves", "curves"), ("config", "masks")):
        less = {key: value for key, value in details.items() if key != field}
        assert set(page_of(less).attributes("id")) == everything - {anchor}
    details["arms"]["clip"] = {"seeds": {}, "mean": {}, "std": {}}  # an arm without a finished run
    details["paired"]["fd_joint_minus_generation"] |= {"mean": None, "low": None, "high": None, "n": 0}
    page = page_of(details)
    assert page.rows_of("seeds")[0][1:] == ["3", "3", "3", "0", "3"]
    assert page.rows_of("zero-shot accuracy")[0][4] == "–"
    assert "FD: joint minus generation is – (0 seeds, no interval)" in page.text


def test_markup_stays_text(details):
    spared = {"created", "png", "model.query_visibility", "query_visibility", "objective.task", "task"}
    evil = poisoned(details, spared, {"arms", "curves"})
    evil["paired"] = {key.replace("_minus_", f"{EVIL}_minus_") + EVIL: entry for key, entry in details["paired"].items()}
    assert not check_poison_is_text(comparison_page(evil, CLAIM), 200).attributes("href")


@pytest.mark.parametrize("name", ["comparison", "masks"])
def test_the_summaries_in_the_docs_have_pages(name):
    summary = json.loads((ROOT / "docs" / "results" / f"{name}.json").read_text())
    page = page_of({"title": name, "created": "2026-11-26", "seconds": 1.0, "code_version": "1", "command": ""} | summary)
    assert page.rows_of("zero-shot accuracy")
    assert [row for row in page.rows_of("scoring time") if len(row) == 1 + len(summary["arms"])]
