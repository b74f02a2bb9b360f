"""What MLflow has to know to keep, describe and load an exported DiffDis."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

import diffdis
from diffdis.config import TaskName
from ray_platform.tracking import ModelPackage

_PARAMS: dict[str, Any] = {
    "task": "classify",
    "classes": [],
    "templates": ["{c}"],
    "num_steps": 0,
    "num_draws": 1,
    "guidance_scale": 7.5,
    "seed": 0,
}


def model_package(trained_for: TaskName) -> ModelPackage:
    """`trained_for`: the half of the model that was trained, which its input example shows."""
    draws = trained_for == "generation"
    return ModelPackage(
        entry=str(Path(__file__).with_name("pyfunc_model.py")),
        code=(str(Path(diffdis.__file__).parent),),
        requirements=("torch", "diffusers", "transformers", "safetensors", "numpy", "pandas", "pillow", "einops"),
        columns={"image": "binary", "caption": "string"},
        results={"class": "string", "score": "double", "scores": ["double"], "image": "binary", "embedding": ["double"]},
        params=_PARAMS | ({"task": "generate"} if draws else {}),
        example={"caption": ["a red circle"]} if draws else {"image": [red_circle()]},
        example_params={"task": "generate", "num_steps": 10} if draws else {"classes": ["a red circle", "a blue square"]},
    )


def red_circle() -> bytes:
    """A small picture of nobody's data, as a PNG."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
