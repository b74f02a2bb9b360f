"""Runs that lose workers, disks, drivers, storage or nodes continue correctly. All tests here are slow.

`make test` kills only one worker, in `trained_run` (tests/end_to_end/test_train.py). These tests use a small Task because they
test the platform. `tests/benchmarks/faults.py` injects twenty faults into a DiffDis run.
"""

import contextlib
import dataclasses
import functools
import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from ray_platform.contracts import TrainingError
from ray_platform.lease import LEASE
from ray_platform.tracking import TrackingConfig
from ray_platform.train import checkpoint_format
from tests.ray_platform.small_task import PixelTask
from tests.support.recording import Records
from tests.support.training import ROOT, at_step, logged_metric, pixel_run, records, wait_for_steps, write_shards

pytestmark = pytest.mark.slow

PYTHONPATH = {"PYTHONPATH": os.pathsep.join(str(path) for path in (ROOT, ROOT / "platform"))}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), num_shards=8, samples_per_shard=60)


def workers():
    """Return the training workers of this process's cluster."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                yield process


def signal_a_worker(number):
    return lambda: random.choice(list(workers())).send_signal(number)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory, ray_cluster):
    """(keys by step and rank, loss by step) of an undisturbed run."""
    output = tmp_path_factory.mktemp("undisturbed")
    run = pixel_run(output, shards)
    run.fit()
    return records(output, run).trained_on(), dict(logged_metric(output, "train/loss"))


def assert_as_undisturbed(output, run, undisturbed):
    ours = records(output, run).trained_on()
    assert sorted(ours) == sorted(undisturbed[0])
    assert not [place for place, keys in ours.items() if keys != undisturbed[0][place]], "(step, rank) with other samples"
    assert dict(logged_metric(output, "train/loss")) == undisturbed[1], "to the last bit"


@pytest.mark.parametrize(("number", "fields"), [(signal.SIGKILL, {}), (signal.SIGSTOP, {"hang_seconds": 15.0})])
def test_a_killed_or_hanging_worker_changes_no_loss(shards, undisturbed, tmp_path, caplog, number, fields):
    run = pixel_run(tmp_path, shards, **fields)
    thread = at_step(tmp_path, 60, signal_a_worker(number))
    run.fit()
    thread.join()
    assert records(tmp_path).count() > 160, "steps since the last checkpoint are done again"
    assert_as_undisturbed(tmp_path, run, undisturbed)
    if number == signal.SIGSTOP:
        assert any("1 of 2 ranks" in r.getMessage() for r in caplog.records), "the hanging rank is named"


@pytest.mark.parametrize(("number", "cause"), [(signal.SIGKILL, "killed"), (signal.SIGSEGV, "segmentation fault")])
def test_the_last_line_names_rank_host_and_cause(shards, ray_cluster, tmp_path, number, cause):
    run = pixel_run(tmp_path, shards, num_steps=60, max_failures=0)
    thread = at_step(tmp_path, 20, signal_a_worker(number))
    with pytest.raises(TrainingError, match=rf"^rank \d \(.*, pid \d+\): {cause} \({number.name}\).*failures.log"):
        run.fit()
    thread.join()
    assert "worker" in (tmp_path / "failures.log").read_text()  # Ray's messages, which are longer


def test_a_run_logs_scores_previews_operations_a_trace_and_keeps_the_best_checkpoint(shards, ray_cluster, tmp_path):
    settings = {"heldout_sources": (str(shards),), "heldout_samples": 11, "heldout_every": 4, "preview_every": 4, "log_every": 4}
    kept = {"checkpoint_every": 4, "keep_checkpoints": 1, "keep_best": "heldout/error", "keep_best_mode": "min"}
    profiled = {"profile": True, "profile_steps": (6, 7), "profile_ranks": (1,)}
    run = pixel_run(tmp_path, shards, num_steps=12, zero_stage=3, **profiled, **settings, **kept)
    tracked = run.fit()
    client = MlflowClient(tracked["tracking_uri"])
    metrics = client.get_run(tracked["run_id"]).data.metrics
    assert metrics["heldout/rows"] == 11, "each once, on any number of ranks"
    assert metrics["train/flops_per_second"] > 0
    assert metrics["memory/process_gb_max"] >= metrics["memory/process_gb_rank_1"] > 0
    assert metrics["train/bad_steps"] == 0
    previews = [file.path for file in client.list_artifacts(tracked["run_id"], "previews")]
    assert previews == [f"previews/step_{step:08d}.png" for step in (4, 8, 12)]
    page = Image.open(client.download_artifacts(tracked["run_id"], previews[0], str(tmp_path)))
    assert page.size == (12, 4), "three images of 4 px, of both ranks"
    [file] = (tmp_path / "profile").glob("*/*.json.gz")
    assert str(file.relative_to(tmp_path)) == "profile/steps_6-7/rank_00001.json.gz"
    trace = json.loads(gzip.decompress(file.read_bytes()))
    assert any("aten::addmm" in event["name"] for event in trace["traceEvents"])
    errors = dict(logged_metric(tmp_path, "heldout/error"))
    left = sorted(int(url[-8:]) for url in checkpoint_format.list_checkpoints(str(tmp_path)))
    assert left == sorted({min(errors, key=errors.get), 12})
    assert not (tmp_path / "ray_train").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_delays_a_checkpoint_and_nothing_else(shards, undisturbed, tmp_path, small_disk):
    """The disk has space again 20 s later: no step is repeated, and the run finishes normally."""
    run = pixel_run(tmp_path, shards, output_dir=str(small_disk), tracking=TrackingConfig(f"sqlite:///{tmp_path}/mlflow.db"))

    def fill():
        try:
            with (small_disk / "rubbish").open("wb") as file:
                while True:
                    file.write(bytes(4096))
                    file.flush()
        except OSError:
            time.sleep(20)
            (small_disk / "rubbish").unlink()

    thread = at_step(tmp_path, 60, fill)
    tracked = run.fit()
    thread.join()
    assert records(tmp_path).count() == 160
    assert (small_disk / "export" / "model.safetensors").exists()
    assert records(tmp_path, run).trained_on() == undisturbed[0]
    assert MlflowClient(tracked["tracking_uri"]).get_run(tracked["run_id"]).info.status == "FINISHED"


DRIVER = """
import sys
from pathlib import Path
from ray_platform.contracts import UserError
from tests.support.training import pixel_run
try:
    pixel_run(Path(sys.argv[1]), sys.argv[2], resume=sys.argv[3], num_steps=int(sys.argv[4])).fit()
except UserError as error:
    sys.exit(f"error: {error}")
"""


def start_driver(ray_cluster, output, shards, resume, num_steps=80):
    env = os.environ | PYTHONPATH | {"RAY_ADDRESS": ray_cluster.address_info["gcs_address"]}
    command = [sys.executable, "-c", DRIVER, str(output), str(shards), resume, str(num_steps)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_driver_that_is_stopped_or_killed_can_be_started_again(shards, undisturbed, ray_cluster, tmp_path, number):
    """On SIGTERM, the run saves a checkpoint of the current step. After SIGKILL, its lease becomes stale.

    The lease is changed to that of another machine, so that no process can see whether its holder has ended. The name of the
    output folder would be another one if it were a pattern or a URI.
    """
    tmp_path = tmp_path / "run[1] {a,b}?x%20ü#"
    run = pixel_run(tmp_path, shards)
    driver = start_driver(ray_cluster, tmp_path, shards, "none")
    wait_for_steps(tmp_path, 60)
    driver.send_signal(number)
    output, _ = driver.communicate(timeout=120)
    if number == signal.SIGTERM:
        assert driver.returncode == 1
        # Ray may print its workers' remaining lines after the driver's last one.
        line = next(line for line in output.splitlines() if line.startswith("error: "))
        assert "SIGTERM" in line
        assert int(line.split("saved at step ")[1].split(";")[0]) >= 30
        assert not (tmp_path / LEASE).exists()
    else:
        change_lease(tmp_path, machine="another machine")
    again = start_driver(ray_cluster, tmp_path, shards, "auto")
    output, _ = again.communicate(timeout=300)
    assert again.returncode == 0, output
    if number == signal.SIGTERM:
        assert records(tmp_path).count() == 160, "a step was done twice"
    else:
        assert re.search(rf"has a lease of launch .*pid {driver.pid}.*waiting up to 45 s[^$]*taking over", output)
    assert_as_undisturbed(tmp_path, run, undisturbed)


def test_a_launch_ends_with_a_checkpoint_before_a_time_limit(shards, ray_cluster, tmp_path):
    run = pixel_run(tmp_path, shards, num_workers=1, num_steps=100_000, checkpoint_every=100_000, max_minutes=0.01)
    with pytest.raises(
        TrainingError, match=r"^train\.max_minutes: .* saved at step \d+; resume from .* with --resume auto$"
    ) as ended:
        run.fit()
    (checkpoint,) = checkpoint_format.list_checkpoints(str(tmp_path))
    assert checkpoint in str(ended.value)
    assert not (tmp_path / "export").exists()


def change_lease(output, **fields):
    file = output / LEASE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_second_launch_is_rejected_and_one_that_lost_its_lease_ends(shards, ray_cluster, tmp_path):
    first = start_driver(ray_cluster, tmp_path, shards, "none", num_steps=100_000)
    wait_for_steps(tmp_path, 60)
    second, _ = start_driver(ray_cluster, tmp_path, shards, "auto").communicate(timeout=120)
    assert re.search(rf"^error: output_dir: .* is in use by launch .*pid {first.pid}\)", second, re.MULTILINE)
    change_lease(tmp_path, token="of another launch", host="gpu-7")
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 1
    assert re.search(r"^error: output_dir: .* was taken over by launch .*gpu-7", output, re.MULTILINE)
    assert json.loads((tmp_path / LEASE).read_text())["host"] == "gpu-7"
    assert not (tmp_path / "export").exists()


def test_losses_that_cannot_be_used_end_the_run_and_name_the_samples(shards, ray_cluster, tmp_path):
    run = pixel_run(tmp_path, shards, max_bad_steps=3, max_loss_factor=1.01, num_steps=400, checkpoint_every=400, num_workers=1)
    with pytest.raises(TrainingError, match=r"3 steps in a row.*bad_steps"):
        run.fit()
    saved = [json.loads(file.read_text()) for file in (tmp_path / "bad_steps").glob("*.json")]
    assert len(saved) >= 3
    assert all(len(entry["keys"]) == 4 for entry in saved)


def out_of_memory_task(folder, full_at):
    """Build a Task whose second rank runs out of accelerator memory at step `full_at`. Ranks that build it write a file."""
    (folder / f"built_{os.getpid()}").touch()
    task = PixelTask()
    forward, left = task.module.forward, iter(range(full_at))

    def full(*arguments, **more):
        if task.module.training and torch.distributed.get_rank() == 1 and next(left, None) is None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of")
        return forward(*arguments, **more)

    task.module.forward = full
    return task


@pytest.mark.parametrize(("full_at", "tries"), [(0, 1), (3, 2)])
def test_a_full_accelerator_is_one_line_with_what_to_do(shards, ray_cluster, tmp_path, full_at, tries):
    """At the first step the run fails immediately; at a later step it retries, as another process may have used the memory."""
    run = pixel_run(tmp_path, shards, num_steps=12, checkpoint_every=12, max_failures=1)
    run = dataclasses.replace(run, build_task=functools.partial(out_of_memory_task, tmp_path, full_at))
    with pytest.raises(TrainingError, match=r"train\.micro_batch_size.*rank 1.*Tried to allocate 2") as ended:
        run.fit()
    assert "\n" not in str(ended.value)
    assert len(list(tmp_path.glob("built_*"))) == 2 * tries


def test_the_loss_continues_at_other_numbers_of_workers_and_another_zero_stage(shards, tmp_path, ray_cluster):
    """2 -> 4 -> 1 workers and ZeRO 3 -> 1: every sample is used once, and the losses stay close to those of a run with 2 workers.

    The tolerance is 10 % in the mean of 60 steps, because the noise differs. With equal samples and noise it is 1e-5
    (tests/ray_platform/test_engine.py).
    """
    changing, same = tmp_path / "changing", tmp_path / "same"
    for steps, num_workers, stage in ((60, 2, 3), (120, 4, 3), (180, 1, 1)):
        fields = {"num_workers": num_workers, "zero_stage": stage, "num_steps": steps}
        pixel_run(changing, shards, resume="auto", lr_schedule="constant", **fields).fit()
    pixel_run(same, shards, num_steps=180, lr_schedule="constant").fit()
    curve, expected = (dict(logged_metric(folder, "train/loss")) for folder in (changing, same))
    assert sorted(curve) == list(range(1, 181))
    for start in (60, 120):
        mean, expected_mean = (sum(losses[step] for step in range(start + 1, start + 61)) / 60 for losses in (curve, expected))
        assert abs(mean - expected_mean) < 0.1 * expected_mean, f"from step {start}: {mean} against {expected_mean}"
    read = Counter(key for _, _, keys, _ in records(changing).entries() for key in keys)
    assert len(read) == 480
    assert set(read.values()) == {3}, "three epochs of every sample once"


def run_script(name, *arguments):
    """Return the lines that a run of disturbed_runs.py prints."""
    command = [sys.executable, ROOT / "tests" / "end_to_end" / "disturbed_runs.py", name, *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | PYTHONPATH, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.s3
def test_storage_that_is_away_for_a_minute_loses_nothing(tmp_path):
    """Data and checkpoints are in S3; its server is killed and restarted. The run does not restart and repeats no step."""
    assert run_script("s3", tmp_path, 60)[-1] == "160 of 160 rank steps, 160 in all, newest step_00000080"


def test_an_elastic_run_continues_with_fewer_workers_and_takes_new_ones(tmp_path):
    """Two nodes have room for one worker each; one is lost and later replaced. Every sample is used once per epoch."""
    num_steps = 3000
    lines = run_script("elastic", tmp_path, num_steps)
    assert [line for line in lines if line.endswith("workers")] == ["2 workers", "1 workers", "2 workers"]
    trained_on = Records(tmp_path / "records", num_steps=num_steps).trained_on()
    read = Counter(key for keys in trained_on.values() for key in keys)
    assert sum(read.values()) == num_steps * 8
    # If the number of workers changes within an epoch, one worker may start the next epoch before the other finishes this one.
    # The last checkpoint's ledger records per shard which samples of the last epochs were used.
    newest = checkpoint_format.list_checkpoints(str(tmp_path))[0]
    _, ledger = checkpoint_format.read_ledgers(newest, checkpoint_format.read_manifest(newest))
    complete = ledger.first_epoch[0]  # number of complete epochs
    assert len(read) == 480
    assert all(count - complete in (0, 1, 2) for count in read.values()), "of a complete epoch, every sample once"

    def num_consumed(epoch, unit):
        return 60 if ledger.is_complete(0, epoch, unit) else sum(stop - start for start, stop in ledger.ranges(0, epoch, unit))

    for unit, shard in enumerate(sorted({key.split("/")[0] for key in read})):
        later = sum(count - complete for key, count in read.items() if key.split("/")[0] == shard)
        assert later == num_consumed(complete, unit) + num_consumed(complete + 1, unit)
