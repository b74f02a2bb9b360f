"""CLIP_benchmark's own zero-shot loop, on a transformers CLIP and a `wds_*` folder.

Its functions are used as they are installed. What it reads the folder with imports torchvision, which does not install beside CPU
torch, so the same pipeline of WebDataset and DataLoader is built here, with its options; and torchvision's transform, which is
Pillow's resize and crop and torch's normalisation, by those.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.utils.data import default_collate
from transformers import AutoTokenizer, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tests.diffdis.metrics import peers  # noqa: F401  (mends CLIP_benchmark for numpy 2.4)

from clip_benchmark.metrics import zeroshot_classification  # isort: skip

NUM_WORKERS, BATCH_SIZE = 4, 64  # the defaults of its command line


class EncodesAsClipBenchmarkWants:
    def __init__(self, folder: Path) -> None:
        self.model = CLIPModel.from_pretrained(folder).eval()

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixel_values=images).pooler_output

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids=tokens).pooler_output


def transform(image: Image.Image, size: int) -> torch.Tensor:
    """Resize(size, BICUBIC), CenterCrop(size), convert to RGB, ToTensor, Normalize. -> [3, size, size]"""
    width, height = image.size
    short, long = min(width, height), max(width, height)
    resized = int(size * long / short)
    image = image.resize((size, resized) if width <= height else (resized, size), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))
    scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float() / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (scaled - mean) / std


def evaluate_by_clip_benchmark(root: Path, clip: Path) -> Mapping[str, float]:
    model, tokenizer = EncodesAsClipBenchmarkWants(clip), AutoTokenizer.from_pretrained(clip)
    size = model.model.config.vision_config.image_size
    length = model.model.config.text_config.max_position_embeddings
    count = int((root / "test" / "nshards.txt").read_text())
    dataset = (
        webdataset.WebDataset(str(root / "test" / f"{{0..{count - 1}}}.tar"), nodesplitter=lambda src: src, shardshuffle=False)
        .decode(webdataset.autodecode.ImageHandler("pil", extensions=["webp", "png", "jpg", "jpeg"]))
        .to_tuple(["webp", "png", "jpg", "jpeg"], "cls")
        .map_tuple(partial(transform, size=size), None)
        .batched(BATCH_SIZE, collation_fn=default_collate)
    )
    dataset.classes = (root / "classnames.txt").read_text().splitlines()
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, shuffle=False, num_workers=min(NUM_WORKERS, count), multiprocessing_context="fork"
    )
    templates = (root / "zeroshot_classification_templates.txt").read_text().splitlines()

    def tokenize(texts: list[str]) -> torch.Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")["input_ids"]

    return zeroshot_classification.evaluate(model, loader, tokenize, dataset.classes, templates, "cpu", amp=False)
