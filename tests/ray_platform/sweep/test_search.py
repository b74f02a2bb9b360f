"""Search spaces in user syntax, the values that searches sample from them, and the Pareto front."""

import random

import pytest

from ray_platform.contracts import ConfigError
from ray_platform.sweep.config import Choice, Range, SearchConfig, describe_space, parse_dimension
from ray_platform.sweep.search import TRIAL, MultiObjectiveSearch, best_point, pareto_front, trial_points

SPACE = {"lambda": Range(0.25, 4.0, log=True), "start": Range(0, 700), "task": Choice(("joint", "clip"))}
DEFAULT = {"lambda": 2.0, "start": 0, "task": "joint"}
OBJECTIVES = {"accuracy": "max", "fd": "min"}


def search_config(search, num_trials, seed=0):
    space = {"any": {"values": [1]}}
    return SearchConfig(space=space, objectives=OBJECTIVES, search=search, num_trials=num_trials, seed=seed)


def test_dimensions_are_parsed_and_described_in_json():
    specs = {
        "a": {"values": [1, "x", [1, 2]]},
        "b": {"low": 1, "high": 4},
        "c": {"low": 0.1, "high": 1, "log": True},
    }
    space = {field: parse_dimension(field, spec) for field, spec in specs.items()}
    assert (space["b"].is_integer, space["c"].is_integer) == (True, False)
    assert describe_space(space) == {
        "a": {"values": [1, "x", [1, 2]]},
        "b": {"low": 1, "high": 4, "log": False},
        "c": {"low": 0.1, "high": 1.0, "log": True},
    }
    assert (space["b"].clip(9.7), space["c"].clip(-3)) == (4, 0.1)


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({}, "neither"),
        ({"values": []}, "neither"),
        ({"low": 1, "high": 2, "step": 1}, "neither"),
        ({"low": "1", "high": 2}, "numbers"),
        ({"low": 2, "high": 2}, "below"),
        ({"low": 0, "high": 2, "log": True}, "logarithmic"),
    ],
)
def test_an_invalid_dimension_is_rejected_in_one_line(spec, word):
    with pytest.raises(ConfigError, match=rf"^space\.x: .*{word}.*$"):
        parse_dimension("x", spec)


def test_a_grid_has_every_combination_once_and_starts_with_the_baseline():
    space, config = {"a": Choice((1, 2, 3)), "b": Choice(("x", "y"))}, search_config("grid", 0)
    points = trial_points(config, space, {"a": 2, "b": "x"})
    assert points[0] == {"a": 2, "b": "x"}
    assert sorted((p["a"], p["b"]) for p in points) == [(a, b) for a in (1, 2, 3) for b in "xy"]
    assert len(trial_points(config, space, {"a": 7, "b": "x"})) == 7, "a baseline outside of the space comes in addition"
    with pytest.raises(ConfigError, match="num_trials: 5, but the grid has 6 points"):
        trial_points(search_config("grid", 5), space, {"a": 2, "b": "x"})
    with pytest.raises(ConfigError, match=r"space\.lambda: a grid has values"):
        trial_points(config, SPACE, DEFAULT)


def is_inside(values):
    start = values["start"]
    return 0.25 <= values["lambda"] <= 4 and 0 <= start <= 700 and isinstance(start, int) and values["task"] in ("joint", "clip")


def test_random_samples_are_in_the_space_and_follow_the_seed():
    def sample(num_trials, seed):
        return trial_points(search_config("random", num_trials, seed), SPACE, DEFAULT)

    points = sample(20, 3)
    assert points[0] == DEFAULT
    assert len(points) == 20
    assert all(is_inside(values) for values in points)
    assert points == sample(20, 3)
    assert points[1:] != sample(20, 4)[1:]
    below_one = sum(values["lambda"] < 1 for values in sample(400, 0))
    assert 150 < below_one < 250, "half of a range that is uniform in the logarithm"


def suggest(searcher, trial):
    values = searcher.suggest(trial)[TRIAL]["values"]
    searcher.on_trial_complete(trial, {"accuracy": -abs(values["lambda"] - 0.5), "fd": values["start"]})
    return values


def test_optuna_starts_with_the_baseline_resumes_from_its_file_and_improves(tmp_path):
    searcher = MultiObjectiveSearch(search_config("optuna", 30), SPACE, DEFAULT)
    assert suggest(searcher, "t0") == DEFAULT
    first = [suggest(searcher, f"t{i}") for i in range(1, 10)]
    assert all(is_inside(values) for values in first)
    searcher.save(str(tmp_path / "state"))
    restored = MultiObjectiveSearch(search_config("optuna", 30), SPACE, DEFAULT)
    restored.restore(str(tmp_path / "state"))
    last = [suggest(searcher, f"t{i}") for i in range(10, 30)]
    assert [suggest(restored, f"t{i}") for i in range(10, 30)] == last
    assert restored.suggest("t30")[TRIAL]["number"] == 30

    def is_near(values):
        return abs(values["lambda"] - 0.5) < 0.25

    assert sum(map(is_near, last)) > sum(map(is_near, first)) + 2


def test_optuna_accepts_a_baseline_outside_of_the_space_and_values_of_any_type():
    space, baseline = {"scales": Choice(([1.0], [2.0, 3.0])), "gamma": Range(0.5, 1.0)}, {"scales": [7.0], "gamma": 0.1}
    searcher = MultiObjectiveSearch(search_config("optuna", 8), space, baseline)
    samples = [searcher.suggest(f"t{i}")[TRIAL]["values"] for i in range(8)]
    assert samples[0] == baseline
    assert {tuple(values["scales"]) for values in samples} <= {(7.0,), (1.0,), (2.0, 3.0)}


def test_the_pareto_front_is_what_no_point_dominates():
    points = {
        "a": {"accuracy": 0.9, "fd": 50.0},
        "b": {"accuracy": 0.5, "fd": 20.0},
        "equal to b": {"accuracy": 0.5, "fd": 20.0},
        "worse than b": {"accuracy": 0.5, "fd": 30.0},
        "c": {"accuracy": 0.7, "fd": 40.0},
        "without fd": {"accuracy": 0.99},
        "nan": {"accuracy": 0.99, "fd": float("nan")},
    }
    assert pareto_front(points, OBJECTIVES) == ["a", "c", "b", "equal to b"]
    assert (best_point(points, "accuracy", "max"), best_point(points, "fd", "min")) == ("without fd", "b")
    assert pareto_front({}, OBJECTIVES) == []
    rng = random.Random(0)
    points = {str(i): {"accuracy": rng.randint(0, 9) / 10, "fd": float(rng.randint(0, 9))} for i in range(60)}

    def dominates(a, b):
        return a != b and a["accuracy"] >= b["accuracy"] and a["fd"] <= b["fd"]

    expected = {name for name, point in points.items() if not any(dominates(other, point) for other in points.values())}
    assert set(pareto_front(points, OBJECTIVES)) == expected
