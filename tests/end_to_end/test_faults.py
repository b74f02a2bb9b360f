"""Runs that lose workers, memory of where they were, or their minds, and what they do about it.

The Task is a small one: it is the platform that is tried here. `tests/benchmarks/faults.py` does it to DiffDis, twenty times.
"""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from ray_platform.contracts import TrainingError
from ray_platform.data.config import DataConfig
from ray_platform.tracking import TrackingConfig
from ray_platform.train import checkpoint_format
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Run
from tests.end_to_end.conftest import write_shards
from tests.ray_platform.small_task import PixelTask
from tests.support.recording import Records, loss_curve, recording

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), num_shards=8, samples_a_shard=60)


def make_run(output, shards, output_dir=None, tracking=None, **train):
    fields = {
        "num_workers": 2, "num_steps": 80, "micro_batch_size": 4, "warmup_steps": 2, "log_every": 1, "preview_every": 0,
        "cpus_per_worker": 0.5, "checkpoint_every": 20, "zero_stage": 2, "ema_decay": 0.9,
    }  # fmt: skip
    return Run(
        functools.partial(recording, str(output / "records"), PixelTask),
        DataConfig(sources=(str(shards),), image_size=16),
        TrainConfig(**(fields | train)),
        tracking or TrackingConfig(),
        output_dir or str(output),
        {"recipe": "test"},
        dict,
    )


def records(output, run=None):
    return Records(output / "records", num_steps=run.train.num_steps if run else 0)


def wait_for_steps(output, number):
    deadline = time.monotonic() + 400
    while (done := records(output).count()) < number:
        assert time.monotonic() < deadline, f"{done} steps in 400 s"
        time.sleep(0.05)


def workers():
    """Of this test run's own cluster: another one may be training on this machine."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def at_some_step(output, number, do):
    """Call `do` from a thread once the run has done so many steps."""

    def wait():
        wait_for_steps(output, number)
        do()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def signal_a_worker(number):
    def do():
        random.choice(workers()).send_signal(number)

    return do


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory, ray_cluster):
    output = tmp_path_factory.mktemp("undisturbed")
    run = make_run(output, shards)
    run.fit()
    return records(output, run).trained_on(), loss_curve(output)


def assert_as_undisturbed(output, run, undisturbed):
    ours = records(output, run).trained_on()
    assert sorted(ours) == sorted(undisturbed[0])
    assert not [place for place, keys in ours.items() if keys != undisturbed[0][place]], "(step, rank) with other samples"
    assert loss_curve(output) == undisturbed[1], "to the last bit"


def test_a_killed_worker_changes_nothing_in_the_end(shards, undisturbed, tmp_path):
    run = make_run(tmp_path, shards)
    thread = at_some_step(tmp_path, 60, signal_a_worker(signal.SIGKILL))
    run.fit()
    thread.join()
    assert records(tmp_path).count() > 160, "nothing was done twice, so nothing was lost"
    assert_as_undisturbed(tmp_path, run, undisturbed)


@pytest.mark.slow
def test_a_run_shows_what_happens(shards, ray_cluster, tmp_path):
    """Scores and previews that all ranks make together, operations, memory, a trace; and the best checkpoint by a score."""
    settings = {"heldout_sources": (str(shards),), "heldout_samples": 11, "heldout_every": 4, "preview_every": 4, "log_every": 4}
    kept = {"checkpoint_every": 4, "keep_checkpoints": 1, "keep_best": "heldout/error", "keep_best_mode": "min"}
    run = make_run(tmp_path, shards, num_steps=12, zero_stage=3, profile=True, **settings, **kept)
    tracked = run.fit()
    client = MlflowClient(tracked["tracking_uri"])
    metrics = client.get_run(tracked["run_id"]).data.metrics
    assert metrics["heldout/rows"] == 11, "each once, on however many ranks"
    assert metrics["train/flops_per_second"] > 0
    assert metrics["memory/process_gb_max"] >= metrics["memory/process_gb_rank_1"] > 0
    assert metrics["train/bad_steps"] == 0
    previews = [file.path for file in client.list_artifacts(tracked["run_id"], "previews")]
    assert previews == [f"previews/step_{step:08d}.png" for step in (4, 8, 12)]
    page = Image.open(client.download_artifacts(tracked["run_id"], previews[0], str(tmp_path)))
    assert page.size == (12, 4), "three images of 4 px, of both ranks"
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "rank_00000.json.gz").read_bytes()))
    assert any("aten::addmm" in event["name"] for event in trace["traceEvents"])
    errors = {m.step: m.value for m in client.get_metric_history(tracked["run_id"], "heldout/error")}
    best = min(errors, key=errors.get)
    left = sorted(int(url[-8:]) for url in checkpoint_format.list_checkpoints(str(tmp_path)))
    assert left == sorted({best, 12})
    assert not (tmp_path / "ray_train").exists()


@pytest.mark.slow
def test_a_hanging_rank_is_named_and_the_run_goes_on(shards, undisturbed, tmp_path, caplog):
    run = make_run(tmp_path, shards, hang_seconds=15.0)
    thread = at_some_step(tmp_path, 60, signal_a_worker(signal.SIGSTOP))
    run.fit()
    thread.join()
    assert any("sends no heartbeats; the other 1 of 2 ranks wait" in r.getMessage() for r in caplog.records)
    assert_as_undisturbed(tmp_path, run, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_delays_a_checkpoint_and_nothing_else(shards, undisturbed, tmp_path, small_disk):
    """It is full from some step on, and has room again 20 s later: no step is done twice, and the run ends as any other."""
    tracking = TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db")
    run = make_run(tmp_path, shards, output_dir=str(small_disk), tracking=tracking)

    def fill():
        try:
            with (small_disk / "rubbish").open("wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
        except OSError:
            time.sleep(20)
            (small_disk / "rubbish").unlink()

    thread = at_some_step(tmp_path, 60, fill)
    tracked = run.fit()
    thread.join()
    assert records(tmp_path).count() == 160
    assert (small_disk / "export" / "model.safetensors").exists()
    assert records(tmp_path, run).trained_on() == undisturbed[0]
    assert MlflowClient(tracked["tracking_uri"]).get_run(tracked["run_id"]).info.status == "FINISHED"


DRIVER = """
import sys
from collections import Counter
from pathlib import Path
import ray
from tests.end_to_end.test_faults import make_run
from ray_platform.connect import connect
from ray_platform.contracts import TrainingError
connect()
try:
    make_run(Path(sys.argv[1]), sys.argv[2], resume=sys.argv[3]).fit()
except TrainingError as error:
    sys.exit(f"error: {error}")
"""


def start_driver(ray_cluster, output, shards, resume):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "platform")),
        "RAY_ADDRESS": ray_cluster.address_info["gcs_address"],
    }
    command = [sys.executable, "-c", DRIVER, str(output), str(shards), resume]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_or_killed_can_be_started_again(shards, undisturbed, ray_cluster, tmp_path, number):
    """SIGTERM is answered by a checkpoint of the step that it came in."""
    run = make_run(tmp_path, shards)
    driver = start_driver(ray_cluster, tmp_path, shards, "none")
    wait_for_steps(tmp_path, 60)
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert driver.returncode == 1
        # Ray may print what it held back of its workers' lines after the driver's last one.
        line = next(line for line in said.splitlines() if line.startswith("error: "))
        assert line.startswith("error: stopped by SIGTERM; saved at step "), said
        assert int(line.split("saved at step ")[1].split(";")[0]) >= 30
    again = start_driver(ray_cluster, tmp_path, shards, "auto")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    if number == signal.SIGTERM:
        assert records(tmp_path).count() == 160, "a step was done twice"
    assert_as_undisturbed(tmp_path, run, undisturbed)


@pytest.mark.slow  # tests/ray_platform/test_guard.py has the judgement alone
def test_losses_that_cannot_be_used_end_the_run_and_name_the_samples(shards, ray_cluster, tmp_path):
    """A rate that makes the weights, and with them the losses, infinite."""

    run = make_run(tmp_path, shards, max_bad_steps=3, max_loss_factor=1.01, num_steps=400, checkpoint_every=400, num_workers=1)
    with pytest.raises(TrainingError, match=r"not usable in 3 steps in a row, up to step \d+; the samples are in .*bad_steps"):
        run.fit()
    saved = [json.loads(file.read_text()) for file in (tmp_path / "bad_steps").glob("*.json")]
    assert len(saved) >= 3
    assert all(len(entry["keys"]) == 4 for entry in saved)


class Large(PixelTask):
    """Its second rank's accelerator is full at the step of that number."""

    def __init__(self, full_at):
        super().__init__()
        self.left, forward = full_at, self.module.forward

        def full(*arguments, **more):
            if self.module.training and torch.distributed.get_rank() == 1:
                self.left -= 1
                if self.left < 0:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of")
            return forward(*arguments, **more)

        self.module.forward = full


@pytest.mark.slow
@pytest.mark.parametrize(("full_at", "tries"), [(0, 1), (3, 2)])
def test_an_accelerator_that_is_full_says_what_to_do(shards, ray_cluster, tmp_path, caplog, full_at, tries):
    """At the first step at once, later after another try: what else was on it may be gone by then."""
    run = make_run(tmp_path, shards, num_steps=12, checkpoint_every=12, max_failures=1)
    run = dataclasses.replace(run, build_task=functools.partial(Large, full_at))
    told = r"train\.micro_batch_size: the memory of rank 1's accelerator is full \(CUDA out of memory\. Tried to allocate 2"
    with pytest.raises(TrainingError, match=told) as ended:
        run.fit()
    assert "\n" not in str(ended.value)
    assert caplog.text.count("resuming from") == tries - 1


@pytest.mark.slow
def test_the_loss_goes_on_at_other_numbers_of_workers_and_another_zero_stage(shards, tmp_path, ray_cluster):
    """2 -> 4 -> 1 workers and ZeRO 3 -> 1: every sample once, and losses as near to those of a run of 2 as other noise lets
    them be: 10 % in the mean of 60 steps. (On equal samples and noise it is 1e-5: tests/ray_platform/test_engine.py.)"""
    changing, same = tmp_path / "changing", tmp_path / "same"
    for steps, workers_, stage in ((60, 2, 3), (120, 4, 3), (180, 1, 1)):
        fields = {"num_workers": workers_, "zero_stage": stage, "num_steps": steps}
        make_run(changing, shards, resume="auto", lr_schedule="constant", **fields).fit()
    make_run(same, shards, num_steps=180, lr_schedule="constant").fit()
    curve, expected = loss_curve(changing), loss_curve(same)
    assert sorted(curve) == list(range(1, 181))
    for start in (60, 120):
        mine, theirs = (sum(losses[step] for step in range(start + 1, start + 61)) / 60 for losses in (curve, expected))
        assert abs(mine - theirs) < 0.1 * theirs, f"from step {start}: {mine} against {theirs}"
    read = [key for _, _, keys, _ in records(changing).entries() for key in keys]
    assert len(read) == 180 * 8 == 3 * 480
    assert all(read.count(key) == 3 for key in set(read)), "three epochs of every sample once"


def run_script(name, *arguments):
    """A script of this folder with a Ray of its own; what it printed."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "platform"))}
    command = [sys.executable, ROOT / "tests" / "end_to_end" / name, *map(str, arguments)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.s3
def test_storage_that_is_away_for_a_minute_loses_nothing(tmp_path):
    """Data and checkpoints in S3; the server is killed and comes back. Nothing starts again, and no step is done twice."""
    assert run_script("s3_run.py", tmp_path, 60)[-1] == "160 of 160 rank steps, 160 in all, newest step_00000080"


@pytest.mark.slow
def test_an_elastic_run_goes_on_with_fewer_workers_and_takes_back_new_ones(tmp_path):
    """Two nodes with room for a worker each; one is lost, and later there is another one. Every sample once an epoch."""
    num_steps = 3000
    said = run_script("elastic_run.py", tmp_path, num_steps)
    assert [line for line in said if line.endswith("workers")] == ["2 workers", "1 workers", "2 workers"]
    read = Counter(key for keys in Records(tmp_path / "records", num_steps=num_steps).trained_on().values() for key in keys)
    assert sum(read.values()) == num_steps * 8
    # Where the workers changed within an epoch, one of them may begin the next epoch before the other one ends this one: what of
    # the last epochs was read is what the last checkpoint says, shard by shard.
    newest = checkpoint_format.list_checkpoints(str(tmp_path))[0]
    _, ledger = checkpoint_format.read_ledgers(newest, checkpoint_format.read_manifest(newest))
    whole = ledger.first_epoch[0]  # so many epochs are over
    assert len(read) == 480
    assert all(count - whole in (0, 1, 2) for count in read.values()), "of an epoch that is over, every sample once"
    begun_later = Counter({key.split("/")[0]: 0 for key in read})
    for key, count in read.items():
        begun_later[key.split("/")[0]] += count - whole
    assert [begun_later[shard] for shard in sorted(begun_later)] == [
        sum(60 if ledger.is_complete(0, epoch, unit) else size(ledger.ranges(0, epoch, unit)) for epoch in (whole, whole + 1))
        for unit in range(8)
    ]


def size(ranges):
    return sum(stop - start for start, stop in ranges)
