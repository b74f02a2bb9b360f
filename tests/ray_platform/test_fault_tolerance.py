"""Steps with bad losses, and failed workers: what is counted, what restarts, and what ends the run."""

import itertools
import json
import math
import time
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import ray
import torch
from ray import cloudpickle
from ray.exceptions import ActorDiedError
from ray.train import ControllerError

from ray_platform.contracts import ConfigError, DataError, TrainingError
from ray_platform.data.config import DataConfig
from ray_platform.storage import StorageError
from ray_platform.tracking import TrackingConfig
from ray_platform.train import failures, fault_tolerance, launch, worker
from ray_platform.train.checkpoint_format import LossHistory
from ray_platform.train.config import TrainConfig
from ray_platform.train.failures import AcceleratorFull, Diverged, Interrupted, find_cause
from ray_platform.train.fault_tolerance import (
    LossMonitor,
    RestartPolicy,
    Stopped,
    is_final,
    progress_text,
)
from ray_platform.train.optimizer import LossScale
from ray_platform.train.worker import Trainer, build_task, train_worker
from tests.ray_platform.test_checkpointing import save
from tests.support.messages import check_message

BATCH = SimpleNamespace(keys=("shard/1", "shard/2"), captions=("a cat", "a dog"))
FLAGS = {"stop": False, "checkpoint_due": True, "uploading": False, "upload_failed": False, "num_bad": 3, "epoch_samples": 9.5}


@pytest.fixture(autouse=True, scope="module")
def one_rank(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "init"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def loss_monitor(tmp_path, history=None, **fields):
    return LossMonitor(TrainConfig(**fields), history or LossHistory(), str(tmp_path))


def step(monitor, number, loss, updated=None, rescaled=False):
    status = monitor.sync_step_status(torch.tensor(loss), **FLAGS)
    updated = not status.is_bad if updated is None else updated
    monitor.record(status, SimpleNamespace(updated=updated, rescaled=rescaled), number, BATCH)
    return status


@pytest.mark.parametrize("loss", [math.nan, math.inf, 25.0])
def test_an_unusable_loss_is_counted_and_its_keys_are_saved(tmp_path, loss):
    monitor = loss_monitor(tmp_path)
    assert not step(monitor, 0, 1.0).is_bad
    assert not step(monitor, 1, 100.0).is_bad, "a loss is not unusual before it is known what is usual"
    monitor = loss_monitor(tmp_path)
    for number in range(30):
        assert not step(monitor, number, 2.0).is_bad
    assert step(monitor, 30, loss).is_bad
    assert not step(monitor, 31, 2.0).is_bad
    assert monitor.history.num_bad == 1
    saved = json.loads((tmp_path / "bad_steps" / "step_00000030_rank_00000.json").read_text())
    assert (saved["keys"], saved["captions"]) == (["shard/1", "shard/2"], ["a cat", "a dog"])


def test_a_loss_that_falls_below_zero_is_usable_and_a_jump_from_there_is_not(tmp_path):
    """The dispersive loss is negative; ten times a negative mean is below every following loss."""
    monitor = loss_monitor(tmp_path)
    for number in range(200):
        assert not step(monitor, number, 2.0 - 0.02 * number + 0.2 * (-1) ** number).is_bad, number
    assert step(monitor, 200, 25.0).is_bad


def test_checkpoints_by_the_clock_are_due_on_rank_0_and_agreed_on(tmp_path):
    trainer = SimpleNamespace(config=TrainConfig(checkpoint_minutes=1.0), rank=0, saved_at=time.monotonic() - 61)
    assert Trainer._is_checkpoint_due(trainer)
    for change in ({"rank": 1}, {"saved_at": time.monotonic()}, {"config": TrainConfig()}):
        assert not Trainer._is_checkpoint_due(SimpleNamespace(**(vars(trainer) | change)))
    status = loss_monitor(tmp_path).sync_step_status(torch.tensor(1.0), **FLAGS)
    assert (status.checkpoint_due, status.stop, status.any_uploading, status.any_upload_failed) == (True, False, False, False)
    assert (status.num_bad, status.epoch_samples) == (3, 9.5)


def test_too_many_bad_steps_in_a_row_end_the_run(tmp_path):
    monitor = loss_monitor(tmp_path, max_bad_steps=3)
    for _ in range(2):  # bad steps that are not consecutive
        step(monitor, 1, math.nan)
        step(monitor, 2, math.nan)
        step(monitor, 3, 1.0)
    step(monitor, 4, math.nan)
    step(monitor, 5, 1.0, updated=False)  # a non-finite gradient
    resumed = loss_monitor(tmp_path, LossHistory(**asdict(monitor.history)), max_bad_steps=3)
    for each in (monitor, resumed):  # restarting a run must not reset the count
        with pytest.raises(Diverged, match=r"3 steps in a row, up to step 6; .*bad_steps"):
            step(each, 6, math.nan)


def test_steps_count_as_bad_once_the_loss_scale_is_at_its_floor(tmp_path):
    """A gradient is never finite in fp16: at first the scale may be the cause; at the lowest scale it cannot be."""
    scale, monitor = LossScale(8.0), loss_monitor(tmp_path, max_bad_steps=2)
    halved = []

    def overflow(number):
        halved.append(scale.update(finite=False))
        step(monitor, number, 1.0, updated=False, rescaled=halved[-1])

    for number in range(4):
        overflow(number)
    with pytest.raises(Diverged, match="2 steps in a row, up to step 4"):
        overflow(4)
    assert (halved, scale.value) == ([True, True, True, False, False], 1.0)


def test_a_loss_scale_is_resumed_but_not_from_another_precision():
    scale, again, other = LossScale(), LossScale(), LossScale(1.0, is_dynamic=False)
    for finite in (False, True, True):
        scale.update(finite)
    again.load(scale.state())
    assert (again.value, again.good_steps) == (2.0**15, 2)
    again.load(other.state())
    other.load(scale.state())
    assert (again.value, other.value) == (2.0**15, 1.0)


class Failed(Exception):
    """Exception in the shape of Ray Train's, with the error of each rank."""

    def __init__(self, **worker_failures):
        super().__init__("training failed")
        self.worker_failures = {int(name[1:]): failure for name, failure in worker_failures.items()}


DIED = Failed(r0=ConnectionError("peer closed the connection"), r1=ActorDiedError())
FROM_START = "resuming from where this launch started"


def restart_policy(newest="", max_failures=1, output_dir="s3://bucket/run"):
    storage = SimpleNamespace(newest=newest)
    return RestartPolicy(max_failures, lambda: storage.newest, str(output_dir)), storage


def test_dead_workers_restart_as_long_as_they_make_progress(tmp_path):
    policy, storage = restart_policy(output_dir=tmp_path)
    messages = f"Ray's messages are in {tmp_path / 'failures.log'}"
    assert policy.record_failure(DIED, "", "") == f"rank 1 died; {messages}; {FROM_START}"
    storage.newest = "run/step_20"
    for _ in range(5):  # each attempt gets further
        storage.newest += "0"
        assert policy.record_failure(DIED, "", "") == f"rank 1 died; {messages}; resuming from {storage.newest}"
    assert (tmp_path / "failures.log").read_text().count("training failed") == 6
    drained = Failed(r0=Interrupted("node a1b2 is being drained; saved at step 7"))
    assert policy.record_failure(drained, "", "").startswith("node a1b2")
    with pytest.raises(TrainingError, match=r"^rank 1 died; .* \(failure 2 without a new checkpoint; train.max_failures\)$"):
        policy.record_failure(DIED, "", "")
    no_workers = ControllerError(RuntimeError("Gloo connectFullMesh failed:\nConnection refused"))
    line = restart_policy()[0].record_failure(no_workers, "", "")
    assert line.startswith("the workers' controller: RuntimeError: Gloo connectFullMesh failed:; Ray's messages are in /")
    assert line.endswith(FROM_START)


WORKER = "Worker info: metadata=(hostname='gpu-7', node_id='5009db', node_ip='192.0.2.2', pid=9181)\n"
CUT_OFF = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
CUT_OFF += "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the OOM killer"


@pytest.mark.parametrize(
    ("fault", "report", "evidence", "words"),
    [
        ("a library crashes a worker", CUT_OFF, ("SIGSEGV", "LOG", -1), "segmentation fault"),
        ("the kernel ends a worker, because the host's memory is full", CUT_OFF, ("", "", 3), "memory was full"),
        ("another process kills a worker", CUT_OFF, ("", "", 0), "not by the kernel"),
        ("a worker is killed, and its host does not answer", CUT_OFF, ("", "", -1), "dmesg"),
        (
            "Ray ends a worker, because the host's memory is full",
            "1 worker(s) were killed due to the node running low on memory. Used 23.10GB / 24.00GB",
            None,
            "23.10GB / 24.00GB",
        ),
        ("a library exits", "Worker exit detail: Worker exits with an exit code 7.", None, "exited with code 7"),
        (
            "a node is lost",
            "The actor died because its node has died. Node Id: 5009db\n"
            "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats",
            None,
            "its node was lost",
        ),
    ],
)
def test_the_line_about_a_dead_worker_names_host_rank_cause_and_remedy(monkeypatch, fault, report, evidence, words):
    monkeypatch.setattr(failures.DeadWorker, "_gather_evidence", lambda worker: evidence)
    error = Failed(r0=ConnectionError("peer closed the connection"), r3=ActorDiedError())
    error.worker_failures[3].error_msg = WORKER + report
    line = find_cause(error)[1]
    assert line.startswith("rank 3 (gpu-7, pid 9181): ")
    assert words in line
    check_message(fault, line, HOST="gpu-7", PID=9181)


def test_the_log_of_a_process_shows_the_signal_that_ended_it(tmp_path):
    (tmp_path / "worker-2-01000000-77.err").write_bytes(b"x" * 2**19 + b"\n*** SIGSEGV received at time=1 on cpu 0 ***\n")
    (tmp_path / "worker-3-01000000-78.err").write_bytes(b"Fatal Python error: Aborted\n")
    (tmp_path / "worker-4-01000000-79.err").write_bytes(b"only a warning\n")
    assert failures.find_signal(tmp_path, "77") == ("SIGSEGV", str(tmp_path / "worker-2-01000000-77.err"), -1)
    assert failures.find_signal(tmp_path, "78")[0] == "SIGABRT"
    assert failures.find_signal(tmp_path, "79") is None


@pytest.mark.parametrize(
    "error", [ConfigError("train.seed: wrong"), DataError("a.tar: gone"), StorageError("s3: no", "forbidden")]
)
def test_an_error_that_a_restart_would_repeat_ends_the_run(error):
    for stopping in ("", "stopped by SIGTERM"):
        with pytest.raises(TrainingError, match=f"^{error}$"):
            restart_policy()[0].record_failure(Failed(r0=error), "", stopping)


def test_failures_in_a_row_are_followed_by_longer_pauses_and_an_outage_of_storage_counts(tmp_path, monkeypatch, caplog):
    outage = StorageError("s3://bucket: cannot reach", "unavailable")
    newest = iter([["run/step_20"], ["run/step_20"], outage, ["run/step_40"], ["run/step_40"]])
    ends = iter([DIED, DIED, DIED, Failed(r0=Interrupted("node a1b2 is being drained")), DIED, None])
    starts: list[float] = []
    now = [0.0]

    def start():
        starts.append(now[0])
        return SimpleNamespace(fit=lambda: next_or_raise(ends))

    def sleep(seconds):
        now[0] += seconds

    def next_or_raise(answers):
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray.train, "TrainingFailedError", Failed)
    monkeypatch.setattr(launch, "list_checkpoints", lambda *_: next_or_raise(newest))
    monkeypatch.setattr(fault_tolerance, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(launch.Run, "_trainer", lambda *_: start())
    run = launch.Run(dict, DataConfig(), TrainConfig(max_failures=3), TrackingConfig(), str(tmp_path), {}, dict)
    monitor = SimpleNamespace(last_hang="", stop_reason="", reset_workers=lambda: None)
    run._run_workers(SimpleNamespace(launch="a"), monitor, SimpleNamespace(lost=""))
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    assert pauses[0] == pauses[3] == pauses[4] == 0 < pauses[1] < pauses[2] <= 60
    assert "cannot reach" in caplog.messages[2]
    assert caplog.messages[2].endswith("resuming from run/step_20")


@pytest.mark.parametrize(
    ("stop_reason", "lost", "kind"), [("stopped by SIGTERM", "", Stopped), ("", "taken over", TrainingError)]
)
def test_a_launch_that_has_to_end_does_not_restart_after_a_pause(monkeypatch, stop_reason, lost, kind):
    policy, _ = restart_policy("run/step_20")
    policy.pause_seconds = 45.0
    monitor, lease, slept = SimpleNamespace(stop_reason=""), SimpleNamespace(lost=""), []

    def sleep(seconds):
        slept.append(seconds)
        monitor.stop_reason, lease.lost = stop_reason, lost

    monkeypatch.setattr(fault_tolerance, "time", SimpleNamespace(monotonic=lambda: 0.0, sleep=sleep))
    with pytest.raises(kind, match=stop_reason or lost):
        policy.pause(monitor, lease)
    assert slept == [fault_tolerance.POLL_SECONDS]


def test_a_stopped_run_says_from_where_it_can_be_resumed():
    saved = Failed(r0=Interrupted("stopped by SIGTERM; saved at step 20"))
    for error, hang, reason in (
        (saved, "", "stopped by SIGTERM; saved at step 20"),
        (DIED, "", "stopped by SIGTERM, and could not save at once: rank 1 died; .*"),
        (DIED, "rank 1 hangs", "stopped by SIGTERM, and could not save at once: rank 1 hangs; .*"),
    ):
        with pytest.raises(Stopped, match=f"^{reason}; resume from run/step_20 with --resume auto$"):
            restart_policy("run/step_20")[0].record_failure(error, hang, "stopped by SIGTERM")
    with pytest.raises(Stopped, match=r"rank 1 died; .*; this launch has saved no checkpoint$"):
        restart_policy()[0].record_failure(DIED, "", "stopped by SIGTERM")

    def unavailable():
        raise StorageError("s3://bucket: cannot reach", "unavailable")

    with pytest.raises(Stopped, match=r"rank 1 died; .*; its checkpoints cannot be listed \(s3://bucket: cannot reach\)"):
        RestartPolicy(1, unavailable, "s3://bucket/run").record_failure(DIED, "", "stopped by SIGTERM")


@pytest.mark.parametrize("error", [ValueError("objective.freeze:\n no such"), FileNotFoundError("objective.freeze: no such")])
def test_a_task_that_cannot_be_built_is_not_tried_again(error):
    def build():
        raise error

    with pytest.raises(ConfigError, match=r"^objective\.freeze: no such$") as raised:
        build_task(SimpleNamespace(train=SimpleNamespace(seed=0), build_task=cloudpickle.dumps(build)))
    assert is_final(raised.value)


@pytest.mark.parametrize(("num_steps", "kind"), [(0, ConfigError), (20, AcceleratorFull)])
def test_a_full_accelerator_is_final_only_before_the_first_step_of_the_run(tmp_path, monkeypatch, num_steps, kind):
    """Also in the first step of new processes, which continue a checkpoint."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of")

    if num_steps:
        save(tmp_path, num_steps)
    monkeypatch.setattr(worker, "stream", full)
    monkeypatch.setattr(worker.HeartbeatThread, "start", lambda heartbeat: None)
    task = SimpleNamespace(parameter_groups=list)
    spec = SimpleNamespace(
        train=TrainConfig(), output_dir=str(tmp_path), launch="a", catalog=SimpleNamespace(digest="d", num_units=[3]), params={},
        data=None, hang_detector=None, build_task=cloudpickle.dumps(lambda: task), tracker=SimpleNamespace(flush=lambda: None),
    )  # fmt: skip
    with pytest.raises(kind, match=r"train\.micro_batch_size"):
        train_worker(spec)


def test_the_progress_shows_what_stalls():
    metrics = {"train/loss": 1.0, "train/loss_alignment": 2.5, "train/samples_per_second": 113.4, "data/waiting_fraction": 0.02}
    line = progress_text(metrics | {"train/stalled_fraction": 0.034, "train/seconds_left": 14 * 86400.0})
    assert line == "loss_alignment 2.500  113 samples/s  waiting for data 2%  stalled 3%  left 14.0 days"
    assert "stalled" not in progress_text(metrics | {"train/stalled_fraction": 0.009})
