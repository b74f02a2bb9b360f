"""The summary, the grid and the table at the end of `make demo`."""

import json
from pathlib import Path
from typing import Any

from diffdis.image_grid import image_grid
from diffdis.pipeline import DiffDisPipeline
from diffdis_platform.demo.scores import SPLITS, colour_agreement, sample_captions, score
from ray_platform.terminal import render_table
from ray_platform.tracking import TrackingConfig, start_run

NUM_RANDOM_CAPTIONS = 48
GUIDANCE_SCALE = 3.0
SUMMARY = "summary.json"


def write_report(output: Path, data: Path, captions: tuple[str, ...]) -> dict[str, Any]:
    """Score the model in `output/export`, draw the grid, and write `output/summary.json`; all of it goes to MLflow too."""
    training = json.loads((output / "train_summary.json").read_text())
    tracked = json.loads((output / "mlflow.json").read_text())
    pipeline = DiffDisPipeline.from_pretrained(output / "export")
    print("scoring zero-shot from pure noise …", flush=True)
    zero_shot = score(pipeline, data)
    print("drawing the grid …", flush=True)
    drawn = [*captions, *sample_captions(data, NUM_RANDOM_CAPTIONS)]
    images = pipeline.generate(drawn, num_inference_steps=30, guidance_scale=GUIDANCE_SCALE)
    image_grid(images, drawn).save(output / "grid.png")
    random_images = images[len(captions) :]
    summary = {
        "recipe": "demo",
        **{key: training[key] for key in ("num_workers", "zero_stage", "num_steps", "num_samples_seen")},
        "samples_per_second": training["samples_per_second"],
        "seconds_training": training["seconds"],
        **{name: {end: training[end][name] for end in ("first", "last")} for name in ("loss_generation", "loss_alignment")},
        "skipped": training["skipped"],
        "zero_shot": zero_shot,
        "colour": colour_agreement(random_images, drawn[len(captions) :], data),
        "mlflow": tracked,
        "export_dir": training["export_dir"],
        "grid": str(output / "grid.png"),
    }
    _track(output, summary)
    (output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _track(output: Path, summary: dict[str, Any]) -> None:
    """Scores and grid on the run that made the model."""
    run = summary["mlflow"]
    tracking = TrackingConfig(run["tracking_uri"], run["experiment"])
    scores = {f"zero_shot/{s}/{name}": v for s, values in summary["zero_shot"].items() for name, v in values.items()}
    with start_run(tracking, str(output), run_id=run["run_id"]) as tracker:
        tracker.log_metrics(scores | {f"colour/{n}": v for n, v in summary["colour"].items()}, summary["num_steps"])
        tracker.log_bytes((output / "grid.png").read_bytes(), "grid.png")


def table(summary: dict[str, Any]) -> str:
    """For the terminal."""
    lines = [
        f"{summary['num_samples_seen']} samples in {summary['seconds_training']:.0f} s "
        f"({summary['samples_per_second']:.0f} samples/s, {summary['num_workers']} workers, ZeRO {summary['zero_stage']})",
        *(
            f"{name:<18}{summary[name]['first']:>8.3f} -> {summary[name]['last']:.3f}"
            for name in ("loss_generation", "loss_alignment")
        ),
        "",
    ]
    rows = [["zero-shot", "acc1", "x chance", "acc5", "100-way", "shuffled", "untrained", "classes", "images"]]
    for split in SPLITS:
        s = summary["zero_shot"][split]
        shares = [f"{s['acc1_100way']:.3f}", f"{s['acc1_shuffled_images']:.2%}", f"{s['acc1_untrained']:.2%}"]
        times = f"{s['acc1'] / s['chance']:.1f}"
        rows.append([split, f"{s['acc1']:.2%}", times, f"{s['acc5']:.2%}", *shares, str(s["num_classes"]), str(s["num_images"])])
    lines.append(render_table(rows))
    c = summary["colour"]
    lines += [
        "",
        f"mean colour: {c['distance_to_own_caption']:.1f} from the caption's own drawing, "
        f"{c['distance_to_random_caption']:.1f} from another caption's",
        f"grid of generated images: {summary['grid']}",
        f"exported model: {summary['export_dir']}",
    ]
    return "\n".join(lines)
