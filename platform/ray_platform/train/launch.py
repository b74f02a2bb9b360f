"""The driver's side of a training run: check what can be checked, start the workers, show progress, say what failed."""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError, Task
from ray_platform.data import precomputed
from ray_platform.data.catalog import Catalog, build_catalog, difference, to_json
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import inspect_first_samples
from ray_platform.data.plan import check_world_size
from ray_platform.tracking import RunStatus, TrackerHandle, TrackingConfig, start_tracker, tracking_uri
from ray_platform.train import checkpoint
from ray_platform.train.config import TrainConfig
from ray_platform.train.loop import Job, train_worker

logger = logging.getLogger(__name__)

INSPECTED_SAMPLES = 64
CATALOG = "catalog.json"  # in output_dir: the shards that the run was begun with
TRACKED = "mlflow.json"  # in output_dir: the run to go on in after a resume


class TrainingError(Exception):
    """The run ended before its last step. The message says why in one line."""


@dataclass(frozen=True)
class Run:
    """A training run as its driver knows it."""

    build_task: Callable[[], Task]
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig
    output_dir: str  # absolute, or s3://
    params: dict[str, Any]  # the whole resolved configuration, for the tracker
    # What the model's frozen encoders are, to compare with what made precomputed shards; called only for those.
    describe_encoders: Callable[[], dict[str, Any]]

    def check(self) -> Catalog:
        """The data's catalog, after every check that needs no cluster. Raises ConfigError or DataError."""
        if not self.output_dir:
            raise ConfigError("output_dir: give the folder (absolute) or s3:// URL that the run's results go to")
        if "://" not in self.output_dir and not os.path.isabs(self.output_dir):
            raise ConfigError(
                f"output_dir: {self.output_dir} is relative, and a submitted job's folder is a copy that is thrown away; "
                "give an absolute path or an s3:// URL"
            )
        if "://" in self.output_dir and not self.tracking.uri:
            raise ConfigError(
                f"tracking.uri: give an MLflow server or sqlite:/// path, as {self.output_dir} cannot hold a database"
            )
        catalog = self._catalog()
        check_world_size(catalog, self.train.num_workers)
        if self.train.resume == "none" and (found := checkpoint.newest(self.output_dir)):
            raise ConfigError(
                f"output_dir: {self.output_dir} already holds a run (up to {found.rsplit('/', 1)[1]}); "
                "go on with it by --train.resume auto, or give another output_dir"
            )
        return catalog

    def _catalog(self) -> Catalog:
        """The source's, compared with the one that a resumed run was begun with, and with the model's encoders."""
        url = storage.join(self.output_dir, CATALOG)
        saved = storage.read_bytes(url) if storage.exists(url) else None
        catalog = build_catalog(self.data, saved)
        if saved and self.train.resume == "auto" and (changes := difference(saved, catalog)):
            raise DataError(
                f"data.sources: changed since this run began: {changes}; restore what it was, "
                "or begin anew with another output_dir"
            )
        if catalog.manifest is not None:
            precomputed.check_encoders(catalog.manifest, self.describe_encoders())
            precomputed.check_settings(catalog.manifest, self.data)
        return catalog

    def dry_run(self) -> dict[str, Any]:
        """What would run, after reading the first samples of the data. Raises as `check`."""
        catalog = self.check()
        train = self.train
        samples = inspect_first_samples(catalog, self.data, INSPECTED_SAMPLES)
        return {
            "shards": len(catalog.shards),
            "bytes": catalog.num_bytes,
            "samples_in_source": catalog.num_samples,
            "first_samples": {
                "good": samples.good,
                "rejected": dict(samples.rejected),
                "example": {"key": samples.example.key, "caption": samples.example.caption},
            },
            "workers": train.num_workers,
            "zero_stage": train.zero_stage,
            "steps": train.num_steps,
            "global_batch_size": train.num_workers * train.micro_batch_size,
            "samples_to_train_on": train.num_steps * train.num_workers * train.micro_batch_size,
            "starts_from": checkpoint.choose(train.resume, self.output_dir, "none yet") or "the beginning",
            "output_dir": self.output_dir,
        }

    def fit(self) -> dict[str, Any]:
        """Train to the last step. Returns where it is tracked: {tracking_uri, experiment, run_id}.

        Raises ConfigError and DataError before anything starts, and TrainingError, in one line, when the run fails.
        """
        catalog = self.check()
        connect()
        storage.write_bytes(storage.join(self.output_dir, CATALOG), to_json(catalog))
        tracker, tracked = self._start_tracker()
        # Named by time: a later launch's name sorts after an earlier one's.
        launch = time.strftime("%Y%m%d-%H%M%S") + f"-{os.getpid()}"
        job = Job(self.build_task, self.data, self.train, catalog, self.output_dir, launch, tracker)
        status: RunStatus = "FAILED"
        try:
            with _progress(tracker, self.train.num_steps):
                self._trainer(job).fit()
            tracker.log_folder(job.export_dir, "model")
            status = "FINISHED"
        except TrainingFailedError as error:
            raise TrainingError(_cause(error)) from error
        finally:
            tracker.end(status)
        return tracked

    def _start_tracker(self) -> tuple[TrackerHandle, dict[str, str]]:
        """The tracker's run: the one that a resumed run began in, else a new one."""
        url, known = storage.join(self.output_dir, TRACKED), {}
        if self.train.resume != "none" and storage.exists(url):
            known = json.loads(storage.read_bytes(url))
        tracker = start_tracker(self.tracking, self.output_dir, known.get("run_id", ""))
        tracker.log_params(self.params)
        uri = tracking_uri(self.tracking, self.output_dir)
        tracked = {"tracking_uri": uri, "experiment": self.tracking.experiment, "run_id": tracker.run_id()}
        storage.write_bytes(url, json.dumps(tracked, indent=2).encode())
        return tracker, tracked

    def _trainer(self, job: Job) -> TorchTrainer:
        train = self.train
        resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
        return TorchTrainer(
            train_worker,
            train_loop_config=job,
            torch_config=TorchConfig(backend="nccl" if train.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                num_workers=train.num_workers, use_gpu=bool(train.gpus_per_worker), resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                name=job.launch,
                storage_path=checkpoint.checkpoints_dir(self.output_dir),
                checkpoint_config=ray.train.CheckpointConfig(num_to_keep=train.keep_checkpoints),
                failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
            ),
        )


@contextmanager
def _progress(tracker: TrackerHandle, num_steps: int):
    """Print a line whenever new metrics have come in."""
    done, shown = threading.Event(), [-1]

    def show() -> None:
        step, metrics = tracker.latest()
        if step > shown[0]:
            shown[0] = step
            print(progress_line(step, num_steps, metrics), flush=True)

    def watch() -> None:
        while not done.wait(1.0):
            show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show()


def progress_line(step: int, num_steps: int, metrics: dict[str, float]) -> str:
    """`step 120/780  loss_generation 0.412  loss_alignment 3.101  113 samples/s  waiting for data 2 %  left 5:32`"""
    losses = "  ".join(f"{n} {v:.3f}" for n, v in sorted(metrics.items(), reverse=True) if n.startswith("loss_"))
    minutes, seconds = divmod(int(metrics.get("train/seconds_left", 0)), 60)
    return (
        f"step {step}/{num_steps}  {losses}  {metrics.get('train/samples_per_second', 0):.0f} samples/s  "
        f"waiting for data {metrics.get('data/share_waiting', 0):.0%}  left {minutes}:{seconds:02d}"
    )


def _cause(error: TrainingFailedError) -> str:
    """The first rank's failure; an error of ours speaks for itself, another one is named by its type."""
    rank, failure = min(getattr(error, "worker_failures", {}).items(), default=(-1, error))
    while getattr(failure, "cause", None) is not None:  # Ray wraps what a task or an actor raised
        failure = failure.cause
    if isinstance(failure, ConfigError | DataError):
        return _first_line(failure)
    return f"worker {rank}: {type(failure).__name__}: {_first_line(failure)}"


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
