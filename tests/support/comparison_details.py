"""A whole comparison, made up: four arms and the joint mask, three seeds.

python -m tests.support.comparison_details report.html [null]
"""

import random
import statistics
import sys
from pathlib import Path
from typing import Any

from scipy import stats

from ray_platform.report.comparison import comparison_page
from tests.support.evaluation_details import CAPTIONS, picture

ARMS: dict[str, dict[str, Any]] = {
    "joint": {"objective.task": "joint"},
    "generation": {"objective.task": "generation"},
    "alignment": {"objective.task": "alignment"},
    "clip": {"objective.task": "clip"},
    "joint_mask": {"objective.task": "joint", "model.query_visibility": "joint", "objective.num_draws": 1},
}
SCORES = ("accuracy", "accuracy_heldout_style", "accuracy_heldout_names", "retrieval_r1")
LEVELS = {"joint": 0.062, "alignment": 0.051, "clip": 0.049, "joint_mask": 0.0615}
PAIRS = [
    *((score, "joint", other) for other in ("alignment", "clip") for score in SCORES),
    ("fd", "joint", "generation"), ("kid", "joint", "generation"),
]  # fmt: skip
SEEDS = ("0", "1", "2")


def comparison(gain: float = 1.0, seeds: tuple[str, ...] = SEEDS) -> dict[str, Any]:
    """What `comparison_page` takes. gain: how much of the joint model's lead there is."""
    arms = {name: _arm(name, gain, seeds) for name in ARMS}
    paired = {f"{metric}_{a}_minus_{b}": difference(arms, metric, a, b) for metric, a, b in PAIRS}
    accuracy, distance = paired["accuracy_joint_minus_alignment"], paired["fd_joint_minus_generation"]
    holds = len(seeds) > 1 and accuracy["low"] > 0 and distance["high"] < 0
    why = "both intervals exclude zero" if holds else "an interval includes zero, or there is none"
    grids = [
        {"arm": arm, "seed": int(seed), "samples": [_sample(i, arm, seed) for i in range(24)]}
        for seed in seeds
        for arm in ("joint", "generation", "joint_mask")
    ]
    return {
        "title": "Comparison demo_compare", "created": "2026-11-26T09:00:00", "seconds": 15402.0, "code_version": "git-0cd9c8",
        "command": "python jobs/compare.py --recipe demo_compare --output_dir /data/my-comparison",
        "config": {
            "arms": ARMS, "seeds": [int(seed) for seed in seeds],
            "pretrain": {"model": {"query_visibility": "one_way"}, "objective": {"task": "joint"}},
        },
        "config_digest": "6f1c0e", "environment": "2 CPUs, 7.8 GB",
        "arms": arms, "paired": paired, "claim": {"holds": holds, "why": why}, "failures": [],
        "grids": grids, "curves": {name: {seed: _curve(arm["seeds"][seed]) for seed in seeds} for name, arm in arms.items()},
    }  # fmt: skip


def difference(arms: dict[str, Any], metric: str, a: str, b: str) -> dict[str, Any]:
    values = [arms[a]["seeds"][seed][metric] - arms[b]["seeds"][seed][metric] for seed in arms[a]["seeds"]]
    mean, n = statistics.fmean(values), len(values)
    if n == 1:
        return {"mean": mean, "low": None, "high": None, "n": 1}
    half = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n**0.5
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def _arm(name: str, gain: float, seeds: tuple[str, ...]) -> dict[str, Any]:
    runs = {seed: _run(name, gain, random.Random(f"{name} {seed}"), random.Random(seed)) for seed in seeds}
    numbers = [metric for metric, value in runs[seeds[0]].items() if not isinstance(value, str)]
    columns = {metric: [run[metric] for run in runs.values()] for metric in numbers}
    spread = {metric: statistics.stdev(values) if len(seeds) > 1 else None for metric, values in columns.items()}
    return {"seeds": runs, "mean": {metric: statistics.fmean(values) for metric, values in columns.items()}, "std": spread}


def _run(name: str, gain: float, own: random.Random, shared: random.Random) -> dict[str, Any]:
    run: dict[str, Any] = {}
    luck = shared.gauss(0, 0.004)
    if name in LEVELS:
        level = 0.05 + gain * (LEVELS[name] - 0.05) + luck
        scores = (level, 0.6 * level, 1.4 * level, 0.4 * level)
        run |= {score: value + own.gauss(0, 0.0012) for score, value in zip(SCORES, scores, strict=True)}
    if name in ("joint", "generation", "joint_mask"):
        run["fd"] = 61 - 6 * gain * (name != "generation") + 300 * luck + own.gauss(0, 0.5)
        run["kid"] = 0.021 - 0.002 * gain * (name != "generation") + own.gauss(0, 0.0002)
    seconds = {"joint": 2900, "generation": 2100, "alignment": 900, "clip": 860, "joint_mask": 2750}[name] * own.uniform(
        0.98, 1.02
    )
    flops = {"joint": 1.4e15, "generation": 1.0e15, "alignment": 4.1e14, "clip": 3.8e14, "joint_mask": 1.3e15}[name]
    costs = {"samples": 163840, "seconds": seconds, "parameters": 6.4e6, "flops": flops}
    return run | costs | {"environment": "2 CPUs, 7.8 GB"}


def _curve(run: dict[str, Any]) -> list[dict[str, Any]]:
    names = [name for name in ("accuracy", "fd") if name in run]
    points = []
    for i in range(1, 9):
        share = i / 8
        worse = {"accuracy": run.get("accuracy", 0) * share**0.5, "fd": run.get("fd", 0) * (2.2 - 1.2 * share)}
        points.append({"samples": int(163840 * share), "metrics": {name: worse[name] for name in names}})
    return points


def _sample(i: int, arm: str, seed: str) -> dict[str, str]:
    return {"caption": CAPTIONS[i % len(CAPTIONS)], "png": picture(1000 * len(arm) + 10 * i + int(seed), 64, "png")}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(comparison_page(comparison(0.0 if "null" in sys.argv else 1.0)), encoding="utf-8")
