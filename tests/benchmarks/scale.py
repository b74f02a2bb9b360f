"""The control plane of a run with 1,024 ranks, on one machine: what it costs, and how that grows from 64 ranks.

    PYTHONPATH=platform:. python tests/benchmarks/scale.py [--ranks 64 1024] [--rounds 3] [--seconds 12] [--s3]

All components are the real ones; only the ranks are simulated, as threads of a few processes that train nothing:

- every rank sends heartbeats to the hang detector, rank 0 logs 60 metrics per second to the tracker (with MLflow's SQLite store),
  and this process is the driver: it holds the lease, and its monitor prints progress and looks for hangs and drained nodes;
- every rank writes tiny files of a checkpoint; rank 0 completes it, removes the one before, and it is read by 1,000 ranks for
  1,024;
- a rank receives the catalog, plans its reads and updates the ledger at a checkpoint, with as many shards as img2dataset writes
  for LAION-400M (41,408, github.com/rom1504/img2dataset/issues/277) and for LAION-5B (5.86 billion samples in shards of 10,000,
  dataset_examples/laion5B.md of that project).

CPU seconds, which other load on the machine changes least, are of user and system together. The last line is one JSON object:
under each figure its median for both numbers of ranks and the median ratio, `growth`. `above_goal` lists the figures that grew
faster than the ranks, and the completion of a checkpoint if it took more than 5 s.
"""

import argparse
import json
import multiprocessing
import os
import pickle  # as Ray sends a catalog to the workers
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path

from tests.benchmarks import own_ray  # isort: skip (before ray)

import psutil
import ray
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ray_platform import storage
from ray_platform.contracts import ConsumedRange, MixtureState
from ray_platform.data.catalog import Catalog, Shard, ShardRange
from ray_platform.data.config import DataConfig
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader, groups
from ray_platform.data.stream import dataset_groups
from ray_platform.lease import Lease
from ray_platform.placement import start_on_this_node
from ray_platform.tracking import RunMetadata, TrackingConfig
from ray_platform.tracking.node_metrics import NodeMetrics
from ray_platform.tracking.runs import start_run
from ray_platform.train.checkpoint_format import (
    BASE,
    CONSUMED,
    Lineage,
    LossHistory,
    Manifest,
    RankState,
    candidates,
    checkpoint_name,
    checkpoints_dir,
    list_checkpoints,
    read_manifest,
    tensor_files,
)
from ray_platform.train.checkpointing import AsyncUploader, LoadedCheckpoint
from ray_platform.train.config import TrainConfig
from ray_platform.train.fault_tolerance import DriverMonitor
from ray_platform.train.hang_detector import HangDetector, HeartbeatThread
from ray_platform.train.retention import RetentionPolicy
from tests.benchmarks.measuring import Measured, in_turns, medians, ratio, seconds
from tests.support.s3_server import S3Server

SHARDS = {"laion_400m": 41_408, "laion_5b": 586_000}
SHARD_SAMPLES, SHARD_BYTES = 10_000, 400_000_000
HOSTS = 4  # processes with simulated ranks
NUM_METRICS = 60
SECONDS_GOAL = 5.0  # to complete a checkpoint
Results = dict[str, dict[str, float]]  # figure -> number of ranks, or "growth" -> value


def summarize(measured: Measured, few: str, many: str, digits: int = 4) -> dict[str, float]:
    return medians(measured, digits) | {"growth": ratio(measured, many, few)}


# --- actors --------------------------------------------------------------------------------------------------------------


@ray.remote(num_cpus=0)
class Host:
    """A process with the heartbeat threads of many ranks."""

    def __init__(self, detector, tracker):
        self.detector, self.tracker, self.ranks, self.done = detector, tracker, [], threading.Event()
        self.start_seconds = time.monotonic()

    def start(self, ranks: range) -> None:
        self.ranks = [HeartbeatThread(self.detector, rank) for rank in ranks]
        for rank in self.ranks:
            rank.set_phase("training")
            rank.start()
        self.done = threading.Event()
        threading.Thread(target=self._train, args=(self.ranks, self.done), daemon=True).start()

    def stop(self) -> None:
        self.done.set()
        for rank in self.ranks:
            rank.stop()

    def _train(self, ranks: list[HeartbeatThread], done: threading.Event) -> None:
        while not done.wait(1.0):
            for rank in ranks:
                rank.step = round(time.monotonic() - self.start_seconds)
            if ranks[0].rank == 0:
                metrics = {f"train/metric_{number}": time.monotonic() + number for number in range(NUM_METRICS)}
                self.tracker.log_metrics(metrics, ranks[0].step)
                ranks[0].report_metrics(ranks[0].step, metrics)


class Actors:
    """The driver of a run with its actors, and the hosts of its ranks."""

    def __init__(self, stack: ExitStack, folder: str):
        own_ray.start(num_cpus=2)
        stack.callback(own_ray.stop)
        lease = stack.enter_context(Lease(folder, "scale"))
        metadata = RunMetadata("scale", "", {}, {"train": {"num_workers": 1024}})
        tracker = stack.enter_context(start_run(TrackingConfig(), folder, metadata, record=True, in_actor=True))
        self.detector = start_on_this_node(HangDetector)
        self.hosts = [Host.remote(self.detector, tracker) for _ in range(HOSTS)]
        stack.enter_context(DriverMonitor(self.detector, NodeMetrics(tracker, 10.0), TrainConfig(), lease))
        tracker.run_id()  # waits for MLflow
        self.processes = {"driver": psutil.Process()}
        for process in psutil.Process().children(recursive=True):
            for name, title in (("hang_detector", "ray::HangDetector"), ("tracker", "ray::RunWriter")):
                if process.cmdline() and process.cmdline()[0].startswith(title):
                    self.processes[name] = process
        self.cpu: dict[str, Measured] = {name: {} for name in self.processes}
        self.memory: dict[str, Measured] = {name: {} for name in self.processes}

    def measure(self, num_ranks: int, window: float) -> float:
        """Run `num_ranks` ranks. Record CPU seconds per minute and MB of each process, and return the sum of the former."""
        size = num_ranks // HOSTS
        ray.get([host.start.remote(range(number * size, (number + 1) * size)) for number, host in enumerate(self.hosts)])
        self._wait_for(num_ranks)
        before, started = self._cpu_seconds(), time.monotonic()
        time.sleep(window)
        minutes = (time.monotonic() - started) / 60
        used = {name: (after - before[name]) / minutes for name, after in self._cpu_seconds().items()}
        for name, process in self.processes.items():
            self.cpu[name].setdefault(str(num_ranks), []).append(used[name])
            self.memory[name].setdefault(str(num_ranks), []).append(process.memory_info().rss / 1e6)
        ray.get([host.stop.remote() for host in self.hosts])
        self._wait_for(0)
        return sum(used.values())

    def _wait_for(self, num_ranks: int) -> None:
        while len(ray.get(self.detector.actors.remote())) != num_ranks:
            time.sleep(0.2)

    def _cpu_seconds(self) -> dict[str, float]:
        return {name: sum(process.cpu_times()[:2]) for name, process in self.processes.items()}


def measure_actors(few: str, many: str, rounds: int, window: float) -> Results:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        actors = Actors(stack, folder)
        in_turns({name: partial(actors.measure, int(name), window) for name in (few, many)}, rounds)
        actors.cpu = {name: {n: values[1:] for n, values in measured.items()} for name, measured in actors.cpu.items()}
        cpu = {f"cpu_seconds_per_minute_{name}": summarize(measured, few, many, 2) for name, measured in actors.cpu.items()}
        memory = {f"memory_mb_{name}": summarize(measured, few, many, 0) for name, measured in actors.memory.items()}
        return cpu | memory


# --- hangs and lease -----------------------------------------------------------------------------------------------------


def silent_detector(num_ranks: int) -> HangDetector:
    """Return a detector of ranks that stop sending heartbeats now."""
    detector = HangDetector()
    for rank in range(num_ranks):
        detector.record(HeartbeatThread(None, rank).heartbeat("host", rank))
    return detector


def find_hang(detector: HangDetector) -> float:
    def find() -> None:
        if not detector.find_hang(1.0):
            raise SystemExit("the silent ranks are not found")

    return seconds(find)


# --- checkpoints ---------------------------------------------------------------------------------------------------------


class Checkpoints:
    """Two checkpoints of a run with `num_ranks` ranks: a complete one, and one after it that is uploaded."""

    def __init__(self, output_dir: str, num_ranks: int):
        self.output_dir, self.num_ranks, self.lineage = output_dir, num_ranks, Lineage("launch")
        folder = storage.join(checkpoints_dir(output_dir), "launch")
        self.uploaders = [AsyncUploader(folder, rank, "token", lambda: None) for rank in range(num_ranks)]
        self.upload()
        self.complete()
        self.lineage = self.lineage.after(checkpoint_name(self.step))
        self.upload()

    @property
    def step(self) -> int:
        return self.lineage.counter + 1

    def upload(self) -> None:
        """Write the files of all ranks, 32 at a time: each has a thread."""
        ledger, state = Ledger([1]).to_bytes(), RankState.capture({"image_undecodable": 1}, LossHistory(), MixtureState())
        for start in range(0, self.num_ranks, 32):
            for uploader in self.uploaders[start : start + 32]:
                tensors = {f"weights/{uploader.rank}": torch.zeros(4)}
                uploader.upload(self.step, tensors, {BASE: ledger, CONSUMED: ledger} if uploader.rank == 0 else {}, state)
            for uploader in self.uploaders[start : start + 32]:
                uploader.wait()

    def complete(self) -> float:
        """Complete the newer checkpoint, which may be complete. Nothing is removed."""
        manifest = Manifest(
            token="token", step=self.step, num_updates=0, samples_seen=0, loss_scale={}, world_size=self.num_ranks, zero_stage=1,
            global_batch_size=self.num_ranks, seed=0, source_digest="digest", metrics={}, code_version="", config={}, files={},
        )  # fmt: skip

        def finalize() -> None:
            self.uploaders[0].finalize(self.lineage.place(manifest), RetentionPolicy(self.output_dir, 2), self.lineage)
            self.uploaders[0].wait()

        return seconds(finalize)

    def remove(self) -> float:
        """Remove the older checkpoint, as retention does."""
        url = self.uploaders[0].url
        passed = seconds(lambda: RetentionPolicy(self.output_dir, 1).prune(url, self.lineage))
        if list_checkpoints(self.output_dir) != [url]:
            raise SystemExit(f"{url} is not the only complete checkpoint; {self.uploaders[0].failure}")
        return passed

    def find(self) -> float:
        """Find and open the newest checkpoint, as a resumed run does."""
        return seconds(lambda: read_manifest(candidates("auto", self.output_dir, "another")[0]))

    def read(self, num_readers: int) -> float:
        """Read the checkpoint as the first of `num_readers` ranks does, in seconds."""
        return seconds(lambda: self.read_rank(0, num_readers))

    def read_rank(self, rank: int, num_readers: int) -> LoadedCheckpoint:
        with reading_rank(rank, num_readers):
            return LoadedCheckpoint.read(candidates("auto", self.output_dir, "another")[0], "digest")

    def read_everything(self, num_readers: int) -> None:
        """Read the checkpoint as all ranks do. Every file must be read exactly once."""
        read = [key for rank in range(num_readers) for key in self.read_rank(rank, num_readers).tensors]
        saved = len(tensor_files(read_manifest(candidates("auto", self.output_dir, "another")[0])))
        if len(read) != len(set(read)) or len(read) != saved:
            raise SystemExit(f"{num_readers} ranks read {len(set(read))} of {saved} tensors")


@contextmanager
def reading_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be one of many ranks that do not communicate."""
    excepthook = sys.excepthook  # torch adds the rank to every line
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
        sys.excepthook = excepthook


def measure_checkpoints(output_dir: str, few: str, many: str, rounds: int, where: str) -> Results:
    runs = {name: Checkpoints(storage.join(output_dir, name), int(name)) for name in (few, many)}
    complete = in_turns({name: run.complete for name, run in runs.items()}, rounds)
    find = in_turns({name: run.find for name, run in runs.items()}, rounds)
    read = in_turns({name: partial(run.read, run.num_ranks * 1000 // 1024) for name, run in runs.items()}, rounds)
    runs[many].read_everything(runs[many].num_ranks * 1000 // 1024)
    remove = in_turns({name: run.remove for name, run in runs.items()}, 1, warm_up=0)
    measured = {"complete_checkpoint": complete, "find_checkpoint": find, "read_checkpoint_a_rank": read}
    measured["remove_checkpoint"] = remove
    return {f"seconds_to_{name}{where}": summarize(values, few, many) for name, values in measured.items()}


# --- data ----------------------------------------------------------------------------------------------------------------


def write_catalog(num_shards: int, path: str) -> None:
    shards = [
        Shard(f"s3://laion/data/{number // 1000:03d}/{number:06d}.tar", SHARD_BYTES + number, f"{number:06d}.tar", SHARD_SAMPLES)
        for number in range(num_shards)
    ]
    units = tuple(ShardRange(shard, 0, shard.size) for shard in shards)
    catalog = Catalog(tuple(shards), (units,), (1.0,), None, (0,) * num_shards)
    Path(path).write_bytes(pickle.dumps(catalog))


def read_plan(path: str, num_ranks: int, rounds: int) -> dict[str, float]:
    """Do a rank's part in a process of its own. Return CPU seconds and MB."""

    def cpu_seconds(call: Callable[[], object]) -> float:
        started = time.process_time()
        call()
        return time.process_time() - started

    memory = psutil.Process().memory_info().rss
    results = {"receive_catalog": time.process_time()}
    with open(path, "rb") as file:
        catalog: Catalog = pickle.load(file)
    results["receive_catalog"] = time.process_time() - results["receive_catalog"]
    config, empty = DataConfig(image_size=256), Ledger(catalog.num_units)
    reader = Reader(0, 0, num_ranks, empty, empty.copy())
    planned = partial(groups, catalog, reader, config.interleave, config.reads_per_rank)
    results["plan"] = min(cpu_seconds(lambda: list(islice(planned(), dataset_groups(catalog, config)))) for _ in range(rounds))
    # Since the last checkpoint, every rank has finished 8 shards and reads 4 more.
    ranges = [
        ConsumedRange(0, 0, unit, 0, SHARD_SAMPLES if unit % 12 < 8 else 100, SHARD_SAMPLES)
        for unit in range(min(12 * num_ranks, catalog.num_units[0]))
    ]

    def save_ledger() -> None:
        ledger = empty.copy()
        ledger.add(ranges)
        Ledger.from_bytes(ledger.to_bytes())

    results["update_ledger"] = min(cpu_seconds(save_ledger) for _ in range(rounds))
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    results["memory"] = int(peak.split()[1]) / 1e3 - memory / 1e6
    return results


def measure_data(name: str, few: str, many: str, rounds: int) -> Results:
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        path = storage.join(folder, "catalog")
        with context.Pool(1, maxtasksperchild=1) as pool:
            pool.apply(write_catalog, (SHARDS[name], path))
            by_ranks = {ranks: pool.apply(read_plan, (path, int(ranks), rounds)) for ranks in (few, many)}
    measured = {figure: {ranks: [by_ranks[ranks][figure]] for ranks in by_ranks} for figure in by_ranks[few]}
    names = {figure: f"cpu_seconds_to_{figure}_{name}" for figure in measured} | {"memory": f"memory_mb_a_rank_{name}"}
    return {names[figure]: summarize(values, few, many, 3) for figure, values in measured.items()}


# --- all -----------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs=2, default=(64, 1024))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each measurement of CPU time")
    parser.add_argument("--s3", action="store_true", help="save checkpoints on a local S3 server as well")
    options = parser.parse_args()
    few, many = map(str, options.ranks)
    detectors = {name: silent_detector(int(name)) for name in (few, many)}  # silent when the actors were measured
    results = measure_actors(few, many, options.rounds, options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        results |= measure_checkpoints(folder, few, many, options.rounds, "")
        lease = Lease(folder, "scale")
        with lease:
            renewals = in_turns({name: partial(seconds, lease.renew) for name in (few, many)}, options.rounds)
        results["seconds_to_renew_lease"] = summarize(renewals, few, many)
        if options.s3:
            server = S3Server(Path(folder) / "s3")
            server.start()
            try:
                os.environ |= server.environment
                results |= measure_checkpoints("s3://tests/scale", few, many, options.rounds, "_on_s3")
            finally:
                server.stop()
    for name in SHARDS:
        results |= measure_data(name, few, many, options.rounds)
    found = in_turns({name: partial(find_hang, detector) for name, detector in detectors.items()}, options.rounds)
    results["seconds_to_find_hang"] = summarize(found, few, many, 5)
    above = [name for name, values in results.items() if values["growth"] > int(many) / int(few)]
    above += [name for name in results if "to_complete" in name and results[name][many] > SECONDS_GOAL]
    print(json.dumps(results | {"above_goal": above}))


if __name__ == "__main__":
    main()
