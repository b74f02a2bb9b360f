"""Driver of a sweep that a test kills. Arguments: output folder, notes folder, search, seconds per segment."""

import json
import sys

import ray

from ray_platform.connect import connect
from ray_platform.placement import ResourceRequest
from ray_platform.sweep.config import Range, SearchConfig, describe_space
from ray_platform.sweep.sweep import Sweep
from tests.ray_platform.sweep.curves import Curves


def main() -> None:
    output_dir, folder, search, seconds = sys.argv[1:]
    connect()
    space = {"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)}
    config = SearchConfig(
        output_dir=output_dir,
        space=describe_space(space),
        objectives={"accuracy": "max", "loss": "min"},
        search=search,
        scheduler="none",
        num_trials=5,
        num_milestones=3,
        max_concurrent=2,
    )
    needs = [ResourceRequest({}, {"CPU": 1.0})]
    outcomes = Sweep(config, Curves(folder, seconds=float(seconds)), space, {"x": 0.5, "y": 0.5}, needs).run()
    groups = [group["state"] for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    print(json.dumps({"outcomes": outcomes, "groups": groups}))


if __name__ == "__main__":
    main()
