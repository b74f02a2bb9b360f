"""Reference implementations that metrics are compared with, taken from the installed peer packages.

Importing torch-fidelity imports torchvision, which is not installed. Its package is therefore registered without running its
`__init__`, and for modules that need torchvision only the required functions are compiled. torchmetrics finds the package in the
same way.

CLIP_benchmark's accuracy converts an array with one element to a float, which numpy 2.4 rejects. This module restores the old
behavior for CLIP_benchmark.
"""

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from clip_benchmark.metrics import zeroshot_classification
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


def _package_without_its_init(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    sys.modules.setdefault(name, importlib.util.module_from_spec(spec))


def functions_of(module: str, *names: str) -> dict[str, Any]:
    """Return functions of a torch-fidelity module, compiled from its installed source."""
    from torch_fidelity import helpers

    path = Path(sys.modules["torch_fidelity"].__path__[0]) / f"{module}.py"
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(body) == len(names)
    namespace: dict[str, Any] = {"np": np, "torch": torch, **vars(helpers), "KEY_METRIC_FID": "fid"}
    exec(compile(ast.Module(body, type_ignores=[]), str(path), "exec"), namespace)
    return namespace


def _float_of_one_number(value: Any) -> float:
    return float(value.item() if isinstance(value, np.ndarray) else value)


_package_without_its_init("torch_fidelity")
zeroshot_classification.float = _float_of_one_number


def clip_transform(image: Image.Image, size: int) -> torch.Tensor:
    """Return [3, size, size] as torchvision's transforms of CLIP do, with which scores were published.

    These are Resize(size, BICUBIC), CenterCrop(size), convert to RGB, ToTensor and Normalize. With torchvision 0.28 the pixels
    are equal, byte by byte, for ten shapes of images.
    """
    short, long = min(image.size), int(size * max(image.size) / min(image.size))
    image = image.resize((size, long) if image.width == short else (long, size), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2.0) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)).convert("RGB"))
    scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float() / 255
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (scaled - mean) / std
