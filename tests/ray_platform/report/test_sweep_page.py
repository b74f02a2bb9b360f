"""A sweep's page and charts are complete, place values correctly, escape untrusted text, and handle missing parts."""

import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from ray_platform.report.sweep import sweep_files, sweep_page
from tests.support.html_page import EVIL, Page, check_poison_is_text, poisoned, saved_details

ACCURACY, DISTANCE = "eval/zero_shot_mean", "eval/fd_efficientnet_lite0/guidance_3"


@pytest.fixture
def details():
    return saved_details("sweep")


def test_the_table_has_every_trial_the_best_first_and_the_failed_last(details):
    page = Page(sweep_page(details))
    rows = page.rows_of("trial_")
    assert len(rows) == len(details["trials"]) == 16
    states = ["failed" if "failed" in row[0] else "stopped" if "stopped" in row[0] else "finished" for row in rows]
    assert states == sorted(states, key=["finished", "stopped", "failed"].index)
    finished = [float(row[1].removesuffix(" %")) for row, state in zip(rows, states, strict=True) if state == "finished"]
    assert finished == sorted(finished, reverse=True)
    (recipe,) = page.rows_of("trial_000")
    default = details["trials"][0]
    assert "the recipe" in recipe[0]
    assert recipe[1] == f"{100 * default['metrics'][ACCURACY]:.2f} %"
    assert recipe[4:] == ["2", "0.1", "0", "0.1", "0.07", "one_way", "20,480", "6.8 min", default["run_id"], "–"]
    (failed,) = page.rows_of("trial_006")
    assert failed[1:4] + failed[10:] == ["–"] * 7
    assert all(page.rows_of(field) for field in details["space"])
    assert page.rows_of("objective.lambda_alignment")[-1][1] == "0.1 to 10, logarithmic"
    assert page.rows_of("objective.query_timestep_min")[-1][1] == "0, 500, 700, 900"
    assert details["command"] in page.text


def test_failures_come_first_and_the_best_trials_are_compared_with_the_recipe(details):
    text = Page(sweep_page(details)).text
    assert text.index("2 of 16 trials failed") < text.index("each after 20,480 samples")
    best = next(trial for trial in details["trials"] if trial["name"] == details["best"][ACCURACY])
    value, own = 100 * best["metrics"][ACCURACY], 100 * details["trials"][0]["metrics"][ACCURACY]
    assert f"{value:.2f} % of {best['name']} against the recipe's {own:.2f} % (+{value - own:.2f}"[:-1] in text
    assert Page(sweep_page(saved_details("sweep_one"))).text.count("no trial is better than the recipe's") == 3


def test_a_sweep_may_lack_a_baseline_finished_trials_or_all_trials(details):
    details["trials"][0] |= {"state": "failed", "error": "lost"}
    assert Page(sweep_page(details)).text.count("the recipe's values were not measured") == 3
    lost = [trial | {"state": "failed", "error": "lost", "history": [], "metrics": {}} for trial in details["trials"]]
    page = Page(sweep_page(details | {"front": [], "best": {}, "trials": lost}))
    assert page.text.count("no trial was trained to the end") == 3
    empty = details | {"front": [], "best": {}, "trials": []}
    assert "svg" not in {tag for tag, _ in Page(sweep_page(empty)).tags}
    assert sweep_files(empty) == {}


def test_markup_stays_text_and_only_runs_are_linked(details):
    page = check_poison_is_text(sweep_page(poisoned(details, {"state", "mode", "metric", "created"}, {"space", "values"})), 200)
    assert page.count("img") == 0
    assert set(page.attributes("href")) == {trial["url"] + EVIL for trial in details["trials"] if trial["url"]}
    for trial in details["trials"]:
        trial["url"] = "javascript:alert(1)"
    assert not Page(sweep_page(details)).attributes("href")


def test_charts_are_files_that_need_nothing_else(details):
    files = sweep_files(details)
    names = [f"{name}.svg" for name in ("learning_curves", "learning_curves_2", "learning_curves_3", "parallel_coordinates")]
    numeric = sorted(f"parameter_{field}.svg" for field in details["space"] if field != "model.query_visibility")
    assert sorted(files) == [*names, *numeric, "pareto.svg", "pareto_2.svg"]
    assert sorted(sweep_files(details | {"objectives": details["objectives"][:1]})) == [names[0], names[3], *numeric]
    odd = poisoned(details, {"state", "mode", "metric", "created"}, {"space", "values"})
    odd["trials"][0]["name"] = odd["front"][0] = "nul \x00, \x1b, half a pair \ud83d and $x_2$"
    for svg in [*files.values(), *sweep_files(odd).values()]:
        root = ElementTree.fromstring(svg.encode())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("width")
        assert "var(" not in svg
        assert "url(" not in svg
        assert svg.count("http") - svg.count("http://127.0.0.1") == 1  # the XML namespace


def groups(details, file, *kinds):
    """Return (class, path, [circle]) of the lines of a chart."""
    namespace = "{http://www.w3.org/2000/svg}"
    lines = []
    for group in ElementTree.fromstring(sweep_files(details)[file].encode()).iter(f"{namespace}g"):
        if group.get("class") in kinds:
            path = group.find(f"{namespace}path")
            points = [] if path is None else [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))]
            lines.append((group.get("class"), points, group.findall(f"{namespace}circle")))
    return lines


def tooltip(circle):
    return circle[0].text.split(",")[0]


def test_a_pareto_chart_has_all_scored_trials_and_a_staircase_of_the_best(details):
    details["trials"][1]["metrics"][ACCURACY] = math.nan
    staircase, *dots = groups(details, "pareto.svg", "line")
    shown = [t for t in details["trials"] if math.isfinite(t["metrics"].get(ACCURACY) or math.nan) and DISTANCE in t["metrics"]]
    assert sorted(tooltip(circle) for *_, (circle,) in dots) == sorted(
        trial["name"] + " (recipe)" * trial["default"] for trial in shown
    )
    hollow = {tooltip(circle) for *_, (circle,) in dots if "fill: #fff" in circle.get("style")}
    assert hollow == {trial["name"] for trial in shown if trial["state"] != "finished"}
    _, path, corners = staircase
    points = [(t["metrics"][ACCURACY], t["metrics"][DISTANCE]) for t in shown if t["state"] == "finished"]
    assert len(corners) == sum(not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in points) for a in points) > 1
    for (x, y), (next_x, next_y) in itertools.pairwise(path):
        assert x == pytest.approx(next_x, abs=0.02) or y == pytest.approx(next_y, abs=0.02)
        assert next_x >= x - 0.02  # y grows downwards: more accuracy costs quality
        assert next_y <= y + 0.02
    assert "nan" not in sweep_page(details).lower()


def test_learning_curves_end_where_trials_end(details):
    lines = groups(details, "learning_curves.svg", "line", "dashed")
    trained = [trial for trial in details["trials"] if trial["history"]]
    assert sorted(len(circles) for *_, circles in lines) == sorted(len(trial["history"]) for trial in trained)
    hollow = [circle for *_, circles in lines for circle in circles if "fill: #fff" in circle.get("style")]
    assert len(hollow) == sum(trial["state"] != "finished" for trial in trained)
    assert [kind for kind, *_ in lines].count("dashed") == 1  # the line of the recipe


def test_values_are_in_their_places_on_parallel_axes(details):
    """Three trials on a logarithmic axis with a zero, a linear axis, an axis of choices, and a lower-is-better metric."""
    details["objectives"] = [{"metric": "fd", "mode": "min"}]
    details["space"] = {
        "log": {"low": 0.1, "high": 10, "log": True},
        "linear": {"low": 0, "high": 10},
        "choice": {"values": ["b", "a"]},
    }
    values = [(0.1, 0, "b", 0.0), (1, 5, "a", 5.0), (10, 10, "c", 10.0), (0.0, None, None, 10.0)]
    trials = [
        details["trials"][0] | {"name": f"t{i}", "default": False, "values": dict(zip(details["space"], of, strict=False)),
                                "metrics": {"fd": of[3]}}
        for i, of in enumerate(values)
    ]  # fmt: skip
    del trials[3]["values"]["linear"]
    drawn = {
        path[0]: path for _, path, _ in groups(details | {"trials": trials, "front": []}, "parallel_coordinates.svg", "trial")
    }
    assert len(drawn) == 4
    zero, low, middle, high = (path for _, path in sorted(drawn.items(), reverse=True))
    for i in range(3):
        assert low[i][1] - middle[i][1] == pytest.approx(middle[i][1] - high[i][1], abs=0.2)
        assert low[i][1] > high[i][1]  # larger is higher
    assert low[3][1] < middle[3][1] < high[3][1]
    assert [x for x, _ in low] == sorted({x for x, _ in low})
    assert zero[0][1] > low[0][1] + 10  # below the smallest positive value
    assert len(zero) == 3  # a gap where a value is missing


def test_the_recipes_values_outside_the_space_are_drawn(details):
    details["trials"][0]["values"] |= {"objective.lambda_alignment": 0.0, "model.query_visibility": None}
    details["space"]["objective.query_timestep_min"] = {"values": [900, 0, 500]}
    svg = sweep_files(details)["parallel_coordinates.svg"]
    labels = re.findall(r">([^<>]+)</text>", svg)
    assert "null" in labels
    assert " 0 500 700 900 " in " ".join(labels)
    assert len(groups(details, "parallel_coordinates.svg", "trial")) == len(details["trials"])


def test_a_trial_links_to_its_run_and_its_folder(details):
    trial = details["trials"][0] | {"run_page": "https://mlflow.example/#/1", "url": "/data/sweep/trials/trial_000_0"}
    page = Page(sweep_page(details | {"trials": [trial]}))
    assert page.attributes("href") == [trial["run_page"], "trials/trial_000_0"]


def test_trials_that_ended_early_have_a_part_of_the_table_of_their_own(details):
    states = [trial["state"] for trial in details["trials"]]
    groups = [row[0] for row in Page(sweep_page(details)).rows if len(row) == 1]
    expected = [
        (label, states.count(state)) for state, label in (("finished", "Finished"), ("stopped", "Stopped"), ("failed", "Failed"))
    ]
    assert [(group.split()[0].rstrip(":"), int(re.search(r"\d+", group)[0])) for group in groups] == [e for e in expected if e[1]]


def test_the_parameter_that_decides_the_score_is_the_most_important_and_its_points_are_on_its_axis(details):
    trials = [trial for trial in details["trials"] if trial["state"] == "finished"]
    for trial in trials:
        trial["metrics"][ACCURACY] = trial["values"]["objective.temperature"]
    page = Page(sweep_page(details | {"trials": trials}))
    importances = [(row[0], int(row[1].removesuffix(" %"))) for row in page.rows if row[0] in details["space"] and "%" in row[1]]
    assert importances[0][0] == "objective.temperature"
    assert importances == sorted(importances, key=lambda each: -each[1])
    assert "%" not in str(
        [row[1] for row in Page(sweep_page(details | {"trials": trials[:3]})).rows if row[0] in details["space"]]
    )
    chart = ElementTree.fromstring(sweep_files(details | {"trials": trials})["parameter_objective.temperature.svg"].encode())
    circles = list(chart.iter("{http://www.w3.org/2000/svg}circle"))
    assert len(circles) == len(trials)
    order = sorted(circles, key=lambda circle: float(circle.get("cx")))
    heights = [-float(circle.get("cy")) for circle in order]
    assert heights == sorted(heights), "the score rises with the parameter"
