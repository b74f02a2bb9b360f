"""A comparison from its plan to its summary and report."""

import base64
import io
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from PIL import Image

from diffdis.pictures import grid
from diffdis_platform.comparison.runs import RESULT, SUMMARY, ComparisonPlan, measure
from diffdis_platform.comparison.summary import summarize, tracked_metrics
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.evaluation.quality import read_prompts
from diffdis_platform.parent_run import open_parent_run
from ray_platform import storage
from ray_platform.contracts import UserError, describe_error
from ray_platform.evaluate.results import as_json
from ray_platform.evaluate.work import image_name
from ray_platform.report.comparison import comparison_page
from ray_platform.tracking import RunStatus, Tracker
from ray_platform.tracking.code_version import code_version
from ray_platform.train.launch import Stopped

logger = logging.getLogger(__name__)

REPORT, SAMPLES = "report.html", "samples"
NUM_SAMPLES = 32  # images per arm in the report


def compare(config: CompareConfig, plan: ComparisonPlan, recipe: str, command: str) -> dict[str, Any]:
    """Do the runs that are left, one after the other, on the connected cluster.

    Write summary.json after every run, and report.html and samples/ at the end. Return the summary; a run that fails is one of its
    failures.

    Raises:
        Stopped: the job received SIGTERM.
    """
    start = time.monotonic()
    failures: list[str] = []
    text = f"A comparison by the recipe `{recipe}`; its runs are those below this one. Report: `{config.output_dir}/{REPORT}`."
    params = {"arms": plan.fields, "seeds": list(config.seeds), **plan.identity}
    tracker, tracking = open_parent_run(config.tracking, config.output_dir, recipe, text, command, params)
    status: RunStatus = "FAILED"
    try:
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
        header = {"command": command, "seconds": round(time.monotonic() - start, 1), "code_version": code_version()}
        _write_report(config, tracker, summary, {"title": f"Comparison {recipe}", **header})
        status = "FINISHED"
    finally:
        tracker.end(status)
    return summary


def _write_summary(config: CompareConfig, plan: ComparisonPlan, failures: list[str]) -> dict[str, Any]:
    summary = summarize(plan, failures)
    storage.write_bytes(storage.join(config.output_dir, SUMMARY), as_json(summary))
    return summary


def _write_report(config: CompareConfig, tracker: Tracker, summary: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Write the report and sample images to the output folder and, with the metrics, to the tracked run."""
    details = {"created": datetime.now().isoformat(timespec="seconds"), **header, **summary}
    details |= {"grids": _read_samples(config), "curves": _read_curves(config)}
    files = {REPORT: comparison_page(details).encode()}
    for arm in details["grids"]:
        images = [Image.open(io.BytesIO(base64.b64decode(sample["png"]))) for sample in arm["samples"]]
        buffer = io.BytesIO()
        grid(images, [sample["caption"] for sample in arm["samples"]]).save(buffer, format="PNG")
        files[f"{SAMPLES}/{arm['arm']}_seed{arm['seed']}.png"] = buffer.getvalue()
    for name, content in files.items():
        storage.write_bytes(storage.join(config.output_dir, name), content)
        tracker.log_bytes(content, name)
    tracker.log_bytes(as_json(summary), SUMMARY)
    tracker.log_metrics(tracked_metrics(summary), step=0)


def _read_samples(config: CompareConfig) -> list[dict[str, Any]]:
    """Return the first images of each arm that generates, for equal prompts and noise: {arm, seed, samples: [{caption, png}]}."""
    quality = config.evaluation.quality
    prompts = read_prompts(quality)[:NUM_SAMPLES] if quality.prompts else []
    names = [image_name(index) for index in range(len(prompts))]
    grids = []
    for arm in config.arms if prompts else ():
        for seed in config.seeds:
            output_dir = config.evaluation_of(arm, seed).output_dir
            folder = storage.join(output_dir, "images", f"guidance_{quality.guidance_scales[0]:g}")
            urls = [storage.join(folder, name) for name in names]
            files = storage.read_many(urls)
            samples = [
                {"caption": prompt, "png": base64.b64encode(files[url]).decode()}
                for prompt, url in zip(prompts, urls, strict=True)
                if url in files
            ]
            if samples:
                grids.append({"arm": arm, "seed": seed, "samples": samples})
                break
    return grids


def _read_curves(config: CompareConfig) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return validation scores during training, arm -> seed -> [{samples, metrics}], of the runs in the output folder."""
    urls = {(arm, str(seed)): storage.join(config.run_dir(arm, seed), RESULT) for arm in config.arms for seed in config.seeds}
    files = storage.read_many(list(urls.values()))
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (arm, seed), url in urls.items():
        if url in files and (curve := json.loads(files[url])["curve"]):
            curves.setdefault(arm, {})[seed] = curve
    return curves
