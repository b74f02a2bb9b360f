"""What all runs of a comparison say together: means, paired differences with their intervals, and whether the claim holds."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from diffdis_platform.comparison.plan import Plan, Results
from ray_platform.metric_registry import find_metric

CONFIDENCE = 0.95
# What the paper claims of the joint model: the difference, the end of its interval that must be beyond zero, on which side.
CLAIM = (("accuracy_joint_minus_alignment", "low", 1), ("fd_joint_minus_generation", "high", -1))


def summarize(made: Plan, failures: Sequence[str]) -> dict[str, Any]:
    """summary.json, in plain JSON types."""
    paired = paired_differences(made.results)
    return {
        "config": {"arms": made.fields, **made.identity},
        "config_digest": made.digest,
        # Where the runs took place: seconds of different machines cannot be compared.
        "environment": "; ".join(dict.fromkeys(run["environment"] for runs in made.results.values() for run in runs.values())),
        "arms": {
            arm: {
                "seeds": {str(seed): runs[seed] for seed in sorted(runs)},
                "mean": {name: statistics.fmean(values) for name, values in _columns(runs).items()},
                "std": {name: _std(values) for name, values in _columns(runs).items()},
            }
            for arm, runs in made.results.items()
        },
        "paired": paired,
        "claim": claim(paired),
        "failures": list(failures),
    }


def _columns(runs: Mapping[int, Mapping[str, Any]]) -> dict[str, list[float]]:
    """The figures that every run of an arm has."""
    first = next(iter(runs.values()), {})
    return {
        name: [run[name] for run in runs.values()]
        for name, value in first.items()
        if isinstance(value, int | float) and all(name in run for run in runs.values())
    }


def _std(values: Sequence[float]) -> float | None:
    """Of a sample; one value has none."""
    return statistics.stdev(values) if len(values) > 1 else None


def paired_differences(results: Results) -> dict[str, dict[str, float | int | None]]:
    """`<score>_<arm>_minus_<other arm>` -> {mean, low, high, n} for the scores that both have, over the seeds that both have.

    The joint arm against each of the others, and joint_mask against one_way_mask.
    """
    pairs = [("joint", other) for other in results if other not in ("joint", "joint_mask", "one_way_mask")]
    found = {}
    for arm, other in [*pairs, ("joint_mask", "one_way_mask")]:
        mine, theirs = results.get(arm, {}), results.get(other, {})
        seeds = sorted(mine.keys() & theirs.keys())
        ours, others = ({seed: runs[seed] for seed in seeds} for runs in (mine, theirs))
        for name in [name for name in _columns(ours) if name in _columns(others) and not find_metric(name).is_cost]:
            found[f"{name}_{arm}_minus_{other}"] = interval([mine[seed][name] - theirs[seed][name] for seed in seeds])
    return found


def interval(differences: Sequence[float]) -> dict[str, float | int | None]:
    """Their mean, and its 95 % interval by Student's t, which one difference does not have."""
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * statistics.stdev(differences) / n**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def claim(paired: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Whether the joint model is better than either single task at its own task, with intervals that exclude zero."""
    missing = [name for name, _, _ in CLAIM if name not in paired]
    if missing:
        return {"holds": False, "why": f"not measured: {', '.join(missing)}"}
    verdicts = [_verdict(name, paired[name], end, sign) for name, end, sign in CLAIM]
    return {"holds": all(held for held, _ in verdicts), "why": "; ".join(why for _, why in verdicts)}


def _verdict(name: str, difference: Mapping[str, Any], end: str, sign: int) -> tuple[bool, str]:
    mean, low, high, n = (difference[part] for part in ("mean", "low", "high", "n"))
    if low is None:
        return False, f"{name} is {mean:+.4g} with one seed: no interval"
    where = f"{name} is {mean:+.4g}, 95 % interval {low:+.4g} to {high:+.4g} over {n} seeds"
    if sign * difference[end] > 0:
        return True, where
    opposite = high < 0 if sign > 0 else low > 0
    return False, f"{where}, {'of the opposite sign' if opposite else 'which holds zero'}"
