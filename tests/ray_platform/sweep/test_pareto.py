"""Fronts against a brute-force definition, and what belongs to none."""

import random

import pytest

from ray_platform.sweep.pareto import best, pareto_front

OBJECTIVES = {"accuracy": "max", "fd": "min"}


def test_a_front_of_few():
    points = {
        "a": {"accuracy": 0.9, "fd": 50.0},
        "b": {"accuracy": 0.5, "fd": 20.0},
        "c": {"accuracy": 0.5, "fd": 30.0},  # b is better
        "d": {"accuracy": 0.7, "fd": 40.0},
        "e": {"accuracy": 0.99},  # has no image quality
    }
    assert pareto_front(points, OBJECTIVES) == ["a", "d", "b"]
    assert best(points, "accuracy", "max") == "e"
    assert best(points, "fd", "min") == "b"
    assert pareto_front({}, OBJECTIVES) == []
    with pytest.raises(ValueError, match="empty"):
        best({}, "fd", "min")


def test_equal_points_are_both_on_the_front():
    points = {"a": {"accuracy": 1.0, "fd": 1.0}, "b": {"accuracy": 1.0, "fd": 1.0}}
    assert pareto_front(points, OBJECTIVES) == ["a", "b"]


def test_nobody_on_the_front_is_dominated_and_everybody_else_is():
    rng = random.Random(0)
    points = {str(i): {"accuracy": rng.randint(0, 9) / 10, "fd": float(rng.randint(0, 9))} for i in range(60)}
    front = set(pareto_front(points, OBJECTIVES))

    def dominated(name):
        own = points[name]
        return any(
            o["accuracy"] >= own["accuracy"] and o["fd"] <= own["fd"] and (o["accuracy"] > own["accuracy"] or o["fd"] < own["fd"])
            for o in points.values()
        )

    assert front == {name for name in points if not dominated(name)}
