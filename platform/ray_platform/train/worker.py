"""Training loop of a Ray Train worker: restore, then batch -> step -> metrics, with checkpoints, scores and previews."""

import contextlib
import gc
import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from ray import cloudpickle

from ray_platform import storage
from ray_platform.contracts import Batch, ConfigError, ConsumedRange, DataError, Task, one_line
from ray_platform.data.causes import check_skipped, is_too_bad, num_bad
from ray_platform.data.plan import Reader
from ray_platform.data.stream import stream
from ray_platform.ray_internals import SpilledBytes
from ray_platform.retry import RETRY_SECONDS
from ray_platform.train.checkpoint_format import Lineage, LossHistory, Manifest, RankState, read_weights
from ray_platform.train.checkpointing import CheckpointManager, TrainState, add_counts, find_checkpoint, restore
from ray_platform.train.collective import collective, gather_objects
from ray_platform.train.config import BatchPlan
from ray_platform.train.engine import Engine
from ray_platform.train.failures import AcceleratorFull, Interrupted
from ray_platform.train.fault_tolerance import LossMonitor, StepStatus
from ray_platform.train.hang_detector import HeartbeatThread
from ray_platform.train.heldout import generate_previews, score, select_samples
from ray_platform.train.profiling import StepProfiler, count_flops
from ray_platform.train.resuming import resumed_rewarm, takes_weights_only
from ray_platform.train.retention import RetentionPolicy
from ray_platform.train.statistics import GradientMonitor, ThroughputMeter, memory_metrics
from ray_platform.train.worker_spec import SUMMARY, SUMMARY_FORMAT, WorkerSpec
from ray_platform.units import plural

logger = logging.getLogger(__name__)


def train_worker(spec: WorkerSpec) -> None:
    """Train one rank to the launch's last step."""
    # In every worker, Ray leaves torch with as many threads as the node has cores. An offloaded optimizer uses them, too.
    torch.set_num_threads(max(1, int(spec.train.cpus_per_worker)))
    # DeepSpeed calls deprecated functions of torch: hundreds of lines that no user can do anything about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    heartbeat = HeartbeatThread(spec.hang_detector, dist.get_rank())
    heartbeat.start()
    try:
        trainer = Trainer(spec, build_task(spec), heartbeat)
        # Never collect modules and the model again: that would pause one rank for a second while the others wait for it.
        gc.collect()
        gc.freeze()
        trainer.run()
    except torch.OutOfMemoryError as error:
        message = oom_message(error, heartbeat.rank)
        # A restart would fail in the same way at the run's first step.
        raise (AcceleratorFull(message) if heartbeat.step else ConfigError(message)) from error
    finally:
        heartbeat.stop()
        spec.tracker.flush()


def oom_message(error: torch.OutOfMemoryError, rank: int) -> str:
    """Return one line with what torch tried to allocate and what to change; torch's message has several paragraphs."""
    tried = str(error).partition(" GPU ")[0].rstrip(".")
    return (
        f"train.micro_batch_size: the memory of rank {rank}'s accelerator is full ({tried}); use fewer samples with the same "
        "train.global_batch_size, or set train.activation_checkpointing; python jobs/sizing.py predicts what fits"
    )


def build_task(spec: WorkerSpec) -> Task:
    """Build the Task with the same initial weights on every rank. Raises ConfigError for errors that a retry would repeat."""
    torch.manual_seed(spec.train.seed)
    try:
        return cloudpickle.loads(spec.build_task)()
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(one_line(error)) from error


class Trainer:
    """Training of one rank: its engine, data stream, metrics and checkpoints."""

    def __init__(self, spec: WorkerSpec, task: Task, heartbeat: HeartbeatThread):
        config = spec.train
        self.spec, self.config, self.task, self.heartbeat = spec, config, task, heartbeat
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        loaded = find_checkpoint(config.resume, spec.output_dir, spec.launch, spec.catalog.digest)
        weights_only = loaded is not None and takes_weights_only(loaded.url, config)
        self.peaks = {group["name"]: group["lr"] for group in task.parameter_groups()}
        if loaded is None or weights_only:
            self.start, history, rewarm = TrainState.initial(spec.catalog, config), LossHistory(), None
        else:
            self.start = TrainState.from_checkpoint(loaded, spec.catalog, config)
            history = loaded.loss_history(spec.output_dir, spec.params)
            rewarm = resumed_rewarm(loaded.manifest, config, self.peaks)
        heartbeat.step = self.start.step
        self.loaded_url = loaded.url if loaded else ""
        self.plan = BatchPlan.of(self.start.global_batch_size, self.world_size, config.micro_batch_size)
        reader = Reader(config.seed, self.rank, self.world_size, self.start.base, self.start.consumed.copy(), self.start.mixture)
        num_batches = max(0, config.last_step - self.start.step)
        self.first_captions: Sequence[str] = ()
        self.batches = stream(spec.catalog, spec.data, reader, batch_size=self.plan.samples, num_batches=num_batches)
        self.meter = ThroughputMeter(self._count_flops_per_step())
        self.engine = Engine(task, config, self.plan.micro_batch_size, self.plan.num_micro_batches, rewarm)
        if loaded is not None:
            restore(loaded, self.engine, weights_only)
        self.loss_monitor = LossMonitor(config, history, spec.output_dir)
        best = config.keep_best, config.keep_best_mode
        self.gradient_monitor = GradientMonitor()
        retention = RetentionPolicy(spec.output_dir, config.keep_checkpoints, *best, config.keep_every)
        lineage = Lineage(spec.launch)
        if self.rank == 0:
            with storage.retrying_for(RETRY_SECONDS):
                manifest = loaded.manifest if loaded else None
                lineage = Lineage.read(spec.output_dir, spec.launch, self.loaded_url, manifest, weights_only)
        self.checkpoints = CheckpointManager(lineage, self.engine, self.start, retention, heartbeat)
        self.spilled_bytes = SpilledBytes()
        self.profiler: StepProfiler | None = None
        if config.profile and self.rank in config.profile_ranks:
            self.profiler = StepProfiler(config, spec.output_dir, self.rank, self.start.step)
        self.step = self.start.step
        self.consumed: list[ConsumedRange] = []  # by this rank since the last checkpoint
        self.skipped = dict(self.start.skipped)  # samples skipped by this rank, by cause
        self.mixture = self.start.mixture
        self.first_metrics: dict[str, float] = {}  # of the first log line, for the summary
        self.last_metrics: dict[str, float] = {}  # newest value of every metric, for the summary
        self.step_metrics: dict[str, float] = {}  # logged at the current step, for the checkpoint's manifest
        self.saved_at = time.monotonic()

    def _count_flops_per_step(self) -> float:
        """Count this rank's FLOPs per step on two samples of its first batch, before the engine takes the module."""
        first = next(self.batches, None)
        if first is None:
            return 0.0
        self.batches, self.first_captions = chain([first], self.batches), first.captions
        device = ray.train.torch.get_device()
        self.task.module.to(device)
        few = select_samples(first, range(min(2, self.plan.samples)))
        return count_flops(self.task.module, self.task.inputs(few, device), seed=0) / len(few.captions) * self.plan.samples

    def run(self) -> None:
        if self.rank == 0:
            self._log_run_start()
        started = requested = time.perf_counter()
        self.heartbeat.set_phase("waiting for data")
        for batch in self.batches:
            self.heartbeat.set_phase("training")
            status = self.train_step(batch, seconds_waited=time.perf_counter() - requested)
            self._after_step(status)
            requested = time.perf_counter()
            self.heartbeat.step = self.step
            self.heartbeat.set_phase("waiting for data")
        self._finish(seconds=time.perf_counter() - started)

    @collective
    def train_step(self, batch: Batch, seconds_waited: float) -> StepStatus:
        """Train on this rank's batch: all its micro-batches, then one optimizer step that all ranks take or skip together."""
        started, num_micro, size = time.perf_counter(), self.plan.num_micro_batches, self.plan.micro_batch_size
        seeds = [step_seed(self.config.seed, self.step, self.rank, i) for i in range(num_micro)]
        parts = [select_samples(batch, range(i * size, (i + 1) * size)) for i in range(num_micro)]
        micro_batches = [self.task.inputs(part, self.engine.device) for part in parts]

        control, statistics = self.config.is_control_due(self.step + 1), self.config.are_statistics_due(self.step + 1)
        has_activations = statistics and not self.config.compile
        loss, metrics = self.engine.backward(micro_batches, seeds, control, has_activations, self.step)

        uploader = self.checkpoints.uploader
        self.skipped, self.skip_details = add_counts(self.start.skipped, batch.skipped), batch.skip_details
        with self.heartbeat.waiting_for_ranks():
            status = self.loss_monitor.sync_step_status(
                loss,
                stop=bool(self.heartbeat.stop_reason),
                checkpoint_due=self._is_checkpoint_due(),
                uploading=uploader.is_uploading,
                upload_failed=bool(uploader.failure),
                num_bad=num_bad(self.skipped),
                epoch_samples=batch.epoch_samples,
            )

        update = self.engine.update(self.step, skip=status.is_bad, statistics=statistics)

        self.step += 1
        self.step_metrics = {}
        self.grad_norm = update.grad_norm
        self.consumed.extend(batch.consumed)
        self.mixture = batch.mixture
        if update.updated:
            metrics |= {f"gradients/{name}": torch.stack([n, torch.ones_like(n)]) for name, n in update.block_norms.items()}
            if (line := self.gradient_monitor.add(update.grad_norm)) and self.rank == 0:
                logger.warning("step %d: %s", self.step, line)
            seconds = time.perf_counter() - started
            self.meter.add(metrics, captions=batch.captions, waited=seconds_waited, worked=seconds)
        self.loss_monitor.record(status, update, self.step, batch)
        self.checkpoints.finalize_checkpoint(status.any_uploading, status.any_upload_failed)
        self._check_skipped(status)
        if self.config.compile and self.step == self.start.step + 1:
            self.task.compile()
        if self.profiler:
            self.profiler.step()
        return status

    @collective
    def _check_skipped(self, status: StepStatus) -> None:
        """Raise DataError on every rank if too many samples are bad: of all ranks, since the run started."""
        expected, limit = status.epoch_samples, self.spec.data.max_skipped_fraction
        if is_too_bad(status.num_bad, self.samples_seen, expected, limit):
            details = dict(chain.from_iterable(details.items() for details in gather_objects(self.skip_details)))
            check_skipped("the run", self._gather_skipped(), self.samples_seen, expected, limit, details)

    def _is_checkpoint_due(self) -> bool:
        """Return whether `train.checkpoint_minutes` have passed on rank 0, whose clock decides for all ranks."""
        minutes = self.config.checkpoint_minutes
        return self.rank == 0 and minutes > 0 and time.monotonic() - self.saved_at >= 60 * minutes

    @collective
    def _after_step(self, status: StepStatus) -> None:
        """Log, score, save and generate previews when they are due; all of them at the last step."""
        config, is_last = self.config, self.step == self.config.last_step
        if self.step % config.log_every == 0 or is_last or status.stop:
            self._log()
        if status.stop and not is_last:
            self._save_and_interrupt()  # without scores and previews, as a stopped run may have little time
        if self.spec.heldout is not None and (self.step % config.heldout_every == 0 or is_last):
            with self._timed_pause("scoring validation samples"):
                heldout = ray.get(self.spec.heldout)
                self._log_metrics(score(self.engine, heldout, config.micro_batch_size, self.heartbeat.count_progress))
        if self.step % config.checkpoint_every == 0 or is_last or status.checkpoint_due:
            self._save_checkpoint()
        if config.preview_every and (self.step % config.preview_every == 0 or is_last):
            with self._timed_pause("generating previews"):
                page = generate_previews(self.engine, self.step)
            if page:
                self.spec.tracker.log_bytes(page, f"previews/step_{self.step:08d}.png")

    @contextlib.contextmanager
    def _timed_pause(self, phase: str) -> Iterator[None]:
        """Time a slow block that is not training."""
        with self.meter.stalled_time():
            self.heartbeat.set_phase(phase, is_slow=True)
            yield

    # --- metrics ---------------------------------------------------------------------------------------------------------

    def _log_run_start(self) -> None:
        plan, requested = self.plan, self.start.global_batch_size
        origin = f"from step {self.start.step} of {self.loaded_url}" if self.loaded_url else "from the beginning"
        if self.loaded_url and not self.start.url:
            origin = f"from the weights of {self.loaded_url}"
        self.spec.tracker.log_bytes(json.dumps(self.task.describe(self.first_captions), indent=2).encode(), "model.json")
        logger.info(
            f"training {origin}: {plural(plan.world_size, 'worker')}, ZeRO {self.config.zero_stage}, "
            f"{plan.global_batch_size} samples per step ({plan.num_micro_batches} x {plan.micro_batch_size} per worker)"
        )
        if plan.global_batch_size != requested:
            logger.warning(
                f"train.global_batch_size: {plan.global_batch_size} samples per step instead of {requested}, which "
                f"{plan.world_size} workers with micro-batches of at most {self.config.micro_batch_size} samples cannot divide "
                "evenly"
            )

    @collective
    def _log(self) -> None:
        """Log the means since the last log line, if any of the steps since then changed the weights."""
        metrics: dict[str, float] = {}
        if self.meter.sums:
            with self.heartbeat.waiting_for_ranks():
                metrics = self.meter.reduce(self.engine.device)
                metrics["train/grad_norm"] = self.grad_norm
                metrics |= {f"train/lr_{name}": rate for name, rate in self.engine.learning_rates().items()}
                metrics |= {f"data/skipped_{cause}": float(count) for cause, count in self._gather_skipped().items()}
                metrics |= memory_metrics(self.engine.device)
            if self.rank == 0:
                if (spilled_bytes := self.spilled_bytes.newest()) >= 0:
                    metrics["data/spilled_bytes"] = spilled_bytes
                metrics["data/epochs_complete"] = float(min(self.start.consumed.first_epoch))
            metrics["train/samples_seen"] = float(self.samples_seen)
            metrics["train/seconds_left"] = self.meter.seconds_left(self.config.last_step - self.step)
        self._log_metrics(metrics | {"train/bad_steps": float(self.loss_monitor.history.num_bad)})

    def _log_metrics(self, metrics: dict[str, float]) -> None:
        self.first_metrics = self.first_metrics or metrics
        self.last_metrics |= metrics
        grouped = {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}  # MLflow groups by /
        self.step_metrics |= grouped
        if self.rank == 0 and grouped:
            self.spec.tracker.log_metrics(grouped, self.step)
            self.heartbeat.report_metrics(self.step, self.step_metrics)

    @property
    def samples_seen(self) -> int:
        return self.start.samples_seen + (self.step - self.start.step) * self.plan.global_batch_size

    @collective
    def _gather_skipped(self) -> dict[str, int]:
        """Return the skipped samples of all ranks, by cause."""
        return add_counts(*gather_objects(self.skipped))

    # --- results ---------------------------------------------------------------------------------------------------------

    def _manifest(self) -> Manifest:
        return Manifest(
            token="",
            step=self.step,
            num_updates=self.engine.adam.num_updates,
            samples_seen=self.samples_seen,
            loss_scale=self.engine.loss_scale.state(),
            world_size=self.world_size,
            zero_stage=self.config.zero_stage,
            global_batch_size=self.start.global_batch_size,
            seed=self.config.seed,
            source_digest=self.spec.catalog.digest,
            metrics=dict(self.step_metrics),
            code_version=self.spec.code_version,
            config=self.spec.params,
            files={},
            rewarm=asdict(self.engine.rewarm) if self.engine.rewarm else {},
            peaks=self.peaks,
        )

    @collective
    def _save_checkpoint(self) -> None:
        with self.meter.stalled_time():
            rank_state = RankState.capture(self.skipped, self.loss_monitor.history, self.mixture)
            self.checkpoints.save(self._manifest(), self.consumed, rank_state)
        self.consumed, self.saved_at = [], time.monotonic()

    @collective
    def _save_and_interrupt(self) -> None:
        """Save a checkpoint, and raise Interrupted on every rank."""
        self._save_checkpoint()
        failure = self.checkpoints.wait()
        reason = next(filter(None, gather_objects(self.heartbeat.stop_reason)), "stop requested")
        if failure:
            raise Interrupted(f"{reason}; the checkpoint of step {self.step} could not be written ({failure})")
        raise Interrupted(f"{reason}; saved at step {self.step}")

    @collective
    def _finish(self, seconds: float) -> None:
        """Wait for the last checkpoint, then export the model and write the summary on rank 0."""
        if self.profiler:
            self.profiler.stop()
        if failure := self.checkpoints.wait():
            raise DataError(f"the last checkpoint could not be written: {failure}")
        self.heartbeat.set_phase("exporting the model", is_slow=True)
        skipped = self._gather_skipped()
        if self.rank == 0:
            # As the checkpoint has them: no rank has all of them in memory.
            url = self.checkpoints.uploader.url or self.start.url
            weights = dict(read_weights(url, self.config.eval_state))
            with tempfile.TemporaryDirectory(prefix="export_") as folder:
                try:
                    self.task.save_pretrained(weights, Path(folder), self._manifest().training_facts())
                except ValueError as error:  # of its check: the folder is complete, and a trained model is not discarded
                    logger.error("%s: %s", self.spec.export_dir, one_line(error))
                storage.put_folder(Path(folder), self.spec.export_dir)
            summary = {
                "num_workers": self.world_size,
                "zero_stage": self.config.zero_stage,
                "num_steps": self.step,
                "num_samples_seen": self.samples_seen,
                "samples_per_second": self.last_metrics.get("train/samples_per_second_mean"),
                "seconds": round(seconds, 1),
                "bad_steps": self.loss_monitor.history.num_bad,
                "first": self.first_metrics,
                "last": self.last_metrics,
                "skipped": skipped,
                "export_dir": self.spec.export_dir,
            }
            storage.write_bytes(
                storage.join(self.spec.output_dir, SUMMARY), json.dumps(SUMMARY_FORMAT.stamp(summary), indent=2).encode()
            )
        with self.heartbeat.waiting_for_ranks():
            dist.barrier()


def step_seed(seed: int, step: int, rank: int, micro_batch: int) -> int:
    """Return the seed of all randomness in one micro-batch, which is the same in a resumed run."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{micro_batch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
