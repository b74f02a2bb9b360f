"""Runs that need a separate Ray instance: `python disturbed_runs.py elastic|s3 FOLDER NUMBER`.

elastic: the cluster loses a node and later gets a new one; NUMBER is the number of steps.
s3: data and checkpoints are in S3, whose server is down for NUMBER seconds.
"""

import os
import sys
import threading
import time
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import ray
from ray.cluster_utils import Cluster

from ray_platform import storage
from ray_platform.tracking import TrackingConfig
from ray_platform.train import checkpoint_format, launch
from tests.support.s3_server import S3Server
from tests.support.training import at_step, pixel_run, records, write_shards

NODE = {"num_cpus": 1, "object_store_memory": 200 * 2**20}  # room for one worker and its reads
PATHS = {"PYTHONPATH": os.pathsep.join(sys.path)}


def wait_for_workers(output, number, training):
    """Wait until `number` ranks have executed the newest recorded step."""
    while max(records(output).entries(), key=lambda entry: entry[1], default=(0, 0.0, [], 0))[3] != number:
        if not training.is_alive():
            sys.exit(f"the run ended before it had {number} workers")
        time.sleep(0.5)
    print(f"{number} workers", flush=True)


def elastic(output, num_steps):
    launch.RESIZE_SECONDS = 5.0
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    nodes = [cluster.add_node(**NODE) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": PATHS})
    shards = write_shards(output / "shards", num_shards=8, samples_per_shard=60)
    run = pixel_run(output, shards, num_workers=(1, 2), num_steps=num_steps, checkpoint_every=50)
    training = threading.Thread(target=run.fit, daemon=True)
    training.start()
    wait_for_workers(output, 2, training)
    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for_workers(output, 1, training)
    cluster.add_node(**NODE)
    wait_for_workers(output, 2, training)
    training.join()
    ray.shutdown()
    cluster.shutdown()


def s3(folder, seconds_away):
    server = S3Server(folder / "s3")
    server.start()
    os.environ.update(server.environment)
    storage.put_folder(write_shards(folder / "shards", num_shards=8, samples_per_shard=60), "s3://tests/shards")
    ray.init(
        address="local", num_cpus=4, object_store_memory=2**29, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": PATHS | server.environment},
    )  # fmt: skip
    tracking = TrackingConfig(f"sqlite:///{folder}/mlflow.db")
    run = pixel_run(folder, "s3://tests/shards", output_dir="s3://tests/run", tracking=tracking)

    def go_away():
        server.stop()
        time.sleep(seconds_away)
        server.start()

    at_step(folder, 60, go_away)
    run.fit()
    newest = checkpoint_format.list_checkpoints("s3://tests/run")[0]
    done = len(records(folder, run).trained_on())
    print(f"{done} of {2 * run.train.num_steps} rank steps, {records(folder).count()} in all, newest {newest.rsplit('/', 1)[1]}")
    assert dict(checkpoint_format.read_weights(newest, "ema"))
    assert storage.exists("s3://tests/run/export/model.safetensors")
    ray.shutdown()
    server.stop()


if __name__ == "__main__":
    {"elastic": elastic, "s3": s3}[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
