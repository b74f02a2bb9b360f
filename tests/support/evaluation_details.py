"""A whole evaluation, made up: 12 sets of the real sizes, two sets of captions, images drawn for several guidance scales.

python -m tests.support.evaluation_details report.html
"""

import base64
import functools
import io
import math
import random
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

OWN, BASELINE = "DiffDis, step 40000", "CLIP ViT-B/32, own run"
# name: classes, images, main metric, this model's and the baseline's main metric
SETS = {
    "vtab/cifar10": (10, 10000, "acc1", 0.913, 0.894),
    "vtab/cifar100": (100, 10000, "acc1", 0.668, 0.641),
    "vtab/caltech101": (102, 6085, "mean_per_class_recall", 0.881, 0.871),
    "cars": (196, 8041, "acc1", 0.572, 0.597),
    "vtab/flowers": (102, 6149, "mean_per_class_recall", 0.701, 0.664),
    "food101": (101, 25250, "acc1", 0.852, 0.838),
    "sun397": (397, 108754, "acc1", 0.646, 0.624),
    "vtab/dtd": (47, 1880, "acc1", 0.481, 0.441),
    "fgvc_aircraft": (100, 3333, "mean_per_class_recall", 0.183, 0.196),
    "vtab/pets": (37, 3669, "mean_per_class_recall", 0.874, 0.872),
    "vtab/eurosat": (10, 5400, "acc1", 0.557, 0.493),
    "imagenet1k": (1000, 50000, "acc1", 0.647, 0.632),
}
PUBLISHED = {
    "CLIP ViT-B/32": (0.898, 0.642, 0.876, 0.596, 0.667, 0.840, 0.625, 0.444, 0.195, 0.870, 0.504, 0.633, 0.649),
    "CLIP ViT-L/14": (0.956, 0.758, 0.925, 0.779, 0.792, 0.930, 0.676, 0.554, 0.318, 0.932, 0.626, 0.755, 0.750),
}
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_KINDS = ("heron", "harbour", "lantern", "sedan 2012", "orchid", "dumpling", "courtyard, indoor", "lattice", "terrier", "pasture")
_QUALITIES = ("grey", "long-tailed", "painted", "northern", "small", "crested", "Bengal", "old", "striped", "royal", "woven")
_ODD = ("مصباح قديم", "🦜 parrot", "a class whose name is a whole sentence, as some exporters write it, with commas and more")
CAPTIONS = (
    "a red circle beside a green square",
    "قطة تجلس على نافذة في الشتاء",
    "two children 👧🏽👦 fly a kite over the dunes while their dog watches; the sun is low and the grass is yellow",
    "Buy now!!! <b>Best price</b> & free shipping, see our shop. " + "vintage handmade ceramic lamp with linen shade " * 30,
    "夕暮れの港に並ぶ小さな漁船",
    "An_underscored_file_name_without_any_space_that_cannot_be_broken_and_is_longer_than_a_thumbnail_is_wide.jpg",
    "a bowl of soup",
    "an aerial photograph of a river delta with three arms",
)


@functools.cache
def picture(seed: int, size: int, kind: str) -> str:
    """Base64 of a JPEG or PNG of shapes on a sky, another one for every seed."""
    draw_from = random.Random(seed)
    colour = lambda low=40, high=230: tuple(draw_from.randint(low, high) for _ in range(3))  # noqa: E731
    image = Image.new("RGB", (size, size), colour(150, 235))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, size * draw_from.uniform(0.5, 0.8), size, size), fill=colour())
    for _ in range(draw_from.randint(1, 4)):
        x, y, r = (draw_from.uniform(0.1, 0.9) * size for _ in range(3))
        shape = draw_from.choice((draw.ellipse, draw.rectangle))
        shape((x - r / 3, y - r / 3, x + r / 3, y + r / 3), fill=colour())
    buffer = io.BytesIO()
    image.save(buffer, kind.upper(), quality=80)
    return base64.b64encode(buffer.getvalue()).decode()


def evaluation() -> dict[str, Any]:
    """What `evaluation_page` and `write_results` take, with every section."""
    drawn = random.Random(0)
    results = [_zero_shot(number, name, model, drawn) for number, name in enumerate(SETS) for model in (OWN, BASELINE)]
    published = {model: dict(zip((*SETS, "mean"), figures, strict=True)) for model, figures in PUBLISHED.items()}
    return {
        "title": "diffdis-sd14-laion, step 40,000",
        "created": "2026-11-25T12:00:00",
        "code_version": "git-0cd9c8a4f1be",
        "seconds": 5321.4,
        "models": [
            {
                "name": OWN, "pretrained": "s3://models/runs/diffdis-sd14-laion/checkpoints/step_00040000/export",
                "task": "joint", "step": 40000, "settings": {"num_steps": 10, "num_draws": 4, "guidance": 0.0},
            },
            {"name": BASELINE, "pretrained": "/models/clip-vit-base-patch32", "task": "clip", "step": None, "settings": {}},
        ],
        "zero_shot": results,
        "means": {model: sum(_mains(results, model)) / len(SETS) for model in (OWN, BASELINE)},
        "published": published,
        "retrieval": [_retrieval(name, model, drawn) for name in ("flickr30k", "mscoco_captions") for model in (OWN, BASELINE)],
        "published_retrieval": {
            "CLIP ViT-L/14": {
                "flickr30k": _recalls((0.650, 0.872, 0.920), (0.852, 0.974, 0.992)),
                "mscoco_captions": _recalls((0.365, 0.611, 0.711), (0.563, 0.794, 0.866)),
            }
        },
        "curve": [
            {
                "set": name, "model": OWN, "num_steps": steps, "num_draws": draws, "seconds": 11.0 * steps * (1 + 0.4 * draws),
                "acc1": top - 0.31 / (1 + steps) - 0.06 / draws,
            }
            for name, top in (("vtab/cifar10", 0.93), ("imagenet1k", 0.66))
            for draws in (1, 2, 4, 8)
            for steps in (1, 2, 5, 10, 20, 50)
        ],
        "quality": [_quality(scale) for scale in (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)],
        "failures": [
            "imagenet-a: /data/eval/wds_imagenet-a/test: 4 of the 8 shards that nshards.txt names are not there; copy them again",
            "flickr8k: s3://eval/wds_flickr8k: no such file or folder; correct the path",
        ],
    }  # fmt: skip


def _mains(results: list[dict[str, Any]], model: str) -> list[float]:
    return [result["metrics"][result["main_metric"]] for result in results if result["model"] == model]


def class_names(count: int) -> list[str]:
    if count == len(_CIFAR10):
        return list(_CIFAR10)
    plain = [f"{quality} {kind}" for kind in _KINDS for quality in _QUALITIES]
    return [*_ODD, *(f"{plain[i % len(plain)]}{f' {i // len(plain) + 1}' if i >= len(plain) else ''}" for i in range(count - 3))]


def _zero_shot(number: int, name: str, model: str, drawn: random.Random) -> dict[str, Any]:
    num_classes, num_images, main_metric, own, baseline = SETS[name]
    main = own if model == OWN else baseline
    names = class_names(num_classes)
    lost = [{"key": f"0.tar/s{i:07d}", "cause": "image_undecodable"} for i in range(11 * (name == "food101"))]
    per_class = [
        {
            "class": each,
            "count": num_images // num_classes,
            "recall": min(1.0, max(0.0, drawn.betavariate(6 * main, 6 - 6 * main))),
        }
        for each in names
    ]
    if name == "sun397":
        per_class[7] |= {"count": 0, "recall": None}
    confusions = []
    for i in range(6):
        true, predicted = drawn.sample(names, 2)
        share = 0.3 / (i + 1)
        images = [{"key": f"0.tar/s{100 * i + j:07d}", "jpeg": picture(1000 * number + 10 * i + j, 64, "jpeg")} for j in range(4)]
        confusions.append(
            {
                "true": true, "predicted": predicted, "count": max(1, round(share * num_images / num_classes)), "share": share,
                "examples": images,
            }
        )  # fmt: skip
    metrics = {"acc1": main - 0.004, "acc5": min(0.999, main + 0.25), "mean_per_class_recall": main - 0.007}
    return {
        "set": name, "model": model, "main_metric": main_metric, "metrics": metrics | {main_metric: main}, "n": num_images,
        "unreadable": lost[:10], "num_unreadable": len(lost), "seconds": num_images / 90, "chance": 1 / num_classes,
        "per_class": per_class, "confusions": confusions,
    }  # fmt: skip


def _recalls(image: tuple[float, ...], text: tuple[float, ...]) -> dict[str, float]:
    found = {f"image_retrieval_recall@{k}": value for k, value in zip((1, 5, 10), image, strict=True)}
    return found | {f"text_retrieval_recall@{k}": value for k, value in zip((1, 5, 10), text, strict=True)}


def _retrieval(name: str, model: str, drawn: random.Random) -> dict[str, Any]:
    level = (0.61 if name == "flickr30k" else 0.33) - 0.02 * (model == BASELINE)
    examples, image_examples = [], []
    for i, caption in enumerate(CAPTIONS[:6]):
        right = drawn.choice((0, 0, 1, 3, 9))
        similarities = [0.41 - 0.013 * j - 0.01 * drawn.random() for j in range(5)]
        images = [
            {
                "key": f"0.tar/s{i + 9 * j:07d}",
                "jpeg": picture(90000 + 7 * i + j, 96, "jpeg"),
                "similarity": s,
                "right": j == right,
            }
            for j, s in enumerate(similarities)
        ]
        examples.append({"caption": caption, "images": images})
        captions = [
            {"text": CAPTIONS[(i + j) % len(CAPTIONS)], "similarity": s, "right": (i + j) % 3 == 0 and i != 4}
            for j, s in enumerate(similarities)
        ]
        image_examples.append({"key": f"0.tar/s{i:07d}", "jpeg": picture(95000 + i, 96, "jpeg"), "captions": captions})
    num_images = 1000 if name == "flickr30k" else 5000
    return {
        "set": name, "model": model, "num_images": num_images, "num_texts": 5 * num_images, "unreadable": [], "num_unreadable": 0,
        "metrics": _recalls((level, level + 0.22, level + 0.29), (level + 0.2, level + 0.34, level + 0.37)),
        "seconds": num_images / 55, "examples": examples, "image_examples": image_examples,
    }  # fmt: skip


def _quality(scale: float) -> dict[str, Any]:
    fid = 12.9 + 1.1 * (scale - 2.2) ** 2 / (1 + 0.25 * scale) + 9 * math.exp(-2.2 * (scale - 0.9))
    return {
        "guidance_scale": scale,
        "metrics": {
            "fid": fid, "fid_infinity": fid - 1.31, "kid": 0.0046 + 0.0001 * fid, "kid_std": 0.0004,
            "alignment": 0.318 - 0.075 * math.exp(-0.55 * scale),
        },
        "alignment_by": "CLIP ViT-L/14",
        "protocol": {
            "network": "pt_inception-2015-12-05", "resize": "tf1_bilinear", "dim": 2048, "image_size": 512,
            "digest": "sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
            "prompts": {"file": "s3://eval/coco_30k.txt", "digest": "sha256:91c2"},
            "sampler": "ddim", "num_steps": 50, "guidance_scale": scale, "seeds": "of each prompt's place",
            "reference": {"file": "s3://eval/coco_val2014.npz", "n": 40504, "digest": "sha256:ab10"},
        },
        "n": 30000, "seconds": 5400.0,
        "samples": [{"caption": caption, "png": picture(round(7 * scale) + i, 128, "png")} for i, caption in enumerate(CAPTIONS)],
    }  # fmt: skip


if __name__ == "__main__":
    from ray_platform.report.evaluation import evaluation_page

    Path(sys.argv[1]).write_text(evaluation_page(evaluation()), encoding="utf-8")
