"""A run's checkpoints as one of its ranks makes them: its share of the state, and what the ranks agree on about their uploads."""

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import ConsumedRange
from ray_platform.data.ledger import merge_ranges
from ray_platform.train import checkpointing
from ray_platform.train.checkpointing import Keep, Manifest
from ray_platform.train.engine import Engine, copied
from ray_platform.train.job import Job
from ray_platform.train.restore import Position
from ray_platform.train.saver import Saver, Shares
from ray_platform.train.watch import Heart

logger = logging.getLogger(__name__)


class Keeper:
    """Every rank must call every method equally often."""

    def __init__(self, job: Job, engine: Engine, at: Position, heart: Heart):
        self.job, self.engine, self.at, self.heart = job, engine, at, heart
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        folder = storage.join(checkpointing.checkpoints_dir(job.output_dir), job.launch)
        self.saver = Saver(folder, self.rank, token[0], heart.moved)
        train = job.train
        self.keep = Keep(job.output_dir, train.keep_checkpoints, train.keep_best, train.keep_best_mode)
        self._manifest: Manifest
        self._told = False

    def save(
        self, step: int, samples_seen: int, marks: Sequence[ConsumedRange], state: Mapping[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Copy this rank's share of the engine's state, and leave its upload to a thread.

        `marks`: what this rank consumed since the last call. `state`: what only this rank knows. `metrics`: logged at this step.
        """
        self.finish()  # of the one before, if it is still under way
        self.heart.at("saving a checkpoint")
        shares, mine = Shares(self.world_size), {}
        with self.heart.waiting():
            self._gather_consumed(marks)
            for name, tensor in self.engine.state():
                if shares.owner(tensor) == self.rank:
                    mine[name] = copied(tensor)
        files = {}
        if self.rank == 0:
            files = {checkpointing.BASE: self.at.base.to_bytes(), checkpointing.CONSUMED: self.at.consumed.to_bytes()}
        self._manifest = self._describe(step, samples_seen, metrics)
        self.saver.begin(step, mine, files, state)

    def upload_is_through(self, uploading: bool, failed: bool) -> None:
        """What all ranks agreed on at a step: where none uploads any more, the checkpoint is completed, or given up."""
        if not self.saver.url or uploading:
            return
        if failed and self.rank == 0:
            self.saver.abandon()
            return
        self.saver.end(self._manifest if self.rank == 0 and not failed else None, self.keep)

    def finish(self) -> str:
        """Wait until the checkpoint under way, if any, is complete, or given up: why it is, else empty; the same on all ranks."""
        if self.saver.url:
            self.heart.at("waiting for a checkpoint's upload", takes_long=True)
        while self.saver.url:
            own = self.saver.uploading
            through = torch.tensor([own, bool(self.saver.failure)], dtype=torch.int32, device=self.engine.device)
            with nullcontext() if own else self.heart.waiting():
                dist.all_reduce(through)
                uploading, failed = through.tolist()
                time.sleep(0.05 if uploading else 0)
            self.upload_is_through(bool(uploading), bool(failed))
        self.saver.wait()
        failures: list[Any] = [None] * self.world_size
        with self.heart.waiting():
            dist.all_gather_object(failures, self.saver.failure)
        return next(filter(None, failures), "")

    def _gather_consumed(self, marks: Sequence[ConsumedRange]) -> None:
        """Bring every rank's ledger up to date with what all ranks consumed."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, merge_ranges(marks))
        for part in parts:
            self.at.consumed.add(part)

    def _describe(self, step: int, samples_seen: int, metrics: Mapping[str, float]) -> Manifest:
        train = self.job.train
        if self.rank == 0 and train.keep_best and train.keep_best not in metrics and not self._told:
            self._told = True
            logger.warning(
                "train.keep_best: %s was not logged at step %d, so this checkpoint cannot be the best; said once. Metrics are "
                "logged every train.log_every, scores every train.heldout_every steps, checkpoints every train.checkpoint_every",
                *(train.keep_best, step),
            )
        return Manifest(
            token=self.saver.token,
            step=step,
            num_updates=self.engine.adam.num_updates,
            samples_seen=samples_seen,
            loss_scale=self.engine.scale.state(),
            world_size=self.world_size,
            zero_stage=train.zero_stage,
            global_batch_size=self.at.global_batch_size,
            seed=train.seed,
            source_digest=self.job.catalog.digest,
            metrics=dict(metrics),
            code_version=self.job.code_version,
            config=self.job.params,
            files={},
        )
