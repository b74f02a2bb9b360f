"""The end of `diffdis demo`: zero-shot accuracy on the held-out splits, a grid of generated images, and their colors.

Every figure is shown next to its control: other images, an untrained model, another caption.
"""

import json
import multiprocessing
import os
import random
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from diffdis.image_grid import image_grid
from diffdis.metrics.zero_shot import ZeroShotScores, subset_accuracy
from diffdis.model import DiffDis
from diffdis.pipeline import DiffDisPipeline
from ray_platform.terminal import render_table
from ray_platform.tracking import TrackingConfig, start_run

SUMMARY = "summary.json"
SPLITS = ("heldout_style", "heldout_names")
NUM_RANDOM_CAPTIONS = 48
GUIDANCE_SCALE = 3.0
NUM_INFERENCE_STEPS = 10
NUM_DRAWS = 8  # averaged; one image pass serves all of them

DemoSummary = dict[str, Any]  # summary.json


@dataclass(frozen=True)
class ZeroShotSet:
    """A `wds_*` folder of CLIP_benchmark's layout in memory."""

    images: list[Image.Image]
    labels: torch.Tensor  # [N]
    class_names: list[str]
    templates: list[str]

    @classmethod
    def read(cls, folder: Path) -> "ZeroShotSet":
        shards = sorted(str(path) for path in (folder / "test").glob("*.tar"))
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb").to_tuple("png", "cls"))
        return cls(
            [image for image, _ in samples],
            torch.tensor([int(label) for _, label in samples]),
            (folder / "classnames.txt").read_text().splitlines(),
            (folder / "zeroshot_classification_templates.txt").read_text().splitlines(),
        )


def write_report(output: Path, data: Path, captions: tuple[str, ...]) -> DemoSummary:
    """Score the model in `output/export`, generate the grid, write `output/summary.json`, and log all of it to MLflow."""
    training = json.loads((output / "train_summary.json").read_text())
    sets = {split: ZeroShotSet.read(data / f"wds_{split}") for split in SPLITS}
    # A fixed random choice of names of which the held-out style has an image.
    random_captions = random.Random(0).sample(sets["heldout_style"].class_names, NUM_RANDOM_CAPTIONS)
    all_captions = [*captions, *random_captions]
    print("scoring zero-shot from pure noise, and generating the grid …", flush=True)
    # Two processes: they take about equally long, and two threads in one would mostly wait for each other in so small a model.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        generating = other.submit(_generate, output / "export", all_captions)
        scores = _score(output / "export", sets)
        images = generating.result()
    image_grid(images, all_captions).save(output / "grid.png")
    summary = {
        "recipe": "demo",
        **{key: training[key] for key in ("num_workers", "zero_stage", "num_steps", "num_samples_seen", "samples_per_second")},
        "seconds_training": training["seconds"],
        **{name: {end: training[end][name] for end in ("first", "last")} for name in ("loss_generation", "loss_alignment")},
        "skipped": training["skipped"],
        "zero_shot": scores,
        "color": color_agreement(images[len(captions) :], random_captions, sets["heldout_style"]),
        "mlflow": json.loads((output / "mlflow.json").read_text()),
        "export_dir": training["export_dir"],
        "grid": str(output / "grid.png"),
    }
    _track(output, summary)
    (output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _open_model(export: Path) -> DiffDisPipeline:
    """Return the exported model for one of two processes that share this machine's CPUs."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    return DiffDisPipeline.from_pretrained(export)


def _generate(export: Path, captions: Sequence[str]) -> list[Image.Image]:
    return _open_model(export).generate(captions, num_inference_steps=30, guidance_scale=GUIDANCE_SCALE)


def _score(export: Path, sets: Mapping[str, ZeroShotSet]) -> dict[str, dict[str, float]]:
    """Return the scores of the model by split, each next to that of an untrained model."""
    pipeline = _open_model(export)
    torch.manual_seed(0)
    untrained = DiffDisPipeline(pipeline.config, DiffDis(pipeline.config), pipeline.autoencoder, pipeline.text_encoder)
    # One step from one draw is at chance as well as ten from eight, and half of the scoring's time would be the control's.
    return {
        split: zero_shot(pipeline, part) | {"acc1_untrained": zero_shot(untrained, part, num_steps=1, num_draws=1)["acc1"]}
        for split, part in sets.items()
    }


def zero_shot(
    pipeline: DiffDisPipeline, data: ZeroShotSet, num_steps: int = NUM_INFERENCE_STEPS, num_draws: int = NUM_DRAWS
) -> dict[str, float]:
    """Return accuracies from pure noise, and that of the same queries with the images permuted."""
    queries = pipeline.embed_image(data.images, num_steps=num_steps, num_draws=num_draws)
    classes = pipeline.embed_classes(data.class_names, data.templates)
    images, texts, labels = (tensor.cpu().numpy() for tensor in (queries, classes, data.labels))
    scores = ZeroShotScores.from_embeddings(images, texts, labels)
    return {
        "acc1": scores.accuracy(),
        "acc5": scores.accuracy(5),
        "acc1_100way": subset_accuracy(images, texts, labels),
        "acc1_shuffled_images": scores.with_shuffled_images().accuracy(),
        "num_classes": len(data.class_names),
        "num_images": len(data.images),
        "chance": 1 / len(data.class_names),
        "num_inference_steps": num_steps,
        "num_draws": num_draws,
    }


def color_agreement(images: Sequence[Image.Image], captions: Sequence[str], real: ZeroShotSet) -> dict[str, float]:
    """Compare the mean colors of generated images with those of real, held-out ones: of the own caption, and of the others.

    Distances are Euclidean in RGB, 0 to 255 each.
    """
    first = {real.class_names[int(label)]: image for image, label in zip(real.images, real.labels, strict=True)}

    def mean_colors(pixels: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([np.asarray(p.convert("RGB"), dtype=np.float64).mean(axis=(0, 1)) for p in pixels])  # [N, 3]

    generated, expected = mean_colors(images), mean_colors([first[caption] for caption in captions])
    distance = np.linalg.norm(generated[:, None] - expected[None], axis=2)  # [N, N]
    own, others = distance.diagonal(), distance[~np.eye(len(distance), dtype=bool)].reshape(len(distance), -1)
    return {
        "distance_to_own_caption": float(own.mean()),
        "distance_to_random_caption": float(others.mean()),
        "fraction_nearer_to_own": float((own[:, None] < others).mean()),
        "num_captions": len(captions),
    }


def _track(output: Path, summary: DemoSummary) -> None:
    """Log scores and grid to the run that trained the model."""
    run = summary["mlflow"]
    scores = {f"zero_shot/{s}/{name}": v for s, values in summary["zero_shot"].items() for name, v in values.items()}
    with start_run(TrackingConfig(run["tracking_uri"], run["experiment"]), str(output), resume=True) as tracker:
        tracker.log_metrics(scores | {f"color/{n}": v for n, v in summary["color"].items()}, summary["num_steps"])
        tracker.log_bytes((output / "grid.png").read_bytes(), "grid.png")


def table(summary: DemoSummary) -> str:
    """Return the summary for the terminal."""
    rows = [["zero-shot", "acc1", "x chance", "acc5", "100-way", "shuffled", "untrained", "classes", "images"]]
    for split, s in summary["zero_shot"].items():
        controls = [f"{s['acc1_100way']:.3f}", f"{s['acc1_shuffled_images']:.2%}", f"{s['acc1_untrained']:.2%}"]
        counts = [str(s["num_classes"]), str(s["num_images"])]
        rows.append([split, f"{s['acc1']:.2%}", f"{s['acc1'] / s['chance']:.1f}", f"{s['acc5']:.2%}", *controls, *counts])
    losses = [(name, summary[name]) for name in ("loss_generation", "loss_alignment")]
    color = summary["color"]
    return "\n".join(
        [
            f"{summary['num_samples_seen']} samples in {summary['seconds_training']:.0f} s "
            f"({summary['samples_per_second']:.0f} samples/s, {summary['num_workers']} workers, ZeRO {summary['zero_stage']})",
            *(f"{name:<18}{loss['first']:>8.3f} -> {loss['last']:.3f}" for name, loss in losses),
            "",
            render_table(rows),
            "",
            f"mean color: {color['distance_to_own_caption']:.1f} from the icon of the caption, "
            f"{color['distance_to_random_caption']:.1f} from another caption's",
            f"grid of generated images: {summary['grid']}",
            f"exported model: {summary['export_dir']}",
        ]
    )
