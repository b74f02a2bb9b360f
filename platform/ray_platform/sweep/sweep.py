"""A sweep: concurrent trials on Ray Tune. Running it again resumes trials that were interrupted or failed.

A trial trains and evaluates from milestone to milestone. No training or evaluation worker runs at a milestone, so a trial that is
stopped there leaves nothing behind. Ray Tune's checkpoint of a trial is a small file that names the training checkpoint.
"""

import hashlib
import json
import logging
import math
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback

from ray_platform import storage
from ray_platform.contracts import ConfigError, describe_error, one_line
from ray_platform.placement import ResourceRequest, can_autoscale, describe_nodes, total_resources
from ray_platform.report.records import HistoryEntry, TrialRecord
from ray_platform.sweep.config import FieldValues, SearchConfig, Space
from ray_platform.sweep.search import (
    HISTORY,
    MILESTONE,
    RUNG,
    TRIAL,
    MultiObjectiveSearch,
    TrialConfig,
    TrialReport,
    build_scheduler,
    is_baseline,
    trial_name,
    trial_points,
)
from ray_platform.terminal import ProgressBar, write_line
from ray_platform.tracking import RunRecord, read_run_record
from ray_platform.units import plural

_STATE = "state.json"
logger = logging.getLogger(__name__)

TUNE = "tune"  # folder in output_dir with Ray Tune's state of the sweep
_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the driver, and with it all trials; Tune would wait for them
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # Progress prints them in one line
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Progress prints more
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
# The process of a trial takes no CPU, since its workers do. It runs on the driver's node, where a local MLflow file is, and takes
# a fraction of this resource (of which that node has 1) that limits how many trials run at the same time.
HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class TrialSegment:
    """Part of a trial between two milestones."""

    trial: str  # name of the trial
    values: FieldValues
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
class Sweep:
    """A search over `space` in which each trial runs `run_segment` from milestone to milestone."""

    config: SearchConfig
    run_segment: RunSegment
    space: Space
    baseline: FieldValues  # the recipe's values of the fields of the space
    needs: Sequence[ResourceRequest]  # resources of one trial, one request per group of nodes

    def concurrency(self) -> int:
        """Return the number of concurrent trials. Raises ConfigError if the cluster has too few resources for them."""
        requested, largest = self.config.max_concurrent, min(self.needs, key=ResourceRequest.capacity)
        capacity = largest.capacity()
        if capacity < max(1, requested) and not can_autoscale():
            needed = {kind: amount for kind, amount in largest.amounts.items() if amount}
            available = total_resources(largest.labels)
            raise ConfigError(
                f"max_concurrent: {plural(max(1, requested), 'trial')} of {_listed(needed)} each do not fit "
                f"{describe_nodes(largest.labels)}'s {_listed({kind: available.get(kind, 0) for kind in needed})}; "
                "each trains with its workers and their reads, then evaluates with evaluation.num_workers"
            )
        return requested or max(1, capacity)

    def run(self) -> list[TrialRecord]:
        """Run all trials to their end; if the sweep was run before, those that were interrupted or failed."""
        os.environ.update(_SETTINGS)
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # between two saves of the sweep's state
        random.seed(self.config.seed)  # used by population-based training
        logging.getLogger("ray.tune.logger").setLevel(logging.ERROR)  # about a file that a paused trial has not written yet
        path = storage.join(self.config.output_dir, TUNE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT")  # a trial's own process does next to nothing
            self._tuner(path).fit()
        filesystem, tune_path = storage.literal_filesystem(path)
        analysis = tune.ExperimentAnalysis(tune_path, storage_filesystem=filesystem)
        trials = sorted(analysis.trials, key=lambda trial: (len(str(trial)), str(trial)))
        return [self._record(trial) for trial in trials]

    def _tuner(self, path: str) -> tune.Tuner:
        concurrent, uses_optuna = self.concurrency(), self.config.search == "optuna"
        filesystem, folder = storage.literal_filesystem(self.config.output_dir)
        trainable, points = self._trainable(concurrent), {}
        if not uses_optuna:
            values = enumerate(trial_points(self.config, self.space, self.baseline))
            points = {TRIAL: tune.grid_search([{"number": number, "values": point} for number, point in values])}
        if _has_trials(path):
            tune_path = storage.join(folder, TUNE)
            return tune.Tuner.restore(
                tune_path, trainable, resume_errored=True, param_space=points, storage_filesystem=filesystem
            )
        storage.delete(path)  # of a sweep that was interrupted before its first trial
        return tune.Tuner(
            trainable,
            param_space=points,
            tune_config=tune.TuneConfig(
                search_alg=MultiObjectiveSearch(self.config, self.space, self.baseline) if uses_optuna else None,
                scheduler=build_scheduler(self.config, self.space),
                num_samples=self.config.num_trials if uses_optuna else 1,
                # Optuna proposes a trial only when it can start, with as many results as possible.
                max_concurrent_trials=concurrent if uses_optuna else None,
                trial_name_creator=lambda trial: trial_name(trial.config[TRIAL]["number"]),
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                storage_path=folder,
                storage_filesystem=filesystem,
                failure_config=tune.FailureConfig(max_failures=1),
                # Without a checkpoint_config's num_to_keep: Tune would delete checkpoints that its saved state still names, and a
                # sweep that is killed then could not resume their trials. Each is a line of JSON.
                # Tune reads what JsonLoggerCallback writes when it ends.
                callbacks=[Progress(self.config), JsonLoggerCallback()],
                verbose=0,
            ),
        )

    def _trainable(self, concurrent: int) -> Any:
        config, run_segment = self.config, self.run_segment

        def trial(trial_config: TrialConfig) -> None:
            run_trial(trial_config, run_segment, config)

        return tune.with_resources(trial, tune.PlacementGroupFactory([{HEAD: math.floor(9_900 / concurrent) / 10_000}]))

    def _record(self, trial: Trial) -> TrialRecord:
        report, has_failed = trial.last_result, trial.status == Trial.ERROR
        history: list[MilestoneEntry] = report.get(HISTORY, [])
        run = read_run_record(report["url"]) if history else None
        return {
            "name": str(trial),
            "state": "failed" if has_failed else "finished" if len(history) == self.config.num_milestones else "stopped",
            "default": is_baseline(trial),
            "error": _read_error(self.config, trial) if has_failed else "",
            "values": trial.config[TRIAL]["values"],
            "history": [
                HistoryEntry(step=one["step"], samples=one["samples"], seconds=one["seconds"], metrics=one["metrics"])
                for one in history
            ],
            "metrics": history[-1]["metrics"] if history else {},
            "run_id": run["run_id"] if run else "",
            "url": report.get("url", ""),
            "run_page": _run_page(run) if run and run["tracking_uri"] and run["run_id"] else "",
        }


def _run_page(run: RunRecord) -> str:
    """Return the URL of a trial's MLflow run; empty if MLflow does not answer."""
    from ray_platform.tracking.mlflow_tracker import run_page  # its import takes a second

    try:
        return run_page(run)
    except Exception as error:  # the sweep has finished, and its results are known
        logger.warning("tracking: the address of a trial's run is not known: %s", one_line(error, 200))
        return ""


class Progress(tune.Callback):
    """Prints a line for every report and every failure, and shows how many trials ended."""

    def __init__(self, config: SearchConfig) -> None:
        self.config, self.bar = config, ProgressBar()

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: TrialReport, **info: Any) -> None:
        last = result[HISTORY][-1]
        metrics = "  ".join(f"{metric} {last['metrics'][metric]:.4g}" for metric in self.config.objectives)
        progress = f"milestone {last['milestone']}/{self.config.num_milestones}, step {last['step']}"
        write_line(f"{trial}  {progress}  {metrics}")
        self.bar.update("trials", sum(other.is_finished() for other in trials), max(len(trials), self.config.num_trials))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        write_line(f"{trial} failed: {_read_error(self.config, trial)}")


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}s" for kind, amount in resources.items())


def _has_trials(path: str) -> bool:
    """Return whether Ray Tune can restore the sweep: it starts a new one, of a single trial, if its state has no trials."""
    if not storage.exists(path):
        return False
    states = storage.list_folder(path, "experiment_state-*.json")
    return bool(states) and bool(storage.read_json(states[-1].url)["trial_data"])


def _error_url(config: SearchConfig, trial: str) -> str:
    """Return the URL of the file with the error of a trial."""
    return storage.join(config.output_dir, "trials", f"{trial}.error")


def _read_error(config: SearchConfig, trial: Trial) -> str:
    url = _error_url(config, str(trial))
    return storage.read_bytes(url).decode() if storage.exists(url) else "its process died"


# --- A trial, in its own process ------------------------------------------------------------------------------------------------


def run_trial(config: TrialConfig, run_segment: RunSegment, search: SearchConfig) -> None:
    """Run a trial and report its results at every milestone. When it fails, write the cause to `_error_url` in one line."""
    name = tune.get_context().get_trial_name()
    url = _error_url(search, name)
    storage.delete(url)  # of the previous attempt
    try:
        _run_segments(name, config[TRIAL]["values"], run_segment, search)
    except Exception as error:
        storage.write_bytes(url, describe_error(error).encode())
        raise


def _run_segments(name: str, values: FieldValues, run_segment: RunSegment, search: SearchConfig) -> None:
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
        # The complete history each time: Ray Tune keeps only the last report of a trial.
        progress = {MILESTONE: entry["milestone"], RUNG: entry["rung"], HISTORY: list(state.history), "url": folder}
        with tempfile.TemporaryDirectory(prefix="trial_") as scratch:
            (Path(scratch) / _STATE).write_text(json.dumps(asdict(state)))
            tune.report({**entry["metrics"], **progress}, checkpoint=tune.Checkpoint.from_directory(scratch))


@dataclass(frozen=True)
class _TrialState:
    """Progress of a trial, as Ray Tune's checkpoint holds it."""

    trial: str
    origin: str = ""  # as in TrialSegment
    checkpoint: str = ""
    seconds: float = 0.0
    history: tuple[MilestoneEntry, ...] = ()


def _load_state(trial: str) -> _TrialState:
    """Return the state in Ray Tune's checkpoint. A clone has the results of the other trial, whose checkpoint is its origin."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return _TrialState(trial)
    with checkpoint.as_directory() as folder:
        saved = json.loads((Path(folder) / _STATE).read_text())
    origin = saved["origin"] if saved["trial"] == trial else saved["checkpoint"]
    return _TrialState(trial, origin, saved["checkpoint"], saved["seconds"], tuple(saved["history"]))
