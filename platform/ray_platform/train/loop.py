"""What every Ray Train worker runs: restore, then batch -> step -> metrics, with checkpoints, scores and previews."""

import hashlib
import json
import logging
import secrets
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import Batch, DataError, Mark, Task
from ray_platform.data.catalog import Catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.execution import spilled_bytes
from ray_platform.data.plan import Reader
from ray_platform.data.stream import join, stream
from ray_platform.tracking import TrackerHandle
from ray_platform.train import checkpoint, heldout
from ray_platform.train.checkpoint import RETRY_SECONDS, Keep, Manifest
from ray_platform.train.config import BatchPlan, TrainConfig
from ray_platform.train.engine import Engine
from ray_platform.train.guard import Guard
from ray_platform.train.meter import Meter, count_flops, memory
from ray_platform.train.profiler import Profiler
from ray_platform.train.restore import Position, find, rank_state
from ray_platform.train.saver import Saver, Shares
from ray_platform.train.watch import Heart

logger = logging.getLogger(__name__)

SUMMARY = "train_summary.json"


class Interrupted(Exception):
    """The run was told to stop: a checkpoint is there, and the message says which."""


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
    watch: Any  # the Watch's actor
    heldout: Any  # a reference to Heldout, or None
    params: dict[str, Any]
    code_version: str

    @property
    def export_dir(self) -> str:
        return storage.join(self.output_dir, "export")


def train_worker(job: Job) -> None:
    """The training function of one rank."""
    if not job.train.gpus_per_worker:
        # Ray leaves torch with one thread a core in every worker, whatever share of the cores a worker has.
        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
    # DeepSpeed calls what torch has renamed: hundreds of lines that no user can do anything about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    heart = Heart(job.watch, dist.get_rank())
    try:
        torch.manual_seed(job.train.seed)  # equal initial weights on every rank
        Trainer(job, job.build_task(), heart).run()
    finally:
        heart.stop()


class Trainer:
    """One rank's run: its engine, its stream, its meter and its checkpoints."""

    def __init__(self, job: Job, task: Task, heart: Heart):
        self.job, self.config, self.task, self.heart = job, job.train, task, heart
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        position = Position.start(job.catalog, job.train)
        found = find(job.train.resume, job.output_dir, job.launch)
        if found is not None:
            position = position.of(found, job.catalog, job.train)
        self.at = position
        self.plan = BatchPlan.of(position.global_batch_size, self.world_size, self.config.micro_batch_size)
        self.batches = self._stream()
        self.meter = Meter(self._flops_a_step())
        self.engine = Engine(task, job.train, self.plan.micro_batch_size, self.plan.num_micro_batches)
        if found is not None:
            found.into(self.engine)
        self.marks: list[Mark] = []  # consumed by this rank since the last checkpoint
        self.skipped: dict[str, int] = dict(position.skipped)
        self.guard = Guard(job.train, position.usual_loss, position.num_good, job.output_dir)
        self.saver = self._saver()
        self.profiler = Profiler(job.output_dir) if job.train.profile and self.rank == 0 else None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.seconds = 0.0
        self.step = position.step
        self.stop_agreed = False

    def _saver(self) -> Saver:
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        folder = storage.join(checkpoint.checkpoints_dir(self.job.output_dir), self.job.launch)
        return Saver(folder, self.rank, token[0])

    def _stream(self) -> Iterator[Batch]:
        """The batches of the steps that are left. Reading starts with the first one that is asked for."""
        reader = Reader(self.config.seed, self.rank, self.world_size, self.at.base, self.at.consumed.copy())
        left = max(0, self.config.num_steps - self.at.step)
        return stream(self.job.catalog, self.job.data, reader, batch_size=self.plan.samples, num_batches=left)

    def _flops_a_step(self) -> float:
        """Of this rank, counted on two samples of its first batch, before the engine takes the module."""
        first = next(self.batches, None)
        if first is None:
            return 0.0
        self.batches = chain([first], self.batches)
        device = ray.train.torch.get_device()
        self.task.module.to(device)
        few = parts_of(first, max(1, self.plan.samples // 2))[0]
        return count_flops(self.task.module, self.task.inputs(few, device), seed=0) / len(few.captions) * self.plan.samples

    def run(self) -> None:
        if self.rank == 0:
            self._tell()
        started = asked = time.perf_counter()
        self.heart.doing = "waiting for data"
        for batch in self.batches:
            self.heart.doing = "training"
            self._train_on(batch, waited=time.perf_counter() - asked)
            self._after_step()
            asked = time.perf_counter()
            self.heart.step, self.heart.doing = self.step, "waiting for data"
        self.seconds = time.perf_counter() - started
        self._finish()

    def _tell(self) -> None:
        plan = self.plan
        where = f"from step {self.step} of {self.at.url}" if self.at.url else "from the beginning"
        self.job.tracker.log_bytes(json.dumps(self.task.describe(), indent=2).encode(), "model.json")
        logger.info(
            "training %s: %d workers, ZeRO %d, %d samples a step (%d x %d a worker)",
            *(where, plan.world_size, self.config.zero_stage, plan.global_batch_size),
            *(plan.num_micro_batches, plan.micro_batch_size),
        )

    # --- a step ----------------------------------------------------------------------------------------------------------

    def _train_on(self, batch: Batch, waited: float) -> None:
        begun = time.perf_counter()
        seeds = [step_seed(self.config.seed, self.step, self.rank, part) for part in range(self.plan.num_micro_batches)]
        inputs = [self.task.inputs(part, self.engine.device) for part in parts_of(batch, self.plan.num_micro_batches)]
        loss, metrics = self.engine.backward(inputs, seeds)
        saver, order = self.saver, self.heart.order
        verdict = self.guard.look(loss, stop=bool(order), uploading=saver.uploading, failed=bool(saver.failure))
        updated = self.engine.update(self.step, skip=verdict.bad)
        self.step += 1
        if self.config.compile and self.step == self.at.step + 1:
            self.engine.compile()
        self.marks.extend(batch.consumed)
        self.skipped = _add(self.at.skipped, batch.skipped)
        if updated:
            self._count(metrics, batch, waited, begun)
        self.guard.judge(verdict, updated, self.step, self.rank, batch)
        self._upload_is_through(verdict.uploading, verdict.failed)
        self.stop_agreed = verdict.stop
        if self.profiler:
            self.profiler.step()

    def _count(self, metrics: dict[str, torch.Tensor], batch: Batch, waited: float, begun: float) -> None:
        words = [float(sum(len(caption.split()) for caption in batch.captions)), float(len(batch.captions))]
        metrics["data/caption_words"] = torch.tensor(words, device=self.engine.device)
        self.meter.add(metrics, samples=len(batch.captions), waited=waited, worked=time.perf_counter() - begun)

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.config.num_steps
        if self.step % config.log_every == 0 or last:
            self._log()
        if self.job.heldout is not None and (self.step % config.heldout_every == 0 or last):
            self._score()
        if self.step % config.checkpoint_every == 0 or last or self.stop_agreed:
            self._save_checkpoint()
        if config.preview_every and (self.step % config.preview_every == 0 or last):
            self._preview()
        if self.stop_agreed and not last:
            self._finish_upload()
            raise Interrupted(f"{self.heart.order or 'told to stop'}; saved at step {self.step}")

    def _log(self) -> None:
        if not self.meter.sums:  # every step since the last line was bad
            return
        metrics = self.meter.reduce(self.engine.device)
        metrics["train/grad_norm"] = self.engine.grad_norm
        metrics["train/bad_steps"] = float(self.guard.num_bad)
        metrics |= {f"train/lr_{name}": rate for name, rate in self.engine.learning_rates().items()}
        metrics |= {f"data/skipped_{cause}": float(n) for cause, n in self._all_skipped().items()}
        metrics |= memory(self.engine.device)
        if self.rank == 0:
            metrics["data/spilled_bytes"] = spilled_bytes()
            metrics["data/epochs_complete"] = float(min(self.at.consumed.first_epoch))
        metrics["train/samples_seen"] = float(self._samples_seen())
        metrics["train/seconds_left"] = metrics["train/seconds_a_step"] * (self.config.num_steps - self.step)
        self._show(metrics)

    def _show(self, metrics: dict[str, float]) -> None:
        self.first, self.last = self.first or metrics, self.last | metrics
        if self.rank == 0:
            self.job.tracker.log_metrics(metrics, self.step)

    def _score(self) -> None:
        self.heart.doing = "scoring held-out samples"
        if metrics := heldout.score(self.engine, ray.get(self.job.heldout), self.config.micro_batch_size):
            self._show(metrics)

    def _preview(self) -> None:
        """A preview that fails costs a warning, never the run."""
        self.heart.doing = "drawing previews"
        images: dict[int, Any] = {}
        try:
            with self.engine.inference():
                images = self.task.preview(self.rank, self.world_size)
        except Exception:
            logger.warning("the preview at step %d failed; training goes on", self.step, exc_info=True)
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, images)
        whole = {place: image for part in parts for place, image in part.items()}
        if self.rank == 0 and whole:
            self.job.tracker.log_bytes(self.task.preview_page(whole), f"previews/step_{self.step:08d}.png")

    def _samples_seen(self) -> int:
        return self.at.samples_seen + (self.step - self.at.step) * self.plan.global_batch_size

    def _all_skipped(self) -> dict[str, int]:
        """Over all ranks. Every rank must call it."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, self.skipped)
        return _add(*parts)

    # --- checkpoints -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        """Copy this rank's share of the state, and leave its upload to a thread."""
        self.heart.doing = "saving a checkpoint"
        self._finish_upload()  # of the one before, if it is still under way
        self._gather_consumed()
        shares, mine = Shares(self.world_size), {}
        for name, tensor in self.engine.state():
            if shares.owner(tensor) == self.rank:
                mine[name] = tensor.detach().cpu().clone()
        files = {}
        if self.rank == 0:
            files = {checkpoint.BASE: self.at.base.to_bytes(), checkpoint.CONSUMED: self.at.consumed.to_bytes()}
        state = rank_state(self.skipped, self.guard.usual_loss, self.guard.num_good)
        self._manifest = self._describe()
        self.saver.begin(self.step, mine, files, state)

    def _describe(self) -> Manifest:
        return Manifest(
            token=self.saver.token,
            step=self.step,
            num_updates=self.engine.adam.num_updates,
            samples_seen=self._samples_seen(),
            loss_scale=self.engine.scale.value,
            world_size=self.world_size,
            zero_stage=self.config.zero_stage,
            global_batch_size=self.at.global_batch_size,
            seed=self.config.seed,
            source_digest=self.job.catalog.digest,
            metrics=self.last,
            code_version=self.job.code_version,
            config=self.job.params,
            files={},
        )

    def _upload_is_through(self, uploading: bool, failed: bool) -> None:
        """What all ranks agreed on at a step: where none uploads any more, the checkpoint is completed, or given up."""
        if not self.saver.url or uploading:
            return
        if failed and self.rank == 0:
            self.saver.abandon()
            return
        config, manifest = self.config, self._manifest
        keep = Keep(self.job.output_dir, config.keep_checkpoints, config.keep_best, config.keep_best_mode)
        self.saver.end(manifest if self.rank == 0 and not failed else None, keep)

    def _finish_upload(self) -> None:
        """Wait until the checkpoint under way, if any, is complete, or given up. Every rank must call it."""
        while self.saver.url:
            through = torch.tensor([self.saver.uploading, bool(self.saver.failure)], dtype=torch.int32, device=self.engine.device)
            dist.all_reduce(through)
            uploading, failed = through.tolist()
            self._upload_is_through(bool(uploading), bool(failed))
            time.sleep(0.05 if uploading else 0)
        self.saver.wait()
        dist.barrier()

    def _gather_consumed(self) -> None:
        """Bring every rank's ledger up to date with what all ranks consumed. Every rank must call it."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, join(self.marks))
        for part in parts:
            self.at.consumed.add(part)
        self.marks = []

    # --- what comes out --------------------------------------------------------------------------------------------------

    def _finish(self) -> None:
        self.heart.doing = "saving the last checkpoint"
        if self.profiler:
            self.profiler.stop()
        self._finish_upload()
        self.saver.close()
        if self.saver.failure:
            raise DataError(f"the last checkpoint could not be written: {self.saver.failure}")
        self.heart.doing = "exporting the model"
        weights = self.engine.weights()
        skipped = self._all_skipped()
        if weights is not None:
            with tempfile.TemporaryDirectory(prefix="export_") as folder:
                self.task.save_pretrained(weights, Path(folder))
                storage.with_retries(lambda: storage.put_folder(Path(folder), self.job.export_dir), RETRY_SECONDS)
            url = storage.join(self.job.output_dir, SUMMARY)
            content = json.dumps(self._summary(skipped), indent=2).encode()
            storage.with_retries(lambda: storage.write_bytes(url, content), RETRY_SECONDS)
        dist.barrier()

    def _summary(self, skipped: dict[str, int]) -> dict[str, Any]:
        return {
            "num_workers": self.world_size,
            "zero_stage": self.config.zero_stage,
            "num_steps": self.step,
            "num_samples_seen": self._samples_seen(),
            "samples_per_second": self.last.get("train/samples_per_second_mean"),
            "seconds": round(self.seconds, 1),
            "bad_steps": self.guard.num_bad,
            "first": self.first,
            "last": self.last,
            "skipped": skipped,
            "export_dir": self.job.export_dir,
        }


def step_seed(seed: int, step: int, rank: int, part: int) -> int:
    """Of all randomness in one micro-batch: a resumed run draws what an uninterrupted one would have drawn."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}/{part}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def parts_of(batch: Batch, num_parts: int) -> list[Batch]:
    """A step's samples as micro-batches of equal size, in order."""
    size = len(batch.captions) // num_parts
    cuts = [slice(start, start + size) for start in range(0, num_parts * size, size)]
    return [
        replace(
            batch,
            tensors={name: tensor[cut] for name, tensor in batch.tensors.items()},
            captions=batch.captions[cut],
            keys=batch.keys[cut],
        )
        for cut in cuts
    ]


def _add(*counts: Any) -> dict[str, int]:
    """The sum of several counts by cause."""
    return {cause: sum(c.get(cause, 0) for c in counts) for cause in sorted({cause for c in counts for cause in c})}
