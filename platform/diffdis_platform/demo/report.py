"""The end of `diffdis demo`: zero-shot accuracy on the held-out splits, generated images, and their quality and colors.

Every figure is shown next to its control: other images, an untrained model, real images, another caption.
"""

import io
import itertools
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from PIL import Image
from scipy.stats import binom

from diffdis.feature_networks import build_feature_network
from diffdis.image_grid import image_grid, side_by_side
from diffdis.metrics.image_quality import Moments, frechet_distance_of_features, kernel_distance
from diffdis.metrics.zero_shot import ZeroShotScores, subset_accuracy
from diffdis.model import DiffDis
from diffdis.pipeline import IMAGE_BATCH, DiffDisPipeline
from diffdis_platform.recipes.demo import DEMO_QUALITY
from ray_platform.terminal import ProgressBar, render_table
from ray_platform.tracking import TrackingConfig, start_run

SUMMARY = "summary.json"
SPLITS = ("heldout_style", "heldout_names")
NUM_QUALITY_IMAGES = 256  # generated, and compared with all images of the held-out style
_CLEARLY = 3.0  # times chance: a result that is not luck
NUM_GRID_IMAGES, NUM_RECOGNIZED = 48, 24  # in the two figures
QUALITY_NETWORK = "efficientnet_lite0"
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

    def first_images(self) -> dict[str, Image.Image]:
        """Return the first image of each class by its name."""
        pairs = zip(self.labels.tolist(), self.images, strict=True)
        return {self.class_names[label]: image for label, image in reversed(list(pairs))}


class GeneratedImages(NamedTuple):
    """Generated images, and features of them and of the training images of the same captions."""

    images: list[Image.Image]
    features: np.ndarray  # [NUM_QUALITY_IMAGES, d]
    training_features: np.ndarray  # [NUM_QUALITY_IMAGES, d]


class SplitResult(NamedTuple):
    """Scores of a split, and the classes with the highest scores of each image."""

    scores: dict[str, float]
    top3: np.ndarray  # [N, 3]


def write_report(output: Path, data: Path, captions: tuple[str, ...]) -> DemoSummary:
    """Score the model in `output/export`, generate images, write the figures and `output/summary.json`, and log all to MLflow."""
    training = json.loads((output / "train_summary.json").read_text())
    sets = {split: ZeroShotSet.read(data / f"wds_{split}") for split in SPLITS}
    style = sets["heldout_style"]
    names, real = style.class_names, style.first_images()
    # A fixed random choice of names, of which the held-out style and the training have an image. For the grid also known names.
    random_captions = random.Random(0).sample(names, min(NUM_QUALITY_IMAGES, len(names)))
    all_captions = [*(caption for caption in captions if caption in real), *random_captions]
    num_known, examples = len(all_captions) - len(random_captions), training_images(data / "train", random_captions)
    print("scoring zero-shot from pure noise, generating images, and measuring their quality …", flush=True)
    # Two processes: they take about equally long, and two threads in one would mostly wait for each other in so small a model.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
        generating = other.submit(_generate, output / "export", all_captions, num_known, examples)
        pipeline = _open_model(output / "export")
        results = _score(pipeline, sets)
        reference = _features(pipeline, style.images)
        generated = generating.result()
    pairs = [
        side_by_side(Image.fromarray(pipeline.preprocess([real[c]])[0]), i)
        for c, i in zip(all_captions, generated.images, strict=True)
    ]
    image_grid(pairs[:NUM_GRID_IMAGES], all_captions[:NUM_GRID_IMAGES], columns=6, cell=64).save(output / "grid.png")
    recognition_figure(style, results["heldout_style"].top3).save(output / "recognition.png")
    summary = {
        "recipe": "demo",
        **{key: training[key] for key in ("num_workers", "zero_stage", "num_steps", "num_samples_seen", "samples_per_second")},
        "seconds_training": training["seconds"],
        **{name: {end: training[end][name] for end in ("first", "last")} for name in ("loss_generation", "loss_alignment")},
        "skipped": training["skipped"],
        "zero_shot": {split: result.scores for split, result in results.items()},
        "quality": quality(generated, reference),
        "color": color_agreement(generated.images[num_known:], [real[caption] for caption in random_captions]),
        "mlflow": json.loads((output / "mlflow.json").read_text()),
        "export_dir": training["export_dir"],
        "grid": str(output / "grid.png"),
        "recognition": str(output / "recognition.png"),
    }
    _track(output, summary)
    (output / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _open_model(export: Path) -> DiffDisPipeline:
    """Return the exported model for one of two processes that share this machine's CPUs."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    return DiffDisPipeline.from_pretrained(export)


def _generate(export: Path, captions: Sequence[str], num_known: int, training_examples: Sequence[Image.Image]) -> GeneratedImages:
    """Generate an image of each caption; features are those of the images after the first `num_known`."""
    pipeline = _open_model(export)
    pipeline.set_progress_bar_config(desc="generating", position=1, leave=False, disable=None)  # None: only in a terminal
    bar, steps = ProgressBar(seconds_between_lines=30.0), itertools.count(1)
    num_steps = -(-len(captions) // IMAGE_BATCH) * DEMO_QUALITY.num_steps

    def show_step(_pipeline: object, _index: int, _timestep: int, values: Any) -> Any:
        if not sys.stdout.isatty():
            bar.update("steps", next(steps), num_steps, "of the sampler")
        return values

    pipeline.scheduler = DEMO_QUALITY.scheduler
    [guidance_scale] = DEMO_QUALITY.guidance_scales
    images = pipeline.generate(
        captions, num_inference_steps=DEMO_QUALITY.num_steps, guidance_scale=guidance_scale, callback_on_step_end=show_step
    )
    return GeneratedImages(images, _features(pipeline, images[num_known:]), _features(pipeline, training_examples))


def _features(pipeline: DiffDisPipeline, images: Sequence[Image.Image]) -> np.ndarray:
    """Return features [N, d] of images at the size of the model's own."""
    network, pixels = build_feature_network(QUALITY_NETWORK), pipeline.preprocess(images)
    return np.concatenate([network.features(pixels[i : i + IMAGE_BATCH]) for i in range(0, len(pixels), IMAGE_BATCH)])


def training_images(folder: Path, captions: Sequence[str]) -> list[Image.Image]:
    """Return the first training image of each caption that has one."""
    shards = sorted(str(path) for path in folder.glob("*.tar"))
    found: dict[str, bytes] = {}
    for png, caption in webdataset.WebDataset(shards, shardshuffle=False).to_tuple("png", "txt"):
        found.setdefault(caption.decode().strip(), png)
    return [Image.open(io.BytesIO(found[caption])).convert("RGB") for caption in captions if caption in found]


def quality(generated: GeneratedImages, reference: np.ndarray) -> dict[str, float]:
    """Return the distances of generated images from the held-out style [n, d], next to those of real training images of the same
    captions: the floor."""
    moments = Moments.of(reference)
    return {
        "fd": frechet_distance_of_features(generated.features, moments),
        "fd_floor": frechet_distance_of_features(generated.training_features, moments),
        "kid": kernel_distance(generated.features, reference).mean,
        "kid_floor": kernel_distance(generated.training_features, reference).mean,
        "num_images": len(generated.features),
        "num_reference": len(reference),
    }


def _score(pipeline: DiffDisPipeline, sets: Mapping[str, ZeroShotSet]) -> dict[str, SplitResult]:
    """Return the results of the model by split, with the accuracy of an untrained model among the scores."""
    torch.manual_seed(0)
    untrained = DiffDisPipeline(pipeline.config, DiffDis(pipeline.config), pipeline.autoencoder, pipeline.text_encoder)
    results = {}
    for split, part in sets.items():
        # One step from one draw is at chance as well as ten from eight, and half of the scoring's time would be the control's.
        control = zero_shot(untrained, part, num_steps=1, num_draws=1).scores["acc1"]
        scores, top3 = zero_shot(pipeline, part)
        results[split] = SplitResult(scores | {"acc1_untrained": control}, top3)
    return results


def zero_shot(
    pipeline: DiffDisPipeline, data: ZeroShotSet, num_steps: int = NUM_INFERENCE_STEPS, num_draws: int = NUM_DRAWS
) -> SplitResult:
    """Return accuracies from pure noise, and that of the same queries with the images permuted."""
    batches = [data.images[start : start + IMAGE_BATCH] for start in range(0, len(data.images), IMAGE_BATCH)]
    bar, parts = ProgressBar(), []
    for batch in batches:
        parts.append(pipeline.embed_image(batch, num_steps=num_steps, num_draws=num_draws))
        bar.update("batches", len(parts), len(batches), "scored")
    queries = torch.cat(parts)
    classes = pipeline.embed_classes(data.class_names, data.templates)
    images, texts, labels = (tensor.cpu().numpy() for tensor in (queries, classes, data.labels))
    scores = ZeroShotScores.from_embeddings(images, texts, labels)
    values = {
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
    return SplitResult(values, (queries @ classes.T).topk(3).indices.cpu().numpy())


def recognition_figure(data: ZeroShotSet, top3: np.ndarray) -> Image.Image:
    """Return a grid of images, each with its name and the three names that the model finds most similar.

    First images whose name is the first of them, then as many others, both chosen at random, so it does not show the accuracy.
    """
    is_correct = top3[:, 0] == data.labels.numpy()
    chosen: list[int] = []
    for group in (is_correct, ~is_correct):
        indices = np.flatnonzero(group).tolist()
        chosen += random.Random(0).sample(indices, min(NUM_RECOGNIZED // 2, len(indices)))
    captions = []
    for index in chosen:
        names = [data.class_names[label] for label in top3[index]]
        verdict = "correct" if is_correct[index] else "incorrect"
        captions.append("\n".join([data.class_names[data.labels[index]], f"({verdict})", *(f"- {name}" for name in names)]))
    return image_grid([data.images[index].convert("RGB") for index in chosen], captions, columns=NUM_RECOGNIZED // 4, cell=128)


def color_agreement(images: Sequence[Image.Image], real: Sequence[Image.Image]) -> dict[str, float]:
    """Compare the mean colors of generated images with those of real, held-out ones: of the own caption, and of the others.

    Distances are Euclidean in RGB, 0 to 255 each.
    """

    def mean_colors(pixels: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([np.asarray(p.convert("RGB"), dtype=np.float64).mean(axis=(0, 1)) for p in pixels])  # [N, 3]

    distance = np.linalg.norm(mean_colors(images)[:, None] - mean_colors(real)[None], axis=2)  # [N, N]
    own, others = distance.diagonal(), distance[~np.eye(len(distance), dtype=bool)].reshape(len(distance), -1)
    return {
        "distance_to_own_caption": float(own.mean()),
        "distance_to_random_caption": float(others.mean()),
        "fraction_nearer_to_own": float((own[:, None] < others).mean()),
        "num_captions": len(images),
    }


def _track(output: Path, summary: DemoSummary) -> None:
    """Log scores and grid to the run that trained the model."""
    run = summary["mlflow"]
    scores = {f"zero_shot/{s}/{name}": v for s, values in summary["zero_shot"].items() for name, v in values.items()}
    with start_run(TrackingConfig(run["tracking_uri"], run["experiment"]), str(output), resume=True) as tracker:
        others = {f"{part}/{name}": value for part in ("quality", "color") for name, value in summary[part].items()}
        tracker.log_metrics(scores | others, summary["num_steps"])
        for figure in ("grid.png", "recognition.png"):
            tracker.log_bytes((output / figure).read_bytes(), figure)


def table(summary: DemoSummary) -> str:
    """Return the summary for the terminal."""
    rows = [["zero-shot", "acc1", "x chance", "acc5", "100-way", "shuffled", "untrained", "classes", "images"]]
    for split, s in summary["zero_shot"].items():
        controls = [f"{s['acc1_100way']:.3f}", f"{s['acc1_shuffled_images']:.2%}", f"{s['acc1_untrained']:.2%}"]
        counts = [str(s["num_classes"]), str(s["num_images"])]
        rows.append([split, f"{s['acc1']:.2%}", f"{s['acc1'] / s['chance']:.1f}", f"{s['acc5']:.2%}", *controls, *counts])
    losses = [(name, summary[name]) for name in ("loss_generation", "loss_alignment")]
    color, images = summary["color"], summary["quality"]
    return "\n".join(
        [
            f"{summary['num_samples_seen']} samples in {summary['seconds_training']:.0f} s "
            f"({summary['samples_per_second']:.0f} samples/s, {summary['num_workers']} workers, ZeRO {summary['zero_stage']})",
            *(f"{name:<18}{loss['first']:>8.3f} -> {loss['last']:.3f}" for name, loss in losses),
            "",
            render_table(rows),
            "acc1, acc5: the name of the icon is the best match, or among the best five; x chance: acc1 relative to guessing;",
            "100-way: acc1 among 100 names. Controls, near chance in a sound test: shuffled images, and an untrained model.",
            "",
            f"quality of {images['num_images']} images: FD {images['fd']:.0f}, KID {images['kid']:.3f}; real images of the same "
            f"captions: FD {images['fd_floor']:.0f}, KID {images['kid_floor']:.3f}",
            f"mean color: {color['distance_to_own_caption']:.1f} from the icon of the caption, "
            f"{color['distance_to_random_caption']:.1f} from another caption's",
            f"real and generated images: {summary['grid']}",
            f"what the model recognizes: {summary['recognition']}",
            f"exported model: {summary['export_dir']}",
            "",
            verdict(summary),
        ]
    )


def _is_above_chance(accuracy: float, chance: float, num_images: int) -> bool:
    """Return whether guessing gives so many correct answers in less than one of 1,000 tests."""
    return bool(binom.sf(round(accuracy * num_images) - 1, num_images, chance) < 1e-3)


def verdict(summary: DemoSummary) -> str:
    """Return in words what the figures say."""
    factors = [s["acc1"] / s["chance"] for s in summary["zero_shot"].values()]
    above_chance = [
        _is_above_chance(s["acc1_shuffled_images"], s["chance"], s["num_images"]) for s in summary["zero_shot"].values()
    ]
    color, images = summary["color"], summary["quality"]
    low, high = min(factors), max(factors)
    if low < _CLEARLY:
        recognition = f"The model does not recognize icons clearly better than guessing ({low:.1f} times as often)."
    elif any(above_chance):
        recognition = "The test is not sound: with other images, the model is right more often than guessing."
    else:
        recognition = f"The model recognizes icons that it has not seen, {low:.0f} to {high:.0f} times as often as guessing."
    follows = color["distance_to_own_caption"] < color["distance_to_random_caption"]
    colors = "are closer in color to their captions' icons than to others" if follows else "do not have their captions' colors"
    is_close = images["fd"] < 2 * images["fd_floor"]
    return f"{recognition} Its images {colors}, and {'come close to' if is_close else 'are far from the detail of'} real icons."
