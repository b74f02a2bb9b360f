"""A sweep from its config to its report."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from typing import Any, cast

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.evaluation.headline import RETRIEVAL_METRICS
from diffdis_platform.evaluation.quality import read_prompts
from diffdis_platform.evaluation.run import open_sets
from diffdis_platform.parent_run import start_parent_run
from diffdis_platform.sweeping.fields import open_space
from diffdis_platform.sweeping.trial import TrialRunner, training_steps, trial_resources
from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.json_values import first_difference, to_json, with_defaults
from ray_platform.metric_registry import check_declared
from ray_platform.redaction import redacted_values
from ray_platform.report.records import HistoryEntry, SweepDetails, TrialRecord
from ray_platform.report.sweep import sweep_files, sweep_page
from ray_platform.sweep.search import best_point, pareto_front, trial_points
from ray_platform.sweep.space import Space, describe_space
from ray_platform.sweep.sweep import Sweep, TrialOutcome
from ray_platform.sweep.trial import TrialSegment
from ray_platform.terminal import render_table
from ray_platform.tracking import Tracker, TrackingConfig, read_run_record, tracking_uri
from ray_platform.tracking.run_metadata import code_version

REPORT, DETAILS, SETTINGS = "report.html", "details.json", "sweep.json"
# Ray Tune's saved state names functions of this code and types of Ray: another version of either cannot resume it.
_VERSION = {"format_version": 2, "ray_version": metadata.version("ray")}


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose config was checked."""

    config: SweepConfig
    recipe: str
    space: Space
    baseline: Mapping[str, Any]  # the recipe's values of the fields of the space

    def sweep(self, tracking: TrackingConfig) -> Sweep:
        runner = TrialRunner(self.config, self.recipe, tracking)
        return Sweep(self.config, runner, self.space, self.baseline, trial_resources(self.config))


def plan_sweep(config: SweepConfig, recipe: str) -> SweepPlan:
    """Check everything that needs no cluster. Raises ConfigError and DataError."""
    if config.pretrain.train.elastic:
        raise ConfigError("pretrain.train.num_workers: a sweep's trials have a fixed number of workers; give one number")
    space, baseline = open_space(config)
    if training_steps(config.pretrain, config.samples) * config.budget_fractions[0] < 1:
        raise ConfigError(
            f"samples: {config.samples} give less than a step to the first of {config.num_milestones} milestones; use more"
        )
    tracking_uri(config.tracking, config.output_dir)
    segment = TrialSegment("", baseline, storage.join(config.output_dir, "trials"), "", 1.0)
    TrialRunner(config, recipe, TrackingConfig()).pretrain_config(segment).run(recipe).check()
    sets, _ = open_sets(config.evaluation)
    if config.evaluation.quality.prompts:
        read_prompts(config.evaluation.quality)
    _check_objectives(config, {data.task for data in sets.values()})
    if config.search == "grid":
        trial_points(config, space, baseline)
    _check_settings(config)
    return SweepPlan(config, recipe, space, baseline)


def run_sweep(plan: SweepPlan, yaml: str, command: str) -> SweepDetails:
    """Run a sweep, or resume it, on the connected cluster. Write details.json and report.html, and return the details.

    Args:
        plan: the checked sweep.
        yaml: resolved config, saved as config.yaml.
        command: command line, shown in the report.
    """
    config, start = plan.config, time.monotonic()
    plan.sweep(TrackingConfig()).concurrency()  # raises before anything is written
    storage.write_bytes(storage.join(config.output_dir, SETTINGS), to_json(_VERSION | _settings(config)))
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), yaml.encode())
    description = (
        f"A sweep by the recipe `{plan.recipe}`; its trials are the runs below this one. Report: `{config.output_dir}/{REPORT}`."
    )
    params = {"recipe": plan.recipe, **asdict(config)}
    parent = start_parent_run(config.tracking, config.output_dir, plan.recipe, description, command, params)
    with parent as (tracker, tracking):
        outcomes = plan.sweep(tracking).run()
        details = _build_details(plan, outcomes, command, time.monotonic() - start)
        storage.write_bytes(storage.join(config.output_dir, DETAILS), to_json(details))
        storage.write_bytes(storage.join(config.output_dir, REPORT), sweep_page(details).encode())
        _track(tracker, config, details)
    return details


def rebuild_report(output_dir: str) -> SweepDetails | None:
    """If output_dir has a finished sweep of another version, write its report.html anew and return its details.

    Returns:
        None if output_dir has no sweep, or one that this version can run.

    Raises:
        ConfigError: output_dir has an unfinished sweep of another version, which cannot be resumed.
    """
    url, details_url = storage.join(output_dir, SETTINGS), storage.join(output_dir, DETAILS)
    if not storage.exists(url):
        return None
    saved = storage.read_json(url)
    version = {"format_version": saved.get("format_version", 1), "ray_version": saved.get("ray_version", "unknown")}
    if version == _VERSION:
        return None
    if not storage.exists(details_url):
        raise ConfigError(
            f"output_dir: {output_dir} has an unfinished sweep of another version (format {version['format_version']}, Ray "
            f"{version['ray_version']}); finish it with that version, or give another output_dir"
        )
    details = cast(SweepDetails, storage.read_json(details_url))
    storage.write_bytes(storage.join(output_dir, REPORT), sweep_page(details).encode())
    return details


def _check_objectives(config: SweepConfig, tasks: set[str]) -> None:
    """Check that the evaluation measures the headline metrics among the objectives; others are checked at the first milestone."""
    check_declared(config.objectives)
    for metric in config.objectives:
        if metric == "accuracy" and "zeroshot_classification" not in tasks:
            raise ConfigError("objectives: accuracy needs a zero-shot set in evaluation.suite")
        if metric in RETRIEVAL_METRICS and "zeroshot_retrieval" not in tasks:
            raise ConfigError(f"objectives: {metric} needs a retrieval set in evaluation.suite")
        if metric.partition("_")[0] in ("fd", "fid", "kid", "alignment") and not config.evaluation.quality.prompts:
            raise ConfigError(f"objectives: {metric} needs evaluation.quality.prompts and evaluation.quality.reference")


def _settings(config: SweepConfig) -> dict[str, Any]:
    """Return the settings that must not change when a sweep is resumed."""
    values = redacted_values(asdict(config))
    return {name: value for name, value in values.items() if name not in ("max_concurrent", "registered_model", "tracking")}


def _check_settings(config: SweepConfig) -> None:
    """Compare the config with that of the sweep in output_dir. Raises ConfigError."""
    url = storage.join(config.output_dir, SETTINGS)
    if not storage.exists(url):
        return
    saved, current = storage.read_json(url), json.loads(to_json(_settings(config)))
    saved = {name: value for name, value in saved.items() if name not in _VERSION}
    for part, defaults in (("pretrain", PretrainConfig()), ("evaluation", EvalConfig())):  # fields added to the code since
        saved[part] = with_defaults(saved[part], json.loads(to_json(asdict(defaults))))
    if difference := first_difference(saved, current):
        field, before, now = difference
        raise ConfigError(
            f"{field}: {now}, but the sweep in {config.output_dir} was started with {before}; restore that value, or give "
            "another output_dir"
        )


def _build_details(plan: SweepPlan, outcomes: list[TrialOutcome], command: str, seconds: float) -> SweepDetails:
    """Return the content of details.json. Pareto front and best trials are among the trials that finished."""
    config = plan.config
    trials = [_trial_record(outcome) for outcome in outcomes]
    finished = {trial["name"]: trial["metrics"] for trial in trials if trial["state"] == "finished"}
    return {
        "title": f"Sweep of {plan.recipe}",
        "created": datetime.now().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "code_version": code_version(),
        "command": command,
        "recipe": plan.recipe,
        "objectives": [{"metric": metric, "mode": mode} for metric, mode in config.objectives.items()],
        "space": describe_space(plan.space),
        "budget_samples": config.samples,
        "scheduler": config.scheduler,
        "search": config.search,
        "trials": trials,
        "front": pareto_front(finished, config.objectives),
        "best": {metric: best_point(finished, metric, mode) for metric, mode in config.objectives.items()} if finished else {},
    }


def _trial_record(outcome: TrialOutcome) -> TrialRecord:
    run = read_run_record(outcome.url) if outcome.url else None
    return {
        "name": outcome.name,
        "state": outcome.state,
        "default": outcome.is_baseline,
        "error": outcome.error,
        "values": dict(outcome.values),
        "history": [
            HistoryEntry(step=one["step"], samples=one["samples"], seconds=one["seconds"], metrics=one["metrics"])
            for one in outcome.history
        ],
        "metrics": outcome.history[-1]["metrics"] if outcome.history else {},
        "run_id": run["run_id"] if run else "",
        "url": outcome.url,
    }


def _track(tracker: Tracker, config: SweepConfig, details: SweepDetails) -> None:
    """Log the report, figures and best values; register the best trials and the Pareto front as versions of a model."""
    trials = {trial["name"]: trial for trial in details["trials"]}
    for metric, name in details["best"].items():
        if (value := trials[name]["metrics"][metric]) is not None:
            tracker.log_metrics({f"best/{metric}": value}, 0)
    tracker.log_bytes(to_json(details), DETAILS)
    for file, text in {REPORT: sweep_page(details), **sweep_files(details)}.items():
        tracker.log_bytes(text.encode(), file)
    for name, roles in _trial_roles(details).items():
        trial = trials[name]
        if config.registered_model and trial["run_id"]:
            metrics = {metric: f"{trial['metrics'][metric]:.6g}" for metric in config.objectives}
            tags = {"roles": ", ".join(roles), "trial": name, "sweep": tracker.run_id()} | metrics
            export = storage.join(trial["url"], "export")  # used if trials log no model in MLflow
            tracker.register_model(config.registered_model, export, trial["run_id"], tags)


def _trial_roles(details: SweepDetails) -> dict[str, list[str]]:
    """Return why each notable trial is notable: trial -> [`best accuracy`, `pareto front`]."""
    roles: dict[str, list[str]] = {}
    for metric, name in details["best"].items():
        roles.setdefault(name, []).append(f"best {metric}")
    for name in details["front"]:
        roles.setdefault(name, []).append("pareto front")
    return roles


def format_trials(details: SweepDetails) -> str:
    """Return a table of the trials for the terminal."""
    metrics, roles = [objective["metric"] for objective in details["objectives"]], _trial_roles(details)
    rows = [["trial", "state", "samples", *metrics, ""]]
    for trial in details["trials"]:
        samples = trial["history"][-1]["samples"] if trial["history"] else 0
        values = [f"{trial['metrics'][m]:.4g}" if m in trial["metrics"] else "-" for m in metrics]
        notes = [*(["recipe's values"] if trial["default"] else []), *roles.get(trial["name"], [])]
        rows.append([trial["name"], trial["state"], f"{samples:,}", *values, ", ".join(notes)])
    return render_table(rows)
