"""Zero-shot accuracy and retrieval of one model on one dataset: units of work, and the results that are made of their rows."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence

import numpy as np

from diffdis.metrics.retrieval import RetrievalRanks, most_similar
from diffdis.metrics.uncertainty import Outcomes
from diffdis.metrics.zero_shot import NO_CLASS, NUM_PREDICTIONS, ZeroShotScores, predict_classes
from diffdis_platform.evaluation.models import EvaluationModel
from diffdis_platform.evaluation.quality import sample_sizes
from diffdis_platform.evaluation.units import build_unit, count_units
from ray_platform.contracts import DataError, Rows, UnitOrigin
from ray_platform.data.causes import BAD_DATA
from ray_platform.evaluate.sets import DEFAULT_TEMPLATES, DatasetSlice, EvaluationSet, check_counts
from ray_platform.evaluate.unit_work import EmbedClasses, EmbedImages, choose_sample, digest_of_contents
from ray_platform.replicas import WorkUnit, join_rows
from ray_platform.report.records import (
    CaptionQuery,
    ClassRecall,
    Confusion,
    CurvePoint,
    DatasetResult,
    ImageQuery,
    PairedDifference,
    PredictedImage,
    RetrievalResult,
    UnreadableSample,
    ZeroShotResult,
)

CLASSES_PER_UNIT = 64
_TEXT_COST = 0.05  # cost of embedding a text, relative to an image
_MAX_UNREADABLE = 20  # unreadable samples that are listed in a result
_MAX_CONFUSIONS, _MAX_EXAMPLES = 10, 3  # confusions shown per set, and images shown per confusion
_NUM_PREDICTED = 5  # examples of correct predictions, and of incorrect ones
_PUBLISHED = "published for the set"  # class names or templates, wherever they were read
_NUM_QUERIES, _NUM_RETRIEVED = 4, 5  # queries of each kind in the report, and what is shown for each


class SetMeasurement(ABC):
    """A model measured on one dataset. It receives the rows of its units in any order."""

    def __init__(self, model: EvaluationModel, data: EvaluationSet, allow_short: bool = False, seed: int = 0, limit: int = 0):
        """`allow_short` accepts a known set that lacks images, `seed` is that of the noise, and `limit` the size of a sample."""
        self.model, self.data, self.allow_short, self.seed, self.limit = model, data, allow_short, seed, limit
        settings = "".join(f" {name}={value}" for name, value in model.settings.items()) + (f" seed={seed}" if seed else "")
        self.group = f"{model.name}/{data.name}{settings}"
        self._slices: dict[str, DatasetSlice] = {}  # key of the unit that embeds it -> slice
        self._rows: dict[int, Rows] = {}  # place of a slice -> rows
        sizes = zip(data.slices, sample_sizes(data, limit, margin=1.0), strict=True)
        self.units = [self._image_unit(part, size) for part, size in sizes if size != 0]
        self.seconds = 0.0  # of replicas
        self.outcomes: dict[str, Outcomes] = {}  # of the metrics; set by `result`
        self._keys = np.empty(0)  # of the samples of the outcomes
        self.origins: list[UnitOrigin | None] = []  # of the units that were received

    def _image_unit(self, part: DatasetSlice, num_sampled: int | None) -> WorkUnit:
        model, data = self.model, self.data
        work = EmbedImages(model.identity, part, model.settings, self.seed, num_sampled)
        unit = build_unit(
            self.group, f"{data.name} {part.name}", part.estimated_images if num_sampled is None else num_sampled, work,
            model=model.identity, preprocessing=model.preprocessing, settings=dict(model.settings), seed=self.seed,
            set=data.name, data=data.digest, slice=part.name, num_sampled=num_sampled,
        )  # fmt: skip
        self._slices[unit.key] = part
        return unit

    def add(self, unit: WorkUnit, rows: Rows) -> None:
        """Receive the rows of one unit."""
        self._check_finite(rows.get("embeddings"), rows["keys"][rows["causes"] == ""], "image")
        self._check_finite(rows.get("text_embeddings"), rows.get("texts"), "text")
        self.seconds += float(rows["seconds"].sum())
        self._rows[self._slices[unit.key].place] = rows

    def _check_finite(self, embeddings: np.ndarray | None, names: Sequence[str] | np.ndarray | None, kind: str) -> None:
        """Raise DataError, with the first of the `names`, if embeddings [n, D] are not finite: their order means nothing."""
        if embeddings is None or names is None:
            return
        invalid = ~np.isfinite(embeddings).all(axis=1)
        if invalid.any():
            raise DataError(
                f"{self.data.name}: {self.model.name} has NaN embeddings, such as that of the {kind} "
                f"{str(names[int(invalid.argmax())])[:80]!r}; the training diverged or the weights are damaged: "
                "evaluate an earlier checkpoint"
            )

    @abstractmethod
    def result(self) -> DatasetResult:
        """Return the dataset's entry in the report. Raises DataError if the dataset cannot be scored."""
        ...

    def differences_to(self, baseline: "SetMeasurement") -> dict[str, PairedDifference]:
        """Return the paired difference of each metric to a baseline on the same samples. Raises ValueError if they differ."""
        if not np.array_equal(self._keys, baseline._keys):
            raise ValueError(f"{self.data.name}: {self.model.name} and {baseline.model.name} read other samples")
        n, differences = len(self._keys), dict[str, PairedDifference]()
        for name in self.outcomes.keys() & baseline.outcomes.keys():
            mean, low, high = self.outcomes[name].minus(baseline.outcomes[name])
            differences[name] = PairedDifference(mean=mean, low=low, high=high, n=n)
        return {name: differences[name] for name in self.outcomes if name in differences}

    def slices_with(self, keys: set[str]) -> dict[DatasetSlice, tuple[str, ...]]:
        """Return the slices that contain samples of `keys`, with those samples' keys."""
        keys_of_slice = {
            part: tuple(str(key) for key in self._rows[part.place]["keys"] if str(key) in keys)
            for part in self._slices.values()
            if part.place in self._rows
        }
        return {part: inside for part, inside in keys_of_slice.items() if inside}

    def _joined_rows(self) -> Rows:
        """Return the rows of all slices in order. Raises DataError if a sample was read twice."""
        rows = join_rows(self._rows)
        keys, counts = np.unique(rows["keys"], return_counts=True)
        if len(keys) < len(rows["keys"]):
            raise DataError(f"{self.data.name}: {self.data.url} has sample {keys[counts > 1][0]} twice; download the set again")
        return rows

    def _check_counts(self, num_read: int, num_rejected: int) -> None:
        if not self.limit:
            check_counts(self.data, num_read, num_rejected, self.allow_short)

    def _common_result(self, rows: Rows, metrics: dict[str, float], num_images: int) -> DatasetResult:
        """Return the fields that the results of all tasks have."""
        expected = self.data.known.num_images if self.data.known else None
        num_missing = max(0, expected - num_images) if expected and not self.limit else 0
        causes = zip(rows["keys"], rows["causes"], strict=True)
        unreadable: list[UnreadableSample] = [{"key": str(key), "cause": str(cause)} for key, cause in causes if cause]
        return {
            "set": self.data.name,
            "model": self.model.name,
            "url": self.data.url,
            "data_digest": self.data.digest,
            "content_digest": digest_of_contents(rows),
            "layout": self.data.layout,
            "num_templates": len(self.data.templates),
            "templates": self._templates_origin(),
            "class_names": self._class_names_origin(),
            "seed": self.seed if self.model.settings else None,
            "settings": dict(self.model.settings),
            "metrics": metrics,
            "standard_errors": {name: outcomes.standard_error for name, outcomes in self.outcomes.items()},
            "units": count_units(self.origins),
            "num_unreadable": len(unreadable),
            "num_expected": expected,
            "num_missing": num_missing,
            "is_complete": not unreadable and not num_missing and not self.limit,
            "limit": self.limit,
            "unreadable": unreadable[:_MAX_UNREADABLE],
            "seconds": round(self.seconds, 1),
        }

    def _templates_origin(self) -> str:
        """Return where the templates come from; "" for a set without classes."""
        if self.data.classes and self.data.known and self.data.templates == self.data.known.templates:
            return _PUBLISHED
        return "ImageNet's, the fallback" if self.data.templates == DEFAULT_TEMPLATES else self.data.templates_source

    def _class_names_origin(self) -> str:
        """Return where the class names come from; "" for a set without classes."""
        is_published = self.data.classes and self.data.known and self.data.classes == self.data.known.classes
        return _PUBLISHED if is_published else self.data.classes_source


class ZeroShotMeasurement(SetMeasurement):
    """Embeds the classes first, and predicts the classes of each slice's images as soon as both embeddings are available."""

    def __init__(self, model: EvaluationModel, data: EvaluationSet, allow_short: bool = False, seed: int = 0, limit: int = 0):
        super().__init__(model, data, allow_short, seed, limit)
        self._class_embeddings: dict[int, np.ndarray] = {}  # first class of a unit -> embeddings
        self._waiting: list[tuple[WorkUnit, Rows]] = []  # images that were embedded before all classes were
        class_units = {first: self._class_unit(first) for first in range(0, len(data.classes), CLASSES_PER_UNIT)}
        self._first_class = {unit.key: first for first, unit in class_units.items()}
        self.units = [*class_units.values(), *self.units]

    def _class_unit(self, first: int) -> WorkUnit:
        templates, names = self.data.templates, self.data.classes[first : first + CLASSES_PER_UNIT]
        return build_unit(
            self.group, f"classes of {self.data.name}", _TEXT_COST * len(names) * len(templates),
            EmbedClasses(self.model.identity, names, templates), runs_first=True,
            model=self.model.identity, classes=names, templates=templates,
        )  # fmt: skip

    def add(self, unit: WorkUnit, rows: Rows) -> None:
        if unit.key in self._first_class:
            self.seconds += float(rows["seconds"].sum())
            first = self._first_class[unit.key]
            self._check_finite(rows["embeddings"], self.data.classes[first:], "class")
            self._class_embeddings[first] = rows["embeddings"]
        else:
            self._check_finite(rows.get("embeddings"), rows["keys"][rows["causes"] == ""], "image")
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
        return {name: rows[name] for name in ("keys", "labels", "causes", "contents", "seconds")} | {"predictions": predictions}

    def samples(self) -> Rows:
        """Return keys [N], labels [N] (-1: none), causes [N] ("": the image was read) and predictions [N, 5] of all samples."""
        rows = self._joined_rows()
        return {name: rows[name] for name in ("keys", "labels", "causes", "predictions")}

    def scores(self) -> ZeroShotScores:
        """Return the scores over all samples that have a label. Raises DataError if there are none."""
        rows = self._joined_rows()
        is_labeled = rows["labels"] >= 0  # samples without a label could not be read at all
        if not is_labeled.any():
            causes = _describe_causes(rows["causes"])
            raise DataError(f"{self.data.name}: no sample of {self.data.url} can be used: {causes}")
        self._check_counts(int(is_labeled.sum()), int((~is_labeled).sum()))
        return ZeroShotScores(rows["labels"][is_labeled], rows["predictions"][is_labeled], len(self.data.classes))

    def result(self) -> ZeroShotResult:
        rows, data, scores = self._joined_rows(), self.data, self.scores()
        self.outcomes, self._keys = scores.outcomes, rows["keys"][rows["labels"] >= 0]
        recalls = zip(data.classes, scores.class_counts, scores.class_recalls, strict=True)
        per_class: list[ClassRecall] = [
            {"class": name, "count": int(count), "recall": float(recall) if count else None} for name, count, recall in recalls
        ]
        return {
            **self._common_result(rows, scores.metrics, len(scores.labels)),
            "main_metric": data.known.main_metric if data.known else "acc1",
            "n": len(scores.labels),
            "chance": 1 / len(data.classes),
            "per_class": per_class,
            "confusions": self._confusions(scores, self._keys),
            "examples": self._predicted_examples(scores, self._keys),
        }

    def curve_point(self) -> CurvePoint:
        """Return the accuracy for the model's steps and draws."""
        settings = self.model.settings
        return {
            "set": self.data.name,
            "model": self.model.name,
            "num_steps": int(settings["num_steps"]),
            "num_draws": int(settings["num_draws"]),
            "acc1": self.scores().accuracy(),
            "seconds": round(self.seconds, 1),
        }

    def _confusions(self, scores: ZeroShotScores, keys: np.ndarray) -> list[Confusion]:
        """Return the most frequent confusions, with the keys of some examples."""
        classes, confusions = self.data.classes, list[Confusion]()
        true_classes, predicted_classes, counts = scores.confused
        wrong = np.flatnonzero((true_classes != predicted_classes) & (predicted_classes < len(classes)))
        for pair in wrong[np.argsort(-counts[wrong], kind="stable")[:_MAX_CONFUSIONS]]:
            true, other, count = int(true_classes[pair]), int(predicted_classes[pair]), int(counts[pair])
            examples = keys[(scores.labels == true) & (scores.predictions[:, 0] == other)][:_MAX_EXAMPLES]
            confusions.append(
                {
                    "true": classes[true],
                    "predicted": classes[other],
                    "count": count,
                    "fraction": count / int(scores.class_counts[true]),
                    "examples": [{"key": str(key)} for key in examples],
                }
            )
        return confusions

    def _predicted_examples(self, scores: ZeroShotScores, keys: np.ndarray) -> list[PredictedImage]:
        """Return a random choice of correct and of incorrect predictions that depends on the keys alone."""
        best, examples = scores.predictions[:, 0], list[PredictedImage]()
        for is_chosen in (best == scores.labels, (best != scores.labels) & (best != NO_CLASS)):
            candidates = np.flatnonzero(is_chosen)
            for chosen in choose_sample([str(key) for key in keys[candidates]], _NUM_PREDICTED):
                index = candidates[chosen]
                label, predicted = scores.labels[index], [each for each in scores.predictions[index] if each != NO_CLASS]
                examples.append(
                    {
                        "key": str(keys[index]),
                        "true": self.data.classes[label],
                        "predicted": [{"name": self.data.classes[each], "right": bool(each == label)} for each in predicted],
                    }
                )
        return examples


def _describe_causes(causes: np.ndarray) -> str:
    """Return how many samples had each cause, the most frequent first, and what the first one means."""
    counts = Counter(str(cause) for cause in causes if cause).most_common()
    return ", ".join(f"{count:,} {cause}" for cause, count in counts) + f" ({BAD_DATA[counts[0][0]]})"


class RetrievalMeasurement(SetMeasurement):
    """Image and text retrieval on a dataset of images with several captions each."""

    def result(self) -> RetrievalResult:
        rows, data = self._joined_rows(), self.data
        if "embeddings" not in rows or "texts" not in rows:
            raise DataError(f"{data.name}: no image of {data.url} can be used: {_describe_causes(rows['causes'])}")
        is_sample = rows["num_texts"] > 0  # the other rows are slices or samples that could not be read at all
        self._check_counts(int(is_sample.sum()), int((~is_sample).sum()))
        is_readable = rows["causes"][is_sample] == ""
        images = np.zeros((len(is_readable), rows["embeddings"].shape[1]), dtype=np.float32)  # [N, D]
        images[is_readable] = rows["embeddings"]
        owners = np.repeat(np.arange(len(images)), rows["num_texts"][is_sample])  # the image of each text
        embeddings, texts = rows["text_embeddings"], [str(text) for text in rows["texts"]]
        keys = [str(key) for key in rows["keys"][is_sample]]

        ranks = RetrievalRanks.of(images, embeddings, owners, is_readable)
        self.outcomes, self._keys = ranks.outcomes(), rows["keys"][is_sample]
        queries = _spread(len(texts))
        matches = zip(queries, *most_similar(embeddings[queries], images, _NUM_RETRIEVED, is_readable), strict=True)
        examples: list[CaptionQuery] = [
            {
                "caption": texts[text],
                "images": [
                    {"key": keys[image], "similarity": float(cosine), "right": bool(image == owners[text])}
                    for image, cosine in zip(retrieved, cosines, strict=True)
                ],
            }
            for text, retrieved, cosines in matches
        ]
        queries = _spread(len(images))
        matches = zip(queries, *most_similar(images[queries], embeddings, _NUM_RETRIEVED), strict=True)
        image_examples: list[ImageQuery] = [
            {
                "key": keys[image],
                "captions": [
                    {"text": texts[text], "similarity": float(cosine), "right": bool(owners[text] == image)}
                    for text, cosine in zip(retrieved, cosines, strict=True)
                ],
            }
            for image, retrieved, cosines in matches
        ]
        return {
            **self._common_result(rows, ranks.recalls(), len(images)),
            "n": len(images),
            "num_images": len(images),
            "num_texts": len(texts),
            "examples": examples,
            "image_examples": image_examples,
        }


def _spread(count: int) -> np.ndarray:
    """Return the indices of a few queries, evenly spread."""
    return np.unique(np.linspace(0, count - 1, _NUM_QUERIES).astype(int))
