"""An evaluation, from its configuration to its report."""

import base64
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace

import numpy as np

from diffdis.config import DiffDisConfig
from diffdis.export_folder import CONFIG_NAME, VERSION_KEY
from diffdis.metrics.zero_shot import ZERO_SHOT_METRICS
from diffdis.schedule import build_scheduler
from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.evaluation.datasets import OpenedSets, open_sets
from diffdis_platform.evaluation.measurements import RetrievalMeasurement, ZeroShotMeasurement
from diffdis_platform.evaluation.models import EvaluationModel, open_baseline, open_judge, open_model
from diffdis_platform.evaluation.quality import QualityMeasurement, read_prompts
from diffdis_platform.evaluation.results import EvaluationPlan, EvaluationResults, step_scores
from diffdis_platform.evaluation.units import build_unit, open_pool
from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.evaluate.results import (
    check_not_taken,
    metrics_for_tracking,
    results_folder,
    tags_for_tracking,
    write_results,
)
from ray_platform.evaluate.sets import EvaluationSet
from ray_platform.evaluate.unit_work import Thumbnails
from ray_platform.metric_registry import check_declared
from ray_platform.redaction import is_redacted, restored
from ray_platform.replicas import ReplicaPool, WorkUnit
from ray_platform.report.evaluation import evaluation_page
from ray_platform.report.records import EvaluationDetails, ExampleImage, StepScore
from ray_platform.tracking import RUN_RECORD, RunMetadata, TrackedData, start_run
from ray_platform.tracking.run_metadata import dated_name, run_tags
from ray_platform.train.checkpoint_format import list_checkpoints, read_manifest

REPORT = "report.html"


def plan_evaluation(config: EvalConfig, opened: OpenedSets | None = None) -> EvaluationPlan:
    """Return the plan after every check that needs no cluster; `opened` are the sets, if they are already open.

    Raises ConfigError and DataError.
    """
    check_declared(ZERO_SHOT_METRICS)
    sets, missing = opened or open_sets(config)
    prompts = read_prompts(config.quality) if config.quality.prompts else []  # fails before the checkpoint is exported
    model = open_model(config)
    baselines: list[EvaluationModel] = []
    for url in config.baselines:
        baselines.append(
            open_baseline(url, {model.name, *(baseline.name for baseline in baselines)}, config.resize, config.dtype)
        )
    check_not_taken([each.describe() for each in [model, *baselines]], config.output_dir)
    plan = EvaluationPlan(model, baselines, sets, failures=dict(missing))
    for data in sets.values():
        measurement = ZeroShotMeasurement if data.task == "zeroshot_classification" else RetrievalMeasurement
        for scorer in [*([model] if model.can_score else []), *baselines]:
            plan.add(measurement(scorer, data, config.allow_short, limit=config.limit))
        if model.can_score and model.settings:  # only a model with settings has noise
            plan.repeats += [measurement(model, data, config.allow_short, seed, config.limit) for seed in range(1, config.seeds)]
    plan.curve = _plan_curve(config, plan)
    if config.quality.prompts:
        if not model.can_generate:
            raise ConfigError(f"quality.prompts: a model that was trained for {model.task} cannot generate images; remove it")
        described = storage.read_json(storage.join(model.url, CONFIG_NAME))
        described.pop(VERSION_KEY, None)
        model_config = DiffDisConfig.from_dict(described)
        if config.quality.scheduler:
            try:
                build_scheduler(config.quality.scheduler, model_config.schedule)
            except ValueError as error:
                raise ConfigError(f"quality.{error}") from None
        judge = model if model.can_score else None
        if config.quality.clip:
            judge = open_judge(config.quality.clip, config.resize)
        ranker = _open_ranker(config, model)
        plan.quality = QualityMeasurement(
            model, judge, model_config.image_size, config.quality, prompts, config.output_dir, ranker
        )
    return plan


def _open_ranker(config: EvalConfig, model: EvaluationModel) -> EvaluationModel | None:
    """Return the model that chooses the best of several images; None: there is one image per prompt."""
    quality = config.quality
    if quality.best_of == 1:
        return None
    ranker = open_model(replace(config, checkpoint=quality.ranker, name="ranker")) if quality.ranker else model
    if not ranker.can_score:
        raise ConfigError(
            f"quality.best_of: {quality.best_of}, but a model that was trained for {ranker.task} cannot rank images; use 1, or "
            "set quality.ranker"
        )
    return ranker


def _plan_curve(config: EvalConfig, plan: EvaluationPlan) -> list[ZeroShotMeasurement]:
    """Plan accuracy against steps and draws. A model of the `clip` task has neither."""
    if not config.curve_set or plan.model.task == "clip" or not plan.model.can_score:
        return []
    data = plan.sets.get(config.curve_set)
    if data is None or data.task != "zeroshot_classification":
        raise ConfigError(
            f"curve_set: {config.curve_set} is not a zero-shot set of this evaluation; use one of {', '.join(plan.sets)}"
        )
    return [
        ZeroShotMeasurement(
            replace(plan.model, settings={"num_steps": steps, "num_draws": draws, "guidance": config.scoring.guidance}),
            data, config.allow_short, limit=config.limit,
        )
        for draws in config.curve_draws
        for steps in config.curve_steps
    ]  # fmt: skip


def configs_of_steps(config: EvalConfig) -> list[EvalConfig]:
    """Return a configuration for each checkpoint of the run that `steps` selects, by step.

    Raises ConfigError if there are none.
    """
    run = config.checkpoint.rstrip("/")
    checkpoints = {read_manifest(url).step: url for url in reversed(list_checkpoints(run))}  # of equal steps the newest one
    interval = 1 if config.steps == "all" else int(config.steps.removeprefix("every:"))
    selected = {step: url for step, url in sorted(checkpoints.items()) if step % interval == 0}
    if not selected:
        existing = ", ".join(map(str, sorted(checkpoints))) or "none"
        raise ConfigError(f"steps: {config.steps} selects no checkpoint of {run}; it has those of steps {existing}")
    return [
        replace(config, checkpoint=url, steps="", name=f"{config.name}-step-{step}" if config.name else "")
        for step, url in selected.items()
    ]


def evaluate_steps(config: EvalConfig, opened: OpenedSets) -> EvaluationDetails:
    """Evaluate several checkpoints of a run one after another on the `opened` sets. Return the details of the last one.

    They have the curve over the training, and the failures of all checkpoints.
    """
    first, *others = configs_of_steps(config)
    details = evaluate(first, plan_evaluation(first, opened))
    failures = [*details.get("failures", ())]
    for each in others:
        details = evaluate(each, plan_evaluation(each, opened), details.get("over_training", ()))
        failures += details.get("failures", ())
    details["failures"] = list(dict.fromkeys(failures))
    return details


def evaluate(config: EvalConfig, plan: EvaluationPlan, earlier: Sequence[StepScore] = ()) -> EvaluationDetails:
    """Measure everything on a running Ray, write results/, results.csv, details.json and report.html, and return the details.

    `earlier` are the scores of earlier checkpoints of the run.
    """
    started = time.monotonic()
    results = EvaluationResults(plan)
    with open_pool(config, plan.builders) as pool:
        for result in pool.run(results.units):
            if results.add(result):  # what is finished survives whatever happens to the rest
                results.write_predictions(config.output_dir)
                write_outputs(config.output_dir, results.details(), started)
            pool.queue.failed_groups |= results.failures.keys()  # such as those of a model whose embeddings are NaN
        print("everything is measured; writing the results …", flush=True)
        details = results.finish()
        details["over_training"] = [*earlier, *step_scores(details)]
        _add_example_images(pool, plan, details)
    results.write_predictions(config.output_dir)
    write_outputs(config.output_dir, details, started)
    _track(config, plan.model, plan.sets.values(), details)
    return details


def write_outputs(output_dir: str, details: EvaluationDetails, started: float) -> None:
    """Write the results, the table and the report of what is measured until now."""
    details["seconds"] = round(time.monotonic() - started, 1)
    write_results(details, output_dir)
    # The second copy stays when another model is evaluated into the same folder.
    copies = {output_dir: "", results_folder(output_dir, "reports", details["models"][0]["name"]): "../../"}
    for folder, path_to_output in copies.items():
        storage.write_bytes(storage.join(folder, REPORT), evaluation_page(details, path_to_output).encode())


def _add_example_images(pool: ReplicaPool, plan: EvaluationPlan, details: EvaluationDetails) -> None:
    """Have the replicas read the images that the report shows, and add them to `details`."""
    examples: dict[tuple[str, str], list[ExampleImage]] = {}
    for result in details.get("zero_shot", ()):
        of_confusions = (example for confusion in result["confusions"] for example in confusion["examples"])
        shown = result.get("examples", ()) if result["model"] == plan.model.name else ()
        for example in (*of_confusions, *shown):
            examples.setdefault((result["set"], example["key"]), []).append(example)
    for retrieved in details.get("retrieval", ()):
        images = (image for query in retrieved["examples"] for image in query["images"])
        for example in (*images, *retrieved["image_examples"]):
            examples.setdefault((retrieved["set"], example["key"]), []).append(example)
    units: dict[str, tuple[str, WorkUnit]] = {}
    for measurement in plan.of_sets:
        data = measurement.data
        for part, keys in measurement.slices_with({key for name, key in examples if name == data.name}).items():
            group, name, work = f"images of {data.name}", f"images of {part.name}", Thumbnails(part, keys)
            unit = build_unit(group, name, 1.0, work, data=data.digest, slice=part.name, keys=keys)
            units[unit.key] = (data.name, unit)
    for unit_result in pool.run([unit for _, unit in units.values()]):
        if (rows := unit_result.rows) is not None:
            name, _ = units[unit_result.unit.key]
            jpegs = np.split(rows["jpegs"], np.cumsum(rows["sizes"]))
            for key, jpeg in zip(rows["keys"], jpegs, strict=False):  # behind the last one is an empty part
                for example in examples.get((name, str(key)), []):
                    example["jpeg"] = base64.b64encode(jpeg.tobytes()).decode()


def _track(config: EvalConfig, model: EvaluationModel, sets: Iterable[EvaluationSet], details: EvaluationDetails) -> None:
    """Log on the run that trained the model; if that is not known, on a new one."""
    tracking, metadata, run_id = config.tracking, None, ""
    if model.run_record and model.run_record["run_id"]:
        uri = restored(model.run_record["tracking_uri"], config.tracking.uri)
        if is_redacted(uri):
            print(
                f"tracking.uri: the results are not logged on the model's run, because {RUN_RECORD} has its address without "
                f"the secrets ({uri}); give --tracking.uri",
                flush=True,
            )
            return
        tracking = replace(config.tracking, uri=uri, experiment=model.run_record["experiment"])
        run_id = model.run_record["run_id"]
    else:
        text = f"An evaluation of `{model.url}`. Report: `{config.output_dir}/{REPORT}`."
        tags = run_tags("evaluation", config.output_dir, details["code_version"])
        metadata = RunMetadata(dated_name("evaluation"), text, tags, {"evaluation": asdict(config)})
    with start_run(tracking, config.output_dir, metadata, run_id=run_id) as tracker:
        tracker.log_data(
            [
                TrackedData(
                    data.name, data.digest, data.url, "evaluation",
                    {"num_classes": len(data.classes), "num_files": data.num_files, "num_bytes": data.num_bytes}
                    | ({} if data.known_images is None else {"num_samples": data.known_images}),
                )
                for data in sets
            ]
        )  # fmt: skip
        tracker.describe("", tags_for_tracking(details))
        tracker.log_metrics(metrics_for_tracking(details), model.step or 0)
        tracker.log_bytes(evaluation_page(details).encode(), f"evaluation/{REPORT}")
        tracker.log_bytes(storage.read_bytes(storage.join(config.output_dir, "results.csv")), "evaluation/results.csv")
