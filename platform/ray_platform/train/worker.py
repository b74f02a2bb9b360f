"""What every Ray Train worker runs: restore, then batch -> step -> metrics, with checkpoints, scores and previews."""

import contextlib
import hashlib
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
import torch.distributed as dist
from ray import cloudpickle

from ray_platform import storage
from ray_platform.contracts import Batch, ConfigError, ConsumedRange, DataError, Task, one_line
from ray_platform.data.plan import Reader
from ray_platform.data.stream import stream
from ray_platform.ray_internals import spilled_bytes
from ray_platform.train import heldout, previews
from ray_platform.train.config import BatchPlan
from ray_platform.train.engine import Engine
from ray_platform.train.guard import Guard, History
from ray_platform.train.job import Job
from ray_platform.train.keeper import Keeper
from ray_platform.train.launch import SUMMARY
from ray_platform.train.profiler import Profiler
from ray_platform.train.restarts import AcceleratorFull, Interrupted
from ray_platform.train.restore import Position, find, rank_state
from ray_platform.train.throughput import Meter, count_flops, memory
from ray_platform.train.watch import Heart

logger = logging.getLogger(__name__)


def train_worker(job: Job) -> None:
    """The training function of one rank."""
    if not job.train.gpus_per_worker:
        # Ray leaves torch with one thread a core in every worker, whatever share of the cores a worker has.
        torch.set_num_threads(max(1, int(job.train.cpus_per_worker)))
    # DeepSpeed calls what torch has renamed: hundreds of lines that no user can do anything about.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    heart = Heart(job.watch, dist.get_rank())
    heart.start()
    try:
        Trainer(job, built(job), heart).run()
    except torch.OutOfMemoryError as error:
        line = memory_full(error, heart.rank)
        # At the first step, another try would end the same way.
        raise (AcceleratorFull(line) if heart.step else ConfigError(line)) from error
    finally:
        heart.stop()


def memory_full(error: torch.OutOfMemoryError, rank: int) -> str:
    """What to do about it, after what torch tried: its own line goes on for paragraphs."""
    tried = str(error).partition(" GPU ")[0].rstrip(".")
    return (
        f"train.micro_batch_size: the memory of rank {rank}'s accelerator is full ({tried}); give fewer samples, with "
        "train.global_batch_size as it was, or set train.activation_checkpointing; python jobs/sizing.py foretells what fits"
    )


def built(job: Job) -> Task:
    """With equal initial weights on every rank. Raises ConfigError for what cannot be built, however often it is tried."""
    torch.manual_seed(job.train.seed)
    try:
        return cloudpickle.loads(job.build_task)()
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(one_line(error)) from error


class Trainer:
    """One rank's run: its engine, its stream, its meter and its checkpoints."""

    def __init__(self, job: Job, task: Task, heart: Heart):
        self.job, self.config, self.task, self.heart = job, job.train, task, heart
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        position, history = Position.start(job.catalog, job.train), History()
        found = find(job.train.resume, job.output_dir, job.launch, job.catalog.digest)
        if found is not None:
            position, history = position.of(found, job.train), found.history(job.output_dir, job.params)
        self.at = position
        self.plan = BatchPlan.of(position.global_batch_size, self.world_size, self.config.micro_batch_size)
        self.batches = self._stream()
        self.meter = Meter(self._flops_a_step())
        self.engine = Engine(task, job.train, self.plan.micro_batch_size, self.plan.num_micro_batches)
        if found is not None:
            found.into(self.engine)
        self.marks: list[ConsumedRange] = []  # consumed by this rank since the last checkpoint
        self.skipped: dict[str, int] = dict(position.skipped)
        self.guard = Guard(job.train, history, job.output_dir)
        self.keeper = Keeper(job, self.engine, position, heart)
        self.profiler = Profiler(job.output_dir) if job.train.profile and self.rank == 0 else None
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self.logged: dict[str, float] = {}  # at this very step
        self.seconds = 0.0
        self.step = position.step
        self.stop_agreed = False

    def _stream(self) -> Iterator[Batch]:
        """The batches of the steps that are left. Reading starts with the first one that is asked for."""
        reader = Reader(self.config.seed, self.rank, self.world_size, self.at.base, self.at.consumed.copy())
        left = max(0, self.config.last_step - self.at.step)
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
        self.heart.at("waiting for data")
        for batch in self.batches:
            self.heart.at("training")
            self._train_on(batch, waited=time.perf_counter() - asked)
            self._after_step()
            asked = time.perf_counter()
            self.heart.step = self.step
            self.heart.at("waiting for data")
        self.seconds = time.perf_counter() - started
        self._finish()

    def _tell(self) -> None:
        plan, asked = self.plan, self.at.global_batch_size
        where = f"from step {self.at.step} of {self.at.url}" if self.at.url else "from the beginning"
        self.job.tracker.log_bytes(json.dumps(self.task.describe(), indent=2).encode(), "model.json")
        logger.info(
            "training %s: %d workers, ZeRO %d, %d samples a step (%d x %d a worker)",
            *(where, plan.world_size, self.config.zero_stage, plan.global_batch_size),
            *(plan.num_micro_batches, plan.micro_batch_size),
        )
        if plan.global_batch_size != asked:
            logger.warning(
                "a step takes %d samples instead of the global batch size of %d, which %d workers with at most %d samples at a "
                "time cannot share out evenly",
                *(plan.global_batch_size, asked, plan.world_size, self.config.micro_batch_size),
            )

    # --- a step ----------------------------------------------------------------------------------------------------------

    def _train_on(self, batch: Batch, waited: float) -> None:
        begun = time.perf_counter()
        seeds = [step_seed(self.config.seed, self.step, self.rank, part) for part in range(self.plan.num_micro_batches)]
        inputs = [self.task.inputs(part, self.engine.device) for part in parts_of(batch, self.plan.num_micro_batches)]
        loss, metrics = self.engine.backward(inputs, seeds)
        saver, order = self.keeper.saver, self.heart.order
        with self.heart.waiting():
            verdict = self.guard.look(loss, stop=bool(order), uploading=saver.uploading, failed=bool(saver.failure))
        updated = self.engine.update(self.step, skip=verdict.bad)
        self.step, self.logged = self.step + 1, {}
        if self.config.compile and self.step == self.at.step + 1:
            self.engine.compile()
        self.marks.extend(batch.consumed)
        self.skipped = _add(self.at.skipped, batch.skipped)
        if updated:
            self._count(metrics, batch, waited, begun)
        self.guard.judge(verdict, updated, self.engine.rescaled, self.step, self.rank, batch)
        self.keeper.upload_is_through(verdict.uploading, verdict.failed)
        self.stop_agreed = verdict.stop
        if self.profiler:
            self.profiler.step()

    def _count(self, metrics: dict[str, torch.Tensor], batch: Batch, waited: float, begun: float) -> None:
        words = [float(sum(len(caption.split()) for caption in batch.captions)), float(len(batch.captions))]
        metrics["data/caption_words"] = torch.tensor(words, device=self.engine.device)
        self.meter.add(metrics, samples=len(batch.captions), waited=waited, worked=time.perf_counter() - begun)

    def _after_step(self) -> None:
        config, last = self.config, self.step == self.config.last_step
        if self.step % config.log_every == 0 or last or self.stop_agreed:
            self._log()
        if self.stop_agreed and not last:
            self._stop()  # whoever stops a run may not wait for more
        if self.job.heldout is not None and (self.step % config.heldout_every == 0 or last):
            with self._aside("scoring held-out samples"):
                self._show(heldout.score(self.engine, ray.get(self.job.heldout), config.micro_batch_size, self.heart.moved))
        if self.step % config.checkpoint_every == 0 or last:
            self._save_checkpoint()
        if config.preview_every and (self.step % config.preview_every == 0 or last):
            with self._aside("drawing previews"):
                page = previews.draw_page(self.engine, self.step)
            if page:
                self.job.tracker.log_bytes(page, f"previews/step_{self.step:08d}.png")

    @contextlib.contextmanager
    def _aside(self, doing: str) -> Iterator[None]:
        """Around what is no training, and may take long."""
        with self.meter.stalling():
            self.heart.at(doing, takes_long=True)
            yield

    def _log(self) -> None:
        with self.heart.waiting():
            metrics = self._measured() if self.meter.sums else {}  # else every step since the last line was bad
        metrics["train/bad_steps"] = float(self.guard.history.num_bad)
        self._show(metrics)

    def _measured(self) -> dict[str, float]:
        """Every rank must call it."""
        metrics = self.meter.reduce(self.engine.device)
        metrics["train/grad_norm"] = self.engine.grad_norm
        metrics |= {f"train/lr_{name}": rate for name, rate in self.engine.learning_rates().items()}
        metrics |= {f"data/skipped_{cause}": float(n) for cause, n in self._all_skipped().items()}
        metrics |= memory(self.engine.device)
        if self.rank == 0:
            metrics["data/spilled_bytes"] = spilled_bytes()
            metrics["data/epochs_complete"] = float(min(self.at.consumed.first_epoch))
        metrics["train/samples_seen"] = float(self._samples_seen())
        metrics["train/seconds_left"] = metrics["train/seconds_a_step"] * (self.config.last_step - self.step)
        return metrics

    def _show(self, metrics: dict[str, float]) -> None:
        self.first, self.last = self.first or metrics, self.last | metrics
        grouped = {name if "/" in name else f"train/{name}": value for name, value in metrics.items()}  # MLflow groups by /
        self.logged |= grouped
        if self.rank == 0 and grouped:
            self.job.tracker.log_metrics(grouped, self.step)

    def _samples_seen(self) -> int:
        return self.at.samples_seen + (self.step - self.at.step) * self.plan.global_batch_size

    def _all_skipped(self) -> dict[str, int]:
        """Over all ranks. Every rank must call it."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, self.skipped)
        return _add(*parts)

    # --- what comes out --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self) -> None:
        with self.meter.stalling():
            state = rank_state(self.skipped, self.guard.history)
            self.keeper.save(self.step, self._samples_seen(), self.marks, state, self.logged)
            self.marks = []

    def _stop(self) -> None:
        """Save, and raise Interrupted, on every rank."""
        self._save_checkpoint()
        failure = self.keeper.finish()
        orders: list[Any] = [None] * self.world_size
        dist.all_gather_object(orders, self.heart.order)
        saved = f"saved at step {self.step}"
        if failure:
            saved = f"the checkpoint of step {self.step} could not be written ({failure})"
        raise Interrupted(f"{next(filter(None, orders), 'told to stop')}; {saved}")

    def _finish(self) -> None:
        if self.profiler:
            self.profiler.stop()
        failure = self.keeper.finish()
        self.keeper.saver.close()
        if failure:
            raise DataError(f"the last checkpoint could not be written: {failure}")
        self.heart.at("exporting the model", takes_long=True)
        weights = self.engine.weights()
        skipped = self._all_skipped()
        if weights is not None:
            with tempfile.TemporaryDirectory(prefix="export_") as folder:
                self.task.save_pretrained(weights, Path(folder))
                storage.put_folder(Path(folder), self.job.export_dir)
            url = storage.join(self.job.output_dir, SUMMARY)
            content = json.dumps(self._summary(skipped), indent=2).encode()
            storage.write_bytes(url, content)
        with self.heart.waiting():
            dist.barrier()

    def _summary(self, skipped: dict[str, int]) -> dict[str, Any]:
        return {
            "num_workers": self.world_size,
            "zero_stage": self.config.zero_stage,
            "num_steps": self.step,
            "num_samples_seen": self._samples_seen(),
            "samples_per_second": self.last.get("train/samples_per_second_mean"),
            "seconds": round(self.seconds, 1),
            "bad_steps": self.guard.history.num_bad,
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
