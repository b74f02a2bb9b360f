"""Compare a run with workers and nodes killed at random moments with an undisturbed run.

    PYTHONPATH=platform:. python tests/benchmarks/faults.py [--faults 20] [--seed 0]

A small DiffDis trains with two workers on a Ray cluster of a head and two nodes, in deterministic mode. A worker, or an entire
node (which a new node replaces), is killed repeatedly with SIGKILL, sometimes in the middle of a checkpoint upload. Prints a
table of the time that each fault cost, measured until the run passed the step that it had reached. The last line is one JSON
object.
"""

import argparse
import functools
import json
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks import own_ray  # isort: skip (before ray)

import pandas as pd
import psutil
import ray
from ray.cluster_utils import Cluster

from diffdis.config import tiny
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Run
from tests.support.recording import Records, recording
from tests.support.tiny_checkpoints import save_mean_pool_encoder
from tests.support.training import diffdis_run, logged_metric, write_shards

STEPS_A_FAULT = 30
CHECKPOINT_EVERY = 10
NODE = {"num_cpus": 2, "object_store_memory": 300 * 2**20}


@dataclass
class Fault:
    kind: str  # "worker" or "node"
    in_upload: bool  # whether a checkpoint was incomplete at the time
    step: int  # the highest step that had started
    when: float
    seconds_lost: float = float("nan")


class Killer:
    """A cluster of a head without tasks and two nodes, whose workers and nodes are killed while a training run is active."""

    def __init__(self, output: Path, records: Records, seed: int):
        self.output, self.records, self.rng = output, records, random.Random(seed)
        self.faults: list[Fault] = []
        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
        for _ in range(2):
            self.cluster.add_node(**NODE)
        ray.init(address=self.cluster.address, **own_ray.OPTIONS)

    def workers(self) -> list[psutil.Process]:
        """Return the training workers on all nodes of this cluster."""
        own = {pid for node in self.cluster.list_all_nodes() for pid in raylets(node)}
        return [
            process
            for process in psutil.process_iter(["cmdline", "ppid"])
            if process.info["ppid"] in own and "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
        ]

    def kill(self, kind: str) -> None:
        """Kill a worker, or a node that is training. A new node replaces a killed one immediately, as an autoscaler would do."""
        while kind == "worker":
            if workers := self.workers():  # empty while the workers restart
                self.rng.choice(workers).send_signal(signal.SIGKILL)
                return
            time.sleep(0.1)
        parents = {worker.ppid() for worker in self.workers()}
        nodes = [node for node in self.cluster.worker_nodes if set(raylets(node)) & parents]
        self.cluster.remove_node(self.rng.choice(nodes or list(self.cluster.worker_nodes)), allow_graceful=False)
        self.cluster.add_node(**NODE)

    def run(self, training: threading.Thread, number: int) -> None:
        """Cause the faults, each at a random moment after the run has recovered from the previous one."""
        kinds = ["node" if i % 3 == 2 else "worker" for i in range(number)]
        self.rng.shuffle(kinds)
        self.wait_until_past(2, training)
        for index, kind in enumerate(kinds):
            time.sleep(self.rng.uniform(0.5, 4.0))
            deadline = time.monotonic() + 15
            while index % 2 and not self.is_uploading() and time.monotonic() < deadline:
                time.sleep(0.0005)
            fault = Fault(kind, self.is_uploading(), self.records.last()[0], time.time())
            self.kill(kind)
            self.faults.append(fault)
            print(f"fault {index + 1}: {kind} killed at step {fault.step}{', in an upload' * fault.in_upload}", flush=True)
            fault.seconds_lost = self.wait_until_past(fault.step, training) - fault.when

    def wait_until_past(self, step: int, training: threading.Thread) -> float:
        """Return the time at which the run passed a step."""
        while training.is_alive():
            reached, when = self.records.last()
            if reached > step:
                return when
            time.sleep(0.1)
        raise SystemExit(f"the run ended after {len(self.faults)} faults")

    def is_uploading(self) -> bool:
        folders = list(self.output.glob("checkpoints/*/step_*"))
        return any(not (folder / "complete.json").exists() for folder in folders)

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def raylets(node) -> list[int]:
    return [raylet.process.pid for raylet in node.all_processes["raylet"]]


def make_run(folder: Path, name: str, num_steps: int) -> tuple[Run, Records]:
    model = replace(tiny(), text_encoder=replace(tiny().text_encoder, path=str(folder / "text_encoder")))
    fields = {"num_steps": num_steps, "zero_stage": 2, "warmup_steps": 5, "ema_decay": 0.99, "checkpoint_every": CHECKPOINT_EVERY}
    run = diffdis_run(model, folder / "shards", folder / name, max_failures=TrainConfig().max_failures, **fields)
    records = folder / name / "records"
    build_task = functools.partial(recording, str(records), run.build_task)
    return replace(run, build_task=build_task), Records(records, num_steps=num_steps)


def compare(disturbed: Records, alone: Records, curves: tuple[dict, dict], faults: list[Fault], finished: bool) -> dict:
    read, expected = (Counter(key for keys in records.trained_on().values() for key in keys) for records in (disturbed, alone))
    return {
        "num_faults": len(faults),
        "num_finished": sum(fault.seconds_lost == fault.seconds_lost for fault in faults) if finished else 0,
        "num_samples_lost": sum((expected - read).values()),
        "num_samples_doubled": sum((read - expected).values()),
        "losses_equal": curves[0] == curves[1],
        "same_samples_at_every_step": disturbed.trained_on() == alone.trained_on(),
        "num_faults_in_upload": sum(fault.in_upload for fault in faults),
        "num_node_faults": sum(fault.kind == "node" for fault in faults),
        "num_steps_done_twice": disturbed.count() // 2 - alone.count() // 2,
        "median_seconds_lost": sorted(fault.seconds_lost for fault in faults)[len(faults) // 2],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="faults_") as temporary:
        folder = Path(temporary)
        save_mean_pool_encoder(folder / "text_encoder")
        write_shards(folder / "shards", num_shards=12, samples_per_shard=80)
        num_steps = STEPS_A_FAULT * arguments.faults
        run, records = make_run(folder, "disturbed", num_steps)
        killer = Killer(folder / "disturbed", records, arguments.seed)
        try:
            # Ray's Cluster must run in the main thread.
            training = threading.Thread(target=run.fit, daemon=True)
            training.start()
            killer.run(training, arguments.faults)
            training.join()
            alone, alone_records = make_run(folder, "alone", num_steps)
            alone.fit()
        finally:
            killer.stop()
        finished = (folder / "disturbed" / "export" / "diffdis.json").exists()
        curves = tuple(dict(logged_metric(folder / name, "train/loss")) for name in ("disturbed", "alone"))
        print(pd.DataFrame(killer.faults).round(1).drop(columns="when").to_string())
        print(json.dumps(compare(records, alone_records, curves, killer.faults, finished)))


if __name__ == "__main__":
    main()
