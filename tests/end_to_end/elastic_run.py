"""A run whose cluster loses a node and gets another one, in a process of its own: `python elastic_run.py <folder>`."""

import os
import sys
import threading
import time
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

from ray_platform.train import launch
from tests.end_to_end.conftest import write_shards
from tests.end_to_end.test_faults import make_run, records

NODE = {"num_cpus": 1, "object_store_memory": 200 * 2**20}  # room for one worker and its reads


def workers_now(output):
    """How many ranks did the newest recorded step."""
    return max(records(output).entries(), key=lambda entry: entry[1], default=(0, 0.0, [], 0))[3]


def wait_for(output, number, training):
    while workers_now(output) != number:
        if not training.is_alive():
            sys.exit(f"the run ended before it had {number} workers")
        time.sleep(0.5)
    print(f"{number} workers", flush=True)


def main():
    output = Path(sys.argv[1])
    shards = write_shards(output / "shards", num_shards=8, samples_a_shard=60)
    launch.RESIZE_SECONDS = 5.0
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    ray.init(
        address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    )  # fmt: skip
    run = make_run(output, shards, num_workers=(1, 2), num_steps=int(sys.argv[2]), checkpoint_every=50)
    training = threading.Thread(target=run.fit, daemon=True)
    training.start()
    wait_for(output, 2, training)
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for(output, 1, training)
    cluster.add_node(**NODE)
    wait_for(output, 2, training)
    training.join()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
