"""Spaces as users write them, and the values that searches draw from them."""

import pytest

from ray_platform.contracts import ConfigError
from ray_platform.sweep import search
from ray_platform.sweep.space import Choice, Range, describe, dimension

SPACE = {"lambda": Range(0.25, 4.0, log=True), "start": Range(0, 700), "task": Choice(("joint", "clip"))}
DEFAULT = {"lambda": 2.0, "start": 0, "task": "joint"}
OBJECTIVES = {"accuracy": "max", "fd": "min"}


def test_dimensions_are_read_and_told_in_json():
    given = {
        "a": {"values": [1, "x", [1, 2]]},
        "b": {"low": 1, "high": 4},
        "c": {"low": 0.1, "high": 1, "log": True},
    }
    space = {field: dimension(field, value) for field, value in given.items()}
    assert (space["b"].whole, space["c"].whole) == (True, False)
    assert describe(space) == {
        "a": {"values": [1, "x", [1, 2]]},
        "b": {"low": 1, "high": 4, "log": False},
        "c": {"low": 0.1, "high": 1.0, "log": True},
    }
    assert (space["b"].clip(9.7), space["c"].clip(-3)) == (4, 0.1)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({}, "neither"),
        ({"values": []}, "neither"),
        ({"low": 1}, "neither"),
        ({"low": 1, "high": 2, "step": 1}, "neither"),
        ({"low": "1", "high": 2}, "must be numbers"),
        ({"low": 2, "high": 2}, "is not below"),
        ({"low": 0, "high": 2, "log": True}, "cannot begin at 0"),
    ],
)
def test_a_dimension_that_is_none_is_refused_in_one_line(given, line):
    with pytest.raises(ConfigError, match=r"^space\.x: ") as error:
        dimension("x", given)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_grid_has_every_combination_once_and_begins_with_the_recipe():
    space = {"a": Choice((1, 2, 3)), "b": Choice(("x", "y"))}
    points = search.grid(space, {"a": 2, "b": "x"})
    assert points[0] == {"a": 2, "b": "x"}
    assert len(points) == 6
    assert {(p["a"], p["b"]) for p in points} == {(a, b) for a in (1, 2, 3) for b in "xy"}
    assert len(search.grid(space, {"a": 7, "b": "x"})) == 7, "the recipe's own values come first even where they are none of its"
    with pytest.raises(ConfigError, match=r"space\.lambda: a grid has values"):
        search.grid(SPACE, DEFAULT)


def inside(values):
    return (0.25 <= values["lambda"] <= 4 and 0 <= values["start"] <= 700 and isinstance(values["start"], int)) and values[
        "task"
    ] in ("joint", "clip")


def test_random_draws_are_inside_begin_with_the_recipe_and_follow_the_seed():
    points = search.random(SPACE, DEFAULT, 20, seed=3)
    assert points[0] == DEFAULT
    assert len(points) == 20
    assert all(inside(values) for values in points)
    assert points == search.random(SPACE, DEFAULT, 20, seed=3)
    assert points[1:] != search.random(SPACE, DEFAULT, 20, seed=4)[1:]
    below_one = sum(values["lambda"] < 1 for values in search.random(SPACE, DEFAULT, 400, seed=0))
    assert 150 < below_one < 250, "half of a range whose logarithm is uniform"


def suggest(searcher, trial, accuracy=None):
    values = searcher.suggest(trial)[search.TRIAL]["values"]
    score = -abs(values["lambda"] - 0.5) if accuracy is None else accuracy
    searcher.on_trial_complete(trial, {"accuracy": score, "fd": values["start"]})
    return values


def test_optuna_begins_with_the_recipe_goes_on_from_its_own_file_and_finds_what_is_better(tmp_path):
    searcher = search.MultiObjective(SPACE, DEFAULT, OBJECTIVES, 30, seed=0)
    assert searcher.suggest("t0") == {search.TRIAL: {"number": 0, "values": DEFAULT}}
    searcher.on_trial_complete("t0", {"accuracy": -1.5, "fd": 0})
    first = [suggest(searcher, f"t{i}") for i in range(1, 10)]
    assert all(inside(values) for values in first)
    searcher.save(str(tmp_path / "state"))
    restored = search.MultiObjective(SPACE, DEFAULT, OBJECTIVES, 30, seed=0)
    restored.restore(str(tmp_path / "state"))
    assert [suggest(restored, f"t{i}") for i in range(10, 30)] == (last := [suggest(searcher, f"t{i}") for i in range(10, 30)])
    assert restored.suggest("t30")[search.TRIAL]["number"] == 30

    def near(values):
        return abs(values["lambda"] - 0.5) < 0.25

    assert sum(map(near, last)) > sum(map(near, first)) + 2


def test_optuna_takes_a_recipe_outside_of_the_space_and_values_of_any_type():
    space = {"scales": Choice(([1.0], [2.0, 3.0])), "gamma": Range(0.5, 1.0)}
    default = {"scales": [7.0], "gamma": 0.1}
    searcher = search.MultiObjective(space, default, OBJECTIVES, 8, seed=0)
    drawn = [searcher.suggest(f"t{i}")[search.TRIAL]["values"] for i in range(8)]
    assert drawn[0] == default
    assert {tuple(values["scales"]) for values in drawn} <= {(7.0,), (1.0,), (2.0, 3.0)}
