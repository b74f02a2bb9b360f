"""A sweep from its configuration to its report."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, cast

from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.evaluation.headline import RETRIEVAL
from diffdis_platform.evaluation.quality import read_prompts
from diffdis_platform.evaluation.run import open_sets
from diffdis_platform.sweeping.fields import open_space
from diffdis_platform.sweeping.trial import TrialJob, needs, steps
from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.json_values import first_difference, to_json, with_defaults
from ray_platform.metric_registry import check_declared
from ray_platform.redaction import redacted_values
from ray_platform.report.records import SweepDetails
from ray_platform.report.sweep import sweep_files, sweep_page
from ray_platform.sweep.pareto import best, pareto_front
from ray_platform.sweep.schedulers import milestones
from ray_platform.sweep.space import Space, describe
from ray_platform.sweep.sweep import Outcome, Sweep
from ray_platform.sweep.trial import Segment
from ray_platform.terminal import render_table
from ray_platform.tracking import (
    RUN_RECORD,
    RunMetadata,
    RunRecord,
    Tracker,
    read_run_record,
    run_record,
    start_run,
    tracking_uri,
)
from ray_platform.tracking.run_metadata import append_command, code_version, dated_name, run_tags

REPORT, DETAILS, BEGUN = "report.html", "details.json", "sweep.json"

_NOT_TRACKED = RunRecord(tracking_uri="none", experiment="none", run_id="none")  # for checks before a run exists


@dataclass(frozen=True)
class Plan:
    """A sweep that was checked."""

    config: SweepConfig
    recipe: str
    space: Space
    default: Mapping[str, Any]  # the recipe's own values

    def sweep(self, tracked: RunRecord) -> Sweep:
        config = self.config
        return Sweep(
            job=TrialJob(config, self.recipe, tracked),
            output_dir=config.output_dir,
            space=self.space,
            default=self.default,
            objectives=config.objectives,
            search=config.search,
            scheduler=config.scheduler,
            num_trials=config.num_trials,
            num_milestones=config.num_milestones,
            reduction=config.reduction,
            seed=config.seed,
            needs=needs(config),
            max_concurrent=config.max_concurrent,
        )


def plan(config: SweepConfig, recipe: str) -> Plan:
    """After every check that needs no cluster. Raises ConfigError and DataError."""
    if config.pretrain.train.elastic:
        raise ConfigError("pretrain.train.num_workers: a sweep's trials have a fixed number of workers; give one number")
    space, default = open_space(config)
    first = milestones(config.scheduler, config.num_milestones, config.reduction)[0]
    if steps(config.pretrain, config.samples) * first < 1:
        raise ConfigError(f"samples: {config.samples} give less than a step to the first of {config.num_milestones} milestones")
    tracking_uri(config.tracking, config.output_dir)
    made = Plan(config, recipe, space, default)
    job = TrialJob(config, recipe, _NOT_TRACKED)
    job.pretrain(Segment("", default, storage.join(config.output_dir, "trials"), "", 1.0)).run(recipe).check()
    sets, _ = open_sets(config.evaluation)
    if config.evaluation.quality.prompts:
        read_prompts(config.evaluation.quality)
    _check_objectives(config, {data.task for data in sets.values()})
    if config.search == "grid":
        made.sweep(_NOT_TRACKED).points()
    _check_same(config)
    return made


def _check_objectives(config: SweepConfig, tasks: set[str]) -> None:
    """Of those by which models are compared, each needs something to be measured on; what else there is shows at the first
    milestone."""
    check_declared(config.objectives)
    for metric in config.objectives:
        if metric == "accuracy" and "zeroshot_classification" not in tasks:
            raise ConfigError("objectives: accuracy needs a zero-shot set in evaluation.suite")
        if metric in RETRIEVAL and "zeroshot_retrieval" not in tasks:
            raise ConfigError(f"objectives: {metric} needs a retrieval set in evaluation.suite")
        if metric.partition("_")[0] in ("fd", "fid", "kid", "alignment") and not config.evaluation.quality.prompts:
            raise ConfigError(f"objectives: {metric} needs evaluation.quality.prompts and evaluation.quality.reference")


def _check_same(config: SweepConfig) -> None:
    """A sweep that was begun in output_dir goes on as it was begun."""
    url = storage.join(config.output_dir, BEGUN)
    if not storage.exists(url):
        return
    begun, now = storage.read_json(url), json.loads(to_json(_lasting(config)))
    for part, defaults in (("pretrain", PretrainConfig()), ("evaluation", EvalConfig())):  # fields that the code got since
        begun[part] = with_defaults(begun[part], json.loads(to_json(asdict(defaults))))
    if difference := first_difference(begun, now):
        field, one, other = difference
        raise ConfigError(
            f"{field}: {other}, but the sweep in {config.output_dir} was begun with {one}; give that again, or another output_dir"
        )


def _lasting(config: SweepConfig) -> dict[str, Any]:
    """What may not change while a sweep lasts."""
    values = redacted_values(asdict(config))
    return {name: value for name, value in values.items() if name not in ("max_concurrent", "registered_model", "tracking")}


def run(made: Plan, yaml: str, command: str) -> dict[str, Any]:
    """Needs a running Ray. Writes details.json and report.html; returns the report's details. The same call goes on.

    `yaml` and `command`: the resolved configuration and what was typed, to be kept with the results.
    """
    config, begun = made.config, time.monotonic()
    made.sweep(_NOT_TRACKED).concurrency()  # before anything is written
    storage.write_bytes(storage.join(config.output_dir, BEGUN), to_json(_lasting(config)))
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), yaml.encode())
    known = read_run_record(config.output_dir)
    metadata = _run_metadata(config, made.recipe, command)
    with start_run(config.tracking, config.output_dir, metadata, run_id=known["run_id"] if known else "", record=True) as tracker:
        outcomes = made.sweep(run_record(config.tracking, config.output_dir, tracker)).run()
        details = _details(made, outcomes, command, time.monotonic() - begun)
        storage.write_bytes(storage.join(config.output_dir, DETAILS), to_json(details))
        storage.write_bytes(storage.join(config.output_dir, REPORT), sweep_page(cast(SweepDetails, details)).encode())
        _track(tracker, config, details)
    return details


def _run_metadata(config: SweepConfig, recipe: str, command: str) -> RunMetadata:
    text = f"A sweep by the recipe `{recipe}`; its trials are the runs below this one. Report: `{config.output_dir}/{REPORT}`."
    return RunMetadata(
        dated_name(recipe),
        append_command(text, command),
        run_tags(recipe, config.output_dir, code_version()),
        {"recipe": recipe, **asdict(config)},
    )


def _details(made: Plan, outcomes: list[Outcome], command: str, seconds: float) -> dict[str, Any]:
    """What the report shows, in plain JSON types. Front and best ones are over the trials that had their whole budget."""
    config = made.config
    trials = [_trial(outcome) for outcome in outcomes]
    whole = {trial["name"]: trial["metrics"] for trial in trials if trial["state"] == "finished"}
    return {
        "title": f"Sweep of {made.recipe}",
        "created": datetime.now().isoformat(timespec="seconds"),
        "seconds": round(seconds, 1),
        "code_version": code_version(),
        "command": command,
        "recipe": made.recipe,
        "objectives": [{"metric": metric, "mode": mode} for metric, mode in config.objectives.items()],
        "space": describe(made.space),
        "budget_samples": config.samples,
        "scheduler": config.scheduler,
        "search": config.search,
        "trials": trials,
        "front": pareto_front(whole, config.objectives),
        "best": {metric: best(whole, metric, mode) for metric, mode in config.objectives.items()} if whole else {},
    }


def _trial(outcome: Outcome) -> dict[str, Any]:
    url = storage.join(outcome.url, RUN_RECORD) if outcome.url else ""
    run_id = storage.read_json(url)["run_id"] if url and storage.exists(url) else ""
    return {
        "name": outcome.name,
        "state": outcome.state,
        "default": outcome.default,
        "error": outcome.error,
        "values": dict(outcome.values),
        "history": [{key: entry[key] for key in ("step", "samples", "seconds", "metrics")} for entry in outcome.history],
        "metrics": outcome.history[-1]["metrics"] if outcome.history else {},
        "run_id": run_id,
        "url": outcome.url,
    }


def _track(tracker: Tracker, config: SweepConfig, details: Mapping[str, Any]) -> None:
    """Report, pictures and best values on the sweep's run; the best trials and the front as versions of a registered model."""
    trials = {trial["name"]: trial for trial in details["trials"]}
    for metric, name in details["best"].items():
        tracker.log_metrics({f"best/{metric}": trials[name]["metrics"][metric]}, 0)
    record = cast(SweepDetails, details)
    files = {REPORT: sweep_page(record), **sweep_files(record)}
    for name, content in ((DETAILS, to_json(details)), *((name, text.encode()) for name, text in files.items())):
        tracker.log_bytes(content, name)
    for name, roles in _roles(details).items():
        trial = trials[name]
        metrics = {metric: f"{trial['metrics'][metric]:.6g}" for metric in config.objectives}
        source = storage.join(trial["url"], "export")  # counts where trials leave no model in MLflow
        tags = {"roles": ", ".join(roles), "trial": name, "sweep": tracker.run_id()} | metrics
        if config.registered_model and trial["run_id"]:
            tracker.register_model(config.registered_model, source, trial["run_id"], tags)


def _roles(details: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each trial that is worth keeping is."""
    roles: dict[str, list[str]] = {}
    for metric, name in details["best"].items():
        roles.setdefault(name, []).append(f"best {metric}")
    for name in details["front"]:
        roles.setdefault(name, []).append("pareto front")
    return roles


def table(details: Mapping[str, Any]) -> str:
    """For the terminal: a row a trial."""
    metrics, roles = [objective["metric"] for objective in details["objectives"]], _roles(details)
    rows = [["", "", "samples", *metrics, ""]]
    for trial in details["trials"]:
        samples = trial["history"][-1]["samples"] if trial["history"] else 0
        figures = [f"{trial['metrics'][m]:.4g}" if m in trial["metrics"] else "-" for m in metrics]
        notes = [*(["recipe's own values"] if trial["default"] else []), *roles.get(trial["name"], [])]
        rows.append([trial["name"], trial["state"], f"{samples:,}", *figures, ", ".join(notes)])
    return render_table(rows)
