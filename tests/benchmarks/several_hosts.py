"""Measure how a training run across several hosts recovers when network links are cut.

    PYTHONPATH=platform:. python tests/benchmarks/several_hosts.py [--cuts worker s3 head replaced returns]

The hosts have separate addresses (tests/support/hosts.py): a Ray head, three training hosts and one S3 server. `ray job submit`
starts jobs/pretrain.py: a small DiffDis with data and output in S3, ZeRO 2, one worker per host and one spare host. Links are cut
one after another. Prints a table: what was cut, when, and the time until the run passed the step that it had reached. The last
line is one JSON object.
"""

import argparse
import json
import os
import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support import hosts  # isort: skip

if __name__ == "__main__":
    hosts.continue_in_sandbox()  # before the slow imports

import pandas as pd
from mlflow import MlflowClient

from diffdis.config import tiny
from ray_platform import storage
from ray_platform.train import checkpoint_format
from tests.support.hosts import Host, Network
from tests.support.recorded_pretrain import SECONDS_A_STEP
from tests.support.recording import Records
from tests.support.s3_server import S3Server
from tests.support.tiny_checkpoints import save_mean_pool_encoder
from tests.support.training import write_shards

NUM_SHARDS, SAMPLES_A_SHARD, SAMPLES_A_STEP = 8, 15, 8
STEPS_AN_EPOCH = NUM_SHARDS * SAMPLES_A_SHARD // SAMPLES_A_STEP
CHECKPOINT_EVERY = 10
OUTPUT = "s3://tests/run"
OBJECT_STORE = 150 * 2**20
NO_STEP_S = 900.0  # seconds without a step after which the run counts as failed
# Restarts Ray on a host whenever it exits, as a service manager would.
SERVICE = 'while :; do "$@"; sleep 1; done'


class RayHosts:
    """The Ray cluster. Its nodes read the token from a file and the storage endpoint from their environment."""

    def __init__(self, network: Network, num_workers: int) -> None:
        self.head, self.storage = network.host("head"), network.host("s3")
        self.workers = [network.host(f"worker{number}") for number in range(num_workers)]
        self.server = S3Server(self.storage.files, self.storage.address, self.storage.prefix)
        self.server.start()
        token = secrets.token_hex(32)
        for host in network.hosts:
            (host.files / "token").write_text(token)
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHONPATH"))}
        self.env |= {
            "PATH": os.pathsep.join((str(Path(sys.executable).parent), self.env["PATH"])),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/tmp/token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",  # other load should slow the workers no more than other processes
        }

    def start(self) -> None:
        """Start Ray and wait until the head accepts jobs."""
        self._ray(self.head, "--head", "--port=6379", f"--dashboard-host={self.head.address}", "--num-cpus=0")
        for worker in self.workers:
            self._ray(worker, f"--address={self.head.address}:6379", "--num-cpus=2")
        deadline = time.monotonic() + 300
        while subprocess.run(self.client("list"), env=self.client_env, capture_output=True).returncode:
            if time.monotonic() > deadline:
                sys.exit(f"the Ray head did not start: {(self.head.files / 'log').read_text()[-2000:]}")
            time.sleep(1)

    def client(self, *arguments: str) -> list[str]:
        """Return the command `ray job …` as a user would type it."""
        return ["ray", "job", arguments[0], f"--address=http://{self.head.address}:8265", *arguments[1:]]

    @property
    def client_env(self) -> dict[str, str]:
        return self.env | {"RAY_AUTH_TOKEN_PATH": str(self.head.files / "token")}

    def _ray(self, host: Host, *options: str) -> None:
        more = [f"--node-ip-address={host.address}", f"--object-store-memory={OBJECT_STORE}", "--block"]
        host.start(["bash", "-c", SERVICE, "service", "ray", "start", *options, *more], self.env | self.server.environment)


@dataclass
class Cut:
    """A link that is cut for `seconds`; 0 means permanently."""

    name: str
    what: str
    seconds: float
    step: int = 0  # the last step that had started
    when: float = 0.0  # seconds since the first step
    seconds_to_recover: float = float("nan")
    noticed: str = ""  # what the driver logged, if anything


CUTS = {
    "worker": Cut("worker", "a training host's link", 10),
    "s3": Cut("s3", "the storage's link", 30),
    "head": Cut("head", "the head's link", 20),
    "replaced": Cut("replaced", "a training host's link", 0),
    "returns": Cut("returns", "a training host's link", 100),
}


class Training:
    """The submitted job, observed from outside the cluster."""

    def __init__(self, cluster: RayHosts, folder: Path, num_steps: int) -> None:
        self.cluster, self.num_steps = cluster, num_steps
        self.records = Records(folder, num_steps=num_steps, pattern="*/records/*.jsonl")
        self.said: list[tuple[float, str]] = []
        config = {
            "output_dir": OUTPUT,
            "model": asdict(tiny()) | {"text_encoder": asdict(tiny().text_encoder) | {"path": "s3://tests/text_encoder"}},
            "objective": {"lr_unet": 1e-3, "lr_new": 1e-3},
            "data": {"sources": ["s3://tests/shards"], "image_size": tiny().image_size, "reads_per_rank": 1},
            # cpus_per_worker is too large for two workers on one host.
            "train": {
                "num_workers": 2, "num_steps": num_steps, "micro_batch_size": 4, "zero_stage": 2, "warmup_steps": 5,
                "cpus_per_worker": 1.25, "log_every": 5, "checkpoint_every": CHECKPOINT_EVERY, "preview_every": 0,
            },
            "tracking": {"uri": "sqlite:////tmp/mlflow.db"},
        }  # fmt: skip
        (cluster.head.files / "run.yaml").write_text(json.dumps(config))
        entrypoint = ["python", "tests/support/recorded_pretrain.py", "--config", "/tmp/run.yaml"]
        command = cluster.client("submit", "--submission-id=run", f"--working-dir={hosts.ROOT}")
        self.process = subprocess.Popen(
            [*command, "--", *entrypoint], env=cluster.client_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self.process.stdout or ():
            self.said.append((time.time(), line.rstrip()))
            if os.environ.get("VERBOSE"):
                print(f"{time.time():.0f} {line}", end="", flush=True)

    def wait_until_past(self, step: int) -> float:
        """Return the time at which the run passed a step."""
        deadline = time.monotonic() + NO_STEP_S
        while True:
            reached, when = self.records.last()
            if reached > step:
                return when
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit("no step any more; it said:\n" + "\n".join(line for _, line in self.said[-40:]))
            time.sleep(0.2)

    def hosts_in_use(self) -> list[Host]:
        """Return the hosts that the newest ranks train on."""

        def newest(host: Host) -> float:
            return max((file.stat().st_mtime for file in (host.files / "records").glob("*")), default=0.0)

        return sorted(self.cluster.workers, key=newest)[-2:]

    def suffer(self, cut: Cut, begun: float) -> None:
        link = {"s3": self.cluster.storage, "head": self.cluster.head}.get(cut.name) or self.hosts_in_use()[0]
        when = time.time()
        link.cut()
        time.sleep(1)  # let data in transit arrive
        cut.step, cut.when = self.records.last()[0], when - begun
        if cut.seconds:
            time.sleep(cut.seconds - 1)
            link.reconnect()
        cut.seconds_to_recover = self.wait_until_past(cut.step) - when
        lines = [f"{line} ({at - when:.0f} s)" for at, line in self.said if at > when and "resuming from" in line]
        if lines:
            cut.noticed = "; ".join(lines)


def epochs_in_ledger() -> int:
    """Return the number of complete epochs in the last checkpoint's ledger; -1 if an epoch is only partly consumed."""
    newest = checkpoint_format.list_checkpoints(OUTPUT)[0]
    _, ledger = checkpoint_format.read_ledgers(newest, checkpoint_format.read_manifest(newest))
    [whole] = ledger.first_epoch
    begun = any(ledger.ranges(0, whole, unit) or ledger.is_complete(0, whole, unit) for unit in range(NUM_SHARDS))
    return -1 if begun else whole


def outcome(training: Training, cuts: list[Cut]) -> dict:
    num_epochs = training.num_steps // STEPS_AN_EPOCH
    read = Counter(key for keys in training.records.trained_on().values() for key in keys)
    missing = NUM_SHARDS * SAMPLES_A_SHARD - len(read)
    run = json.loads(storage.read_bytes(f"{OUTPUT}/mlflow.json"))
    client = MlflowClient(f"sqlite:///{training.cluster.head.files}/mlflow.db")
    exported = storage.exists(f"{OUTPUT}/export/diffdis.json")
    return {
        "num_hosts": len(training.cluster.workers) + 2,
        "finished": exported and client.get_run(run["run_id"]).info.status == "FINISHED",
        "seconds_to_recover": round(max(cut.seconds_to_recover for cut in cuts), 1),
        "num_samples_lost": missing * num_epochs + sum(max(0, num_epochs - count) for count in read.values()),
        "num_samples_doubled": sum(max(0, count - num_epochs) for count in read.values()),
        "num_steps_done_twice": training.records.count() // 2 - training.num_steps,
        "num_epochs": num_epochs,
        "epochs_in_ledger": epochs_in_ledger(),
        "cuts": [asdict(cut) for cut in cuts],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cuts", nargs="*", choices=CUTS, default=list(CUTS))
    cuts = [CUTS[name] for name in parser.parse_args().cuts]
    with tempfile.TemporaryDirectory(prefix="several_hosts_") as temporary, Network(Path(temporary) / "hosts") as network:
        folder = Path(temporary)
        cluster = RayHosts(network, num_workers=3)
        os.environ.update(cluster.server.environment)
        storage.put_folder(write_shards(folder / "shards", NUM_SHARDS, SAMPLES_A_SHARD), "s3://tests/shards")
        storage.put_folder(save_mean_pool_encoder(folder / "text_encoder"), "s3://tests/text_encoder")
        cluster.start()
        # Complete epochs, enough for all cuts even if a cut does not stop the run.
        num_epochs = 2 * (len(cuts) + 1) + -(-int(sum(cut.seconds for cut in cuts) / SECONDS_A_STEP) // STEPS_AN_EPOCH)
        training = Training(cluster, folder / "hosts", num_epochs * STEPS_AN_EPOCH)
        begun = training.wait_until_past(-1)
        for cut in cuts:
            training.wait_until_past(training.records.last()[0] + STEPS_AN_EPOCH)
            training.suffer(cut, begun)
            print(f"{cut.what}: {cut.seconds_to_recover:.1f} s", flush=True)
        code = training.process.wait()
        print(pd.DataFrame(cuts).round(1).to_string())
        print(json.dumps(outcome(training, cuts) | {"exit_code": code}))


if __name__ == "__main__":
    main()
