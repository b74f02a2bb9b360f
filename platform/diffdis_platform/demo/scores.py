"""Zero-shot accuracy on the held-out splits and the colours of generated images, each beside its control."""

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image

from diffdis.metrics.zero_shot import ZeroShotScores, subset_accuracy
from diffdis.model import DiffDis
from diffdis.pipeline import DiffDisPipeline

NUM_INFERENCE_STEPS = 10
NUM_DRAWS = 8  # averaged; one image pass serves all of them
SPLITS = ("heldout_style", "heldout_names")


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


def zero_shot(pipeline: DiffDisPipeline, data: ZeroShotSet, batch_size: int = 128) -> dict[str, Any]:
    """Accuracies from pure noise, and that of the same queries with the images permuted."""
    parts = [data.images[i : i + batch_size] for i in range(0, len(data.images), batch_size)]
    queries = torch.cat([pipeline.embed_image(part, num_steps=NUM_INFERENCE_STEPS, num_draws=NUM_DRAWS) for part in parts])
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
        "num_inference_steps": NUM_INFERENCE_STEPS,
        "num_draws": NUM_DRAWS,
    }


def untrained(pipeline: DiffDisPipeline) -> DiffDisPipeline:
    """The same model with fresh random weights."""
    torch.manual_seed(0)
    config = dataclasses.replace(pipeline.config)
    return DiffDisPipeline(config, DiffDis(config), pipeline.autoencoder, pipeline.text_encoder)


def score(pipeline: DiffDisPipeline, data: Path) -> dict[str, dict[str, Any]]:
    """Every held-out split, trained and untrained."""
    sets = {split: ZeroShotSet.read(data / f"wds_{split}") for split in SPLITS}
    fresh = untrained(pipeline)
    return {split: zero_shot(pipeline, part) | {"acc1_untrained": zero_shot(fresh, part)["acc1"]} for split, part in sets.items()}


def sample_captions(data: Path, count: int) -> list[str]:
    """A fixed random choice of names of which the held-out style has a drawing."""
    names = (data / "wds_heldout_style" / "classnames.txt").read_text().splitlines()
    return random.Random(0).sample(names, count)


def colour_agreement(images: Sequence[Image.Image], captions: Sequence[str], data: Path) -> dict[str, float]:
    """Mean colours of generated images against those of real, held-out drawings: of the own caption, and of the others.

    Distances are Euclidean in RGB, 0 to 255 each.
    """
    real = ZeroShotSet.read(data / "wds_heldout_style")
    first = {real.class_names[int(label)]: image for image, label in zip(real.images, real.labels, strict=True)}

    def mean_colours(pictures: Sequence[Image.Image]) -> np.ndarray:
        return np.stack([np.asarray(p.convert("RGB"), dtype=np.float64).mean(axis=(0, 1)) for p in pictures])  # [N, 3]

    generated, drawn = mean_colours(images), mean_colours([first[caption] for caption in captions])
    distance = np.linalg.norm(generated[:, None] - drawn[None], axis=2)  # [N, N]
    own, others = distance.diagonal(), distance[~np.eye(len(distance), dtype=bool)].reshape(len(distance), -1)
    return {
        "distance_to_own_caption": float(own.mean()),
        "distance_to_random_caption": float(others.mean()),
        "share_nearer_to_own": float((own[:, None] < others).mean()),
        "num_captions": len(captions),
    }
