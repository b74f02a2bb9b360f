"""Statistics of a comparison over its seeds, and the check of the paper's claim."""

import hashlib
import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, cast

from scipy import optimize, stats

from ray_platform.metric_registry import describe_metric, find_metric
from ray_platform.report.comparison import claim_verdict
from ray_platform.report.records import ArmResult, Claim, ClaimResult, ComparisonDetails, PairedDifference
from ray_platform.terminal import render_table

CLAIM = Claim(
    differences=(("accuracy", "joint", "alignment"), ("fd", "joint", "generation")),
    holds="The claim holds: the joint model is better than the single-task models at both tasks",
    opposite="The claim does not hold: the joint model is worse at one of the tasks, or at both",
    partly="Half of the claim is shown: the joint model is better at one task, and at the other no difference is shown",
    not_shown="Null result: the claim is not shown",
    undecided="No verdict: the claim is about two differences, each over several seeds",
)
CONFIDENCE, POWER = 0.95, 0.8

Fields = dict[str, Any]  # config field -> value
RunFigures = Fields  # scores and costs of a run by name, and its `environment`
Results = dict[str, dict[int, RunFigures]]  # arm -> seed -> figures


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison whose config was checked."""

    identity: Fields  # everything that the figures depend on, except for arm and seed
    fields: dict[str, Fields]  # arm -> fields in which it differs
    results: Results  # of earlier calls; `compare` adds to them
    pending: list[tuple[str, int]]  # (arm, seed) in the order in which they run: all arms of a seed first
    selected_on: tuple[int, ...] = ()  # seeds on which settings were chosen, also by earlier calls


class ComparisonSummary(TypedDict):
    """`summary.json` of a comparison.

    It also has `best_of_<n>` if images were chosen among n: the differences of the joint arm, and of all arms in `arms`.
    """

    config: Fields
    config_digest: str
    environment: str
    selected_on: Sequence[int]  # seeds on which settings were chosen
    fresh: Sequence[int]  # the other ones, of which `paired`, `best_of_<n>` and `claim` are
    arms: Mapping[str, ArmResult]
    paired: Mapping[str, PairedDifference]
    claim: ClaimResult
    failures: Sequence[str]


def summarize(plan: ComparisonPlan, failures: Sequence[str]) -> ComparisonSummary:
    """Return the content of summary.json."""
    seeds = sorted({seed for runs in plan.results.values() for seed in runs})
    fresh = {arm: {s: run for s, run in runs.items() if s not in plan.selected_on} for arm, runs in plan.results.items()}
    paired = paired_differences(fresh, _joint_variants(plan))
    environments = [figures["environment"] for runs in plan.results.values() for figures in runs.values()]
    summary: ComparisonSummary = {
        "config": {"arms": plan.fields, **plan.identity},
        "config_digest": hashlib.sha256(json.dumps(plan.identity, sort_keys=True).encode()).hexdigest()[:16],
        "environment": "; ".join(dict.fromkeys(environments)),  # seconds on different machines are not comparable
        "selected_on": list(plan.selected_on),
        "fresh": [seed for seed in seeds if seed not in plan.selected_on],
        "arms": {arm: _summarize_arm(runs) for arm, runs in plan.results.items()},
        "paired": paired,
        "claim": check_claim(paired),
        "failures": list(failures),
    }
    return cast(ComparisonSummary, summary | best_of_differences(fresh))


def _joint_variants(plan: ComparisonPlan) -> list[str]:
    """Return the user's own arms that learn both tasks."""
    default = plan.identity["pretrain"]["objective"]["task"]
    known = ("joint", "joint_mask", "one_way_mask")
    return [arm for arm, own in plan.fields.items() if arm not in known and own.get("objective.task", default) == "joint"]


def _summarize_arm(runs: Mapping[int, RunFigures]) -> ArmResult:
    columns = _columns(runs)
    return {
        "seeds": {str(seed): runs[seed] for seed in sorted(runs)},
        "mean": {name: statistics.fmean(values) for name, values in columns.items()},
        "std": {name: statistics.stdev(values) if len(values) > 1 else None for name, values in columns.items()},
    }


def _columns(runs: Mapping[int, RunFigures]) -> dict[str, list[float]]:
    """Return the values of each number that every run of an arm has."""
    first = next(iter(runs.values()), {})
    names = [name for name, value in first.items() if isinstance(value, int | float)]
    return {name: [run[name] for run in runs.values()] for name in names if all(name in run for run in runs.values())}


def paired_differences(results: Results, joint_variants: Collection[str] = ()) -> dict[str, PairedDifference]:
    """Return `<score>_<arm>_minus_<other arm>` -> interval, for the scores that both arms have, over the seeds that both have.

    The joint arm is compared with every other one, `joint_variants` with the arms of a single task as well, and joint_mask with
    one_way_mask.
    """
    pairs = [("joint", other) for other in results if other not in ("joint", "joint_mask", "one_way_mask")]
    pairs += [(arm, other) for arm in joint_variants for other in ("generation", "alignment", "clip")]
    differences = {}
    for arm, other in [*pairs, ("joint_mask", "one_way_mask")]:
        seeds = sorted(results.get(arm, {}).keys() & results.get(other, {}).keys())
        columns, other_columns = (_columns({seed: results[a][seed] for seed in seeds}) for a in (arm, other))
        for name in (name for name in columns if name in other_columns and not describe_metric(name).is_cost):
            values = [a - b for a, b in zip(columns[name], other_columns[name], strict=True)]
            differences[f"{name}_{arm}_minus_{other}"] = confidence_interval(values)
    return differences


def best_of_differences(results: Results) -> Fields:
    """Return `best_of_<n>` -> `<fd or kid>_minus_random` -> interval of the joint arm, and those of each arm in `arms`.

    A run's `fd` is that of the first image of each caption, and `fd_best_of_<n>` that of the best of its n images.
    """
    differences: dict[str, dict[str, dict[str, PairedDifference]]] = {}  # `best_of_<n>` -> arm -> name -> interval
    for arm, runs in results.items():
        columns = _columns(runs)
        for name in columns:
            metric, best_of, number = name.partition("_best_of_")
            if best_of and metric in ("fd", "kid"):
                of_arm = differences.setdefault(f"best_of_{number}", {}).setdefault(arm, {})
                interval = confidence_interval([best - one for best, one in zip(columns[name], columns[metric], strict=True)])
                of_arm[f"{metric}_minus_random"] = interval
    return {name: {**arms.get("joint", {}), "arms": arms} for name, arms in differences.items()}


def confidence_interval(differences: Sequence[float]) -> PairedDifference:
    """Return the mean of paired differences, its 95 % interval by Student's t, and `detectable_difference`.

    One difference has neither.
    """
    n, mean = len(differences), statistics.fmean(differences)
    if n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n, "detectable": None}
    std = statistics.stdev(differences)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / n**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n, "detectable": detectable_difference(std, n)}


def detectable_difference(std: float, n: int) -> float:
    """Return the smallest true difference whose interval excludes zero, on its side, with a probability of 80 %.

    `std` is the standard deviation of n paired differences: the power of the two-sided t-test at 5 % is that of the noncentral t
    distribution with noncentrality delta sqrt(n) / std.
    """
    threshold = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)
    noncentrality = optimize.brentq(lambda x: stats.nct.sf(threshold, n - 1, x) - POWER, 0.0, 4 * threshold)
    return float(noncentrality * std / n**0.5)


def check_claim(paired: Mapping[str, PairedDifference]) -> ClaimResult:
    """Return whether the joint model is better than either single task at that task, with intervals that exclude zero."""
    names = {f"{metric}_{arm}_minus_{other}": metric for metric, arm, other in CLAIM.differences}
    if missing := [name for name in names if name not in paired]:
        return {"holds": False, "why": f"not measured: {', '.join(missing)}"}
    verdicts = [_check_difference(name, paired[name], find_metric(metric).direction == "max") for name, metric in names.items()]
    return {"holds": all(holds for holds, _ in verdicts), "why": "; ".join(why for _, why in verdicts)}


def _check_difference(name: str, difference: PairedDifference, higher_is_better: bool) -> tuple[bool, str]:
    mean, low, high, n = difference["mean"], difference["low"], difference["high"], difference["n"]
    if low is None or high is None:
        return False, f"{name} is {mean:+.4g} with one seed: no interval"
    text = f"{name} is {mean:+.4g}, 95 % interval {low:+.4g} to {high:+.4g} over {n} seeds"
    if low <= 0 <= high:
        if (detectable := difference.get("detectable")) is not None:
            text += f" (a difference of {detectable:.3g} would have been detected with a probability of {POWER:.0%})"
        return False, f"{text}, which includes zero"
    holds = (low > 0) == higher_is_better
    return holds, text if holds else f"{text}, of the opposite sign"


def format_summary(summary: ComparisonSummary) -> str:
    """Return tables for the terminal, a column per arm and a row per paired difference, and the verdict on the claim."""
    arms = summary["arms"]
    names = dict.fromkeys(name for entry in arms.values() for name in entry["mean"])
    rows = [["", *arms], ["seeds", *(str(len(entry["seeds"])) for entry in arms.values())]]
    for name in names:
        rows.append([name, *(_format_mean(entry["mean"].get(name), entry["std"].get(name)) for entry in arms.values())])
    differences = [["paired difference", "mean", "95 % interval", "detectable", "n"]]
    named, entries = dict(summary["paired"]), cast(Fields, summary)
    for best_of in (name for name in entries if name.startswith("best_of_")):
        arms_of = entries[best_of]["arms"]
        named |= {f"{arm}, {best_of}: {name}": each for arm, own in arms_of.items() for name, each in own.items()}
    for name, difference in named.items():
        low, high, detectable = difference["low"], difference["high"], difference.get("detectable")
        interval = "no interval" if low is None else f"{low:+.4g} to {high:+.4g}"
        least = "-" if detectable is None else f"{detectable:.3g}"
        differences.append([name, f"{difference['mean']:+.4g}", interval, least, str(difference["n"])])
    _, verdict, _ = claim_verdict(cast(ComparisonDetails, summary), CLAIM)
    return "\n\n".join([render_table(rows), render_table(differences), f"{verdict}: {summary['claim']['why']}"])


def _format_mean(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"
