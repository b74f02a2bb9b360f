"""A whole sweep, made up: 16 trials under ASHA, of which some fail.

python -m tests.support.sweep_details report.html [folder for its pictures]
"""

import math
import random
import sys
from pathlib import Path
from typing import Any

from ray_platform.report.sweep import pictures, sweep_page

ACCURACY, DISTANCE = "eval/zero_shot_mean", "eval/fd_efficientnet_lite0/guidance_3"
RETRIEVAL = "eval/heldout_pairs/image_retrieval_recall_at_1"
OBJECTIVES = [{"metric": ACCURACY, "mode": "max"}, {"metric": DISTANCE, "mode": "min"}, {"metric": RETRIEVAL, "mode": "max"}]
SPACE: dict[str, dict[str, Any]] = {
    "objective.lambda_alignment": {"low": 0.1, "high": 10.0, "log": True},
    "model.schedule.gamma": {"low": 0.05, "high": 1.0, "log": True},
    "objective.query_timestep_min": {"values": [0, 500, 700, 900]},
    "objective.caption_dropout": {"low": 0.0, "high": 0.3, "log": False},
    "objective.temperature": {"low": 0.02, "high": 0.2, "log": True},
    "model.query_visibility": {"values": ["joint", "one_way"]},
}
RECIPE = {
    "objective.lambda_alignment": 2.0, "model.schedule.gamma": 0.1, "objective.query_timestep_min": 0,
    "objective.caption_dropout": 0.1, "objective.temperature": 0.07, "model.query_visibility": "one_way",
}  # fmt: skip
MILESTONES = (2560, 5120, 10240, 20480)
ERROR = "objective.lambda_alignment 9.7: 20 steps in a row had a loss that is not finite; see bad_steps"


def sweep(num_trials: int = 16) -> dict[str, Any]:
    """What `sweep_page` takes. Trial 0 has the recipe's values; half of the others are stopped at each milestone."""
    drawn = random.Random(3)
    trials = []
    for number in range(num_trials):
        values = {field: _draw(space, drawn) for field, space in SPACE.items()} if number else RECIPE
        reached = 4 if number == 0 else min(4, 1 + (number * 7) % 5)
        trials.append(_trial(number, values, reached, drawn))
    if num_trials > 6:
        trials[3] |= {"state": "failed", "error": ERROR, "history": trials[3]["history"][:1]}
        trials[6] |= {"state": "failed", "error": ERROR, "history": [], "metrics": {}, "run_id": "", "url": ""}
    finished = [trial for trial in trials if trial["state"] == "finished"]
    front = [one["name"] for one in finished if not any(_beats(other, one) for other in finished)]
    best = {
        objective["metric"]: max(finished, key=lambda one: _sign(objective) * one["metrics"][objective["metric"]])["name"]
        for objective in OBJECTIVES
    }
    return {
        "title": "Sweep demo_sweep", "created": "2026-11-26T09:00:00", "seconds": 1502.0, "code_version": "git-0cd9c8a4f1be",
        "command": "python jobs/sweep.py --recipe demo_sweep --output_dir /data/my-sweep", "recipe": "demo_sweep",
        "objectives": OBJECTIVES, "space": SPACE, "budget_samples": MILESTONES[-1], "scheduler": "asha", "search": "optuna",
        "trials": trials, "front": front, "best": best,
    }  # fmt: skip


def _draw(space: dict[str, Any], drawn: random.Random) -> Any:
    if "values" in space:
        return drawn.choice(space["values"])
    if space["log"]:
        return math.exp(drawn.uniform(math.log(space["low"]), math.log(space["high"])))
    return drawn.uniform(space["low"], space["high"])


def _trial(number: int, values: dict[str, Any], reached: int, drawn: random.Random) -> dict[str, Any]:
    weight = math.log10(values["objective.lambda_alignment"])
    skill = 0.02 + 0.008 * weight - 0.006 * abs(math.log10(values["model.schedule.gamma"]) + 1) + drawn.gauss(0, 0.002)
    distance = 92 + 14 * weight + 10 * abs(values["objective.caption_dropout"] - 0.1) + drawn.gauss(0, 3)
    history = []
    for step, samples in enumerate(MILESTONES[:reached], start=1):
        share = samples / MILESTONES[-1]
        metrics = {
            ACCURACY: max(0.0006, skill * share**0.6),
            DISTANCE: distance + 60 * (1 - share),
            RETRIEVAL: max(0.0, 1.4 * skill * share**0.5 + drawn.gauss(0, 0.001)),
        }
        history.append({"step": 40 * step, "samples": samples, "seconds": 0.02 * samples, "metrics": metrics})
    return {
        "name": f"trial_{number:03d}", "state": "finished" if reached == 4 else "stopped", "default": number == 0, "error": "",
        "values": dict(values), "history": history, "metrics": history[-1]["metrics"],
        "run_id": f"{number:02x}7d9c1e5b4a4f0c8e2d6b3a1f9e8c7d", "url": f"http://127.0.0.1:5000/#/experiments/1/runs/{number}",
    }  # fmt: skip


def _sign(objective: dict[str, str]) -> int:
    return 1 if objective["mode"] == "max" else -1


def _beats(a: dict[str, Any], b: dict[str, Any]) -> bool:
    gains = [_sign(one) * (a["metrics"][one["metric"]] - b["metrics"][one["metric"]]) for one in OBJECTIVES]
    return min(gains) >= 0 and max(gains) > 0


if __name__ == "__main__":
    made = sweep()
    Path(sys.argv[1]).write_text(sweep_page(made), encoding="utf-8")
    for name, svg in pictures(made).items():
        Path(sys.argv[2], name).write_text(svg, encoding="utf-8")
