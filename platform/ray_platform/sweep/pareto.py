"""Trade-offs between objectives."""

from collections.abc import Mapping, Sequence


def pareto_front(points: Mapping[str, Mapping[str, float]], objectives: Mapping[str, str]) -> list[str]:
    """The names of `points` that no other one dominates: is as good in all objectives (`{metric: max | min}`) and better in one.

    The best by the first objective come first. A point without one of the metrics is left out.
    """
    losses = {
        name: tuple(-found[metric] if mode == "max" else found[metric] for metric, mode in objectives.items())
        for name, found in points.items()
        if all(metric in found for metric in objectives)
    }
    front = [name for name, own in losses.items() if not any(_dominates(other, own) for other in losses.values())]
    return sorted(front, key=lambda name: losses[name])


def _dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


def best(points: Mapping[str, Mapping[str, float]], metric: str, mode: str) -> str:
    """The name with the best value; the first of equals. Raises ValueError where none has the metric."""
    values = {name: found[metric] for name, found in points.items() if metric in found}
    return (max if mode == "max" else min)(values, key=lambda name: values[name])
