"""What every Ray Train worker runs: restore, then batch -> step -> metrics, with checkpoints, previews and an export."""

import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import Batch, Mark, Task
from ray_platform.data.catalog import Catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.execution import spilled_bytes
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader
from ray_platform.data.stream import join, stream
from ray_platform.tracking import TrackerHandle
from ray_platform.train import checkpoint
from ray_platform.train.config import TrainConfig
from ray_platform.train.engine import Engine

logger = logging.getLogger(__name__)

SUMMARY = "train_summary.json"


@dataclass(frozen=True)
class Job:
    """All that a worker is told. It travels to the workers, so it holds plain data and importable functions."""

    build_task: Callable[[], Task]
    data: DataConfig
    train: TrainConfig
    catalog: Catalog
    output_dir: str
    launch: str  # names this launch's checkpoints
    tracker: TrackerHandle

    @property
    def export_dir(self) -> str:
        return storage.join(self.output_dir, "export")


def train_worker(job: Job) -> None:
    """The training function of one rank."""
    if not job.train.gpus_per_worker:
        # Ray leaves torch with one thread a core in every worker, whatever share of the cores a worker has.
        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
    torch.manual_seed(job.train.seed)  # equal initial weights on every rank
    task = job.build_task()
    Trainer(job, task, Engine(task, job.train)).run()


class Trainer:
    """One rank's run: its engine, its stream and its meters."""

    def __init__(self, job: Job, task: Task, engine: Engine):
        self.job, self.config, self.task, self.engine = job, job.train, task, engine
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.step = 0
        self.base = Ledger(job.catalog.num_units)  # the plan of this and all ranks begins with what it leaves
        self.consumed = self.base.copy()  # by all ranks, as of the last checkpoint
        self.marks: list[Mark] = []  # consumed by this rank since then
        self.skipped_before: dict[str, int] = {}  # by runs that this one goes on from
        self.skipped: dict[str, int] = {}
        self.meter = Meter()
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.seconds = 0.0

    def run(self) -> None:
        self._restore()
        reader = Reader(self.config.seed, self.rank, self.world_size, self.base, self.consumed.copy())
        size, left = self.config.micro_batch_size, self.config.num_steps - self.step
        batches = stream(self.job.catalog, self.job.data, reader, batch_size=size, num_batches=left)
        started = asked = time.perf_counter()
        for batch in batches:
            self._train_on(batch, waited=time.perf_counter() - asked)
            if self._due(self.config.log_every):
                self._log()
            if self._due(self.config.checkpoint_every):
                self._save_checkpoint()
            if self.config.preview_every and self._due(self.config.preview_every):
                self._preview()
            asked = time.perf_counter()
        self.seconds = time.perf_counter() - started
        self._finish()

    def _due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.num_steps

    def _train_on(self, batch: Batch, waited: float) -> None:
        begun = time.perf_counter()
        # Noise depends on (seed, step, rank) alone, so a resumed run draws what an uninterrupted one would have drawn.
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) * 65_537 + self.rank)
        metrics = self.engine.step(self.task.inputs(batch, self.engine.device), generator)
        self.step += 1
        self.marks.extend(batch.consumed)
        words = torch.tensor([float(sum(len(caption.split()) for caption in batch.captions)), float(len(batch.captions))])
        metrics["data/caption_words"] = words.to(self.engine.device)
        self.skipped = _add(self.skipped_before, batch.skipped)
        self.meter.add(metrics, samples=len(batch.captions), waited=waited, worked=time.perf_counter() - begun)

    def _log(self) -> None:
        metrics = self.meter.reduce(self.world_size)
        metrics["train/grad_norm"] = self.engine.grad_norm
        metrics |= {f"train/lr_{name}": rate for name, rate in self.engine.learning_rates().items()}
        metrics |= {f"data/skipped_{cause}": float(n) for cause, n in self._all_skipped().items()}
        if self.rank == 0:
            metrics["data/spilled_bytes"] = spilled_bytes()
            metrics["data/epochs_complete"] = float(min(self.consumed.first_epoch))
        metrics["train/samples_seen"] = float(self._samples_seen())
        metrics["train/seconds_left"] = metrics["train/seconds_a_step"] * (self.config.num_steps - self.step)
        self.first, self.last = self.first or metrics, metrics
        if self.rank == 0:
            self.job.tracker.log_metrics(metrics, self.step)

    def _samples_seen(self) -> int:
        return self.step * self.config.micro_batch_size * self.world_size

    def _all_skipped(self) -> dict[str, int]:
        """Over all ranks. Every rank must call it."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, self.skipped)
        return _add(*parts)

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def _manifest(self) -> checkpoint.Manifest:
        config = self.config
        return checkpoint.Manifest(
            step=self.step,
            world_size=self.world_size,
            zero_stage=config.zero_stage,
            micro_batch_size=config.micro_batch_size,
            seed=config.seed,
            source_digest=self.job.catalog.digest,
        )

    def _save_checkpoint(self) -> None:
        """Every rank's part through Ray Train; complete once all of them are uploaded."""
        name = checkpoint.checkpoint_name(self.step)
        self._gather_consumed()
        with tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
            self.engine.save(Path(folder))
            checkpoint.RankState(self.skipped).save(Path(folder), self.rank)
            if self.rank == 0:
                checkpoint.save_ledgers(Path(folder), self.base, self.consumed)
            ray.train.report(
                {"step": self.step},
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
            )
        dist.barrier()
        if self.rank == 0:
            url = storage.join(checkpoint.checkpoints_dir(self.job.output_dir), self.job.launch, name)
            checkpoint.write_manifest(url, self._manifest())
        dist.barrier()

    def _gather_consumed(self) -> None:
        """Bring every rank's ledger up to date with what all ranks consumed. Every rank must call it."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, join(self.marks))
        for part in parts:
            self.consumed.add(part)
        self.marks = []

    def _restore(self) -> None:
        """Every rank starts from the checkpoint that rank 0 chose."""
        chosen: list[Any] = [None]
        if self.rank == 0:
            chosen = [checkpoint.choose(self.config.resume, self.job.output_dir, self.job.launch)]
        dist.broadcast_object_list(chosen)
        url = chosen[0]
        if url is None:
            return
        saved = checkpoint.read_manifest(url)
        checkpoint.check_fits(url, saved, self._manifest())
        with checkpoint.local_copy(url) as folder:
            self.engine.load(folder)
            self.step, self.skipped_before = saved.step, checkpoint.RankState.load(folder, self.rank).skipped
            self.base, self.consumed = checkpoint.load_ledgers(folder)
        if self.rank == 0:
            logger.warning("resumed from %s at step %d", url, self.step)

    # --- what comes out --------------------------------------------------------------------------------------------------

    def _preview(self) -> None:
        """A preview that fails costs a warning, never the run."""
        weights = self.engine.state_dict()
        if weights is not None:
            try:
                self.job.tracker.log_bytes(self.task.preview(weights), f"previews/step_{self.step:08d}.png")
            except Exception:
                logger.warning("the preview at step %d failed; training goes on", self.step, exc_info=True)
        dist.barrier()

    def _finish(self) -> None:
        weights = self.engine.state_dict()
        skipped = self._all_skipped()
        if weights is not None:
            with tempfile.TemporaryDirectory(prefix="export_") as folder:
                self.task.save_pretrained(weights, Path(folder))
                storage.put_folder(Path(folder), self.job.export_dir)
            samples = self._samples_seen()
            summary = {
                "num_workers": self.world_size,
                "zero_stage": self.config.zero_stage,
                "num_steps": self.step,
                "num_samples_seen": samples,
                "samples_per_second": self.last.get("train/samples_per_second_mean"),
                "seconds": round(self.seconds, 1),
                "first": self.first,
                "last": self.last,
                "skipped": skipped,
                "export_dir": self.job.export_dir,
            }
            storage.write_bytes(storage.join(self.job.output_dir, SUMMARY), json.dumps(summary, indent=2).encode())
        dist.barrier()


class Meter:
    """Sums of weighted metrics and of time between two log lines."""

    def __init__(self) -> None:
        self.all_samples, self.all_seconds = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps, self.samples, self.waited, self.worked = 0, 0, 0.0, 0.0

    def add(self, metrics: dict[str, torch.Tensor], *, samples: int, waited: float, worked: float) -> None:
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps, self.samples = self.steps + 1, self.samples + samples
        self.waited, self.worked = self.waited + waited, self.worked + worked

    def reduce(self, world_size: int) -> dict[str, float]:
        """Means over all ranks and the steps since the last call, which end here. Every rank must call it."""
        names = sorted(self.sums)
        device = self.sums[names[0]].device
        totals = torch.stack([self.sums[name] for name in names])  # [M, 2]
        dist.all_reduce(totals)
        weighted, weights = totals.cpu().unbind(dim=1)
        times = torch.tensor([self.waited, self.worked], dtype=torch.float64, device=device)
        dist.all_reduce(times)
        waited, worked = (times / world_size).tolist()
        metrics = {n: float(s / w) for n, s, w in zip(names, weighted, weights, strict=True) if w > 0}
        samples, seconds = self.samples * world_size, waited + worked
        self.all_samples, self.all_seconds = self.all_samples + samples, self.all_seconds + seconds
        metrics["train/samples_per_second"] = samples / seconds
        metrics["train/samples_per_second_mean"] = self.all_samples / self.all_seconds
        metrics["train/seconds_a_step"] = seconds / self.steps
        metrics["data/share_waiting"] = waited / seconds
        self._reset()
        return metrics


def _add(*counts: Any) -> dict[str, int]:
    """The sum of several counts by cause."""
    return {cause: sum(c.get(cause, 0) for c in counts) for cause in sorted({cause for c in counts for cause in c})}
