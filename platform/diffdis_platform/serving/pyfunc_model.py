"""DiffDis as an MLflow pyfunc model. This file is stored with every logged model, and can import only what is stored with it.

The input is a DataFrame with the columns `image` (bytes of an image file; base64 in JSON) and `caption`; either may be missing.
"""

import io
from typing import Any

import mlflow
import pandas as pd

_BATCH_SIZE = 32


class DiffDisModel(mlflow.pyfunc.PythonModel):
    def load_context(self, context: Any) -> None:
        import torch  # late: logging this model does not need torch

        from diffdis.pipeline import DiffDisPipeline

        pipeline = DiffDisPipeline.from_pretrained(context.artifacts["model"])
        pipeline.set_progress_bar_config(disable=True)
        self.pipeline = pipeline.to("cuda" if torch.cuda.is_available() else "cpu")

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Return one row per input row; its columns depend on `params["task"]`.

        classify: image -> class, score (its probability) and scores (of all params["classes"], in that order).
        generate: caption -> image, the bytes of a PNG.
        embed: image, or caption if there is no image -> embedding; matching pairs have a large dot product.

        `num_steps` 0 means 50 for generate, and 10 otherwise.

        Raises:
            ValueError: an unknown task, or an input that the task needs is missing.
        """
        params = params or {}
        task = params.get("task", "classify")
        methods = {"classify": self._classify, "generate": self._generate, "embed": self._embed}
        if task not in methods:
            raise ValueError(f"task: {task!r} is unknown; choose one of {', '.join(methods)}")
        model_input = model_input.reset_index(drop=True)  # the index of a row is its number, in errors and for the noise
        parts = [model_input.iloc[start : start + _BATCH_SIZE] for start in range(0, len(model_input), _BATCH_SIZE)]
        results = [methods[task](part, params) for part in parts]
        return pd.concat(results, ignore_index=True) if results else pd.DataFrame()

    def _classify(self, rows: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        classes, templates = list(params.get("classes", [])), list(params.get("templates", [])) or ["{c}"]
        if not classes:
            raise ValueError("classes: empty; give the classes to choose from")
        scores = self.pipeline.classify(_images(rows), classes, templates, **_denoising(params)).tolist()
        best = [max(range(len(classes)), key=row.__getitem__) for row in scores]
        named = [classes[place] for place in best]
        chosen = [row[place] for row, place in zip(scores, best, strict=True)]
        return pd.DataFrame({"class": named, "score": chosen, "scores": scores})

    def _generate(self, rows: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        images = self.pipeline.generate(
            _column(rows, "caption"),
            num_inference_steps=params.get("num_steps", 0) or 50,
            guidance_scale=params.get("guidance_scale", 7.5),
            negative_prompt=params.get("negative_prompt", ""),
            seed=params.get("seed", 0),
            best_of=params.get("best_of", 1),  # images per caption, of which the model itself chooses
            indices=rows.index.tolist(),  # the noise of a row depends on its index, not on the batches
        )
        return pd.DataFrame({"image": [_png(image) for image in images]})

    def _embed(self, rows: pd.DataFrame, params: dict[str, Any]) -> pd.DataFrame:
        has_image = rows["image"].notna() if "image" in rows else pd.Series(False, index=rows.index)
        embeddings: dict[Any, list[float]] = {}
        if has_image.any():
            embedded = self.pipeline.embed_image(_images(rows[has_image]), **_denoising(params))
            embeddings |= dict(zip(rows.index[has_image], embedded.tolist(), strict=True))
        if not has_image.all():
            embedded = self.pipeline.embed_text(_column(rows[~has_image], "caption"))
            embeddings |= dict(zip(rows.index[~has_image], embedded.tolist(), strict=True))
        return pd.DataFrame({"embedding": [embeddings[place] for place in rows.index]})


def _denoising(params: dict[str, Any]) -> dict[str, Any]:
    return {"num_steps": params.get("num_steps", 0) or 10, "num_draws": params.get("num_draws", 1)}


def _column(rows: pd.DataFrame, name: str) -> list[Any]:
    values = list(rows[name]) if name in rows else [None] * len(rows)
    for number, value in zip(rows.index, values, strict=True):
        if not isinstance(value, str | bytes):
            raise ValueError(f"{name}: missing in row {number}")
    return values


def _images(rows: pd.DataFrame) -> list[Any]:
    from diffdis.images import open_image

    opened = []
    for number, content in zip(rows.index, _column(rows, "image"), strict=True):
        try:
            opened.append(open_image(content))
        except ValueError:
            raise ValueError(f"image: row {number} is not a JPEG, PNG or WebP") from None
    return opened


def _png(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


mlflow.models.set_model(DiffDisModel())
