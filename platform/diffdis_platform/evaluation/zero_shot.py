"""Zero-shot accuracy of one model on one set."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdis.metrics.zero_shot import NONE, accuracies, confusion_matrix, recall_per_class, top_k
from diffdis_platform.evaluation.models import Model
from diffdis_platform.evaluation.units import check_distinct, set_identity, unit
from ray_platform.contracts import DataError, Rows
from ray_platform.evaluate.sets import EvaluationSet, check_counts
from ray_platform.evaluate.unit_work import EmbedClasses, EmbedImages
from ray_platform.replicas import WorkUnit, join_rows

CLASSES_A_UNIT = 64
_TEXT_COST = 0.05  # of an image's pass
_CONFUSIONS, _EXAMPLES = 10, 3  # shown of a set, and of a confusion
_UNREADABLE_SHOWN = 20


class ZeroShot:
    def __init__(self, model: Model, data: EvaluationSet, allow_short: bool = False, num_examples: int = _EXAMPLES):
        self.model, self.data, self.allow_short, self.num_examples = model, data, allow_short, num_examples
        settings = "".join(f" {name}={value}" for name, value in model.settings.items())
        self.group = f"{model.name}/{data.name}{settings}"
        self._classes: dict[int, np.ndarray] = {}  # first class of a chunk -> embeddings
        self._waiting: dict[str, Rows] = {}  # unit key -> rows, until all classes are there
        self._scored: dict[int, Rows] = {}  # place -> keys, labels, causes, top5
        self._class_units, self._image_units = self._classes_by_chunk(), self._images_by_slice()
        self.units = [*self._class_units.values(), *(u for u, _ in self._image_units.values())]
        self._first_class = {u.key: first for first, u in self._class_units.items()}
        self._seconds = 0.0  # of workers

    def _classes_by_chunk(self) -> dict[int, WorkUnit]:
        data, found = self.data, {}
        for first in range(0, len(data.classes), CLASSES_A_UNIT):
            names = data.classes[first : first + CLASSES_A_UNIT]
            identity = {"model": self.model.digest, "classes": names, "templates": data.templates}
            cost = _TEXT_COST * len(names) * len(data.templates)
            work = EmbedClasses(self.model.name, names, data.templates)
            found[first] = unit(self.group, f"classes of {data.name}", cost, work, identity, first=True)
        return found

    def _images_by_slice(self) -> dict[str, tuple[WorkUnit, Any]]:
        model, data, found = self.model, self.data, {}
        for part in data.slices:
            identity = set_identity(model, data) | {"slice": part.name}
            work = EmbedImages(model.name, data.name, part, model.settings)
            made = unit(self.group, f"{data.name} {part.name}", part.estimated_images, work, identity)
            found[made.key] = (made, part)
        return found

    def add(self, done: WorkUnit, rows: Rows) -> None:
        self._seconds += float(rows["seconds"].sum())
        if done.key in self._first_class:
            self._classes[self._first_class[done.key]] = rows["embeddings"]
        else:
            self._waiting[done.key] = rows
        if len(self._classes) == len(self._class_units):
            classes = np.concatenate([self._classes[first] for first in sorted(self._classes)])  # [C, D]
            for key, waiting in self._waiting.items():
                self._score(key, waiting, classes)
            self._waiting = {}

    def _score(self, key: str, rows: Rows, classes: np.ndarray) -> None:
        _, part = self._image_units[key]
        read = rows["causes"] == ""
        top5 = np.full((len(read), 5), NONE)
        if read.any():
            top5[read] = top_k(rows["embeddings"], classes, k=5)
        self._scored[part.place] = {name: rows[name] for name in ("keys", "labels", "causes")} | {"top5": top5}

    def result(self) -> dict[str, Any]:
        """An entry of `zero_shot` in the report's details, and `wanted`: the examples to draw, keys by slice."""
        rows, data = join_rows(self._scored), self.data
        check_distinct(data, rows["keys"])
        lost = rows["labels"] < 0  # what has not even a label
        check_counts(data, int((~lost).sum()), int(lost.sum()), self.allow_short)
        labels, top5 = rows["labels"][~lost], rows["top5"][~lost]
        if not len(labels):
            raise DataError(f"{data.name}: no sample of {data.url} has a label")
        matrix = confusion_matrix(labels, top5, len(data.classes))
        unreadable = [{"key": str(k), "cause": str(c)} for k, c in zip(rows["keys"], rows["causes"], strict=True) if c]
        return {
            "set": data.name,
            "model": self.model.name,
            "url": data.url,
            "settings": dict(self.model.settings),
            "main_metric": data.known.main_metric if data.known else "acc1",
            "metrics": accuracies(labels, top5, len(data.classes)),
            "n": len(labels),
            "num_unreadable": len(unreadable),
            "unreadable": unreadable[:_UNREADABLE_SHOWN],
            "seconds": round(self._seconds, 1),
            "chance": 1 / len(data.classes),
            "per_class": self._per_class(matrix),
            "confusions": self._confusions(matrix, rows["keys"][~lost], labels, top5[:, 0]),
        }

    def _per_class(self, matrix: np.ndarray) -> list[dict[str, Any]]:
        rows = zip(self.data.classes, matrix.sum(axis=1), recall_per_class(matrix), strict=True)
        return [{"class": name, "count": int(n), "recall": float(recall) if n else None} for name, n, recall in rows]

    def _confusions(self, matrix: np.ndarray, keys: np.ndarray, labels: np.ndarray, predicted: np.ndarray) -> list[dict]:
        """The most frequent ones, with the keys of some examples."""
        num, wrong = len(self.data.classes), matrix[:, :-1].copy()
        np.fill_diagonal(wrong, 0)
        found = []
        for flat in np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]:
            true, other = divmod(int(flat), num)
            if not (count := int(wrong[true, other])):
                break
            examples = keys[(labels == true) & (predicted == other)][: self.num_examples]
            found.append(
                {
                    "true": self.data.classes[true],
                    "predicted": self.data.classes[other],
                    "count": count,
                    "share": count / int(matrix[true].sum()),
                    "examples": [{"key": str(key)} for key in examples],
                }
            )
        return found

    def slices_of(self, keys: set[str]) -> Mapping[Any, tuple[str, ...]]:
        """Where samples are: slice -> those of `keys` in it."""
        places = {part.place: part for _, part in self._image_units.values()}
        inside = {place: tuple(str(key) for key in rows["keys"] if str(key) in keys) for place, rows in self._scored.items()}
        return {places[place]: found for place, found in inside.items() if found}
