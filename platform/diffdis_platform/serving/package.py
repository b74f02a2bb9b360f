"""Description of an exported DiffDis with which MLflow stores, documents and loads it."""

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
    "negative_prompt": "",
    "best_of": 1,
    "seed": 0,
}


def model_package(trained_for: TaskName) -> ModelPackage:
    """Return the package of a model that was trained for a task, which decides its input example."""
    generates = trained_for == "generation"
    return ModelPackage(
        entry=str(Path(__file__).with_name("pyfunc_model.py")),
        code=(str(Path(diffdis.__file__).parent),),
        requirements=("torch", "diffusers", "transformers", "safetensors", "numpy", "pandas", "pillow", "einops"),
        columns={"image": "binary", "caption": "string"},
        results={"class": "string", "score": "double", "scores": ["double"], "image": "binary", "embedding": ["double"]},
        params=_PARAMS | ({"task": "generate"} if generates else {}),
        example={"caption": ["a red circle"]} if generates else {"image": [red_circle()]},
        example_params={"task": "generate", "num_steps": 10} if generates else {"classes": ["a red circle", "a blue square"]},
    )


def red_circle() -> bytes:
    """Return a small synthetic image as a PNG."""
    image = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(image).ellipse((12, 12, 52, 52), fill="red")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
