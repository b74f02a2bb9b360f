"""The driver's side of a training run: check what can be checked, start the workers, and again if lost, say what failed."""

import contextlib
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.train
from ray import cloudpickle
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError, Task
from ray_platform.data import precomputed
from ray_platform.data.catalog import Catalog, build_catalog, difference, to_json
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import inspect_first_samples
from ray_platform.data.plan import check_world_size
from ray_platform.placement import label_selector
from ray_platform.tracking import (
    ModelPackage,
    RunRecord,
    Tracker,
    TrackingConfig,
    read_run_record,
    run_record,
    start_run,
    tracking_uri,
)
from ray_platform.tracking.node_metrics import NodeMetrics
from ray_platform.tracking.run_metadata import code_version
from ray_platform.train import checkpointing
from ray_platform.train.config import TrainConfig
from ray_platform.train.elastic import SaveBeforeResize
from ray_platform.train.heldout import read_heldout
from ray_platform.train.job import Job
from ray_platform.train.network import ProcessGroup
from ray_platform.train.overseer import Overseer
from ray_platform.train.restarts import Restarts, Stopped
from ray_platform.train.run_description import pretraining_metadata
from ray_platform.train.watch import start_watch

__all__ = ["Run", "Stopped"]

logger = logging.getLogger(__name__)

INSPECTED_SAMPLES = 64
RESIZE_SECONDS = 60.0  # between looks whether an elastic run can have more workers: each change costs a restart
CATALOG = "catalog.json"  # in output_dir: the shards that the run was begun with
SUMMARY = "train_summary.json"  # in output_dir: the result of a finished run


def run_worker(job: Job) -> None:
    """Training function that Ray Train runs on every worker.

    Ray Train's controller unpickles it, too, so the engine, whose imports take seconds, is imported by the workers only.
    """
    from ray_platform.train.worker import train_worker

    train_worker(job)


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
    package: ModelPackage | None = None  # how the exported model becomes one of MLflow's; None: it is stored as plain files
    command: str = ""  # that started it

    def check(self) -> Catalog:
        """The data's catalog, after every check that needs no cluster. Raises ConfigError or DataError."""
        if not self.output_dir:
            raise ConfigError("output_dir: give the folder (absolute) or s3:// URL that the run's results go to")
        if "://" not in self.output_dir and not os.path.isabs(self.output_dir):
            raise ConfigError(
                f"output_dir: {self.output_dir} is relative, and a submitted job's folder is a copy that is thrown away; "
                "give an absolute path or an s3:// URL"
            )
        tracking_uri(self.tracking, self.output_dir)
        if self.train.elastic and self.data.placement and not self.train.placement:
            raise ConfigError(
                "train.placement: the workers of an elastic run would take the CPUs of data.placement, where their reads are to "
                "be; give them nodes of their own, as {pool: gpu}"
            )
        catalog = self._catalog()
        check_world_size(catalog, self.train.max_workers)
        if self.train.resume == "none" and (found := checkpointing.list_checkpoints(self.output_dir)):
            raise ConfigError(
                f"output_dir: {self.output_dir} already holds a run (up to {found[0].rsplit('/', 1)[1]}); "
                "go on with it by --resume auto, or give another output_dir"
            )
        return catalog

    def _catalog(self) -> Catalog:
        """The source's, compared with the one that a resumed run was begun with, and with the model's encoders."""
        url = storage.join(self.output_dir, CATALOG)
        saved = storage.read_small(url, storage.LISTING_BYTES) if storage.exists(url) else None
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
        starts = checkpointing.candidates(train.resume, self.output_dir, "none yet")
        saved = checkpointing.read_manifest(starts[0]) if starts else None
        global_batch = train.global_batch_size or (
            saved.global_batch_size if saved else train.max_workers * train.micro_batch_size
        )
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
            "steps": train.last_step,
            "global_batch_size": global_batch,
            "samples_to_train_on": max(0, train.last_step - (saved.step if saved else 0)) * global_batch,
            "starts_from": starts[0] if starts else "the beginning",
            "output_dir": self.output_dir,
        }

    def fit(self) -> RunRecord:
        """Train to the launch's last step, and return the record of the tracked run.

        Raises ConfigError and DataError before anything starts, and TrainingError, in one line, when the run fails or is
        stopped by SIGTERM (which it answers with a checkpoint).
        """
        catalog = self.check()
        heldout = None
        if self.train.heldout_sources:
            heldout = read_heldout(self.data, self.train.heldout_sources, self.train.heldout_samples)
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor a run, for what the Overseer does
        connect()
        storage.write_bytes(storage.join(self.output_dir, CATALOG), to_json(catalog))
        version = code_version()
        known = read_run_record(self.output_dir) if self.train.resume != "none" else None
        metadata = pretraining_metadata(
            self.params, catalog, self.data, self.train, self.output_dir, command=self.command, code_version=version
        )
        with start_run(
            self.tracking, self.output_dir, metadata, run_id=known["run_id"] if known else "", record=True, in_actor=True
        ) as tracker:
            try:
                self._train(catalog, heldout, tracker, version)
            finally:
                with contextlib.suppress(storage.StorageError):
                    storage.delete(self._ray_dir)
            return run_record(self.tracking, self.output_dir, tracker)

    def _train(self, catalog: Catalog, heldout: Any, tracker: Tracker, version: str) -> None:
        """Run the workers to the last step, and store the exported model in the tracker."""
        job = Job(
            cloudpickle.dumps(self.build_task),
            self._data(),
            self.train,
            catalog,
            self.output_dir,
            # Named by time, which no clock change sets back: a later launch's name sorts after an earlier one's.
            time.strftime("%Y%m%d-%H%M%S", time.gmtime()) + f"-{os.getpid()}",
            tracker,
            start_watch(),
            ray.put(heldout) if heldout is not None else None,
            self.params,
            version,
        )
        machines = NodeMetrics(tracker, self.tracking.system_metrics_seconds)
        with Overseer(job.watch, tracker, machines, self.train) as overseer:
            self._train_to_the_end(job, overseer)
        if self.train.last_step == self.train.num_steps and self.tracking.log_model:
            if self.package:
                tracker.log_model(job.export_dir, self.package)
            else:
                tracker.log_folder(job.export_dir, "model")

    @property
    def _ray_dir(self) -> str:
        """Ray Train wants a place for checkpoints of its own, which it is never given."""
        return storage.join(self.output_dir, "ray_train")

    def _data(self) -> DataConfig:
        """An elastic run's workers hold the CPUs of their reads themselves: Ray counts how many workers there is room for.
        Reads on nodes of their own ask for theirs there."""
        if not self.train.elastic or self.data.placement:
            return self.data
        return replace(self.data, cpus_per_read=0.0)

    def _train_to_the_end(self, job: Job, overseer: Overseer) -> None:
        """Start the workers, and again, from the newest checkpoint, as long as that can help."""
        restarts = Restarts(
            self.train.max_failures, lambda: next(iter(checkpointing.list_checkpoints(self.output_dir, job.launch)), "")
        )
        while True:
            try:
                self._trainer(job).fit()
                return
            except (TrainingFailedError, ray.exceptions.RayActorError) as error:
                logger.warning("%s", restarts.judge(error, overseer.last_hang, overseer.stopping))
                overseer.workers_are_gone()

    def _trainer(self, job: Job) -> TorchTrainer:
        train = self.train
        resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
        workers: dict[str, Any] = {"num_workers": train.max_workers}
        if train.elastic:
            if not self.data.placement:
                resources["CPU"] += self.data.reads_per_rank * self.data.cpus_per_read
            workers = {"num_workers": train.num_workers, "elastic_resize_monitor_interval_s": RESIZE_SECONDS}
        return TorchTrainer(
            run_worker,
            train_loop_config=job,
            torch_config=ProcessGroup(backend="nccl" if train.gpus_per_worker else "gloo"),
            scaling_config=ray.train.ScalingConfig(
                use_gpu=bool(train.gpus_per_worker),
                resources_per_worker=resources,
                label_selector=label_selector(train.placement),
                **workers,
            ),
            run_config=ray.train.RunConfig(
                name=f"{job.launch}-{time.monotonic_ns()}",  # a name that Ray knows would resume
                storage_path=self._ray_dir,
                # Every failure comes back here, where a new checkpoint counts for more than a count of failures.
                failure_config=ray.train.FailureConfig(max_failures=0),
                callbacks=[SaveBeforeResize(job.watch)] if train.elastic else [],
            ),
        )
