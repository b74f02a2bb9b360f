"""Compare a run whose workers, nodes, drivers and services are killed at random moments with an undisturbed run.

    PYTHONPATH=platform:. python tests/benchmarks/faults.py [--faults 20] [--seed 0]

A small DiffDis trains with two workers on a Ray cluster of a head and two nodes, in deterministic mode. A worker, or an entire
node (which a new node replaces), is killed repeatedly with SIGKILL, sometimes in the middle of a checkpoint upload. In between,

- a second launch starts into the same output folder, whose name `run[1]` is also a pattern,
- the processes of the tracker and of the hang detector are killed,
- the MLflow server is down: at the start, for a minute, and when the run is resumed,
- the driver is killed twice. The next launch runs on a host whose clock is an hour back; the one after that finds the lease of a
  driver on another host.

Prints a table of the time that each fault cost, measured until the run passed the step that it had reached. The last line is one
JSON object.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import own_ray  # isort: skip (before ray)

import pandas as pd
import psutil
from mlflow import MlflowClient
from ray.cluster_utils import Cluster

from ray_platform.lease import LEASE
from ray_platform.tracking import read_run_record
from ray_platform.tracking.mlflow_tracker import read_history
from tests.benchmarks.faults_driver import NUM_STEPS
from tests.support.mlflow_server import MlflowServer
from tests.support.recording import Records
from tests.support.tiny_checkpoints import save_mean_pool_encoder
from tests.support.training import write_shards

LAST_STEPS = 20  # without a disturbance
OUTAGE_SECONDS, CLOCK_SECONDS = 60.0, 3600.0
DISTURBED, ALONE = "run[1]", "alone"
NODE = {"num_cpus": 2, "object_store_memory": 300 * 2**20}
DRIVER = Path(__file__).with_name("faults_driver.py")


@dataclass
class Fault:
    kind: str  # "worker" or "node"
    in_upload: bool  # whether a checkpoint was incomplete at the time
    step: int  # the highest step that had started
    when: float
    seconds_lost: float = float("nan")


class Disturbance:
    """A cluster of a head without tasks and two nodes, an MLflow server, and the launches of a run that is disturbed there."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.output, self.rng = folder, folder / DISTURBED, random.Random(seed)
        self.records = Records(self.output / "records", num_steps=NUM_STEPS)
        self.server = MlflowServer(folder, f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"))
        self.faults: list[Fault] = []
        self.counts = Counter[str]()
        self.drivers: list[subprocess.Popen] = []
        self.cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
        for _ in range(2):
            self.cluster.add_node(**NODE)

    def run(self, number: int) -> None:
        """Train, with `number` killed workers and nodes, and then without. MLflow is down outside the `with` blocks."""
        kinds = ["node" if i % 3 == 2 else "worker" for i in range(number)]
        self.rng.shuffle(kinds)
        in_outage, *parts = [kinds[i::5] for i in range(5)]
        driver = self.launch()
        self.wait_until_past(2)
        self.launch_again()
        self.kill_workers(parts[0])
        with self.server:
            self.kill_actor("RunWriter")
            self.kill_workers(parts[1])
            self.kill_actor("HangDetector")
        down_until = time.monotonic() + OUTAGE_SECONDS
        self.kill_workers(in_outage)
        time.sleep(max(0.0, down_until - time.monotonic()))
        with self.server:
            self.kill_workers(parts[2])
            self.kill_driver(driver)
        driver = self.resume("--seconds-back", str(CLOCK_SECONDS))
        self.kill_workers(parts[3])
        with self.server:
            self.kill_driver(driver)
            lease = json.loads((self.output / LEASE).read_text())
            (self.output / LEASE).write_text(json.dumps(lease | {"machine": "another machine"}))
            stop = ("--stop-at-step", str(self.records.last()[0] + LAST_STEPS))
            self.finish(self.resume(*stop))
            self.counts["num_stale_leases_taken_over"] += "was not renewed" in self.log(len(self.drivers) - 1).read_text()
        self.finish(self.launch(*stop, name=ALONE))

    # --- launches --------------------------------------------------------------------------------------------------------

    def launch(self, *arguments: str, name: str = DISTURBED) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": own_ray.PATHS, "RAY_ADDRESS": self.cluster.address}
        command = [sys.executable, str(DRIVER), str(self.folder), name, *arguments]
        if name == DISTURBED:
            command += ["--uri", self.server.url]
        with self.log(len(self.drivers)).open("wb") as log:
            self.drivers.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
        return self.drivers[-1]

    def finish(self, driver: subprocess.Popen) -> None:
        if driver.wait():
            self.check_runs()

    def log(self, number: int) -> Path:
        return self.folder / f"launch_{number}.log"

    def launch_again(self) -> None:
        """Start a second launch into the run that is training."""
        second = self.launch("--resume", "auto")
        second.wait()
        self.drivers.pop()
        self.counts["num_launches_rejected"] += "is in use by launch" in self.log(len(self.drivers)).read_text()
        print("a second launch has ended", flush=True)

    def kill_driver(self, driver: subprocess.Popen) -> None:
        driver.kill()
        driver.wait()
        while self.processes("RayTrainWorker"):
            time.sleep(0.1)

    def resume(self, *arguments: str) -> subprocess.Popen:
        """Start the next launch, and count it if it continues with the newest checkpoint."""
        newest = max(int(file.parent.name[-8:]) for file in self.output.glob("checkpoints/*/step_*/complete.json"))
        start, previous = time.time(), self.drivers[-1]
        driver = self.launch("--resume", "auto", *arguments)
        while not (steps := [self.records.places[seed][0] for seed, when, *_ in self.records.entries() if when > start]):
            self.check_runs()
            time.sleep(0.1)
        self.counts["num_resumes_from_the_newest"] += min(steps) == newest
        seconds = time.time() - start
        print(f"driver {previous.pid} killed; launch resumed at step {min(steps)} of {newest} after {seconds:.0f} s", flush=True)
        return driver

    # --- faults ----------------------------------------------------------------------------------------------------------

    def processes(self, name: str) -> list[psutil.Process]:
        """Return the processes on all nodes of this cluster with `name` in their command line."""
        own = {pid for node in self.cluster.list_all_nodes() for pid in raylets(node)}
        return [
            process
            for process in psutil.process_iter(["cmdline", "ppid"])
            if process.info["ppid"] in own and name in " ".join(process.info["cmdline"] or [])
        ]

    def kill_actor(self, name: str) -> None:
        """Kill the process of an actor of the driver, and count it once Ray has started another one."""
        (process,) = self.processes(name)
        process.kill()
        while not [other for other in self.processes(name) if other.pid != process.pid]:
            self.check_runs()
            time.sleep(0.1)
        self.counts["num_actors_restarted"] += 1
        print(f"{name} killed and restarted", flush=True)

    def kill_workers(self, kinds: list[str]) -> None:
        """Cause faults, each at a random moment after the run has recovered from the previous one."""
        for kind in kinds:
            time.sleep(self.rng.uniform(0.5, 4.0))
            deadline = time.monotonic() + 15
            while len(self.faults) % 2 and not self.is_uploading() and time.monotonic() < deadline:
                time.sleep(0.0005)
            fault = Fault(kind, self.is_uploading(), self.records.last()[0], time.time())
            self.kill(kind)
            self.faults.append(fault)
            where = ", in an upload" * fault.in_upload
            print(f"fault {len(self.faults)}: {kind} killed at step {fault.step}{where}", flush=True)
            fault.seconds_lost = self.wait_until_past(fault.step) - fault.when

    def kill(self, kind: str) -> None:
        """Kill a worker, or a node that is training. A new node replaces a killed one immediately, as an autoscaler would do."""
        while kind == "worker":
            if workers := self.processes("RayTrainWorker"):  # empty while the workers restart
                self.rng.choice(workers).send_signal(signal.SIGKILL)
                return
            time.sleep(0.1)
        parents = {worker.ppid() for worker in self.processes("RayTrainWorker")}
        nodes = [node for node in self.cluster.worker_nodes if set(raylets(node)) & parents]
        self.cluster.remove_node(self.rng.choice(nodes or list(self.cluster.worker_nodes)), allow_graceful=False)
        self.cluster.add_node(**NODE)

    def wait_until_past(self, step: int) -> float:
        """Return the time at which the run passed a step."""
        while (last := self.records.last())[0] <= step:
            self.check_runs()
            time.sleep(0.1)
        return last[1]

    def check_runs(self) -> None:
        if self.drivers[-1].poll() is not None:
            log = self.log(len(self.drivers) - 1).read_text()
            raise SystemExit(f"launch {len(self.drivers)} ended after {len(self.faults)} faults:\n{log[-3000:]}")

    def is_uploading(self) -> bool:
        folders = list(self.output.glob("checkpoints/*/step_*"))
        return any(not (folder / "complete.json").exists() for folder in folders)

    def stop(self) -> None:
        for driver in self.drivers:
            driver.kill()
            driver.wait()
        self.cluster.shutdown()


def raylets(node) -> list[int]:
    return [raylet.process.pid for raylet in node.all_processes["raylet"]]


def tracked_metrics(output: Path, uri: str) -> dict[tuple[str, int], float]:
    """Return the values of the run in MLflow by name and step, without the load of the nodes."""
    record = read_run_record(str(output))
    points = read_history(uri or record["tracking_uri"], record["run_id"], "")
    return {(name, step): value for step, name, value in points if not name.startswith("system/")}


def compare(run: Disturbance, alone: Records) -> dict[str, object]:
    read, expected = (Counter(key for keys in records.trained_on().values() for key in keys) for records in (run.records, alone))
    uri = f"sqlite:///{run.folder}/mlflow.db"
    metrics, expected_metrics = tracked_metrics(run.output, uri), tracked_metrics(run.folder / ALONE, "")
    losses, expected_losses = (
        {step: value for (name, step), value in part.items() if name == "train/loss"} for part in (metrics, expected_metrics)
    )
    lost = Counter(name for name, _ in expected_metrics.keys() - metrics.keys())
    print(f"metrics lost: {dict(lost)}" * bool(lost), end="\n" * bool(lost))
    client = MlflowClient(uri)
    return {
        "num_faults": len(run.faults),
        "num_finished": sum(fault.seconds_lost == fault.seconds_lost for fault in run.faults),
        "num_samples_lost": sum((expected - read).values()),
        "num_samples_doubled": sum((read - expected).values()),
        "losses_equal": losses == expected_losses,
        "same_samples_at_every_step": run.records.trained_on() == alone.trained_on(),
        "num_faults_in_upload": sum(fault.in_upload for fault in run.faults),
        "num_node_faults": sum(fault.kind == "node" for fault in run.faults),
        "num_steps_done_twice": run.records.count() // 2 - alone.count() // 2,
        "median_seconds_lost": sorted(fault.seconds_lost for fault in run.faults)[len(run.faults) // 2],
        "num_metrics_lost": sum(lost.values()),
        "num_tracked_runs": sum(len(client.search_runs([one.experiment_id])) for one in client.search_experiments()),
        **run.counts,
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
        disturbed = Disturbance(folder, arguments.seed)
        try:
            disturbed.run(arguments.faults)
        finally:
            disturbed.stop()
        print(pd.DataFrame(disturbed.faults).round(1).drop(columns="when").to_string())
        print(json.dumps(compare(disturbed, Records(folder / ALONE / "records", num_steps=NUM_STEPS))))


if __name__ == "__main__":
    main()
