"""A sweep from its config to its report: trials that are pretrainings and evaluations, each up to the next milestone."""

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib import metadata
from typing import Any, cast

from diffdis_platform.config.evaluate import EvalConfig, network_name
from diffdis_platform.config.parse import with_fields
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.evaluation.datasets import open_sets
from diffdis_platform.evaluation.headline import RETRIEVAL_METRICS, headline
from diffdis_platform.evaluation.quality import read_prompts
from diffdis_platform.evaluation.run import evaluate, plan_evaluation
from diffdis_platform.parent_run import start_parent_run
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.results import metrics_for_tracking
from ray_platform.formats import FileFormat
from ray_platform.json_values import first_difference, to_json, with_defaults
from ray_platform.metric_registry import check_declared
from ray_platform.placement import ResourceRequest
from ray_platform.redaction import redacted_values
from ray_platform.report.records import SweepDetails, TrialRecord
from ray_platform.report.sweep import sweep_files, sweep_page
from ray_platform.sweep.config import Choice, Dimension, FieldValues, Space, describe_space, parse_dimension
from ray_platform.sweep.search import best_point, pareto_front, trial_points
from ray_platform.sweep.sweep import SegmentResult, Sweep, TrialSegment
from ray_platform.terminal import render_table
from ray_platform.tracking import RUN_RECORD, Tracker, TrackingConfig, start_run, tracking_uri
from ray_platform.tracking.delivery import check_trackers
from ray_platform.tracking.run_metadata import code_version
from ray_platform.train import checkpoint_format

REPORT, DETAILS, SETTINGS = "report.html", "details.json", "sweep.json"
DETAILS_FORMAT = FileFormat("sweep result")
# Ray Tune's saved state names functions of this code and types of Ray: another version of either cannot resume it.
VERSION = {"format_version": 2, "ray_version": metadata.version("ray")}
# Fields that the sweep sets, or that must be equal for all trials.
_FIXED = (
    "output_dir", "tracking", "train.num_steps", "train.stop_at_step", "train.resume", "train.num_workers",
    "train.cpus_per_worker", "train.gpus_per_worker", "data.reads_per_rank", "data.cpus_per_read", "evaluation.checkpoint",
    "evaluation.output_dir", "evaluation.tracking", "evaluation.num_workers", "evaluation.cpus_per_worker",
    "evaluation.gpus_per_worker", "evaluation.quality.reference", "evaluation.quality.num_reference",
)  # fmt: skip


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose config was checked."""

    config: SweepConfig
    recipe: str
    space: Space
    baseline: FieldValues  # the recipe's values of the fields of the space

    def sweep(self, tracking: TrackingConfig) -> Sweep:
        runner = TrialRunner(self.config, self.recipe, tracking)
        return Sweep(self.config, runner, self.space, self.baseline, trial_resources(self.config))


# --- Checks before anything starts ----------------------------------------------------------------------------------------------


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
    check_trackers(config.tracking, config.output_dir)
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


def open_space(config: SweepConfig) -> tuple[dict[str, Dimension], FieldValues]:
    """Return the search space, and the recipe's values of its fields in JSON types.

    Raises:
        ConfigError: a field that does not exist or that the sweep sets, or a value or an end of a range that is not valid
            while all other fields have the recipe's values.
    """
    space: dict[str, Dimension] = {}
    baseline = {}
    for field, spec in config.space.items():
        if any(field == fixed or field.startswith(f"{fixed}.") for fixed in _FIXED):
            raise ConfigError(f"space.{field}: the sweep sets it, for all trials alike; remove it from the space")
        dimension = parse_dimension(field, spec)
        values = dimension.values if isinstance(dimension, Choice) else (dimension.low, dimension.high)
        for value in values:
            try:
                configure(config, {field: value})
            except ConfigError as error:
                raise ConfigError(f"space.{field}: {json.dumps(value)} is not valid: {error}") from None
        default = _recipe_value(config, field)
        if isinstance(default, tuple):
            lists_given = any(isinstance(value, list | tuple) for value in values)
            default = list(default) if lists_given or len(default) != 1 else default[0]
        if isinstance(default, float) and not isinstance(dimension, Choice):  # 1 to 4 includes 1.5
            dimension = replace(dimension, low=float(dimension.low), high=float(dimension.high))
        space[field], baseline[field] = dimension, default
    return space, baseline


def configure(config: SweepConfig, values: FieldValues) -> tuple[PretrainConfig, EvalConfig]:
    """Return the configs of a trial with these values. For a field that is a list, a scalar stands for a list of one.

    Raises:
        ConfigError: a field that does not exist, or a value that is not valid.
    """
    values = {
        field: [value] if isinstance(_recipe_value(config, field), tuple) and not isinstance(value, list | tuple) else value
        for field, value in values.items()
    }
    pretrain = {field: value for field, value in values.items() if not field.startswith("evaluation.")}
    evaluation = {field.removeprefix("evaluation."): value for field, value in values.items() if field not in pretrain}
    return with_fields(config.pretrain, pretrain), with_fields(config.evaluation, evaluation)


def _recipe_value(config: SweepConfig, field: str) -> Any:
    value: Any = config if field.startswith("evaluation.") else config.pretrain
    for name in field.split("."):
        value = getattr(value, name, None)
    return value


def training_steps(pretrain: PretrainConfig, samples: int) -> int:
    """Return the number of steps for a budget of samples. Raises ConfigError if it is smaller than a batch."""
    train = pretrain.train
    batch = train.global_batch_size or train.max_workers * train.micro_batch_size
    if samples < batch:
        raise ConfigError(f"samples: {samples} is less than a step's {batch}; use at least {batch}")
    return samples // batch


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


def settings(config: SweepConfig) -> bytes:
    """Return the content of sweep.json: the version, and the settings that must not change when a sweep is resumed."""
    values = redacted_values(asdict(config))
    for name in ("max_concurrent", "registered_model", "tracking"):
        del values[name]
    return to_json(VERSION | values)


def _check_settings(config: SweepConfig) -> None:
    """Compare the config with that of the sweep in output_dir. Raises ConfigError."""
    url = storage.join(config.output_dir, SETTINGS)
    if not storage.exists(url):
        return
    saved, current = storage.read_json(url) | VERSION, json.loads(settings(config))
    for part, defaults in (("pretrain", PretrainConfig()), ("evaluation", EvalConfig())):  # fields added to the code since
        saved[part] = with_defaults(saved[part], json.loads(to_json(asdict(defaults))))
    if difference := first_difference(saved, current):
        field, before, now = difference
        raise ConfigError(
            f"{field}: {now}, but the sweep in {config.output_dir} was started with {before}; restore that value, or give "
            "another output_dir"
        )


# --- A segment of a trial -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialRunner:
    """Trains and evaluates one segment of a trial (a `ray_platform.sweep.sweep.RunSegment`)."""

    config: SweepConfig
    recipe: str
    tracking: TrackingConfig  # of the trials, below the sweep's run

    def __call__(self, segment: TrialSegment) -> SegmentResult:
        """Train to the end of the segment and evaluate. Raises DataError if an objective was not measured."""
        self._adopt_tracked_run(segment)
        self.pretrain_config(segment).run(self.recipe).fit()
        url = checkpoint_format.list_checkpoints(segment.folder)[0]
        manifest = checkpoint_format.read_manifest(url)
        return SegmentResult(url, manifest.step, manifest.samples_seen, self._evaluate(segment, manifest.step))

    def pretrain_config(self, segment: TrialSegment) -> PretrainConfig:
        """Return the config that trains to the end of the segment. The learning rate schedule spans the complete budget."""
        pretrain, _ = configure(self.config, segment.values)
        train, num_steps = pretrain.train, training_steps(pretrain, self.config.samples)
        keep = train.keep_checkpoints
        if self.config.scheduler == "pbt":  # other trials may clone the checkpoint of any milestone
            keep = self.config.num_milestones + num_steps // train.checkpoint_every
        train = replace(
            train,
            num_steps=num_steps,
            stop_at_step=max(1, round(num_steps * segment.budget_fraction)),
            keep_checkpoints=keep,
            resume="auto" if checkpoint_format.list_checkpoints(segment.folder) else segment.origin or "auto",
        )
        return replace(pretrain, output_dir=segment.folder, train=train, tracking=replace(self.tracking, run_name=segment.trial))

    def evaluation_config(self, segment: TrialSegment, step: int) -> tuple[EvalConfig, str]:
        """Return the config that evaluates the model of a step, and the file through which all trials share the features of the
        real images; "" with several networks, whose features are not shared."""
        pretrain, evaluation = configure(self.config, segment.values)
        quality, (name, *others) = evaluation.quality, map(network_name, evaluation.quality.networks)
        shared = "" if others else storage.join(self.config.output_dir, f"reference_{name}_{pretrain.model.image_size}px.npz")
        if quality.prompts and shared and storage.exists(shared):
            quality = replace(quality, reference=shared, num_reference=0)
        evaluation = replace(
            evaluation,
            checkpoint=storage.join(segment.folder, "export"),
            output_dir=storage.join(segment.folder, "evaluations", checkpoint_format.checkpoint_name(step)),
            quality=quality,
            tracking=replace(self.tracking, run_name=segment.trial),
            num_workers=_evaluation_workers(self.config),
        )
        return evaluation, shared

    def _evaluate(self, segment: TrialSegment, step: int) -> Mapping[str, float]:
        evaluation, shared = self.evaluation_config(segment, step)
        details = evaluate(evaluation, plan_evaluation(evaluation))
        if details["failures"]:
            raise DataError("not everything was measured: " + "; ".join(details["failures"]))
        main_metrics = headline(details)
        metrics = metrics_for_tracking(details) | main_metrics
        if missing := [metric for metric in self.config.objectives if metric not in metrics]:
            raise DataError(f"objectives: {missing[0]} was not measured; use one of {', '.join(sorted(metrics))}")
        computed = storage.join(evaluation.output_dir, f"reference_{network_name(evaluation.quality.networks[0])}.npz")
        if shared and not storage.exists(shared) and storage.exists(computed):
            storage.write_bytes(shared, storage.read_bytes(computed))
        # Under names that are equal for all trials, whatever their guidance scale, so that MLflow can compare them.
        with start_run(evaluation.tracking, segment.folder, resume=True, record=True) as tracker:
            tracker.log_metrics({f"sweep/{name}": value for name, value in main_metrics.items()}, step)
        return metrics

    def _adopt_tracked_run(self, segment: TrialSegment) -> None:
        """Keep the trial's MLflow run when the trial, as a clone, starts in another folder."""
        url, trials = storage.join(segment.folder, RUN_RECORD), storage.join(self.config.output_dir, "trials")
        if storage.exists(url) or not storage.exists(trials):
            return
        if earlier := storage.list_folder(trials, f"{segment.trial}_*/{RUN_RECORD}"):
            storage.write_bytes(url, storage.read_bytes(earlier[0].url))


def trial_resources(config: SweepConfig) -> list[ResourceRequest]:
    """Return the resources of a trial, one request per group of nodes: the larger of what training and evaluation need."""
    evaluation, workers = config.evaluation, _evaluation_workers(config)
    amounts = {"CPU": workers * evaluation.cpus_per_worker, "GPU": workers * evaluation.gpus_per_worker}
    largest: dict[tuple[tuple[str, str], ...], dict[str, float]] = {}
    for need in (*_training_resources(config.pretrain), ResourceRequest(evaluation.placement, amounts)):
        group = largest.setdefault(tuple(sorted(need.labels.items())), {})
        group |= {kind: max(amount, group.get(kind, 0.0)) for kind, amount in need.amounts.items()}
    return [ResourceRequest(dict(labels), group) for labels, group in largest.items()]


def _evaluation_workers(config: SweepConfig) -> int:
    """Return evaluation.num_workers; if it is 0, as many as fit the resources of the training workers."""
    evaluation, training = config.evaluation, _training_resources(config.pretrain)[0].amounts
    needs = [(training["CPU"], evaluation.cpus_per_worker), (training["GPU"], evaluation.gpus_per_worker)]
    return evaluation.num_workers or max(1, min(int(available / need + 1e-6) for available, need in needs if need))


def _training_resources(pretrain: PretrainConfig) -> list[ResourceRequest]:
    """Return what the workers need, and what their reads need if those run on other nodes."""
    train, data = pretrain.train, pretrain.data
    cpus, gpus = train.max_workers * train.cpus_per_worker, float(train.max_workers * train.gpus_per_worker)
    reads = train.max_workers * sum(data.reads_per_pool) * data.cpus_per_read
    if data.placement == train.placement:
        return [ResourceRequest(train.placement, {"CPU": cpus + reads, "GPU": gpus})]
    return [ResourceRequest(train.placement, {"CPU": cpus, "GPU": gpus}), ResourceRequest(data.placement, {"CPU": reads})]


# --- The sweep and its report ---------------------------------------------------------------------------------------------------


def run_sweep(plan: SweepPlan, yaml: str, command: str) -> SweepDetails:
    """Run a sweep, or resume it, on the connected cluster, and return its details. Write details.json and report.html.

    `yaml` is the resolved config, saved as config.yaml; the report shows the `command` line.
    """
    config, start = plan.config, time.monotonic()
    plan.sweep(TrackingConfig()).concurrency()  # raises before anything is written
    storage.write_bytes(storage.join(config.output_dir, SETTINGS), settings(config))
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), yaml.encode())
    params = {"recipe": plan.recipe, **asdict(config)}
    with start_parent_run(config, "sweep", plan.recipe, command, params) as (tracker, tracking):
        details = _build_details(plan, plan.sweep(tracking).run(), command, time.monotonic() - start)
        files = {DETAILS: to_json(DETAILS_FORMAT.stamp(details)), REPORT: sweep_page(details).encode()}
        for name, content in files.items():
            storage.write_bytes(storage.join(config.output_dir, name), content)
        _track(tracker, config, details, files | {name: text.encode() for name, text in sweep_files(details).items()})
    return details


def rebuild_report(output_dir: str) -> SweepDetails | None:
    """If output_dir has a finished sweep of another version, write its report.html anew and return its details, else None.

    Raises:
        ConfigError: output_dir has an unfinished sweep of another version, which cannot be resumed.
    """
    url, details_url = storage.join(output_dir, SETTINGS), storage.join(output_dir, DETAILS)
    if not storage.exists(url):
        return None
    saved = storage.read_json(url)
    version = {"format_version": saved.get("format_version", 1), "ray_version": saved.get("ray_version", "unknown")}
    if version == VERSION:
        return None
    if not storage.exists(details_url):
        raise ConfigError(
            f"output_dir: {output_dir} has an unfinished sweep of another version (format {version['format_version']}, Ray "
            f"{version['ray_version']}); finish it with that version, or give another output_dir"
        )
    values = storage.read_json(details_url)
    DETAILS_FORMAT.check_version(values, details_url)
    details = cast(SweepDetails, values)
    storage.write_bytes(storage.join(output_dir, REPORT), sweep_page(details).encode())
    return details


def _build_details(plan: SweepPlan, trials: list[TrialRecord], command: str, seconds: float) -> SweepDetails:
    """Return the content of details.json. Pareto front and best trials are among the trials that finished."""
    config = plan.config
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


def _track(tracker: Tracker, config: SweepConfig, details: SweepDetails, files: Mapping[str, bytes]) -> None:
    """Log the report, figures and best values; register the best trials and the Pareto front as versions of a model."""
    trials = {trial["name"]: trial for trial in details["trials"]}
    for metric, name in details["best"].items():
        if (value := trials[name]["metrics"][metric]) is not None:
            tracker.log_metrics({f"best/{metric}": value}, 0)
    for name, content in files.items():
        tracker.log_bytes(content, name)
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
