"""Fault tolerance: unusable losses, restarts of failed workers, changes of their number, and the driver that watches them."""

import contextlib
import itertools
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import Batch, ConfigError, DataError, TrainingError, describe_error
from ray_platform.lease import Lease
from ray_platform.placement import StartNotice
from ray_platform.ray_internals import ControllerCallback, draining_nodes
from ray_platform.retry import RETRY_SECONDS
from ray_platform.terminal import ProgressBar, left_text
from ray_platform.tracking.node_metrics import NodeMetrics
from ray_platform.train.checkpoint_format import LossHistory
from ray_platform.train.collective import collective
from ray_platform.train.config import TrainConfig
from ray_platform.train.engine import Update
from ray_platform.train.failures import OURS, Diverged, Interrupted, find_cause, save_messages

logger = logging.getLogger(__name__)

BAD_STEPS = "bad_steps"  # folder in output_dir
_EMA_DECAY = 0.98  # of the usual loss
_MIN_GOOD_STEPS = 20  # before a loss can be called unusual
POLL_SECONDS = 1.0
_POLLS_PER_CHECK = 5  # a check needs several calls
_ANSWER_TIMEOUT_SECONDS = 10.0
_STOPPED = "stopped by SIGTERM"
_PAUSES_S = (0.0, 15.0, 45.0, 60.0)  # before restarts after 1, 2, 3, … failures without a new checkpoint
_RESIZE_TIMEOUT_SECONDS = 600.0  # for a checkpoint before a resize; after that the workers restart from an older one


class Stopped(TrainingError):
    """The run was stopped by SIGTERM or its time limit, so that callers must not start anything else."""


# --- steps ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepStatus:
    """What the ranks agreed on in a step: the same on every rank, except for `local_nonfinite`."""

    loss: float  # mean over all ranks; NaN when it is not finite on any rank
    is_bad: bool  # the loss is not finite or unusually large, so the step must not change the weights
    local_nonfinite: bool  # this rank's loss is not finite
    stop: bool  # save and stop
    checkpoint_due: bool
    any_uploading: bool
    any_upload_failed: bool
    num_bad: int  # samples that all ranks skipped as bad, since the run started
    epoch_samples: float  # mean of what the ranks expect


class LossMonitor:
    """Judges every step's loss by those of the steps before. All ranks come to the same result from the same numbers."""

    def __init__(self, config: TrainConfig, history: LossHistory, output_dir: str):
        self.max_factor, self.max_bad_steps = config.max_loss_factor, config.max_bad_steps
        self.history = history
        self.folder = storage.join(output_dir, BAD_STEPS)

    @collective
    def sync_step_status(
        self, loss: torch.Tensor, *, stop: bool, checkpoint_due: bool, uploading: bool, upload_failed: bool,
        num_bad: int, epoch_samples: float,
    ) -> StepStatus:  # fmt: skip
        """Combine this rank's loss (scalar), flags and counts with those of all ranks, in one small all-reduce."""
        nonfinite = ~torch.isfinite(loss)
        flags = [stop, checkpoint_due, uploading, upload_failed, num_bad, epoch_samples]
        of_host = torch.tensor(flags, dtype=torch.float64, pin_memory=loss.device.type != "cpu")
        losses = torch.stack([loss.masked_fill(nonfinite, 0.0).double(), nonfinite.double()])
        sums = torch.cat([losses, of_host.to(loss.device, non_blocking=True)])
        dist.all_reduce(sums)
        # The host waits for the accelerator here; elsewhere in a step, only to know whether the gradients are finite.
        total, num_nonfinite, *flag_sums, all_bad, samples, local_nonfinite = torch.cat([sums, nonfinite.double()[None]]).tolist()
        mean = math.nan if num_nonfinite else total / dist.get_world_size()
        is_unusual = self.history.num_good >= _MIN_GOOD_STEPS and mean > self.max_factor * self.history.usual_loss
        any_stop, any_due, any_uploading, any_failed = (flag > 0 for flag in flag_sums)
        return StepStatus(
            loss=mean,
            is_bad=num_nonfinite > 0 or is_unusual,
            local_nonfinite=local_nonfinite > 0,
            stop=any_stop,
            checkpoint_due=any_due,
            any_uploading=any_uploading,
            any_upload_failed=any_failed,
            num_bad=round(all_bad),
            epoch_samples=samples / dist.get_world_size(),
        )

    def record(self, status: StepStatus, update: Update, step: int, batch: Batch) -> None:
        """Count a step, and save the sample keys of a bad one. One that lowered the loss scale of fp16 is neither good nor bad.

        Raises Diverged after `train.max_bad_steps` bad steps in a row.
        """
        past = self.history
        if update.updated:
            # The magnitude, because a loss may be negative, and a multiple of a negative number does not limit anything.
            usual = past.usual_loss + (1 - _EMA_DECAY if past.num_good else 1.0) * (abs(status.loss) - past.usual_loss)
            self.history = LossHistory(usual, past.num_good + 1, past.num_bad, 0)
            return
        if update.rescaled:
            return
        self.history = replace(past, num_bad=past.num_bad + 1, in_a_row=past.in_a_row + 1)
        if dist.get_rank() == 0:
            cause = f"loss {status.loss:g}" if status.is_bad else "a gradient is not finite"
            logger.warning("step %d: %s; the weights stay, and the sample keys are in %s", step, cause, self.folder)
        if status.local_nonfinite or not math.isnan(status.loss):
            self._save_keys(status.loss, step, batch)
        if self.history.in_a_row >= self.max_bad_steps:
            raise Diverged(
                f"the loss or its gradient was not usable in {self.history.in_a_row} steps in a row, up to step {step}; the "
                f"samples are in {self.folder}: lower the learning rate or inspect them, then resume with --resume auto"
            )

    def _save_keys(self, loss: float, step: int, batch: Batch) -> None:
        rank = dist.get_rank()
        content = {"step": step, "rank": rank, "loss": repr(loss), "keys": list(batch.keys), "captions": list(batch.captions)}
        try:
            url = storage.join(self.folder, f"step_{step:08d}_rank_{rank:05d}.json")
            with storage.retrying_for(0):  # training does not wait for it
                storage.write_bytes(url, json.dumps(content, indent=1).encode())
        except storage.StorageError as error:
            logger.warning("the sample keys of step %d could not be saved: %s", step, error)


# --- workers -------------------------------------------------------------------------------------------------------------


class RestartPolicy:
    """Decides whether failed workers are restarted: as long as that can help, and until too many failures without progress."""

    def __init__(self, max_failures: int, newest_checkpoint: Callable[[], str], output_dir: str):
        """`newest_checkpoint` returns the newest checkpoint of this launch; empty when there is none."""
        self.max_failures, self.newest_checkpoint, self.output_dir = max_failures, newest_checkpoint, output_dir
        self.num_failures, self.last_checkpoint = 0, ""
        self.pause_seconds = 0.0  # before the next restart: what made several in a row fail may take a while to end

    def record_failure(self, error: Exception, hang: str, stop_reason: str) -> str:
        """Return a log line about the failure, which Ray Train raised, and the checkpoint from which the workers restart.

        Args:
            hang: message of the hang for which the workers were killed; empty when there was none.
            stop_reason: why the driver stops the run; empty when it does not.

        Raises:
            TrainingError: a restart cannot help, or there were too many failures without a new checkpoint.
            Stopped: for a `stop_reason`.
        """
        cause, line = find_cause(error)
        line = hang or line
        if not isinstance(cause, OURS):
            line += f"; Ray's messages are in {save_messages(error, self.output_dir)}"
        if stop_reason and not is_final(cause):
            reason = line if isinstance(cause, Interrupted) else f"{stop_reason}, and could not save at once: {line}"
            raise Stopped(f"{reason}; {self._resume_advice()}") from None
        if is_final(cause):
            raise TrainingError(line) from error
        try:
            with storage.retrying_for(RETRY_SECONDS):
                newest = self.newest_checkpoint()
        except storage.StorageError as unavailable:
            newest, line = self.last_checkpoint, f"{line}; the checkpoints cannot be listed ({unavailable})"
        if newest != self.last_checkpoint:
            self.num_failures, self.last_checkpoint = 0, newest
        self.pause_seconds = 0.0
        if not isinstance(cause, Interrupted):
            self.num_failures += 1
            self.pause_seconds = _PAUSES_S[min(self.num_failures, len(_PAUSES_S)) - 1]
        if self.num_failures > self.max_failures:
            raise TrainingError(f"{line} (failure {self.num_failures} without a new checkpoint; train.max_failures)") from error
        return f"{line}; resuming from {newest or 'where this launch started'}"

    def pause(self, monitor: "DriverMonitor", lease: Lease) -> None:
        """Wait before a restart. Raises Stopped or TrainingError as soon as this launch is stopped or taken over."""
        end = time.monotonic() + self.pause_seconds
        while not monitor.stop_reason and not lease.lost and time.monotonic() < end:
            time.sleep(POLL_SECONDS)
        if lease.lost:
            raise TrainingError(lease.lost)
        if monitor.stop_reason:
            raise Stopped(f"{monitor.stop_reason}; {self._resume_advice()}")

    def _resume_advice(self) -> str:
        """Say from where the stopped run can be resumed. Storage is asked once, without retries, as the user waits."""
        try:
            newest = self.newest_checkpoint()
        except storage.StorageError as error:
            return f"its checkpoints cannot be listed ({error})"
        return f"resume from {newest} with --resume auto" if newest else "this launch has saved no checkpoint"


def is_final(cause: BaseException) -> bool:
    """Return whether a restart would fail in the same way."""
    is_transient = isinstance(cause, storage.StorageError) and cause.kind == "unavailable"
    return isinstance(cause, ConfigError | DataError | Diverged) and not is_transient


class SaveBeforeResize(ControllerCallback):
    """Has the workers of an elastic run save before Ray Train ends them to change their number. Runs in its controller."""

    def __init__(self, hang_detector: Any):
        self.hang_detector = hang_detector
        self.has_started = False

    def before_controller_execute_resize_decision(self, resize_decision: Any) -> None:
        if not self.has_started:  # the first decision starts the workers
            self.has_started = True
            return
        reason = f"resizing to {resize_decision.num_workers} workers"
        deadline = time.monotonic() + _RESIZE_TIMEOUT_SECONDS
        while not ray.get(self.hang_detector.all_stopped.remote()) and time.monotonic() < deadline:
            self.hang_detector.request_stop.remote(reason)  # again, as a detector that was restarted does not know it
            time.sleep(0.2)
        ray.get(self.hang_detector.reset.remote())


# --- monitoring by the driver ----------------------------------------------------------------------------------------------


class DriverMonitor:
    """Watches the workers for the length of a `with` block. Enter it in the main thread, where it handles SIGTERM."""

    def __init__(self, hang_detector: Any, node_metrics: NodeMetrics, train: TrainConfig, lease: Lease):
        self.hang_detector, self.node_metrics, self.train, self.lease = hang_detector, node_metrics, train, lease
        self.stop_reason = ""  # the workers save, and the run ends
        self._started = time.monotonic()
        self._start_notice: StartNotice | None = self._new_notice()  # None once workers have started
        self.last_hang = ""  # message about the workers killed since the last `reset_workers`
        self._printed_step, self._bar = -1, ProgressBar(seconds_between_lines=0)
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._poll_loop, daemon=True, name="monitor")
        self._previous_handler: Any = None

    def __enter__(self) -> "DriverMonitor":
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        with contextlib.suppress(ray.exceptions.RayError, OSError):
            self._print_progress()
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def reset_workers(self) -> None:
        """Forget the workers that ended; new ones will start."""
        self.last_hang, self._start_notice = "", self._new_notice()
        self.hang_detector.reset.remote()

    def _new_notice(self) -> StartNotice:
        return StartNotice(self.train.worker_request.times(self.train.min_workers))

    def _on_sigterm(self, *_: object) -> None:
        self._stop(_STOPPED)
        with contextlib.suppress(OSError):  # standard output may be closed
            print("SIGTERM: saving a checkpoint", flush=True)

    def _stop(self, reason: str) -> None:
        self.stop_reason = reason
        self.hang_detector.request_stop.remote(reason)

    def _poll_loop(self) -> None:
        logged = ""
        for num_polls in itertools.count(1):
            if self._done.wait(POLL_SECONDS):
                return
            try:
                if num_polls % _POLLS_PER_CHECK == 0:
                    self._check_workers()  # first, as the disk may be full to which the progress is printed
                self._print_progress()
            except Exception as error:  # without this thread, no hang, drain, time limit or lost lease is noticed
                if logged != (logged := describe_error(error)):
                    logger.warning("the workers cannot be watched (logged once); the next attempt follows: %s", logged)

    def _check_workers(self) -> None:
        """Have the workers save and restart without a node that is being drained.

        Kill them all when one hangs, or when another launch took the lease over: it may already train from the same checkpoint.
        """
        detector = self.hang_detector
        if self.lease.lost:
            self._kill_workers()
            return
        limit = self.train.max_minutes
        if limit and not self.stop_reason and time.monotonic() - self._started >= 60 * limit:
            self._stop(f"train.max_minutes: stopped after {limit:g} minutes")
        if self.stop_reason:  # again, for workers that were being started
            detector.request_stop.remote(self.stop_reason)
        nodes = ray.get(detector.nodes.remote(), timeout=_ANSWER_TIMEOUT_SECONDS)
        if nodes:
            self._start_notice = None
        elif self._start_notice:
            self._start_notice.check()
        if drained := draining_nodes() & nodes:
            detector.request_stop.remote(f"node {min(drained)[:8]} is being drained")
        seconds = self.train.hang_seconds
        if seconds and (hang := ray.get(detector.find_hang.remote(seconds), timeout=_ANSWER_TIMEOUT_SECONDS)):
            self.last_hang = hang
            logger.warning("%s; restarting all workers", hang)
            self._kill_workers()
            detector.reset.remote()
        self.node_metrics.poll(nodes)

    def _kill_workers(self) -> None:
        for actor in ray.get(self.hang_detector.actors.remote(), timeout=_ANSWER_TIMEOUT_SECONDS):
            ray.kill(actor)

    def _print_progress(self) -> None:
        """Show the progress when new metrics have arrived."""
        step, metrics = ray.get(self.hang_detector.progress.remote(), timeout=_ANSWER_TIMEOUT_SECONDS)
        if step > self._printed_step and "train/samples_per_second" in metrics:
            self._printed_step = step
            self._bar.update("step", step, self.train.last_step, progress_text(metrics))


def progress_text(metrics: dict[str, float]) -> str:
    """Format `loss_generation 0.412  113 samples/s  waiting for data 2 %  stalled 3 %  left 5.5 min`.

    Stalled is the fraction of time spent on checkpoints, scores and previews, shown from 1 % on.
    """
    names = [name for name in sorted(metrics, reverse=True) if name.startswith("train/loss_")]
    losses = "  ".join(f"{name.removeprefix('train/')} {metrics[name]:.3f}" for name in names)
    stalled = metrics.get("train/stalled_fraction", 0)
    return (
        f"{losses}  {metrics.get('train/samples_per_second', 0):.0f} samples/s  "
        f"waiting for data {metrics.get('data/waiting_fraction', 0):.0%}  "
        f"{f'stalled {stalled:.0%}  ' if stalled >= 0.01 else ''}{left_text(metrics.get('train/seconds_left', 0))}"
    )
