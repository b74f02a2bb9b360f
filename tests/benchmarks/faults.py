"""A run that is killed at random moments, against one that is left alone.

    PYTHONPATH=platform:. python tests/benchmarks/faults.py [--faults 20] [--seed 0]

A small DiffDis trains with two workers on a Ray cluster of a head and two nodes, in deterministic mode. Again and again a worker
is killed (SIGKILL), or a whole node (and a new one joins), some of them in the middle of a checkpoint's upload. Prints a table
with the time that each fault cost: until the run was past the step that it had reached. Ends in one JSON line.
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
    kind: str  # worker or node
    in_upload: bool  # a checkpoint was incomplete when it came
    step: int  # that had been begun
    when: float
    seconds_lost: float = float("nan")


class Nodes:
    """A head that takes no work, and two nodes that can be lost."""

    def __init__(self) -> None:
        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
        for _ in range(2):
            self.cluster.add_node(**NODE)
        ray.init(address=self.cluster.address, **own_ray.OPTIONS)

    def workers(self) -> list[psutil.Process]:
        """The training's, on whatever node of this cluster."""
        own = {process.process.pid for node in self.cluster.list_all_nodes() for process in raylets(node)}
        return [
            process
            for process in psutil.process_iter(["cmdline", "ppid"])
            if process.info["ppid"] in own and "RayTrainWorker" in " ".join(process.info["cmdline"] or [])
        ]

    def kill_a_worker(self, rng: random.Random) -> None:
        while not (workers := self.workers()):  # they are being started again
            time.sleep(0.1)
        rng.choice(workers).send_signal(signal.SIGKILL)

    def kill_a_node(self, rng: random.Random) -> None:
        """One that trains; another joins at once, as an autoscaler would see to."""
        parents = {worker.ppid() for worker in self.workers()}
        nodes = [node for node in self.cluster.worker_nodes if {p.process.pid for p in raylets(node)} & parents]
        self.cluster.remove_node(rng.choice(nodes or list(self.cluster.worker_nodes)), allow_graceful=False)
        self.cluster.add_node(**NODE)

    def stop(self) -> None:
        ray.shutdown()
        self.cluster.shutdown()


def raylets(node) -> list:
    return node.all_processes["raylet"]


class Killer:
    """Causes the faults, each a random moment after the run has got past the one before, or until the run is over."""

    def __init__(self, nodes: Nodes, output: Path, records: Records, number: int, seed: int):
        self.nodes, self.output, self.records, self.number = nodes, output, records, number
        self.rng = random.Random(seed)
        self.faults: list[Fault] = []

    def work(self, training: threading.Thread) -> None:
        self.training = training
        kinds = ["node" if i % 3 == 2 else "worker" for i in range(self.number)]
        self.rng.shuffle(kinds)
        for number, kind in enumerate(kinds):
            self.wait_until_past(self.faults[-1].step if self.faults else 2)
            time.sleep(self.rng.uniform(0.5, 4.0))
            if number % 2:
                self.wait_for_upload()
            fault = Fault(kind, self.incomplete(), self.records.last()[0], time.time())
            (self.nodes.kill_a_worker if kind == "worker" else self.nodes.kill_a_node)(self.rng)
            self.faults.append(fault)
            print(f"fault {number + 1}: {kind} killed at step {fault.step}{', in an upload' * fault.in_upload}", flush=True)
        self.wait_until_past(self.faults[-1].step)

    def wait_until_past(self, step: int) -> None:
        while self.training.is_alive():
            reached, when = self.records.last()
            if reached > step:
                if self.faults:
                    self.faults[-1].seconds_lost = when - self.faults[-1].when
                return
            time.sleep(0.1)
        raise SystemExit(f"the run ended after {len(self.faults)} of {self.number} faults")

    def incomplete(self) -> bool:
        folders = list(self.output.glob("checkpoints/*/step_*"))
        return any(not (folder / "complete.json").exists() for folder in folders)

    def wait_for_upload(self) -> None:
        deadline = time.monotonic() + 15
        while not self.incomplete() and time.monotonic() < deadline:
            time.sleep(0.0005)


def make_run(folder: Path, name: str, num_steps: int) -> tuple[Run, Records]:
    model = replace(tiny(), text_encoder=replace(tiny().text_encoder, path=str(folder / "text_encoder")))
    fields = {"num_steps": num_steps, "zero_stage": 2, "warmup_steps": 5, "ema_decay": 0.99, "checkpoint_every": CHECKPOINT_EVERY}
    run = diffdis_run(model, folder / "shards", folder / name, max_failures=TrainConfig().max_failures, **fields)
    records = folder / name / "records"
    build_task = functools.partial(recording, str(records), run.build_task)
    return replace(run, build_task=build_task), Records(records, num_steps=num_steps)


def table(faults: list[Fault]) -> str:
    lines = ["fault  kind    in upload  at step  seconds lost"]
    for number, fault in enumerate(faults, 1):
        upload = "yes" if fault.in_upload else "no"
        lines.append(f"{number:5d}  {fault.kind:6s}  {upload:9s}  {fault.step:7d}  {fault.seconds_lost:12.1f}")
    return "\n".join(lines)


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
        nodes = Nodes()
        try:
            run, records = make_run(folder, "disturbed", STEPS_A_FAULT * arguments.faults)
            killer = Killer(nodes, folder / "disturbed", records, arguments.faults, arguments.seed)
            # Ray's Cluster wants the main thread for itself.
            training = threading.Thread(target=run.fit, daemon=True)
            training.start()
            killer.work(training)
            training.join()
            alone, alone_records = make_run(folder, "alone", STEPS_A_FAULT * arguments.faults)
            alone.fit()
        finally:
            nodes.stop()
        finished = (folder / "disturbed" / "export" / "diffdis.json").exists()
        curves = tuple(dict(logged_metric(folder / name, "train/loss")) for name in ("disturbed", "alone"))
        print(table(killer.faults))
        print(json.dumps(compare(records, alone_records, curves, killer.faults, finished)))


if __name__ == "__main__":
    main()
