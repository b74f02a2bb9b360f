"""Resuming a run: the checkpoint that a launch continues, the settings that changed since, and the learning rate between both."""

import contextlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.json_values import JsonObject, differences, to_json
from ray_platform.train.checkpoint_format import CorruptCheckpoint, Manifest, candidates, checkpoints_dir, read_manifest
from ray_platform.train.config import TrainConfig
from ray_platform.train.optimizer import Rewarm, learning_rate_factor
from ray_platform.train.worker_spec import SUMMARY

logger = logging.getLogger(__name__)

# Fields that say where a launch starts and ends, not how it trains.
UNREPORTED = ("output_dir", "train.resume", "train.resume_weights_only", "train.stop_at_step")
SCHEDULE_FIELDS = ("num_steps", "warmup_steps", "lr_schedule", "rewarm_steps", "cooldown_steps", "min_lr_factor")
MAX_TAG = 4000  # characters that MLflow's stores accept
JUMP = 0.05  # fraction of the peak: a learning rate that grows by more from one step to the next is reported


@dataclass(frozen=True)
class Resumption:
    """The checkpoint from which a launch continues training."""

    url: str
    manifest: Manifest

    @classmethod
    def find(cls, train: TrainConfig, output_dir: str) -> "Resumption | None":
        """Return the newest readable checkpoint that `train.resume` names; None for a launch that starts with step 0."""
        for url in candidates(train.resume, output_dir, "none yet"):
            with contextlib.suppress(CorruptCheckpoint):
                return None if takes_weights_only(url, train) else cls(url, read_manifest(url))
        return None

    @property
    def started_from(self) -> str:
        """`train.resume` of the launch that wrote the checkpoint, without a final slash."""
        return str(self.manifest.config.get("train", {}).get("resume", "")).rstrip("/")

    def completed(self, train: TrainConfig, output_dir: str) -> str:
        """Return a line that says that nothing is left to do, when that is so; otherwise an empty string."""
        url = storage.join(output_dir, SUMMARY)
        is_own = self.url.startswith(storage.join(checkpoints_dir(output_dir), ""))
        if not is_own or self.manifest.step < train.last_step or not storage.exists(url):
            return ""
        if storage.read_json(url).get("num_steps", 0) < train.last_step:  # a restart has yet to export
            return ""
        return (
            f"output_dir: {output_dir} is complete (step {self.manifest.step} of {train.last_step}); to train longer, raise "
            "train.num_steps or train.stop_at_step; to train anew, give another output_dir"
        )

    def changes(self, params: JsonObject) -> list[str]:
        """Return `field: was …, is …` for each field of the resolved configuration that differs from that of the checkpoint."""
        saved, current = (json.loads(to_json(config)) for config in (self.manifest.config, params))
        return [f"{name}: was {was}, is {now}" for name, was, now in differences(saved, current) if name not in UNREPORTED]

    def report(self, params: JsonObject, train: TrainConfig) -> dict[str, str]:
        """Print `changes` and `warnings`, and return the changes as a tag of the tracked run, whose parameters never change."""
        changes = self.changes(params)
        if changes:
            print("\n  ".join([f"settings changed since {self.url}:", *changes]), flush=True)
        for line in self.warnings(train):
            logger.warning("%s", line)
        return {f"changed_at_step_{self.manifest.step}": "; ".join(changes)[:MAX_TAG]} if changes else {}

    def warnings(self, train: TrainConfig) -> list[str]:
        """Return a line when the learning rate jumps, or when a cooldown starts in the past."""
        step, rewarm = self.manifest.step, resumed_rewarm(self.manifest, train)
        if rewarm is None or rewarm.step != step:
            return []
        rate, num_left = learning_rate_factor(train, step, rewarm), train.num_steps - step
        change = f"from {rewarm.factor:.2g} to {rate:.2g} of its peak at step {step}"
        if rate > rewarm.factor + JUMP:
            steps = max(100, train.num_steps // 100)
            return [
                f"train.rewarm_steps: the learning rate jumps {change}, because the schedule changed ({train.rewarm_steps}); set "
                f"the number of steps over which it should rise, such as {steps}"
            ]
        if rate < rewarm.factor - JUMP and train.cooldown_steps > num_left:
            return [
                f"train.cooldown_steps: the learning rate falls {change}, because the cooldown ({train.cooldown_steps}) would "
                f"have started before that step; use {num_left}"
            ]
        return []


def takes_weights_only(url: str, train: TrainConfig) -> bool:
    """Return whether only the weights of this checkpoint are used. A restart continues from the launch's own checkpoints."""
    return train.resume_weights_only and url == train.resume.rstrip("/")


def other_shards(url: str) -> DataError:
    """Return the error of a run that would continue a checkpoint with other shards than it was trained on."""
    return DataError(
        f"data.sources: the checkpoint {url} was trained on other shards; restore those, or take only its weights with "
        "--train.resume_weights_only true"
    )


def resumed_rewarm(manifest: Manifest, train: TrainConfig, peaks: Mapping[str, float] | None = None) -> Rewarm | None:
    """Return where the learning rates of a resumed run start to rise to their schedule; None if nothing of it ever changed.

    `peaks`: learning rate of each of the Task's parameter groups, by name, where there is a Task.
    """
    saved_train = manifest.config.get("train", {})
    # A field that a release before this one did not have has its default.
    fields = {name: saved_train.get(name, getattr(TrainConfig, name)) for name in SCHEDULE_FIELDS if saved_train}
    # Without the fields that must fit today's number of steps.
    saved, previous = replace(train, stop_at_step=0, profile_steps=None, **fields), None
    if rewarm := manifest.rewarm:
        previous = Rewarm(int(rewarm["step"]), rewarm["factor"], rewarm.get("factors", {}))
    # How much higher the former peak is. A checkpoint of a release before has no peaks.
    ratios = {name: manifest.peaks.get(name, peak) / peak for name, peak in (peaks or {}).items() if peak}
    is_same = all(getattr(saved, name) == getattr(train, name) for name in SCHEDULE_FIELDS)
    if manifest.step == 0 or (is_same and all(ratio == 1 for ratio in ratios.values())):
        return previous
    last = manifest.step - 1
    factors = {name: ratio * learning_rate_factor(saved, last, previous, name) for name, ratio in ratios.items()}
    return Rewarm(manifest.step, learning_rate_factor(saved, last, previous), factors)
