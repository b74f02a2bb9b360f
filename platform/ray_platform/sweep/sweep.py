"""A sweep: concurrent trials on Ray Tune. Running it again resumes trials that were interrupted or failed."""

import logging
import math
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.logger import JsonLoggerCallback

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.placement import ResourceRequest, can_autoscale, describe_nodes, total_resources
from ray_platform.sweep.config import SearchConfig
from ray_platform.sweep.schedulers import HISTORY, build_scheduler, is_baseline, trial_name
from ray_platform.sweep.search import TRIAL, MultiObjectiveSearch, trial_config, trial_points
from ray_platform.sweep.space import Space
from ray_platform.sweep.trial import MilestoneEntry, RunSegment, error_url, run_trial

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
class TrialOutcome:
    """Result of a trial."""

    name: str
    is_baseline: bool
    state: Literal["finished", "stopped", "failed"]
    error: str  # one line
    values: Mapping[str, Any]
    history: list[MilestoneEntry]
    url: str  # folder of the trial; empty if it reported nothing


@dataclass(frozen=True)
class Sweep:
    """A search over `space` in which each trial runs `run_segment` from milestone to milestone."""

    config: SearchConfig
    run_segment: RunSegment
    space: Space
    baseline: Mapping[str, Any]  # the recipe's values of the fields of the space
    needs: Sequence[ResourceRequest]  # resources of one trial, one request per group of nodes

    def concurrency(self) -> int:
        """Return the number of concurrent trials. Raises ConfigError if the cluster has too few resources for them."""
        requested, largest = self.config.max_concurrent, min(self.needs, key=ResourceRequest.capacity)
        capacity = largest.capacity()
        if capacity < max(1, requested) and not can_autoscale():
            needed = {kind: amount for kind, amount in largest.amounts.items() if amount}
            available = total_resources(largest.labels)
            raise ConfigError(
                f"max_concurrent: {max(1, requested)} trials of {_listed(needed)} each do not fit "
                f"{describe_nodes(largest.labels)}'s {_listed({kind: available.get(kind, 0) for kind in needed})}; "
                "each trains with its workers and their reads, then evaluates with evaluation.num_workers"
            )
        return requested or max(1, capacity)

    def run(self) -> list[TrialOutcome]:
        """Run all trials to their end; if the sweep was run before, those that were interrupted or failed."""
        os.environ.update(_SETTINGS)
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # between two saves of the sweep's state
        random.seed(self.config.seed)  # used by population-based training
        logging.getLogger("ray.tune.logger").setLevel(logging.ERROR)  # about a file that a paused trial has not written yet
        path = storage.join(self.config.output_dir, TUNE)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT")  # a trial's own process does next to nothing
            self._tuner(path).fit()
        trials = sorted(tune.ExperimentAnalysis(path).trials, key=lambda trial: (len(str(trial)), str(trial)))
        return [self._outcome(trial) for trial in trials]

    def _tuner(self, path: str) -> tune.Tuner:
        concurrent, uses_optuna = self.concurrency(), self.config.search == "optuna"
        trainable, points = self._trainable(concurrent), {} if uses_optuna else self._points()
        if _has_trials(path):
            return tune.Tuner.restore(path, trainable, resume_errored=True, param_space=points)
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
                trial_name_creator=_name_trial,
                trial_dirname_creator=str,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                storage_path=self.config.output_dir,
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

        def trial(trial_config: dict[str, Any]) -> None:
            run_trial(trial_config, run_segment, config)

        return tune.with_resources(trial, tune.PlacementGroupFactory([{HEAD: math.floor(9_900 / concurrent) / 10_000}]))

    def _points(self) -> dict[str, Any]:
        points = trial_points(self.config, self.space, self.baseline)
        return {TRIAL: tune.grid_search([trial_config(n, point)[TRIAL] for n, point in enumerate(points)])}

    def _outcome(self, trial: Trial) -> TrialOutcome:
        history = trial.last_result.get(HISTORY, [])
        has_failed, is_complete = trial.status == Trial.ERROR, len(history) == self.config.num_milestones
        return TrialOutcome(
            name=str(trial),
            is_baseline=is_baseline(trial),
            state="failed" if has_failed else "finished" if is_complete else "stopped",
            error=_read_error(self.config, trial) if has_failed else "",
            values=trial.config[TRIAL]["values"],
            history=history,
            url=trial.last_result.get("url", ""),
        )


class Progress(tune.Callback):
    """Prints a line for every report and every failure."""

    def __init__(self, config: SearchConfig) -> None:
        self.config = config

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        last = result[HISTORY][-1]
        metrics = "  ".join(f"{metric} {last['metrics'][metric]:.4g}" for metric in self.config.objectives)
        num_ended = sum(other.is_finished() for other in trials)
        progress = f"milestone {last['milestone']}/{self.config.num_milestones}, step {last['step']}"
        print(f"{trial}  {progress}  {metrics}  {num_ended} of {len(trials)} trials ended", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        print(f"{trial} failed: {_read_error(self.config, trial)}", flush=True)


def _name_trial(trial: Trial) -> str:
    return trial_name(trial.config[TRIAL]["number"])


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}s" for kind, amount in resources.items())


def _has_trials(path: str) -> bool:
    """Return whether Ray Tune can restore the sweep: it starts a new one, of a single trial, if its state has no trials."""
    if not storage.exists(path):
        return False
    states = storage.list_files(storage.join(path, "experiment_state-*.json"))
    return bool(states) and bool(storage.read_json(states[-1].url)["trial_data"])


def _read_error(config: SearchConfig, trial: Trial) -> str:
    url = error_url(config.output_dir, str(trial))
    return storage.read_bytes(url).decode() if storage.exists(url) else "its process died"
