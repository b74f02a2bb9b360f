"""A comparison from its plan to its summary and its page."""

import base64
import io
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, cast

from PIL import Image

from diffdis.image_grid import image_grid
from diffdis_platform.comparison.claim import CLAIM
from diffdis_platform.comparison.plan import RESULT, SUMMARY, Plan
from diffdis_platform.comparison.runs import measure
from diffdis_platform.comparison.summary import summarize
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.evaluation.quality import read_prompts
from ray_platform import storage
from ray_platform.contracts import UserError, describe_error
from ray_platform.evaluate.work import image_name
from ray_platform.json_values import to_json
from ray_platform.report.comparison import comparison_page
from ray_platform.report.records import ComparisonDetails
from ray_platform.terminal import render_table
from ray_platform.tracking import RunMetadata, Tracker, TrackingConfig, read_run_record, start_run, tracking_uri
from ray_platform.tracking.run_metadata import append_command, code_version, dated_name, run_tags
from ray_platform.train.launch import Stopped

logger = logging.getLogger(__name__)

REPORT, SAMPLES = "report.html", "samples"
SHOWN = 32  # images an arm


def compare(config: CompareConfig, made: Plan, recipe: str, command: str) -> dict[str, Any]:
    """Measure what is left, one run after the other. Needs a running Ray.

    Writes summary.json after every run, at the end report.html and samples/, and returns the summary. A run that fails is one of
    its failures. Raises Stopped on SIGTERM.
    """
    begun = time.monotonic()
    failures: list[str] = []
    known = read_run_record(config.output_dir)
    metadata = _run_metadata(config, made, recipe, command)
    with start_run(config.tracking, config.output_dir, metadata, run_id=known["run_id"] if known else "", record=True) as tracker:
        uri = tracking_uri(config.tracking, config.output_dir)
        tracking = TrackingConfig(
            uri, config.tracking.experiment, parent_run_id=tracker.run_id(), backends=config.tracking.backends
        )
        summary = _write_summary(config, made, failures)  # at once: it says of which comparison this folder is
        for number, (arm, seed) in enumerate(made.left, 1):
            print(f"run {number} of {len(made.left)}: {arm}, seed {seed}", flush=True)
            try:
                named = replace(tracking, run_name=f"{arm} seed {seed}")
                made.results[arm][seed] = measure(config, made.identity, arm, seed, recipe, named)
            except Stopped:
                raise
            except Exception as error:  # hours of other runs shall not be lost to it
                failures.append(f"{arm}, seed {seed}: {_logged_line(error)}")
                print(f"failed: {failures[-1]}", flush=True)
            summary = _write_summary(config, made, failures)
        about = {"command": command, "seconds": round(time.monotonic() - begun, 1), "code_version": code_version()}
        _show(config, tracker, summary, {"title": f"Comparison {recipe}", **about})
    return summary


def _logged_line(error: Exception) -> str:
    """Return the error on one line; log the traceback of an unexpected one."""
    if not isinstance(error, UserError):
        logger.error("an unexpected error", exc_info=error)
    return describe_error(error)


def _run_metadata(config: CompareConfig, made: Plan, recipe: str, command: str) -> RunMetadata:
    text = f"A comparison by the recipe `{recipe}`; its runs are those below this one. Report: `{config.output_dir}/{REPORT}`."
    return RunMetadata(
        dated_name(recipe),
        append_command(text, command),
        run_tags(recipe, config.output_dir, code_version()),
        {"arms": made.fields, "seeds": list(config.seeds), **made.identity},
    )


def _write_summary(config: CompareConfig, made: Plan, failures: Sequence[str]) -> dict[str, Any]:
    summary = summarize(made, failures)
    storage.write_bytes(storage.join(config.output_dir, SUMMARY), to_json(summary))
    return summary


def _show(config: CompareConfig, tracker: Tracker, summary: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """The page and the pictures, in the output folder and on the comparison's run, with its figures."""
    details = {"created": datetime.now().isoformat(timespec="seconds"), **about, **summary}
    details |= {"grids": _grids(config), "curves": _curves(config)}
    page = comparison_page(cast(ComparisonDetails, details), CLAIM).encode()
    storage.write_bytes(storage.join(config.output_dir, REPORT), page)
    tracker.log_bytes(page, REPORT)
    for drawn in details["grids"]:
        images = [Image.open(io.BytesIO(base64.b64decode(sample["png"]))) for sample in drawn["samples"]]
        buffer = io.BytesIO()
        image_grid(images, [sample["caption"] for sample in drawn["samples"]]).save(buffer, format="PNG")
        name = f"{SAMPLES}/{drawn['arm']}_seed{drawn['seed']}.png"
        storage.write_bytes(storage.join(config.output_dir, name), buffer.getvalue())
        tracker.log_bytes(buffer.getvalue(), name)
    tracker.log_bytes(storage.read_bytes(storage.join(config.output_dir, SUMMARY)), SUMMARY)
    tracker.log_metrics(_metrics(summary), step=0)


def _grids(config: CompareConfig) -> list[dict[str, Any]]:
    """The first images of each arm that draws, from equal prompts and noise: {arm, seed, samples: [{caption, png}]}."""
    grids = []
    prompts = read_prompts(config.evaluation.quality)[:SHOWN] if config.evaluation.quality.prompts else []
    for arm in config.arms if prompts else ():
        for seed in config.seeds:
            folder = storage.join(
                config.evaluation_of(arm, seed).output_dir, "images", f"guidance_{config.evaluation.quality.guidance_scales[0]:g}"
            )
            urls = [storage.join(folder, image_name(place)) for place in range(len(prompts))]
            found = storage.read_many(urls)
            samples = [
                {"caption": prompt, "png": base64.b64encode(found[url]).decode()}
                for prompt, url in zip(prompts, urls, strict=True)
                if url in found
            ]
            if samples:
                grids.append({"arm": arm, "seed": seed, "samples": samples})
                break
    return grids


def _curves(config: CompareConfig) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Scores while training: arm -> seed -> [{samples, metrics}], of the runs that took place here."""
    urls = {(arm, str(seed)): storage.join(config.run_dir(arm, seed), RESULT) for arm in config.arms for seed in config.seeds}
    found = storage.read_many(list(urls.values()))
    curves: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for (arm, seed), url in urls.items():
        if url in found and (curve := json.loads(found[url])["curve"]):
            curves.setdefault(arm, {})[seed] = curve
    return curves


def _metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """For the comparison's run: `mean/joint/accuracy`, `paired/accuracy_joint_minus_alignment/low`."""
    found = {f"mean/{arm}/{name}": value for arm, entry in summary["arms"].items() for name, value in entry["mean"].items()}
    for name, difference in summary["paired"].items():
        found |= {f"paired/{name}/{part}": value for part, value in difference.items() if value is not None}
    return found | {"claim/holds": float(summary["claim"]["holds"])}


def table(summary: Mapping[str, Any]) -> str:
    """For the terminal: a column an arm, then the paired differences and the claim."""
    arms = summary["arms"]
    names = dict.fromkeys(name for entry in arms.values() for name in entry["mean"])
    rows = [["", *arms], ["seeds", *(str(len(entry["seeds"])) for entry in arms.values())]]
    for name in names:
        rows.append([name, *(_cell(entry["mean"].get(name), entry["std"].get(name)) for entry in arms.values())])
    differences = [["paired difference", "mean", "95 % interval", "n"]]
    for name, difference in summary["paired"].items():
        mean, low, high = difference["mean"], difference["low"], difference["high"]
        interval = "no interval" if low is None else f"{low:+.4g} to {high:+.4g}"
        differences.append([name, f"{mean:+.4g}", interval, str(difference["n"])])
    held = "the claim holds" if summary["claim"]["holds"] else "the claim does not hold"
    return "\n\n".join([render_table(rows), render_table(differences), f"{held}: {summary['claim']['why']}"])


def _cell(mean: float | None, std: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"
