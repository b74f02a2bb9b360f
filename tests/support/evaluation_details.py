"""A complete synthetic evaluation: zero-shot sets of realistic sizes, a caption set, and images for several guidance scales."""

import base64
import functools
import io
import random
from typing import Any

from PIL import Image

OWN, BASELINE = "DiffDis, step 40000", "CLIP ViT-B/32, own run"
# name: classes, images, main metric, and its value for this model, the baseline and two published models
SETS = {
    "vtab/cifar10": (10, 10000, "acc1", 0.913, 0.894, 0.898, 0.956),
    "cars": (196, 8041, "acc1", 0.572, 0.597, 0.596, 0.779),
    "food101": (101, 25250, "acc1", 0.852, 0.838, 0.840, 0.930),
    "vtab/pets": (37, 3669, "mean_per_class_recall", 0.874, 0.872, 0.870, 0.932),
    "imagenet1k": (1000, 50000, "acc1", 0.647, 0.632, 0.633, 0.755),
}
CAPTIONS = (
    "a red circle next to a green square",
    "قطة تجلس على نافذة في الشتاء",
    "Buy now!!! <b>Best price</b> & free shipping, see our shop. " + "vintage handmade ceramic lamp with linen shade " * 30,
    "An_underscored_file_name_without_any_space_that_cannot_be_broken_and_is_longer_than_a_thumbnail_is_wide.jpg",
)
RECALLS = [f"{direction}_retrieval_recall@{k}" for direction in ("image", "text") for k in (1, 5, 10)]


@functools.cache
def picture(seed: int, kind: str = "jpeg") -> str:
    """Return a single-color image in base64, with a different color for every seed."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), f"hsl({37 * seed % 360}, 60%, 60%)").save(buffer, kind)
    return base64.b64encode(buffer.getvalue()).decode()


def evaluation() -> dict[str, Any]:
    """Return the input of `evaluation_page`, with every section."""
    results = [zero_shot_result(name, model) for name in SETS for model in (OWN, BASELINE)]
    return {
        "title": "diffdis-sd14-laion, step 40,000",
        "created": "2026-11-25T12:00:00",
        "code_version": "git-0cd9c8a4f1be",
        "seconds": 5321.4,
        "models": [
            {"name": OWN, "pretrained": "s3://models/run/export", "task": "joint", "step": 40000,
             "settings": {"num_steps": 10, "num_draws": 4, "guidance": 0.0}},
            {"name": BASELINE, "pretrained": "/models/clip-vit-base-patch32", "task": "clip", "step": None, "settings": {}},
        ],
        "zero_shot": results,
        "means": {OWN: 0.7716, BASELINE: 0.7666},
        "published": {
            model: {name: values[5 + i] for name, values in SETS.items()} | {"mean": (0.7674, 0.8704)[i]}
            for i, model in enumerate(("CLIP ViT-B/32", "CLIP ViT-L/14"))
        },
        "retrieval": [retrieval_result(model) for model in (OWN, BASELINE)],
        "published_retrieval": {"CLIP ViT-L/14": {"flickr30k": dict.fromkeys(RECALLS, 0.9)}},
        "published_sources": {"a table of open_clip": {"CLIP ViT-B/32": "ViT-B-32, openai", "CLIP ViT-L/14": "ViT-L-14, openai"}},
        "published_notes": ["the paper: 1.65 points more"],
        "curve": [
            {"set": name, "model": OWN, "num_steps": steps, "num_draws": draws, "seconds": 11.0 * steps,
             "acc1": 0.9 - 0.3 / (1 + steps) - 0.06 / draws}
            for name in ("vtab/cifar10", "imagenet1k") for draws in (1, 2) for steps in (1, 5, 50)
        ],
        "quality": [quality_point(scale) for scale in (1.0, 2.0, 3.0, 7.5)],
        "warnings": ["cars: names.txt names the class 'van' more than once"],
        "failures": ["flickr8k: s3://eval/wds_flickr8k: no such file or folder; correct the path"],
    }  # fmt: skip


def class_names(count: int) -> list[str]:
    return ["مصباح قديم", "🦜 parrot", *(f"class {i}, with a comma" for i in range(count - 2))]


def zero_shot_result(name: str, model: str) -> dict[str, Any]:
    num_classes, num_images, main_metric, *mains = SETS[name]
    main, rng, names = mains[model == BASELINE], random.Random(name), class_names(SETS[name][0])
    lost = [{"key": f"0.tar/s{i:07d}", "cause": "image_undecodable"} for i in range(11 * (name == "food101"))]
    classes = [
        {"class": each, "count": num_images // num_classes, "recall": rng.betavariate(6 * main, 6 - 6 * main)} for each in names
    ]
    if name == "food101":
        classes[7] |= {"count": 0, "recall": None}
    examples = [{"key": f"0.tar/s{i:07d}", "jpeg": picture(i)} for i in range(3)]
    confusions = [{"true": names[i], "predicted": names[i + 1], "count": 9, "fraction": 0.3 / (i + 1), "examples": examples}
                  for i in range(3)]  # fmt: skip
    predictions = [
        {"key": f"0.tar/s{i:07d}", "jpeg": picture(i), "true": names[i],
         "predicted": [{"name": names[(i + (i > 4) + j) % len(names)], "right": j == 0 and i < 5} for j in range(5)]}
        for i in range(8)
    ]  # fmt: skip
    metrics = {"acc1": main - 0.004, "acc5": min(0.999, main + 0.25), "mean_per_class_recall": main - 0.007, main_metric: main}
    return {
        "set": name, "model": model, "main_metric": main_metric, "metrics": metrics, "n": num_images, "seconds": num_images / 90,
        "unreadable": lost[:10], "num_unreadable": len(lost), "chance": 1 / num_classes, "per_class": classes,
        "confusions": confusions, "examples": predictions,
    }  # fmt: skip


def retrieval_result(model: str) -> dict[str, Any]:
    examples = [{"key": f"0.tar/s{j:07d}", "jpeg": picture(j), "similarity": 0.41 - 0.01 * j, "right": j == 1} for j in range(5)]
    captions = [{"text": caption, "similarity": 0.4, "right": False} for caption in CAPTIONS]
    return {
        "set": "flickr30k", "model": model, "num_images": 1000, "num_texts": 5000, "unreadable": [], "num_unreadable": 0,
        "metrics": {name: 0.5 + 0.03 * i for i, name in enumerate(RECALLS)}, "seconds": 18.0,
        "examples": [{"caption": caption, "images": examples} for caption in CAPTIONS],
        "image_examples": [{"key": "0.tar/s0000000", "jpeg": picture(0), "captions": captions}],
    }  # fmt: skip


def quality_point(scale: float) -> dict[str, Any]:
    fid = 12.9 + (scale - 2.2) ** 2
    protocol = {
        "network": "pt_inception-2015-12-05", "resize": "tf1_bilinear", "dim": 2048, "image_size": 512,
        "digest": "sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        "prompts": {"file": "s3://eval/coco_30k.txt", "digest": "sha256:91c2"}, "num_steps": 50, "guidance_scale": scale,
    }  # fmt: skip
    return {
        "guidance_scale": scale, "alignment_by": "CLIP ViT-L/14", "protocol": protocol, "n": 30000, "seconds": 5400.0,
        "metrics": {"fid": fid, "fid_infinity": fid - 1.31, "kid": 0.0046, "kid_std": 0.0004, "alignment": 0.25 + 0.009 * scale},
        "samples": [{"caption": caption, "png": picture(i, "png")} for i, caption in enumerate(CAPTIONS)],
    }  # fmt: skip
