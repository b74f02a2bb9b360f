"""A sweep's page and pictures: complete, in place, closed to what the web wrote, and good for whatever a sweep may lack."""

import copy
import math
import re
from xml.etree import ElementTree

import pytest

from ray_platform.report import sweep_charts
from ray_platform.report.parallel_coordinates import Axis, Trial, parallel_coordinates
from ray_platform.report.sweep import pictures, sweep_page
from tests.support.html_page import EVIL, Page
from tests.support.sweep_details import ACCURACY, DISTANCE, ERROR, OBJECTIVES, RECIPE, SPACE, sweep


@pytest.fixture(scope="module")
def details():
    return sweep()


@pytest.fixture(scope="module")
def html(details):
    return sweep_page(details)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def of_state(details, *states):
    return [trial for trial in details["trials"] if trial["state"] in states]


def test_every_trial_is_in_the_table_the_best_first_and_the_failed_last(page, details):
    rows = page.rows_of("trial_")
    assert len(rows) == len(details["trials"]) == 16
    states = ["failed" if "failed" in row[0] else "stopped" if "stopped" in row[0] else "finished" for row in rows]
    assert states == sorted(states, key=["finished", "stopped", "failed"].index)
    finished = [float(row[1].removesuffix(" %")) for row, state in zip(rows, states, strict=True) if state == "finished"]
    assert finished == sorted(finished, reverse=True)
    default = details["trials"][0]
    (row,) = [row for row in rows if row[0].startswith("trial_000")]
    assert "the recipe" in row[0]
    assert row[1] == f"{100 * default['metrics'][ACCURACY]:.2f} %"
    assert row[2] == f"{default['metrics'][DISTANCE]:.{2 if default['metrics'][DISTANCE] < 100 else 1}f}"
    assert row[4:10] == ["2", "0.1", "0", "0.1", "0.07", "one_way"]
    assert row[10:] == ["20,480", "6.8 min", default["run_id"]]
    (lost,) = [row for row in rows if row[0].startswith("trial_006")]
    assert lost[1:4] == ["–"] * 3
    assert lost[10:] == ["–"] * 3


def test_failures_come_first_with_their_line(page):
    assert "2 of 16 trials failed" in page.text
    assert page.text.count(ERROR) == 2
    assert page.text.index("2 of 16 trials failed") < page.text.index("Against the recipe's own values")
    clean = sweep(6)
    assert "failed" not in Page(sweep_page(clean)).text


def test_the_best_trials_are_compared_with_the_recipe(page, details):
    by_name = {trial["name"]: trial for trial in details["trials"]}
    best, default = by_name[details["best"][ACCURACY]], details["trials"][0]
    value, own = 100 * best["metrics"][ACCURACY], 100 * default["metrics"][ACCURACY]
    sentence = f"mean zero-shot accuracy: {value:.2f} % of {best['name']} against the recipe's {own:.2f} % (+{value - own:.2f}"
    assert sentence[:-1] in page.text
    assert "each after 20,480 samples" in page.text
    alone = sweep_page(sweep(1))
    assert Page(alone).text.count("no trial is better than the recipe's") == 3
    assert 'class="card verdict null"' in alone


def test_a_recipe_that_was_not_trained_to_the_end_is_no_yardstick(details):
    less = copy.deepcopy(details)
    less["trials"][0] |= {"state": "failed", "error": "lost"}
    less["front"] = [name for name in less["front"] if name != "trial_000"]
    assert Page(sweep_page(less)).text.count("the recipe's own values were not measured") == 3


def test_a_sweep_of_failures_alone_and_one_of_nothing(details):
    lost = [
        trial | {"state": "failed", "error": ERROR, "history": [], "metrics": {}} for trial in copy.deepcopy(details["trials"])
    ]
    none = {"front": [], "best": {}}
    page = Page(sweep_page(details | none | {"trials": lost}))
    assert "16 of 16 trials failed" in page.text
    assert page.text.count("no trial was trained to the end") == 3
    empty = Page(sweep_page(details | none | {"trials": []}))
    assert "What was found" not in empty.text
    assert pictures(details | none | {"trials": []}) == {}


def test_nothing_is_loaded_and_only_runs_are_linked(page, html, details):
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form", "img"})
    assert set(page.attributes("href")) == {trial["url"] for trial in details["trials"] if trial["url"]}
    assert "url(" not in html
    assert "@import" not in html
    odd = copy.deepcopy(details)
    for trial in odd["trials"]:
        trial["url"] = "javascript:alert(1)"
    assert not Page(sweep_page(odd)).attributes("href")


def poisoned(value, field=""):
    """Every text that people gave, ending in markup; names of fields too."""
    if isinstance(value, dict):
        spoilt = field in ("space", "values")
        return {
            key + EVIL * spoilt: poisoned(inner, "values" if spoilt and field == "values" else key)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [poisoned(inner, field) for inner in value]
    return value + EVIL if value and isinstance(value, str) and field not in ("state", "mode", "metric", "created") else value


def test_nothing_of_the_web_is_taken_for_markup(page, details):
    evil = sweep_page(poisoned(details))
    assert "<script" not in evil
    assert evil.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 200
    dangerous = Page(evil)
    # Tag by tag the same page, but for the marks of axes, of which longer names leave room for fewer.
    tags, others = ([(tag, list(attrs)) for tag, attrs in each.tags if tag != "text"] for each in (dangerous, page))
    assert tags == others
    assert dangerous.attributes("style") == page.attributes("style")
    for svg in pictures(poisoned(details)).values():
        ElementTree.fromstring(svg)


def test_pictures_are_files_of_their_own(details):
    found = pictures(details)
    assert set(found) == {
        "pareto.svg", "pareto_2.svg", "parallel_coordinates.svg", "learning_curves.svg", "learning_curves_2.svg",
        "learning_curves_3.svg",
    }  # fmt: skip
    for svg in found.values():
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "var(" not in svg
        assert "url(" not in svg
        assert svg.count("http") == 1  # the name space
    odd = copy.deepcopy(details)
    odd["trials"][0]["name"] = "nul \x00 and \x1b"
    odd["front"] = ["nul \x00 and \x1b"]
    for svg in pictures(odd).values():
        ElementTree.fromstring(svg)


def test_one_objective_has_no_front(details):
    one = details | {"objectives": OBJECTIVES[:1]}
    assert set(pictures(one)) == {"parallel_coordinates.svg", "learning_curves.svg"}
    assert "against mean zero-shot accuracy" not in Page(sweep_page(one)).text


def circles(svg):
    return re.findall(r'<circle class="(dot[ a-z]*)" cx="([\d.]+)" cy="([\d.]+)" r="4"><title>(trial_\d+)', svg)


def test_the_front_joins_what_nothing_beats(details):
    svg = sweep_charts.pareto(details, *OBJECTIVES[:2])
    shown = [trial for trial in details["trials"] if trial["metrics"]]
    lone = {name for _, _, _, name in circles(svg)}
    assert lone == {trial["name"] for trial in shown}
    hollow = {name for kind, _, _, name in circles(svg) if kind == "dot hollow"}
    assert hollow == {trial["name"] for trial in shown if trial["state"] != "finished"}
    path = re.search(r'<polyline class="line" points="([^"]+ [^"]+)"', svg)[1].split()
    joined = [tuple(map(float, place.split(","))) for place in path]
    assert len(joined) > 1
    assert joined == sorted(joined)
    assert [y for _, y in joined] == sorted(
        (y for _, y in joined), reverse=True
    )  # more accuracy costs quality: y grows downwards
    points = [(t["metrics"][ACCURACY], t["metrics"][DISTANCE]) for t in of_state(details, "finished")]
    best = [a for a in points if not any(b != a and b[0] >= a[0] and b[1] <= a[1] for b in points)]
    assert len(joined) == len(best)
    assert "trial_000 (recipe)</text>" in svg


def test_a_trial_without_a_score_is_not_drawn(details):
    odd = copy.deepcopy(details)
    odd["trials"][1]["metrics"][ACCURACY] = math.nan
    odd["trials"][2]["metrics"][DISTANCE] = None
    assert "trial_001" not in {name for *_, name in circles(sweep_charts.pareto(odd, *OBJECTIVES[:2]))}
    assert "trial_002" not in {name for *_, name in circles(sweep_charts.pareto(odd, *OBJECTIVES[:2]))}
    assert "nan" not in sweep_page(odd).lower()


def test_learning_curves_end_where_trials_end(details):
    svg = sweep_charts.learning_curves(details, ACCURACY)
    assert svg.count('<polyline class="line"') == len([trial for trial in details["trials"] if trial["history"]])
    assert len(circles(svg)) == sum(len(trial["history"]) for trial in details["trials"])
    ended = [trial for trial in of_state(details, "stopped", "failed") if trial["history"]]
    assert svg.count('"dot hollow"') == len(ended)
    assert svg.count('class="dashed"') == 1  # the recipe's


def lines_of(svg):
    return [
        [tuple(map(float, place.split(","))) for place in points.split()]
        for points in re.findall(r'<polyline class="trial" points="([^"]+)"', svg)
    ]


def trial(*values, name=""):
    return Trial(name, values, "#123456", 1.0, False, "about")


def test_values_are_where_they_belong_on_their_axes():
    axes = [
        Axis("log", "", "", log=True),
        Axis("linear", "", ""),
        Axis("choice", "", "", choices=["b", "a"]),
        Axis("down", "", "", downwards=True),
    ]
    svg = parallel_coordinates(axes, [trial(0.1, 0, "b", 0), trial(1, 5, "a", 5), trial(10, 10, "c", 10)], None)
    low, middle, high = lines_of(svg)
    for i in range(3):
        assert low[i][1] - middle[i][1] == pytest.approx(middle[i][1] - high[i][1], abs=0.2)
        assert low[i][1] > high[i][1]  # larger is higher
    assert low[3][1] < middle[3][1] < high[3][1]
    assert [x for x, _ in low] == sorted({x for x, _ in low})


def test_odd_values_on_axes():
    zero = lines_of(
        parallel_coordinates([Axis("log", "", "", log=True), Axis("y", "", "")], [trial(0, 1), trial(0.1, 1), trial(1, 1)], None)
    )
    assert zero[0][0][1] > zero[1][0][1] + 10  # below the least value that has a logarithm
    numbers = parallel_coordinates(
        [Axis("x", "", "", choices=[900, 0, 500]), Axis("y", "", "")], [trial(700, 1), trial(0, 2)], None
    )
    assert re.findall(r'text-anchor="end">([\d,]+)<', numbers)[:4] == ["0", "500", "700", "900"]  # with the recipe's own
    gap = lines_of(
        parallel_coordinates([Axis(n, "", "") for n in "abcde"], [trial(1, 2, None, 3, 4), trial(1, None, 1, None, 1)], None)
    )
    assert [len(piece) for piece in gap] == [2, 2]
    same = lines_of(parallel_coordinates([Axis("x", "", "", log=True), Axis("y", "", "")], [trial(3.0, 1), trial(3.0, 1)], None))
    assert same[0] == same[1]


def test_the_recipes_values_outside_the_space_are_drawn(details):
    outside = copy.deepcopy(details)
    outside["trials"][0]["values"] = RECIPE | {
        "objective.lambda_alignment": 0.0, "objective.query_timestep_min": 50, "model.query_visibility": None,
    }  # fmt: skip
    svg = sweep_charts.parallel_coordinates(outside)
    assert ">null</text>" in svg
    assert len(lines_of(svg)) == len(lines_of(sweep_charts.parallel_coordinates(details)))


def test_all_of_the_space_is_on_the_page(page):
    for field in SPACE:
        assert page.rows_of(field)
    assert page.rows_of("objective.lambda_alignment")[0][1] == "0.1 to 10, logarithmic"
    assert page.rows_of("objective.query_timestep_min")[0][1] == "0, 500, 700, 900"
    assert "python jobs/sweep.py --recipe demo_sweep --output_dir /data/my-sweep" in page.text
