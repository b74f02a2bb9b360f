"""Image and text retrieval of one model on one set of images with several captions each."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdis.metrics.retrieval import most_similar, retrieval_recalls
from diffdis_platform.evaluation.models import Model
from diffdis_platform.evaluation.units import check_distinct, set_identity, unit
from ray_platform.contracts import DataError, Rows
from ray_platform.evaluate.sets import EvaluationSet, check_counts
from ray_platform.evaluate.unit_work import EmbedImages
from ray_platform.replicas import WorkUnit, join_rows

_EXAMPLES, _SHOWN = 4, 5  # queries of each kind, and what is found for each
_UNREADABLE_SHOWN = 20


class Retrieval:
    def __init__(self, model: Model, data: EvaluationSet, allow_short: bool = False):
        self.model, self.data, self.allow_short = model, data, allow_short
        self.group = f"{model.name}/{data.name}"
        self._parts: dict[str, Any] = {}  # unit key -> slice
        self._rows: dict[int, Rows] = {}
        self.units = []
        for part in data.slices:
            work = EmbedImages(model.name, data.name, part, model.settings)
            identity = set_identity(model, data) | {"slice": part.name}
            made = unit(self.group, f"{data.name} {part.name}", part.estimated_images, work, identity)
            self.units.append(made)
            self._parts[made.key] = part

    def add(self, done: WorkUnit, rows: Rows) -> None:
        self._rows[self._parts[done.key].place] = rows

    def result(self) -> dict[str, Any]:
        """An entry of `retrieval` in the report's details."""
        rows, data = join_rows(self._rows), self.data
        check_distinct(data, rows["keys"])
        if "embeddings" not in rows or "texts" not in rows:
            raise DataError(f"{data.name}: no image of {data.url} can be read; see jobs/inspect_data.py")
        known = rows["num_texts"] > 0  # others are no samples, but places where one was lost
        check_counts(data, int(known.sum()), int((~known).sum()), self.allow_short)
        readable = rows["causes"][known] == ""
        images = np.zeros((len(readable), rows["embeddings"].shape[1]), dtype=np.float32)  # [N, D]
        images[readable] = rows["embeddings"]
        image_of_text = np.repeat(np.arange(len(images)), rows["num_texts"][known])
        texts = rows["text_embeddings"]
        keys = [str(key) for key in rows["keys"][known]]
        unreadable = [{"key": str(k), "cause": str(c)} for k, c in zip(rows["keys"], rows["causes"], strict=True) if c]
        return {
            "set": data.name,
            "model": self.model.name,
            "url": data.url,
            "settings": dict(self.model.settings),
            "metrics": retrieval_recalls(images, texts, image_of_text, readable=readable),
            "n": len(images),
            "num_images": len(images),
            "num_texts": len(texts),
            "num_unreadable": len(unreadable),
            "unreadable": unreadable[:_UNREADABLE_SHOWN],
            "seconds": round(float(rows["seconds"].sum()), 1),
            "examples": self._of_texts(images, texts, image_of_text, readable, rows["texts"], keys),
            "image_examples": self._of_images(images, texts, image_of_text, rows["texts"], keys),
        }

    def _of_texts(
        self, images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray, readable: np.ndarray, captions: np.ndarray,
        keys: list[str],
    ) -> list[dict[str, Any]]:  # fmt: skip
        """Some captions, evenly spread, and the images that are found for each."""
        chosen = np.unique(np.linspace(0, len(texts) - 1, _EXAMPLES).astype(int))
        found, similarity = most_similar(texts[chosen], images, _SHOWN, readable)
        return [
            {
                "caption": str(captions[text]),
                "images": [
                    {"key": keys[i], "similarity": float(s), "right": bool(i == image_of_text[text])}
                    for i, s in zip(found[row], similarity[row], strict=True)
                ],
            }
            for row, text in enumerate(chosen)
        ]

    def _of_images(
        self, images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray, captions: np.ndarray, keys: list[str]
    ) -> list[dict[str, Any]]:
        chosen = np.unique(np.linspace(0, len(images) - 1, _EXAMPLES).astype(int))
        found, similarity = most_similar(images[chosen], texts, _SHOWN)
        return [
            {
                "key": keys[image],
                "captions": [
                    {"text": str(captions[i]), "similarity": float(s), "right": bool(image_of_text[i] == image)}
                    for i, s in zip(found[row], similarity[row], strict=True)
                ],
            }
            for row, image in enumerate(chosen)
        ]

    def slices_of(self, keys: set[str]) -> Mapping[Any, tuple[str, ...]]:
        """Where samples are: slice -> those of `keys` in it."""
        by_place = {part.place: part for part in self._parts.values()}
        inside = {place: tuple(str(key) for key in rows["keys"] if str(key) in keys) for place, rows in self._rows.items()}
        return {by_place[place]: found for place, found in inside.items() if found}
