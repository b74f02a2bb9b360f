"""A sweep: trials side by side on Ray Tune, restored where they were cut off."""

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
from ray_platform.placement import ResourceRequest, can_autoscale, describe_nodes, most_restrictive, total_resources
from ray_platform.sweep import search
from ray_platform.sweep.schedulers import HISTORY, SchedulerName, build_scheduler, is_default, milestones
from ray_platform.sweep.space import Space
from ray_platform.sweep.trial import Job, error_url, run_trial, trial_name

SearchName = Literal["grid", "random", "optuna"]

TUNE = "tune"  # folder in output_dir with the state of the sweep
_SETTINGS = {
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the driver, and with it all trials; Tune would wait for them
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # Progress does, in one line
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # Progress shows more
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
# A trial's own process takes no CPU: its workers do. It runs beside the driver, where an MLflow file is, and takes such a share
# of this resource, of which there is 1, that no more run than there is room for.
_HEAD = "node:__internal_head__"


@dataclass(frozen=True)
class Outcome:
    """Of a trial."""

    name: str
    default: bool  # it has the recipe's own values
    state: Literal["finished", "stopped", "failed"]
    error: str  # in one line
    values: Mapping[str, Any]
    history: list[dict[str, Any]]  # an entry a milestone: step, samples, seconds, metrics
    url: str  # its folder; empty: it reported nothing


@dataclass(frozen=True)
class Sweep:
    """What is tried, and how."""

    job: Job
    output_dir: str  # absolute folder or s3:// URL
    space: Space
    default: Mapping[str, Any]  # the recipe's own values of the space's fields
    objectives: Mapping[str, str]  # metric -> max or min
    search: SearchName
    scheduler: SchedulerName
    num_trials: int  # of a grid: 0, or as many as it has points
    num_milestones: int
    reduction: int  # of ASHA
    seed: int
    needs: Sequence[ResourceRequest]  # of one trial, each of other nodes
    max_concurrent: int  # 0: as many trials as there is room for

    def points(self) -> list[dict[str, Any]]:
        """Of a search that knows all its trials beforehand. Raises ConfigError."""
        if self.search == "random":
            return search.random(self.space, self.default, self.num_trials, self.seed)
        points = search.grid(self.space, self.default)
        if self.num_trials not in (0, len(points)):
            raise ConfigError(f"num_trials: {self.num_trials}, but the grid has {len(points)} points; give 0")
        return points

    def concurrency(self) -> int:
        """How many trials run side by side. Raises ConfigError where the cluster cannot hold so many, or not even one."""
        least = most_restrictive(self.needs)
        fitting = least.capacity()
        if fitting < max(1, self.max_concurrent) and not can_autoscale():
            need, there = {kind: share for kind, share in least.amounts.items() if share}, total_resources(least.labels)
            raise ConfigError(
                f"max_concurrent: {max(1, self.max_concurrent)} trials of {_listed(need)} each do not fit "
                f"{describe_nodes(least.labels)}'s {_listed({kind: there.get(kind, 0) for kind in need})}; "
                "each trains with its workers and their reads, then evaluates with evaluation.num_workers"
            )
        return self.max_concurrent or max(1, fitting)

    def run(self) -> list[Outcome]:
        """All trials to their ends; again after it was cut off, those that were not there yet, and those that failed."""
        os.environ.update(_SETTINGS)
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")  # between two saves of the sweep's state
        path = storage.join(self.output_dir, TUNE)
        concurrent = self.concurrency()
        random.seed(self.seed)  # population based training draws from it
        logging.getLogger("ray.tune.logger").setLevel(logging.ERROR)  # a file that a paused trial has not written yet
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Consider boosting PBT")  # a trial's own process does next to nothing
            self._tuner(path, concurrent).fit()
        trials = tune.ExperimentAnalysis(path).trials
        trials.sort(key=lambda trial: trial.config[search.TRIAL]["number"])
        return [_outcome(trial, self.num_milestones, self.output_dir) for trial in trials]

    def _tuner(self, path: str, concurrent: int) -> tune.Tuner:
        trainable, points = self._trainable(concurrent), self._param_space()
        if _has_trials(path):
            return tune.Tuner.restore(path, trainable, resume_errored=True, param_space=points)
        storage.delete(path)  # of one that was cut off before it had a trial
        return self._begun(trainable, points, concurrent)

    def _trainable(self, concurrent: int) -> Any:
        shares = milestones(self.scheduler, self.num_milestones, self.reduction)
        job, output_dir, reduction = self.job, self.output_dir, self.reduction

        def trial(config: dict[str, Any]) -> None:
            run_trial(config, job, output_dir, shares, reduction)

        share = math.floor(9_900 / concurrent) / 10_000
        return tune.with_resources(trial, tune.PlacementGroupFactory([{_HEAD: share}]))

    def _param_space(self) -> dict[str, Any]:
        if self.search == "optuna":
            return {}
        return {search.TRIAL: tune.grid_search([search.given(n, p)[search.TRIAL] for n, p in enumerate(self.points())])}

    def _begun(self, trainable: Any, points: dict[str, Any], concurrent: int) -> tune.Tuner:
        algorithm = None
        if self.search == "optuna":
            algorithm = search.MultiObjective(self.space, self.default, self.objectives, self.num_trials, self.seed)
        return tune.Tuner(
            trainable,
            param_space=points,
            tune_config=tune.TuneConfig(
                search_alg=algorithm,
                scheduler=build_scheduler(self.scheduler, self.objectives, self.space, self.num_milestones, self.reduction),
                num_samples=self.num_trials if algorithm else 1,
                max_concurrent_trials=concurrent if algorithm else None,  # it proposes when it has seen as much as it can
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=TUNE,
                storage_path=self.output_dir,
                failure_config=tune.FailureConfig(max_failures=1),
                # Without a checkpoint_config's num_to_keep: Tune would delete checkpoints that its saved state still names, and a
                # sweep that is killed then could not go on with their trials. Each is a line of JSON.
                # Tune reads what JsonLoggerCallback writes when it ends.
                callbacks=[Progress(list(self.objectives), self.num_milestones, self.output_dir), JsonLoggerCallback()],
                verbose=0,
            ),
        )


class Progress(tune.Callback):
    """A line for every report and every failure."""

    def __init__(self, shown: list[str], num_milestones: int, output_dir: str) -> None:
        self.shown, self.num_milestones, self.output_dir = shown, num_milestones, output_dir

    def on_trial_result(self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any) -> None:
        last = result[HISTORY][-1]
        figures = "  ".join(f"{metric} {last['metrics'][metric]:.4g}" for metric in self.shown)
        ended = sum(other.is_finished() for other in trials)
        where = f"milestone {last['milestone']}/{self.num_milestones}, step {last['step']}"
        print(f"{trial}  {where}  {figures}  {ended} of {len(trials)} trials ended", flush=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        print(f"{trial} failed: {_error(trial, self.output_dir)}", flush=True)


def _listed(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}s" for kind, amount in resources.items())


def _name(trial: Trial) -> str:
    return trial_name(trial.config[search.TRIAL]["number"])


def _has_trials(path: str) -> bool:
    """Whether there is a sweep to restore: Tune begins anew, with one trial, where its state has none."""
    if not storage.exists(path):
        return False
    states = storage.list_files(storage.join(path, "experiment_state-*.json"))
    return bool(states) and bool(storage.read_json(states[-1].url)["trial_data"])


def _outcome(trial: Trial, num_milestones: int, output_dir: str) -> Outcome:
    history = trial.last_result.get(HISTORY, [])
    failed = trial.status == Trial.ERROR
    done = len(history) == num_milestones
    return Outcome(
        _name(trial),
        is_default(trial),
        "failed" if failed else "finished" if done else "stopped",
        _error(trial, output_dir) if failed else "",
        trial.config[search.TRIAL]["values"],
        history,
        trial.last_result.get("url", ""),
    )


def _error(trial: Trial, output_dir: str) -> str:
    url = error_url(output_dir, _name(trial))
    return storage.read_bytes(url).decode() if storage.exists(url) else "its process died"
