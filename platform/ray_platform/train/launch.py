"""Launch of a training run by its driver: check the configuration, start the workers, restart them when they fail."""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import ray
import ray.train
from ray import cloudpickle
from ray.train.torch import TorchConfig, TorchTrainer

from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import Batch, TrainingError
from ray_platform.data.catalog import Catalog, to_json
from ray_platform.lease import Lease
from ray_platform.names import is_pattern
from ray_platform.placement import label_selector, start_on_this_node
from ray_platform.tracking import (
    RunMetadata,
    RunRecord,
    TrackedData,
    TrackedRun,
    read_run_record,
    tracking_uri,
)
from ray_platform.tracking.node_metrics import NodeMetrics
from ray_platform.tracking.run_metadata import append_command, code_version, dated_name, run_tags
from ray_platform.tracking.runs import run_record, start_run
from ray_platform.train.checkpoint_format import list_checkpoints
from ray_platform.train.config import TrainConfig
from ray_platform.train.fault_tolerance import DriverMonitor, RestartPolicy, SaveBeforeResize
from ray_platform.train.hang_detector import HangDetector
from ray_platform.train.heldout import read_heldout
from ray_platform.train.preflight import CATALOG, RunPlan
from ray_platform.train.resuming import Resumption
from ray_platform.train.worker_spec import WorkerSpec
from ray_platform.units import plural

logger = logging.getLogger(__name__)

RESIZE_SECONDS = 60.0  # between checks whether an elastic run can have more workers: each change costs a restart


def run_worker(spec: WorkerSpec) -> None:
    """Training function that Ray Train runs on every worker.

    Ray Train's controller unpickles it, too, so the training loop and what it needs are imported by the workers only.
    """
    from ray_platform.train.worker import train_worker

    train_worker(spec)


# --- process group -------------------------------------------------------------------------------------------------------

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"
_TorchBackend: Any = TorchConfig().backend_cls


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(choose_gloo_interface)
        if backend_config.backend == "gloo":
            worker_group.execute(hide_gpus)
        super().on_start(worker_group, backend_config)


class ProcessGroupConfig(TorchConfig):
    """Ray Train's configuration of the process group, which prepares the workers' environment first."""

    @property
    def backend_cls(self) -> type:
        return _Backend


def choose_gloo_interface() -> None:
    """Unless the user has set it, select the interface with this node's address in the Ray cluster.

    By default gloo uses the address of the host's name: 127.0.1.1 with Debian's installer, which other hosts cannot reach.
    """
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(known.address == address for known in addresses):
            os.environ.setdefault(GLOO_INTERFACE, name)


def hide_gpus() -> None:
    """Hide the node's GPUs from a worker that trains on CPUs: Ray leaves them visible to workers that request none.

    The engine and DeepSpeed would use them, while the Task's inputs are on the CPU.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


# --- run -----------------------------------------------------------------------------------------------------------------


class Run(RunPlan):
    """A training run, which the driver checks and launches."""

    def fit(self, config_yaml: str = "") -> RunRecord:
        """Train to the launch's last step, and return the record of the tracked run.

        `config_yaml` is saved as config.yaml. Raises ConfigError or DataError before anything starts, also if another launch uses
        the output folder, and TrainingError for a run that failed or was stopped.
        """
        catalog, resumed = self.check(), Resumption.find(self.train, self.output_dir)
        if resumed and (line := resumed.completed(self.train, self.output_dir)):
            print(line, flush=True)
            record = RunRecord(tracking_uri=tracking_uri(self.tracking, self.output_dir), experiment="", run_id="")
            return read_run_record(self.output_dir) or record
        # Unique; people read the time, and nothing depends on it.
        launch = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        with Lease(self.output_dir, launch) as lease:
            if config_yaml:
                storage.write_bytes(storage.join(self.output_dir, "config.yaml"), config_yaml.encode())
            tags = resumed.report(self.params, self.train) if resumed else {}
            return self._fit(catalog, launch, lease, tags)

    def _fit(self, catalog: Catalog, launch: str, lease: Lease, tags: dict[str, str]) -> RunRecord:
        heldout_catalog = self._heldout_catalog()
        heldout = read_heldout(heldout_catalog, self.data, self.train.heldout_samples) if heldout_catalog else None
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor per run for what DriverMonitor does
        connect()
        self.check_capacity()
        storage.write_bytes(storage.join(self.output_dir, CATALOG), to_json(catalog))
        version = code_version()
        metadata, resume = self._metadata(catalog, heldout_catalog, version, tags), self.train.resume != "none"
        with start_run(self.tracking, self.output_dir, metadata, resume=resume, record=True, in_actor=True) as tracker:
            try:
                self._train(catalog, heldout, tracker, version, launch, lease)
            finally:
                if not lease.lost:
                    with contextlib.suppress(storage.StorageError):
                        storage.delete(self._ray_dir)
            return run_record(self.tracking, self.output_dir, tracker)

    def _metadata(self, catalog: Catalog, heldout: Catalog | None, version: str, tags: dict[str, str]) -> RunMetadata:
        """Describe the run in the tracker."""
        recipe, sources = str(self.params.get("recipe", "run")), ", ".join(self.data.sources)
        datasets = tracked_data(catalog, self.data.sources, "training")
        if heldout:
            datasets += tracked_data(heldout, self.train.heldout_sources, "heldout")
        return RunMetadata(
            f"{dated_name(recipe)}-seed{self.train.seed}",
            describe_run(recipe, self.command, self.train, datasets, self.output_dir),
            run_tags(recipe, self.output_dir, version) | {"data.sources": sources} | tags,
            self.params,
            datasets,
        )

    def _train(
        self, catalog: Catalog, heldout: Batch | None, tracker: TrackedRun, version: str, launch: str, lease: Lease
    ) -> None:
        """Run the workers to the last step, and store the exported model in the tracker."""
        data = self.data
        if self.train.elastic and not data.placement:
            # The workers reserve the CPUs of their reads themselves, so that Ray counts how many workers fit.
            data = replace(data, cpus_per_read=0.0)
        spec = WorkerSpec(
            build_task=cloudpickle.dumps(self.build_task),
            data=data,
            train=self.train,
            catalog=catalog,
            output_dir=self.output_dir,
            launch=launch,
            tracker=tracker,
            hang_detector=start_on_this_node(HangDetector),
            heldout=ray.put(heldout) if heldout is not None else None,
            params=self.params,
            code_version=version,
        )
        node_metrics = NodeMetrics(tracker, self.tracking.system_metrics_seconds)
        with DriverMonitor(spec.hang_detector, node_metrics, self.train, lease) as monitor:
            self._run_workers(spec, monitor, lease)
        if self.train.last_step == self.train.num_steps and self.tracking.log_model:
            if self.package:
                tracker.log_model(spec.export_dir, self.package)
            else:
                tracker.log_folder(spec.export_dir, "model")

    @property
    def _ray_dir(self) -> str:
        """Folder that Ray Train requires for its own checkpoints, of which there are none."""
        return storage.join(self.output_dir, "ray_train")

    def _run_workers(self, spec: WorkerSpec, monitor: DriverMonitor, lease: Lease) -> None:
        """Start the workers, and restart them from the newest checkpoint as long as `RestartPolicy` allows."""
        restarts = RestartPolicy(
            self.train.max_failures, lambda: next(iter(list_checkpoints(self.output_dir, spec.launch)), ""), self.output_dir
        )
        while True:
            try:
                self._trainer(spec).fit()
                return
            except (ray.train.TrainingFailedError, ray.exceptions.RayActorError) as error:
                if lease.lost:
                    raise TrainingError(lease.lost) from None
                logger.warning("%s", restarts.record_failure(error, monitor.last_hang, monitor.stop_reason))
                monitor.reset_workers()
                restarts.pause(monitor, lease)

    def _trainer(self, spec: WorkerSpec) -> TorchTrainer:
        train = self.train
        resources = {"CPU": train.cpus_per_worker} | ({"GPU": train.gpus_per_worker} if train.gpus_per_worker else {})
        if train.elastic and not self.data.placement:
            resources["CPU"] += sum(self.data.reads_per_pool) * self.data.cpus_per_read
        filesystem, folder = storage.literal_filesystem(self._ray_dir)
        return TorchTrainer(
            run_worker,
            train_loop_config=spec,
            torch_config=ProcessGroupConfig("nccl" if train.gpus_per_worker else "gloo", timeout_s=train.collective_timeout_s),
            scaling_config=ray.train.ScalingConfig(
                num_workers=train.num_workers,
                elastic_resize_monitor_interval_s=RESIZE_SECONDS,
                use_gpu=bool(train.gpus_per_worker),
                resources_per_worker=resources,
                label_selector=label_selector(train.placement),
            ),
            run_config=ray.train.RunConfig(
                name=f"{spec.launch}-{time.monotonic_ns()}",  # unique: Ray would resume a known name
                storage_path=folder,
                storage_filesystem=filesystem,
                # Failures are handled by RestartPolicy, which counts those without a new checkpoint. Ray's default is to restart
                # workers on preempted nodes without a limit.
                failure_config=ray.train.FailureConfig(max_failures=0, max_preemption_failures=0),
                callbacks=[SaveBeforeResize(spec.hang_detector)] if train.elastic else [],
                # Not its requests for resources at every start, nor 100 lines per failure, which the driver reports in one line.
                logging_config=ray.train.LoggingConfig(log_level="CRITICAL"),
            ),
        )


# --- description in the tracker ------------------------------------------------------------------------------------------


def describe_run(recipe: str, command: str, train: TrainConfig, datasets: Iterable[TrackedData], output_dir: str) -> str:
    """Describe a pretraining in Markdown."""
    workers = f"{train.min_workers} to {train.max_workers} workers" if train.elastic else plural(train.max_workers, "worker")
    lines = [
        f"Pretraining by the recipe `{recipe}`, seed {train.seed}: {train.num_steps:,} steps on {workers}, "
        f"ZeRO {train.zero_stage}.",
        "",
        *(f"- {part.context} data: {_format_counts(part.counts)} in `{part.url}` (digest `{part.digest}`)" for part in datasets),
        f"- output: `{output_dir}` (checkpoints, `export/`, `config.yaml`)",
    ]
    return append_command("\n".join(lines), command)


def _format_counts(counts: Mapping[str, int]) -> str:
    samples = f"{counts['num_samples']:,} samples, " if "num_samples" in counts else ""
    return f"{samples}{plural(counts['num_shards'], 'shard')}, {counts['num_bytes'] / 1e6:,.1f} MB"


def tracked_data(catalog: Catalog, sources: Sequence[str], context: str) -> list[TrackedData]:
    """Describe the sources of a catalog, one by one."""
    datasets = []
    for number, source in enumerate(sources):
        if shards := catalog.of_source(number):  # empty if earlier sources already contain all of its shards
            # Unlike the catalog's digest, the same in every mixture and however the shards are read.
            digest = hashlib.sha256(json.dumps([(shard.name, shard.size) for shard in shards]).encode()).hexdigest()[:16]
            counts = {"num_shards": len(shards), "num_bytes": sum(shard.size for shard in shards)}
            if min(shard.num_samples for shard in shards) >= 0:
                counts["num_samples"] = sum(shard.num_samples for shard in shards)
            # The last part of the path that is not a pattern: `train` for s3://bucket/train/part-*.tar.
            parts = source.rpartition("://")[2].strip("/").split("/")
            name = next((part for part in reversed(parts) if not is_pattern(part)), source)
            datasets.append(TrackedData(name, digest, source, context, counts))
    return datasets
