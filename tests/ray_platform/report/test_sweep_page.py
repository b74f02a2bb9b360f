"""A sweep's page and charts: complete, values in place, closed to what the web wrote, and robust to missing parts."""

import copy
import itertools
import math
import re
from xml.etree import ElementTree

import pytest

from ray_platform.report.parallel_coordinates import ParallelAxis, ParallelLine, parallel_coordinates
from ray_platform.report.sweep import learning_curves, pareto_chart, sweep_files, sweep_page, trials_chart
from tests.support.html_page import EVIL, Page, check_poison_is_text, poisoned, saved_details

ACCURACY, DISTANCE = "eval/zero_shot_mean", "eval/fd_efficientnet_lite0/guidance_3"
NOT_MEASURED = "the recipe's values were not measured"


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
    assert recipe[4:] == ["2", "0.1", "0", "0.1", "0.07", "one_way", "20,480", "6.8 min", default["run_id"]]
    (failed,) = page.rows_of("trial_006")
    assert failed[1:4] + failed[10:] == ["–"] * 6
    for field in details["space"]:
        assert page.rows_of(field)
    assert page.rows_of("objective.lambda_alignment")[0][1] == "0.1 to 10, logarithmic"
    assert page.rows_of("objective.query_timestep_min")[0][1] == "0, 500, 700, 900"
    assert details["command"] in page.text


def test_failures_come_first_and_the_best_trials_are_compared_with_the_recipe(details):
    text = Page(sweep_page(details)).text
    assert text.index("2 of 16 trials failed") < text.index("each after 20,480 samples")
    assert text.count(details["trials"][3]["error"]) == 2
    by_name = {trial["name"]: trial for trial in details["trials"]}
    best = by_name[details["best"][ACCURACY]]
    value, own = 100 * best["metrics"][ACCURACY], 100 * details["trials"][0]["metrics"][ACCURACY]
    assert f"{value:.2f} % of {best['name']} against the recipe's {own:.2f} % (+{value - own:.2f}"[:-1] in text
    assert Page(sweep_page(saved_details("sweep_one"))).text.count("no trial is better than the recipe's") == 3


def test_a_sweep_may_lack_a_baseline_finished_trials_or_all_trials(details):
    less = copy.deepcopy(details)
    less["trials"][0] |= {"state": "failed", "error": "lost"}
    assert Page(sweep_page(less)).text.count(NOT_MEASURED) == 3
    lost = [trial | {"state": "failed", "error": "lost", "history": [], "metrics": {}} for trial in details["trials"]]
    page = Page(sweep_page(details | {"front": [], "best": {}, "trials": lost}))
    assert page.text.count("no trial was trained to the end") == 3
    empty = details | {"front": [], "best": {}, "trials": []}
    assert "svg" not in {tag for tag, _ in Page(sweep_page(empty)).tags}
    assert sweep_files(empty) == {}


def test_markup_stays_text_and_only_runs_are_linked(details):
    page = check_poison_is_text(sweep_page(poisoned(details, {"state", "mode", "metric", "created"}, {"space", "values"})), 200)
    assert page.count("img") == 0
    assert set(page.attributes("href")) == {
        trial["url"] + EVIL
        for trial in details["trials"] if trial["url"]
    }  # fmt: skip
    for trial in details["trials"]:
        trial["url"] = "javascript:alert(1)"
    assert not Page(sweep_page(details)).attributes("href")


def test_charts_are_files_that_need_nothing_else(details):
    files = sweep_files(details)
    assert set(files) == {
        "pareto.svg", "pareto_2.svg", "parallel_coordinates.svg", "learning_curves.svg", "learning_curves_2.svg",
        "learning_curves_3.svg",
    }  # fmt: skip
    assert files == sweep_files(details)  # deterministic
    assert set(sweep_files(details | {"objectives": details["objectives"][:1]})) == {
        "parallel_coordinates.svg", "learning_curves.svg",
    }  # fmt: skip
    odd = poisoned(details, {"state", "mode", "metric", "created"}, {"space", "values"})
    odd["trials"][0]["name"] = odd["front"][0] = "nul \x00, \x1b, half a pair \ud83d and $x_2$"
    for svg in [*files.values(), *sweep_files(odd).values()]:
        root = ElementTree.fromstring(svg.encode())
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root.get("width")
        assert "var(" not in svg
        assert "url(" not in svg
        assert svg.count("http") - svg.count("http://127.0.0.1") == 1  # the name space


def groups(chart, *kinds):
    """Return (class, opacity, path, [circle]) of the lines of a chart."""
    found = []
    for group in ElementTree.fromstring(chart.__html__()).iter("g"):
        if group.get("class") in kinds:
            path = group.find("path")
            points = [] if path is None else [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", path.get("d"))]
            found.append((group.get("class"), points, group.findall("circle")))
    return found


def test_the_front_is_a_staircase_through_what_nothing_dominates(details):
    chart = pareto_chart(details, *details["objectives"][:2])
    staircase, *dots = groups(chart, "line")
    shown = [trial for trial in details["trials"] if trial["metrics"]]
    assert [len(circles) for _, _, circles in dots] == [1] * len(shown)
    hollow = {c.find("title").text.split(",")[0] for *_, (c,) in dots if "fill: var(--card)" in c.get("style")}
    assert hollow == {trial["name"] for trial in shown if trial["state"] != "finished"}
    _, path, corners = staircase
    points = [(t["metrics"][ACCURACY], t["metrics"][DISTANCE]) for t in shown if t["state"] == "finished"]
    assert len(corners) == sum(not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in points) for a in points) > 1
    for (x, y), (next_x, next_y) in itertools.pairwise(path):
        assert x == pytest.approx(next_x, abs=0.02) or y == pytest.approx(next_y, abs=0.02)
        assert next_x >= x - 0.02  # y grows downwards: more accuracy costs quality
        assert next_y <= y + 0.02
    assert "trial_000 (recipe)" in chart.__html__()


def test_trials_without_a_score_are_not_drawn(details):
    details["trials"][1]["metrics"][ACCURACY] = math.nan
    details["trials"][2]["metrics"][DISTANCE] = None
    titles = ElementTree.fromstring(pareto_chart(details, *details["objectives"][:2]).__html__()).iter("title")
    assert {"trial_001", "trial_002"}.isdisjoint(title.text.split(",")[0] for title in titles)
    assert "nan" not in sweep_page(details).lower()


def test_learning_curves_end_where_trials_end(details):
    lines = groups(learning_curves(details, ACCURACY), "line", "dashed")
    trained = [trial for trial in details["trials"] if trial["history"]]
    assert sorted(len(circles) for *_, circles in lines) == sorted(len(trial["history"]) for trial in trained)
    hollow = [circle for *_, circles in lines for circle in circles if "fill: var(--card)" in circle.get("style")]
    assert len(hollow) == sum(trial["state"] != "finished" for trial in trained)
    assert [kind for kind, *_ in lines].count("dashed") == 1  # the recipe's


def trial(*values, name=""):
    return ParallelLine(name, values, "#123456", 1.0, False, "tooltip")


def axis(name, **options):
    return ParallelAxis(name, "", "", **options)


def paths(*args):
    return [points for _, points, _ in groups(parallel_coordinates(*args, None), "trial")]


def test_values_are_in_their_places_on_parallel_axes():
    axes = [axis("log", log=True), axis("linear"), axis("choice", choices=["b", "a"]), axis("down", downwards=True)]
    low, middle, high = paths(axes, [trial(0.1, 0, "b", 0), trial(1, 5, "a", 5), trial(10, 10, "c", 10)])
    for i in range(3):
        assert low[i][1] - middle[i][1] == pytest.approx(middle[i][1] - high[i][1], abs=0.2)
        assert low[i][1] > high[i][1]  # larger is higher
    assert low[3][1] < middle[3][1] < high[3][1]
    assert [x for x, _ in low] == sorted({x for x, _ in low})
    zero, least, _ = paths([axis("log", log=True), axis("y")], [trial(0, 1), trial(0.1, 1), trial(1, 1)])
    assert zero[0][1] > least[0][1] + 10  # below the smallest value that has a logarithm
    gap = paths([axis(name) for name in "abcde"], [trial(1, 2, None, 3, 4), trial(1, None, 1, None, 1)])
    assert len(gap[0]) == 4
    same, other = paths([axis("x", log=True), axis("y")], [trial(3.0, 1), trial(3.0, 1)])
    assert same == other
    chart = parallel_coordinates([axis("x", choices=[900, 0, 500]), axis("y")], [trial(700, 1), trial(0, 2)], None)
    labels = [element.text for element in ElementTree.fromstring(chart.__html__()).iter("text")]
    assert [label for label in labels if label in ("0", "500", "700", "900")] == ["0", "500", "700", "900"]


def test_the_recipes_values_outside_the_space_are_drawn(details):
    details["trials"][0]["values"] |= {"objective.lambda_alignment": 0.0, "model.query_visibility": None}
    chart = trials_chart(details)
    assert ">null</text>" in chart.__html__()
    assert len(groups(chart, "trial")) == len(details["trials"])
