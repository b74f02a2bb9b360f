"""What one trial of a sweep does, as a function that Ray Tune runs: from milestone to milestone, train and evaluate.

No worker is up at a milestone, so that whoever is stopped there leaves nothing behind. Tune's checkpoint of a trial is a
small file that names ours.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ray import tune

from ray_platform import storage
from ray_platform.contracts import describe_error
from ray_platform.sweep.schedulers import HISTORY, MILESTONE, RUNG
from ray_platform.sweep.search import TRIAL

_STATE = "state.json"


@dataclass(frozen=True)
class Segment:
    """What a trial does between two of its milestones."""

    trial: str  # its name
    values: Mapping[str, Any]  # field -> value
    folder: str  # its own, in which it goes on where it was
    origin: str  # another trial's checkpoint, with whose weights it began here; empty: none
    share: float  # of its budget that is used up at its end


@dataclass(frozen=True)
class Reached:
    """Where a trial stands after a segment's training."""

    checkpoint: str
    step: int
    samples: int


class Job(Protocol):
    """What is swept. It travels to the trials, so it holds plain data."""

    def train(self, segment: Segment) -> Reached:
        """Train to the segment's end. Called again after a crash, it goes on."""
        ...

    def evaluate(self, segment: Segment, reached: Reached) -> Mapping[str, float]:
        """All metrics, with the sweep's objectives among them."""
        ...


@dataclass(frozen=True)
class State:
    """What a trial has done."""

    trial: str = ""  # whose checkpoint this is
    origin: str = ""  # see Segment
    checkpoint: str = ""
    seconds: float = 0.0
    history: tuple[dict[str, Any], ...] = ()  # an entry a milestone

    def of(self, trial: str) -> "State":
        """Where `trial` begins: what another one has done is its own from here on."""
        if not self.trial or self.trial == trial:
            return self
        return State(trial, self.checkpoint, self.checkpoint, self.seconds, self.history)


def trial_name(number: int) -> str:
    return f"trial_{number:03d}"


def run_trial(config: Mapping[str, Any], job: Job, output_dir: str, shares: tuple[float, ...], reduction: int) -> None:
    """`config`: see `search.given`. Reports at every milestone. Why it fails is left in `error_url`, in one line."""
    name = trial_name(config[TRIAL]["number"])
    url = error_url(output_dir, name)
    storage.delete(url)  # of the try before
    try:
        _run(name, config[TRIAL]["values"], job, output_dir, shares, reduction)
    except Exception as error:
        storage.write_bytes(url, describe_error(error).encode())
        raise


def error_url(output_dir: str, name: str) -> str:
    return storage.join(output_dir, "trials", f"{name}.error")


def _run(
    name: str, values: Mapping[str, Any], job: Job, output_dir: str, shares: tuple[float, ...], reduction: int
) -> None:  # fmt: skip
    state = _restored().of(name)
    folder = storage.join(output_dir, "trials", f"{name}_{_digest(values, state.origin)}")
    for place in range(len(state.history), len(shares)):
        begun = time.monotonic()
        segment = Segment(name, values, folder, state.origin, shares[place])
        reached = job.train(segment)
        metrics = dict(job.evaluate(segment, reached))
        seconds = round(state.seconds + time.monotonic() - begun, 1)
        entry = {
            MILESTONE: place + 1, RUNG: reduction**place, "step": reached.step, "samples": reached.samples, "seconds": seconds,
            "metrics": metrics,
        }  # fmt: skip
        state = State(name, state.origin, reached.checkpoint, seconds, (*state.history, entry))
        _report(state, entry, folder)


def _digest(values: Mapping[str, Any], origin: str) -> str:
    """A folder is named by what its checkpoints are made by, so that nothing goes on from those of other values."""
    return hashlib.sha256(json.dumps([values, origin], sort_keys=True).encode()).hexdigest()[:6]


def _restored() -> State:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return State()
    with checkpoint.as_directory() as folder:
        found = json.loads((Path(folder) / _STATE).read_text())
    return State(**found | {"history": tuple(found["history"])})


def _report(state: State, entry: Mapping[str, Any], folder: str) -> None:
    with tempfile.TemporaryDirectory(prefix="trial_") as scratch:
        (Path(scratch) / _STATE).write_text(json.dumps(vars(state)))
        # The whole history each time: what Tune knows of a trial is its last report.
        told = {**entry["metrics"], MILESTONE: entry[MILESTONE], RUNG: entry[RUNG], HISTORY: list(state.history), "url": folder}
        tune.report(told, checkpoint=tune.Checkpoint.from_directory(scratch))
