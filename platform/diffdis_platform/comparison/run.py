"""A comparison from its plan to its summary and report."""

import base64
import io
import json
import logging
import time
from dataclasses import replace
from datetime import datetime

from PIL import Image

from diffdis.image_grid import image_grid
from diffdis_platform.comparison.claim import CLAIM
from diffdis_platform.comparison.runs import RESULT, SUMMARY, ComparisonPlan, measure
from diffdis_platform.comparison.summary import ComparisonSummary, summarize, tracked_metrics
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.evaluation.quality import read_prompts
from diffdis_platform.parent_run import start_parent_run
from ray_platform import storage
from ray_platform.contracts import UserError, describe_error
from ray_platform.evaluate.unit_work import image_name
from ray_platform.json_values import to_json
from ray_platform.report.comparison import comparison_page
from ray_platform.report.records import ComparisonDetails, GeneratedSample, ImageGrid, TrainingPoint
from ray_platform.tracking import Tracker
from ray_platform.tracking.run_metadata import code_version
from ray_platform.train.fault_tolerance import Stopped

logger = logging.getLogger(__name__)

REPORT, SAMPLES = "report.html", "samples"
NUM_SAMPLES = 32  # images per arm in the report


def compare(config: CompareConfig, plan: ComparisonPlan, recipe: str, command: str) -> ComparisonSummary:
    """Do the runs that are left, one after the other, on the connected cluster.

    Write summary.json after every run, and report.html and samples/ at the end. Return the summary, which lists the runs that
    failed.

    Raises:
        Stopped: the job received SIGTERM.
    """
    start = time.monotonic()
    failures: list[str] = []
    text = f"A comparison by the recipe `{recipe}`; its runs are those below this one. Report: `{config.output_dir}/{REPORT}`."
    params = {"arms": plan.fields, "seeds": list(config.seeds), **plan.identity}
    with start_parent_run(config.tracking, config.output_dir, recipe, text, command, params) as (tracker, tracking):
        summary = _write_summary(config, plan, failures)  # before the first run: it identifies the comparison in this folder
        for number, (arm, seed) in enumerate(plan.pending, 1):
            print(f"run {number} of {len(plan.pending)}: {arm}, seed {seed}", flush=True)
            try:
                run_tracking = replace(tracking, run_name=f"{arm} seed {seed}")
                plan.results[arm][seed] = measure(config, plan.identity, arm, seed, recipe, run_tracking)
            except Stopped:
                raise
            except Exception as error:  # the other runs continue
                if not isinstance(error, UserError):
                    logger.error("an unexpected error", exc_info=error)
                failures.append(f"{arm}, seed {seed}: {describe_error(error)}")
                print(f"failed: {failures[-1]}", flush=True)
            summary = _write_summary(config, plan, failures)
        details: ComparisonDetails = {
            "title": f"Comparison {recipe}",
            "created": datetime.now().isoformat(timespec="seconds"),
            "seconds": round(time.monotonic() - start, 1),
            "code_version": code_version(),
            "command": command,
            **summary,
            "grids": _read_samples(config),
            "curves": _read_curves(config),
        }
        _write_report(config, tracker, summary, details)
    return summary


def _write_summary(config: CompareConfig, plan: ComparisonPlan, failures: list[str]) -> ComparisonSummary:
    summary = summarize(plan, failures)
    storage.write_bytes(storage.join(config.output_dir, SUMMARY), to_json(summary))
    return summary


def _write_report(config: CompareConfig, tracker: Tracker, summary: ComparisonSummary, details: ComparisonDetails) -> None:
    """Write the report and sample images to the output folder and, with the metrics, to the tracked run."""
    files = {REPORT: comparison_page(details, CLAIM).encode()}
    for arm in details["grids"]:
        images = [Image.open(io.BytesIO(base64.b64decode(sample["png"]))) for sample in arm["samples"]]
        buffer = io.BytesIO()
        image_grid(images, [sample["caption"] for sample in arm["samples"]]).save(buffer, format="PNG")
        files[f"{SAMPLES}/{arm['arm']}_seed{arm['seed']}.png"] = buffer.getvalue()
    for name, content in files.items():
        storage.write_bytes(storage.join(config.output_dir, name), content)
        tracker.log_bytes(content, name)
    tracker.log_bytes(to_json(summary), SUMMARY)
    tracker.log_metrics(tracked_metrics(summary), step=0)


def _read_samples(config: CompareConfig) -> list[ImageGrid]:
    """Return the first images of each arm that generates, for equal prompts and noise."""
    quality = config.evaluation.quality
    prompts = read_prompts(quality)[:NUM_SAMPLES] if quality.prompts else []
    names = [image_name(index) for index in range(len(prompts))]
    grids: list[ImageGrid] = []
    for arm in config.arms if prompts else ():
        for seed in config.seeds:
            output_dir = config.evaluation_of(arm, seed).output_dir
            folder = storage.join(output_dir, "images", f"guidance_{quality.guidance_scales[0]:g}")
            urls = [storage.join(folder, name) for name in names]
            files = storage.read_many(urls)
            samples = [
                GeneratedSample(caption=prompt, png=base64.b64encode(files[url]).decode())
                for prompt, url in zip(prompts, urls, strict=True)
                if url in files
            ]
            if samples:
                grids.append({"arm": arm, "seed": seed, "samples": samples})
                break
    return grids


def _read_curves(config: CompareConfig) -> dict[str, dict[str, list[TrainingPoint]]]:
    """Return validation scores during training, by arm and seed, of the runs in the output folder."""
    urls = {(arm, str(seed)): storage.join(config.run_dir(arm, seed), RESULT) for arm in config.arms for seed in config.seeds}
    files = storage.read_many(list(urls.values()))
    curves: dict[str, dict[str, list[TrainingPoint]]] = {}
    for (arm, seed), url in urls.items():
        if url in files and (curve := json.loads(files[url])["curve"]):
            curves.setdefault(arm, {})[seed] = curve
    return curves
