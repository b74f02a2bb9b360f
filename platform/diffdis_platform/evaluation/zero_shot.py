"""Zero-shot accuracy of one model on one dataset."""

import numpy as np

from diffdis.metrics.zero_shot import NO_CLASS, NUM_PREDICTIONS, ZeroShotScores, predict_classes
from diffdis_platform.evaluation.models import EvaluationModel
from diffdis_platform.evaluation.units import SetMeasurement, build_unit
from ray_platform.contracts import DataError, Rows
from ray_platform.evaluate.sets import EvaluationSet, check_counts
from ray_platform.evaluate.unit_work import EmbedClasses
from ray_platform.replicas import WorkUnit
from ray_platform.report.records import ClassRecall, Confusion, ZeroShotResult

CLASSES_PER_UNIT = 64
_TEXT_COST = 0.05  # cost of embedding a text, relative to an image
_MAX_CONFUSIONS, _MAX_EXAMPLES = 10, 3  # confusions shown per set, and images shown per confusion


class ZeroShotMeasurement(SetMeasurement):
    """Embeds the classes first, and predicts the classes of each slice's images as soon as both embeddings are available."""

    def __init__(self, model: EvaluationModel, data: EvaluationSet, allow_short: bool = False, num_examples: int = _MAX_EXAMPLES):
        super().__init__(model, data, allow_short)
        self.num_examples = num_examples
        self._class_embeddings: dict[int, np.ndarray] = {}  # first class of a unit -> embeddings
        self._waiting: list[tuple[WorkUnit, Rows]] = []  # images that were embedded before all classes were
        class_units = {first: self._class_unit(first) for first in range(0, len(data.classes), CLASSES_PER_UNIT)}
        self._first_class = {unit.key: first for first, unit in class_units.items()}
        self.units = [*class_units.values(), *self.units]

    def _class_unit(self, first: int) -> WorkUnit:
        data = self.data
        names = data.classes[first : first + CLASSES_PER_UNIT]
        identity = {"model": self.model.digest, "classes": names, "templates": data.templates}
        cost = _TEXT_COST * len(names) * len(data.templates)
        work = EmbedClasses(self.model.name, names, data.templates)
        return build_unit(self.group, f"classes of {data.name}", cost, work, identity, runs_first=True)

    def add(self, unit: WorkUnit, rows: Rows) -> None:
        if unit.key in self._first_class:
            self.seconds += float(rows["seconds"].sum())
            self._class_embeddings[self._first_class[unit.key]] = rows["embeddings"]
        else:
            self._waiting.append((unit, rows))
        if len(self._class_embeddings) == len(self._first_class):
            classes = np.concatenate([self._class_embeddings[first] for first in sorted(self._class_embeddings)])  # [C, D]
            for image_unit, image_rows in self._waiting:
                super().add(image_unit, self._predict(image_rows, classes))
            self._waiting = []

    def _predict(self, rows: Rows, classes: np.ndarray) -> Rows:
        """Replace the embeddings, which are large, by predicted classes."""
        is_readable = rows["causes"] == ""
        predictions = np.full((len(is_readable), NUM_PREDICTIONS), NO_CLASS)
        if is_readable.any():
            predictions[is_readable] = predict_classes(rows["embeddings"], classes)
        return {name: rows[name] for name in ("keys", "labels", "causes", "seconds")} | {"predictions": predictions}

    def scores(self) -> ZeroShotScores:
        """Return the scores over all samples that have a label. Raises DataError if there are none."""
        rows = self._joined_rows()
        is_labeled = rows["labels"] >= 0  # samples without a label could not be read at all
        check_counts(self.data, int(is_labeled.sum()), int((~is_labeled).sum()), self.allow_short)
        if not is_labeled.any():
            raise DataError(f"{self.data.name}: no sample of {self.data.url} has a label; download the set again")
        return ZeroShotScores(rows["labels"][is_labeled], rows["predictions"][is_labeled], len(self.data.classes))

    def result(self) -> ZeroShotResult:
        rows, data, scores = self._joined_rows(), self.data, self.scores()
        return {
            **self._common_result(rows, scores.metrics),
            "main_metric": data.known.main_metric if data.known else "acc1",
            "n": len(scores.labels),
            "chance": 1 / len(data.classes),
            "per_class": self._class_recalls(scores),
            "confusions": self._confusions(scores, rows["keys"][rows["labels"] >= 0]),
        }

    def _class_recalls(self, scores: ZeroShotScores) -> list[ClassRecall]:
        rows = zip(self.data.classes, scores.confusion.sum(axis=1), scores.class_recalls, strict=True)
        return [{"class": name, "count": int(n), "recall": float(recall) if n else None} for name, n, recall in rows]

    def _confusions(self, scores: ZeroShotScores, keys: np.ndarray) -> list[Confusion]:
        """Return the most frequent confusions, with the keys of some examples."""
        classes, labels, predicted = self.data.classes, scores.labels, scores.predictions[:, 0]
        wrong = scores.confusion[:, :-1].copy()
        np.fill_diagonal(wrong, 0)
        confusions: list[Confusion] = []
        for cell in np.argsort(-wrong, axis=None, kind="stable")[:_MAX_CONFUSIONS]:
            true, other = divmod(int(cell), len(classes))
            if not (count := int(wrong[true, other])):
                break
            examples = keys[(labels == true) & (predicted == other)][: self.num_examples]
            confusions.append(
                {
                    "true": classes[true],
                    "predicted": classes[other],
                    "count": count,
                    "share": count / int(scores.confusion[true].sum()),
                    "examples": [{"key": str(key)} for key in examples],
                }
            )
        return confusions
