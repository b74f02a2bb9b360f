"""DiffDis as MLflow's pyfunc loads it: it travels with every logged model, and finds only what is stored there with it.

Rows go in as a DataFrame with the columns `image` (the bytes of a picture file; base64 in JSON) and `caption`; each may lack.
"""

import io
from typing import Any

import mlflow
import pandas as pd

_BATCH = 32  # rows at a time


class DiffDisModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        import torch  # late: whoever logs this model need not have it

        from diffdis.pipeline import DiffDisPipeline

        pipeline = DiffDisPipeline.from_pretrained(context.artifacts["model"])
        self.pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """A row for each of the input's; which columns depends on `params["task"]`:

        classify: image -> class, score (the class's probability) and scores (those of all of params["classes"], in that order).
        generate: caption -> image, the bytes of a PNG.
        embed:    image, or where there is none caption -> embedding; those of a fitting pair have a large dot product.

        `num_steps` 0 stands for what the pipeline takes: 50 for generate, 10 otherwise.
        Raises ValueError in a line for what the task lacks.
        """
        params = params or {}
        task = params.get("task", "classify")
        methods = {"classify": self._classify, "generate": self._generate, "embed": self._embed}
        if task not in methods:
            raise ValueError(f"task: {task!r} is none of {', '.join(methods)}")
        parts = [model_input.iloc[start : start + _BATCH] for start in range(0, len(model_input), _BATCH)]
        found = [methods[task](part, params, start * _BATCH) for start, part in enumerate(parts)]
        return pd.concat(found, ignore_index=True) if found else pd.DataFrame()

    def _classify(self, rows: pd.DataFrame, params: dict[str, Any], first: int) -> pd.DataFrame:
        classes, templates = list(params.get("classes", [])), list(params.get("templates", [])) or ["{c}"]
        if not classes:
            raise ValueError("classes: name those to choose from")
        scores = self.pipeline.classify(_images(rows, first), classes, templates, **_denoising(params)).tolist()
        best = [max(range(len(classes)), key=row.__getitem__) for row in scores]
        named = [classes[place] for place in best]
        chosen = [row[place] for row, place in zip(scores, best, strict=True)]
        return pd.DataFrame({"class": named, "score": chosen, "scores": scores})

    def _generate(self, rows: pd.DataFrame, params: dict[str, Any], first: int) -> pd.DataFrame:
        images = self.pipeline.generate(
            _column(rows, "caption", first),
            num_steps=params.get("num_steps", 0) or 50,
            guidance_scale=params.get("guidance_scale", 7.5),
            seed=params.get("seed", 0),
            indices=range(first, first + len(rows)),  # the noise of a row depends on its index, not on the batch size
        )
        return pd.DataFrame({"image": [_png(image) for image in images]})

    def _embed(self, rows: pd.DataFrame, params: dict[str, Any], first: int) -> pd.DataFrame:
        there = rows["image"].notna() if "image" in rows else pd.Series(False, index=rows.index)
        found: dict[Any, list[float]] = {}
        if there.any():
            embedded = self.pipeline.embed_image(_images(rows[there], first), **_denoising(params))
            found |= dict(zip(rows.index[there], embedded.tolist(), strict=True))
        if not there.all():
            embedded = self.pipeline.embed_text(_column(rows[~there], "caption", first))
            found |= dict(zip(rows.index[~there], embedded.tolist(), strict=True))
        return pd.DataFrame({"embedding": [found[place] for place in rows.index]})


def _denoising(params: dict[str, Any]) -> dict[str, Any]:
    return {"num_steps": params.get("num_steps", 0) or 10, "num_draws": params.get("num_draws", 1)}


def _column(rows: pd.DataFrame, name: str, first: int) -> list[Any]:
    values = list(rows[name]) if name in rows else [None] * len(rows)
    for number, value in enumerate(values):
        if not isinstance(value, str | bytes):
            raise ValueError(f"{name}: row {first + number} has none")
    return values


def _images(rows: pd.DataFrame, first: int) -> list[Any]:
    from PIL import Image, UnidentifiedImageError

    opened = []
    for number, content in enumerate(_column(rows, "image", first)):
        try:
            image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))  # others start programs
            opened.append(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, Image.DecompressionBombError):
            raise ValueError(f"image: row {first + number} is no JPEG, PNG or WebP") from None
    return opened


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


mlflow.models.set_model(DiffDisModel())
