"""A driver of a sweep, to be killed: `python -m tests.ray_platform.sweep.driver OUTPUT NOTES SEARCH SECONDS`, on RAY_ADDRESS."""

import json
import sys
from dataclasses import asdict

import ray

from ray_platform.connect import connect
from ray_platform.placement import ResourceRequest
from ray_platform.sweep.space import Range
from ray_platform.sweep.sweep import Sweep
from tests.ray_platform.sweep.curves import Curves


def main() -> None:
    output_dir, folder, search, seconds = sys.argv[1:]
    connect()
    sweep = Sweep(
        job=Curves(folder, seconds=float(seconds)),
        output_dir=output_dir,
        space={"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)},
        default={"x": 0.5, "y": 0.5},
        objectives={"accuracy": "max", "loss": "min"},
        search=search,
        scheduler="none",
        num_trials=5,
        num_milestones=3,
        reduction=2,
        seed=0,
        needs=[ResourceRequest({}, {"CPU": 1.0})],
        max_concurrent=2,
    )
    outcomes = [asdict(outcome) for outcome in sweep.run()]
    groups = [group["state"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    print(json.dumps({"outcomes": outcomes, "groups": groups}))


if __name__ == "__main__":
    main()
