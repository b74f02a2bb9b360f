"""Compare the cost of an evaluation with CLIP_benchmark, torchmetrics, torch-fidelity and a diffusion classifier.

    PYTHONPATH=platform:. python tests/benchmarks/evaluate.py [--rounds 5] [--photographs /data/wds_photographs]

Uses one process with one torch thread per core. The contenders take turns. The last line is one JSON object.

`--photographs` is the folder of a `wds_*` set of real images: `predictions_changed` counts those whose predicted class torch's
resize changes, compared with Pillow's, for a CLIP of random weights. The margin of an image is the similarity of its best class
minus that of the second: `margin_of_changed` is the largest margin of a changed image, next to the `margin_median`.
`peak_memory_mb` is what a CLIP's preprocessing of a 1 x 60,000 image adds to a process.
"""

import argparse
import dataclasses
import io
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, default_collate
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPModel

from diffdis import config as presets
from diffdis.metrics.image_quality import Moments, frechet_distance
from diffdis.metrics.zero_shot import ZeroShotScores, class_embeddings
from diffdis.model import DiffDis
from diffdis.pipeline import DiffDisPipeline
from diffdis.scorers import ClipScorer, Resize
from diffdis.text_encoder import build_text_encoder
from ray_platform.evaluate.discovery import open_evaluation_set
from ray_platform.evaluate.sets import KNOWN_SETS
from ray_platform.evaluate.unit_work import BATCH_SIZE, EmbedImages, WorkerModels
from ray_platform.replicas import UNITS_IN_FLIGHT
from tests.benchmarks.measuring import in_turns, medians, ratio, seconds
from tests.diffdis.metrics.peers import clip_transform, functions_of, zeroshot_classification
from tests.support.tiny_checkpoints import save_clip, save_mean_pool_encoder

# The demo's networks at twice its image size. At the demo's 32 px, encoding an image costs at most as much as 20 query steps (see
# `k10_cost_ratio_32px`); at Stable Diffusion's size, it costs as much as several thousand (see `k10_flops_ratio_sd_v1`).
IMAGE_SIZE = 64
NUM_STEPS = 10
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = ("a photo of a {c}.", "a blurry photo of a {c}.", "the photo of the {c}.")
# Samples of (t, eps) per class that a diffusion classifier averages over. Li et al. (2023), "Your Diffusion Model is Secretly a
# Zero-Shot Classifier", use from 50 for pruning to 500 for the remaining classes.
CLASSIFIER_DRAWS = 50
NUM_JPEGS, NUM_CLASSES = 1024, 20  # as many texts per image as ImageNet: 80 templates and 50 images per class
FEATURES, WIDTH = 4096, 2048


# --- Zero-shot by denoising a query, compared with one encoder pass and with a diffusion classifier ------------------------


def small_pipeline(folder: Path, image_size: int) -> DiffDisPipeline:
    base = presets.demo()
    text = dataclasses.replace(presets.tiny().text_encoder, path=str(folder))
    unet = dataclasses.replace(base.unet, sample_size=image_size // 2)
    config = dataclasses.replace(base, image_size=image_size, unet=unet, text_encoder=text)
    torch.manual_seed(0)
    encoder = build_text_encoder(text)
    from diffdis.autoencoder import build_autoencoder

    return DiffDisPipeline(config, DiffDis(config), build_autoencoder(config.autoencoder), encoder)


@torch.no_grad()
def diffusion_classifier(pipeline: DiffDisPipeline, latent: torch.Tensor, class_names: tuple[str, ...]) -> int:
    """Return the class whose text minimizes the U-Net's denoising error on one latent [1, C, H, W]."""
    states, _ = pipeline.text_encoder.encode([f"a photo of a {name}." for name in class_names])
    generator = torch.Generator().manual_seed(0)
    t = torch.randint(1000, (CLASSIFIER_DRAWS,), generator=generator)
    noise = torch.randn((CLASSIFIER_DRAWS, *latent.shape[1:]), generator=generator)
    abar = pipeline.model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
    noised = abar.sqrt() * latent + (1 - abar).sqrt() * noise
    target = abar.sqrt() * noise - (1 - abar).sqrt() * latent  # v
    errors = []
    for state in states:
        predicted = pipeline.model.predict_image(noised, t, state.expand(CLASSIFIER_DRAWS, -1, -1))
        errors.append(float(((predicted - target) ** 2).mean()))
    return int(np.argmin(errors))


def denoising(folder: Path, image_size: int, num_rounds: int, with_classifier: bool) -> dict[str, float]:
    """Return the seconds per image of each contender."""
    pipeline = small_pipeline(folder, image_size)
    latent = torch.randn(4 * BATCH_SIZE, pipeline.config.unet.in_channels, image_size // 2, image_size // 2)
    keys = [str(i) for i in range(len(latent))]
    null, _ = pipeline.text_encoder.encode([""])
    classes = pipeline.embed_classes(CLASSES, TEMPLATES)

    @torch.no_grad()
    def encoder() -> None:
        pipeline.model.encode_condition(latent, null)

    def zero_shot() -> None:
        (pipeline.embed_latent(latent, keys, num_steps=NUM_STEPS) @ classes.T).argmax(dim=1)

    contenders = {"encoder": lambda: seconds(encoder) / len(latent), "zero_shot": lambda: seconds(zero_shot) / len(latent)}
    if with_classifier:
        contenders["classifier"] = lambda: seconds(lambda: diffusion_classifier(pipeline, latent[:1], CLASSES))
    measured = in_turns(contenders, num_rounds)
    suffix = "" if with_classifier else f"_{image_size}px"
    result = {f"k10_cost_ratio{suffix}": ratio(measured, "zero_shot", "encoder")}
    if with_classifier:
        result["speedup_vs_diffusion_classifier"] = ratio(measured, "classifier", "zero_shot")
        result |= {f"images_per_second_{name}": round(1 / value, 1) for name, value in medians(measured, 6).items()}
    return result


def flops_ratio_of_sd_v1() -> float:
    """Return the FLOPs of one image encoding plus ten query steps over those of the encoding alone, at the paper's model size.

    Uses tensors without data, so no weights are allocated.
    """
    with torch.device("meta"):
        model = DiffDis(presets.sd_v1(query_visibility="one_way"))
        latent, null = torch.zeros(1, 4, 64, 64), torch.zeros(1, 77, 768)
        e_t, time_ = torch.zeros(1, 1, 768), torch.zeros(1, 1, dtype=torch.long)
    counts = {}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            image = model.encode_condition(latent, null)
        counts["walk"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            model.predict_query(image, e_t, time_)
        counts["step"] = counter.get_total_flops()
    return round(1 + NUM_STEPS * counts["step"] / counts["walk"], 4)


# --- CLIP on a set of photographs, with this platform's worker and with CLIP_benchmark's loop --------------------------------


def write_photographs(folder: Path) -> Path:
    """Write a `wds_*` set of JPEGs of 384 to 512 px with structure at several scales, labeled with some of ImageNet's classes."""
    rng, imagenet = np.random.default_rng(0), KNOWN_SETS["imagenet1k"]
    root = folder / "wds_photographs"
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("\n".join(imagenet.classes[:NUM_CLASSES]) + "\n")
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(imagenet.templates) + "\n")
    sink = webdataset.ShardWriter(str(root / "test" / "%d.tar"), maxcount=512, verbose=0)
    for i in range(NUM_JPEGS):
        size = tuple(int(side) for side in rng.integers(384, 513, 2))
        pixels = sum(
            np.asarray(
                Image.fromarray(rng.integers(0, 256, (scale, scale, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC),
                dtype=np.float32,
            )
            * weight
            for scale, weight in ((6, 0.6), (48, 0.3), (192, 0.1))
        )
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(pixels).clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        sink.write({"__key__": f"s{i:07d}", "jpg": buffer.getvalue(), "cls": int(rng.integers(NUM_CLASSES))})
    sink.close()
    (root / "test" / "nshards.txt").write_text(f"{NUM_JPEGS // 512}\n")
    return root


def evaluate_by_us(root: Path, clip: Path) -> Mapping[str, float]:
    return scores_of(root, clip, "torch")[0].metrics


def scores_of(root: Path, clip: Path, resize: Resize) -> tuple[ZeroShotScores, np.ndarray]:
    """Return the scores and the margins of the images [n].

    Runs the work of one evaluation worker on all cores, with UNITS_IN_FLIGHT concurrent units, and the driver's aggregation.
    """
    data = open_evaluation_set("photographs", str(root))
    parts = WorkerModels({"clip": lambda device: ClipScorer(clip, device, resize)}, os.cpu_count() or 1, "cpu")
    classes = class_embeddings(parts["clip"].embed_texts, data.classes, data.templates).numpy()
    with ThreadPoolExecutor(UNITS_IN_FLIGHT) as units_under_way:
        rows = list(units_under_way.map(lambda part: EmbedImages("clip", part, {}).run(parts), data.slices))
    labels = np.concatenate([part["labels"] for part in rows])
    images = np.concatenate([part["embeddings"] for part in rows])
    second, best = np.sort(images @ classes.T, axis=1)[:, -2:].T
    return ZeroShotScores.from_embeddings(images, classes, labels), best - second


def memory_of_an_extreme_image(clip: Path) -> float:
    """Return the MiB by which preprocessing a 1 x 60,000 image raises the peak memory of a process."""
    scorer, image = ClipScorer(clip), np.zeros((60_000, 1, 3), dtype=np.uint8)
    scorer.preprocess(np.zeros((500, 375, 3), dtype=np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scorer.preprocess(image)
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, 1)


# CLIP_benchmark's zero-shot loop, on a transformers CLIP and a `wds_*` folder. Its installed functions are used unchanged, except
# for its data reader: that imports torchvision, which cannot be installed alongside CPU torch. The same pipeline of WebDataset
# and DataLoader is therefore built here with the same options, and `clip_transform` stands for torchvision's transform.
PEER_WORKERS, PEER_BATCH_SIZE = 4, 64  # the defaults of CLIP_benchmark's command line


def evaluate_by_clip_benchmark(root: Path, clip: Path) -> Mapping[str, float]:
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), AutoTokenizer.from_pretrained(clip)
    size, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    encoders = SimpleNamespace(
        encode_image=lambda images: model.get_image_features(pixel_values=images).pooler_output,
        encode_text=lambda tokens: model.get_text_features(input_ids=tokens).pooler_output,
    )
    count = int((root / "test" / "nshards.txt").read_text())
    dataset = (
        webdataset.WebDataset(str(root / "test" / f"{{0..{count - 1}}}.tar"), nodesplitter=lambda src: src, shardshuffle=False)
        .decode(webdataset.autodecode.ImageHandler("pil", extensions=["webp", "png", "jpg", "jpeg"]))
        .to_tuple(["webp", "png", "jpg", "jpeg"], "cls")
        .map_tuple(partial(clip_transform, size=size), None)
        .batched(PEER_BATCH_SIZE, collation_fn=default_collate)
    )
    dataset.classes = (root / "classnames.txt").read_text().splitlines()
    loader = DataLoader(
        dataset, batch_size=None, shuffle=False, num_workers=min(PEER_WORKERS, count), multiprocessing_context="fork"
    )
    templates = (root / "zeroshot_classification_templates.txt").read_text().splitlines()

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]

    return zeroshot_classification.evaluate(encoders, loader, tokenize, dataset.classes, templates, "cpu", amp=False)


def against_clip_benchmark(folder: Path, num_rounds: int, photographs: str) -> dict[str, Any]:
    root, clip = write_photographs(folder), save_clip(folder / "clip", image_size=224, patch_size=32)
    scores: dict[str, Mapping[str, float]] = {}
    # Each contender has a persistent process, so that neither is affected by the other's torch settings and memory.
    with ProcessPoolExecutor(1, get_context("spawn")) as ours, ProcessPoolExecutor(1, get_context("spawn")) as peer:

        def evaluate(name: str, process: ProcessPoolExecutor, call: Callable) -> float:
            start = time.perf_counter()
            scores[name] = process.submit(call, root, clip).result()
            return time.perf_counter() - start

        contenders = {
            "ours": partial(evaluate, "ours", ours, evaluate_by_us),
            "peer": partial(evaluate, "peer", peer, evaluate_by_clip_benchmark),
        }
        measured = in_turns(contenders, num_rounds)
    changes: dict[str, Any] = {}
    if photographs:
        (by_torch, _), (by_pillow, margins) = (scores_of(Path(photographs), clip, resize) for resize in ("torch", "pillow"))
        changed = by_torch.predictions[:, 0] != by_pillow.predictions[:, 0]
        changes = {
            "predictions_changed": int(changed.sum()),
            "predictions_compared": len(changed),
            "margin_of_changed": float(margins[changed].max(initial=0.0)),
            "margin_median": float(np.median(margins)),
        }
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        changes["peak_memory_mb"] = process.submit(memory_of_an_extreme_image, clip).result()
    rates = {name: round(NUM_JPEGS / value, 1) for name, value in medians(measured, 4).items()}
    return {
        "speedup_vs_clip_benchmark": ratio(measured, "peer", "ours"),
        "accuracy_equal": all(abs(scores["ours"][name] - value) < 1e-9 for name, value in scores["peer"].items()),
        "images_per_second_clip": rates["ours"],
        "images_per_second_clip_benchmark": rates["peer"],
        **changes,
    }


# --- The Fréchet distance -----------------------------------------------------------------------------------------------------


def frechet(num_rounds: int) -> dict[str, float]:
    """Measure the Fréchet distance, starting from the moments, at the feature width of the FID Inception network."""
    from torchmetrics.image.fid import _compute_fid

    rng = np.random.default_rng(0)
    mix = rng.standard_normal((WIDTH, WIDTH)) * np.geomspace(1, 1e-3, WIDTH)  # a decaying spectrum, like that of real features
    a, b = (Moments.of((rng.standard_normal((FEATURES, WIDTH)) @ mix + shift).astype(np.float32)) for shift in (0.0, 0.05))
    as_torch = [torch.from_numpy(x) for x in (a.mean, a.covariance, b.mean, b.covariance)]
    fidelity = functions_of("metric_fid", "fid_statistics_to_metric")["fid_statistics_to_metric"]
    stats = [{"mu": m.mean, "sigma": m.covariance} for m in (a, b)]
    values: dict[str, float] = {}
    calls: dict[str, Callable[[], float]] = {
        "ours": lambda: frechet_distance(a, b),
        "torchmetrics": lambda: float(_compute_fid(*as_torch)),
        "torch_fidelity": lambda: float(next(iter(fidelity(*stats, False).values()))),
    }

    def measure(name: str) -> float:
        start = time.perf_counter()
        values[name] = calls[name]()
        return time.perf_counter() - start

    measured = in_turns({name: partial(measure, name) for name in calls}, num_rounds, warm_up=0)
    peers = ("torchmetrics", "torch_fidelity")
    return {
        "speedup_frechet": min(ratio(measured, peer, "ours") for peer in peers),
        "frechet_relative_error": max(abs(values["ours"] - values[peer]) / values[peer] for peer in peers),
        **{f"seconds_frechet_{name}": value for name, value in medians(measured, 3).items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--photographs", default="", help="folder of a wds_* set of real images")
    arguments = parser.parse_args()
    num_rounds = arguments.rounds
    torch.set_num_threads(os.cpu_count() or 1)
    result: dict[str, Any] = {"image_size": IMAGE_SIZE, "num_classes": len(CLASSES), "classifier_draws": CLASSIFIER_DRAWS}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_mean_pool_encoder(folder / "text_encoder")
        result |= denoising(folder / "text_encoder", IMAGE_SIZE, num_rounds, with_classifier=True)
        result |= denoising(folder / "text_encoder", presets.demo().image_size, num_rounds, with_classifier=False)
        result["k10_flops_ratio_sd_v1"] = flops_ratio_of_sd_v1()
        result |= against_clip_benchmark(folder, num_rounds, arguments.photographs)
    result |= frechet(num_rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
