"""One trial of a sweep as a function that Ray Tune runs: train and evaluate from milestone to milestone.

No training or evaluation worker runs at a milestone, so a trial that is stopped there leaves nothing behind. Ray Tune's
checkpoint of a trial is a small file that names the training checkpoint.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from ray import tune

from ray_platform import storage
from ray_platform.contracts import describe_error
from ray_platform.sweep.config import SearchConfig
from ray_platform.sweep.schedulers import HISTORY, MILESTONE, RUNG
from ray_platform.sweep.search import TRIAL

_STATE = "state.json"


@dataclass(frozen=True)
class TrialSegment:
    """Part of a trial between two milestones."""

    trial: str  # name of the trial
    values: Mapping[str, Any]  # field -> value
    folder: str  # of the trial; a segment that was interrupted resumes from what is in it
    origin: str  # checkpoint of another trial whose weights this trial started from; empty: none
    budget_fraction: float  # of the trial's budget, used up at the end of the segment


@dataclass(frozen=True)
class SegmentResult:
    """State of a trial at a milestone."""

    checkpoint: str
    step: int
    samples: int
    metrics: Mapping[str, float]  # all metrics of the evaluation, the sweep's objectives among them


class MilestoneEntry(TypedDict):
    """Report of a trial at a milestone."""

    milestone: int  # from 1
    rung: int  # of ASHA
    step: int
    samples: int
    seconds: float  # of all segments so far
    metrics: Mapping[str, float]


RunSegment = Callable[[TrialSegment], SegmentResult]  # pickled and sent to the trials


@dataclass(frozen=True)
class _TrialState:
    """Progress of a trial, as Ray Tune's checkpoint holds it."""

    trial: str
    origin: str = ""  # as in TrialSegment
    checkpoint: str = ""
    seconds: float = 0.0
    history: tuple[MilestoneEntry, ...] = ()


def run_trial(config: Mapping[str, Any], run_segment: RunSegment, search: SearchConfig) -> None:
    """Run a trial and report its results at every milestone; `config` is a `trial_config`.

    When it fails, the cause is written to `error_url` in one line.
    """
    name = tune.get_context().get_trial_name()
    url = error_url(search.output_dir, name)
    storage.delete(url)  # of the previous attempt
    try:
        _run_segments(name, config[TRIAL]["values"], run_segment, search)
    except Exception as error:
        storage.write_bytes(url, describe_error(error).encode())
        raise


def error_url(output_dir: str, name: str) -> str:
    """Return the URL of the file with the error of a trial."""
    return storage.join(output_dir, "trials", f"{name}.error")


def _run_segments(name: str, values: Mapping[str, Any], run_segment: RunSegment, search: SearchConfig) -> None:
    state = _load_state(name)
    # The folder's name depends on what its checkpoints depend on, so that no trial resumes from those of other values.
    digest = hashlib.sha256(json.dumps([values, state.origin], sort_keys=True).encode()).hexdigest()[:6]
    folder = storage.join(search.output_dir, "trials", f"{name}_{digest}")
    for index, budget_fraction in list(enumerate(search.budget_fractions))[len(state.history) :]:
        start = time.monotonic()
        result = run_segment(TrialSegment(name, values, folder, state.origin, budget_fraction))
        seconds = round(state.seconds + time.monotonic() - start, 1)
        entry: MilestoneEntry = {
            "milestone": index + 1, "rung": search.reduction**index, "step": result.step, "samples": result.samples,
            "seconds": seconds, "metrics": dict(result.metrics),
        }  # fmt: skip
        state = _TrialState(name, state.origin, result.checkpoint, seconds, (*state.history, entry))
        _report(state, entry, folder)


def _load_state(trial: str) -> _TrialState:
    """Return the state in Ray Tune's checkpoint. A clone has the results of the other trial, whose checkpoint is its origin."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return _TrialState(trial)
    with checkpoint.as_directory() as folder:
        saved = json.loads((Path(folder) / _STATE).read_text())
    origin = saved["origin"] if saved["trial"] == trial else saved["checkpoint"]
    return _TrialState(trial, origin, saved["checkpoint"], saved["seconds"], tuple(saved["history"]))


def _report(state: _TrialState, entry: MilestoneEntry, folder: str) -> None:
    with tempfile.TemporaryDirectory(prefix="trial_") as scratch:
        (Path(scratch) / _STATE).write_text(json.dumps(asdict(state)))
        # The complete history each time: Ray Tune keeps only the last report of a trial.
        report = {
            **entry["metrics"],
            MILESTONE: entry["milestone"],
            RUNG: entry["rung"],
            HISTORY: list(state.history),
            "url": folder,
        }
        tune.report(report, checkpoint=tune.Checkpoint.from_directory(scratch))
