"""Record which process ran on which of three labeled nodes: `python placed_run.py FOLDER` writes FOLDER/found.json.

Every Ray worker process is a child of its node's raylet, and its process name states what it runs.
"""

import contextlib
import json
import os
import sys
import threading
from dataclasses import replace
from pathlib import Path

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import psutil
import ray
from ray.cluster_utils import Cluster
from ray.experimental.internal_kv import internal_kv_get_gcs_client

from ray_platform.contracts import ConfigError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.precompute import precompute
from ray_platform.evaluate.result_cache import ResultCache
from ray_platform.placement import total_resources
from ray_platform.replicas import ReplicaPool, ReplicaSpec
from ray_platform.terminal import ProgressBar
from tests.ray_platform.replica_work import no_replica
from tests.ray_platform.test_precompute import encoders
from tests.ray_platform.test_replicas import squares
from tests.support.training import pixel_run, write_shards

CPU, GPU = {"pool": "cpu"}, {"pool": "gpu"}  # the pool "gpu" trains; it needs no real GPU
# CPUs of each node. Every node has room for all processes, so placement depends only on the labels.
NODES = {"head": 0, "cpu": 4, "gpu": 4}


class ProcessWatcher:
    """Records the names of the processes on each node during a `with` block."""

    def __init__(self, raylets):
        self.raylets, self.seen = raylets, {pool: set() for pool in raylets}
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def _look(self):
        while not self.done.wait(0.01):
            for pool, pid in self.raylets.items():
                with contextlib.suppress(psutil.NoSuchProcess):
                    for process in psutil.Process(pid).children(recursive=True):
                        with contextlib.suppress(psutil.Error, IndexError):
                            self.seen[pool].add(process.cmdline()[0])

    def names(self):
        return {pool: sorted(name for name in names if name.startswith("ray::")) for pool, names in self.seen.items()}


def errors(run, catalog, config):
    """Yield the error messages for labeled nodes that are too small or missing."""
    for call in (
        lambda: ReplicaSpec(no_replica, 5, placement=GPU).resolve_num_replicas(),
        lambda: list(precompute(catalog, config, replace(encoders(), count=9, placement=GPU), "/nowhere")),
        lambda: replace(run, train=replace(run.train, num_workers=(1, 2), placement={})).check(),
    ):
        try:
            call()
        except ConfigError as error:
            yield str(error)


def size_where_nodes_may_come():
    """Return the resolved number of replicas, more than fit now, when the cluster reports that KubeRay's autoscaler is on."""
    key, namespace = ray._raylet.GCS_AUTOSCALER_V2_ENABLED_KEY, ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE
    internal_kv_get_gcs_client().internal_kv_put(key.encode(), b"1", True, namespace=namespace.encode())
    return ReplicaSpec(no_replica, 5, placement=GPU).resolve_num_replicas()


def main():
    output = Path(sys.argv[1])
    shards = write_shards(output / "shards", num_shards=4, samples_per_shard=60)
    nodes, cluster = {}, Cluster()
    for pool, cpus in NODES.items():
        nodes[pool] = cluster.add_node(
            num_cpus=cpus, labels={"pool": pool}, object_store_memory=200 * 2**20, include_dashboard=False
        )
    raylets = {pool: node.all_processes["raylet"][0].process.pid for pool, node in nodes.items()}
    ray.init(
        address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    )  # fmt: skip
    config = DataConfig(sources=(str(shards),), image_size=16, placement=CPU)
    run = pixel_run(output, shards, num_steps=12, placement=GPU)
    run = replace(run, data=replace(run.data, placement=CPU))
    catalog = build_catalog(config)
    with ProcessWatcher(raylets) as trained:
        run.fit()
    with ProcessWatcher(raylets) as encoded:
        list(precompute(catalog, config, replace(encoders(count=2), placement=GPU), str(output / "encoded")))
    with ProcessWatcher(raylets) as evaluated:
        fleet = ReplicaSpec(no_replica, 2, cpus=0.5, placement=GPU)
        with ReplicaPool(fleet, ResultCache(str(output / "kept"), ""), ProgressBar()) as workers:
            rows = list(workers.run(squares(range(40))))
    found = {
        "trained": trained.names(),
        "encoded": encoded.names(),
        "evaluated": evaluated.names(),
        "units": len(rows),
        "cpus": {pool: total_resources({"pool": pool}).get("CPU", 0) for pool in (*NODES, "none")},
        "refusals": list(errors(run, catalog, config)),
    }
    found["size_where_nodes_may_come"] = size_where_nodes_may_come()
    (output / "found.json").write_text(json.dumps(found, indent=2))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
