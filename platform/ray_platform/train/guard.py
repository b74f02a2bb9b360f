"""What all ranks agree on at every step: whether its loss can be used, whether to stop, how far the checkpoint's upload is."""

import json
import logging
import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import Batch
from ray_platform.train.config import TrainConfig

logger = logging.getLogger(__name__)

BAD_STEPS = "bad_steps"  # folder in output_dir
_MEMORY = 0.98  # of the usual loss
_WARM_UP = 20  # good steps before a loss can be called unusual


class Diverged(Exception):
    """The loss was not usable for too many steps in a row."""


@dataclass(frozen=True)
class History:
    """Of a run's losses so far: what a checkpoint keeps of a Guard."""

    usual_loss: float = 0.0
    num_good: int = 0
    num_bad: int = 0
    in_a_row: int = 0  # the bad ones at its end


@dataclass(frozen=True)
class Verdict:
    """The same on every rank, but for `mine`."""

    loss: float  # mean over all ranks; NaN where that of any is not finite
    bad: bool
    mine: bool  # this rank's loss is not finite
    stop: bool
    uploading: bool  # some rank still uploads
    failed: bool  # some rank's upload has failed


class Guard:
    """Judges losses by what they were in the steps before; the ranks reach the same judgement from the same numbers."""

    def __init__(self, config: TrainConfig, history: History, output_dir: str):
        self.factor, self.max_bad, self.output_dir = config.max_loss_factor, config.max_bad_steps, output_dir
        self.history = history

    def look(self, loss: torch.Tensor, *, stop: bool, uploading: bool, failed: bool) -> Verdict:
        """One small all-reduce. Every rank must call it."""
        not_finite = ~torch.isfinite(loss)
        own = torch.tensor([stop, uploading, failed], dtype=torch.float64).to(loss.device)
        sums = torch.cat([torch.stack([loss.masked_fill(not_finite, 0.0).double(), not_finite.double()]), own])
        dist.all_reduce(sums)
        # The only wait for the accelerator in a step.
        total, not_finite_ranks, stops, uploads, failures, mine = torch.cat([sums, not_finite.double()[None]]).tolist()
        mean = math.nan if not_finite_ranks else total / dist.get_world_size()
        unusual = self.history.num_good >= _WARM_UP and mean > self.factor * self.history.usual_loss
        return Verdict(mean, not_finite_ranks > 0 or unusual, mine > 0, stops > 0, uploads > 0, failures > 0)

    def judge(self, verdict: Verdict, updated: bool, rescaled: bool, step: int, rank: int, batch: Batch) -> None:
        """Count the step. A bad one's keys are saved. Raises Diverged after too many bad ones in a row.

        One that found a smaller loss scale (`rescaled`) is neither good nor bad: the scale was at fault.
        """
        past = self.history
        if updated:
            usual = past.usual_loss + (1 - _MEMORY if past.num_good else 1.0) * (verdict.loss - past.usual_loss)
            self.history = History(usual, past.num_good + 1, past.num_bad, 0)
            return
        if rescaled:
            return
        self.history = replace(past, num_bad=past.num_bad + 1, in_a_row=past.in_a_row + 1)
        if rank == 0:
            what = f"loss {verdict.loss:g}" if verdict.bad else "a gradient that is not finite"
            logger.warning("step %d: %s; the step changes nothing, its keys are in %s", step, what, self.folder)
        if verdict.mine or not math.isnan(verdict.loss):
            self._save(verdict.loss, step, rank, batch)
        if self.history.in_a_row >= self.max_bad:
            raise Diverged(
                f"the loss or its gradient was not usable in {self.history.in_a_row} steps in a row, up to step {step}; the "
                f"samples are in {self.folder}: lower the learning rate or look at them, then go on with --resume auto"
            )

    @property
    def folder(self) -> str:
        return storage.join(self.output_dir, BAD_STEPS)

    def _save(self, loss: float, step: int, rank: int, batch: Batch) -> None:
        content = {"step": step, "rank": rank, "loss": repr(loss), "keys": list(batch.keys), "captions": list(batch.captions)}
        try:
            url = storage.join(self.folder, f"step_{step:08d}_rank_{rank:05d}.json")
            with storage.retrying_for(0):  # training does not wait for it
                storage.write_bytes(url, json.dumps(content, indent=1).encode())
        except storage.StorageError as error:
            logger.warning("the keys of step %d could not be saved: %s", step, error)
