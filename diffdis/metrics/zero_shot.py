"""Zero-shot classification: embeddings of classes, predicted classes of images, and their scores.

`ZeroShotScores` is the one scorer: evaluations, the demo and the scores while training use it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from diffdis.metrics.uncertainty import Outcomes

MAX_SIMILARITIES = 2**23  # similarities of queries and candidates that are in memory at a time
NO_CLASS = -1  # in a row of predicted classes: the image could not be read, or there are fewer classes than columns
NUM_PREDICTIONS = 5  # predicted classes per image


def class_embeddings(
    embed_texts: Callable[[Sequence[str]], torch.Tensor | np.ndarray], class_names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """Return the normalized mean of each class's unit-norm template embeddings, [C, D] of unit norm.

    `embed_texts` is called once with the texts of all classes. Raises ValueError if a template lacks "{c}", the class.
    """
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"template {template!r} has no {{c}} for the class name")
    texts = [template.replace("{c}", name) for name in class_names for template in templates]
    embedded = torch.as_tensor(embed_texts(texts)).unflatten(0, (len(class_names), len(templates)))
    return F.normalize(embedded.mean(dim=1), dim=-1)


def predict_classes(images: np.ndarray, classes: np.ndarray, k: int = NUM_PREDICTIONS) -> np.ndarray:
    """Return the k most similar classes of each image, best first: [N, k] int64, -1 where there are fewer than k classes.

    Of equally similar classes the one with the lower index comes first. Raises ValueError if one of the embeddings, images [N, D]
    and classes [C, D], is not finite.
    """
    check_finite(images, "image")
    check_finite(classes, "class")
    rows = max(1, MAX_SIMILARITIES // max(1, len(classes)))
    parts = [largest(images[i : i + rows] @ classes.T, k) for i in range(0, len(images), rows)]
    return np.concatenate([np.empty((0, k), dtype=np.int64), *parts])


def largest(similarity: np.ndarray, k: int) -> np.ndarray:
    """Return the columns of each row's k largest values, the largest first; of equal values the first one.

    similarity [N, C], finite -> [N, k] int64, -1 where there are fewer than k columns.
    """
    remaining = np.array(similarity)
    columns = np.full((len(remaining), k), NO_CLASS, dtype=np.int64)
    rows = np.arange(len(remaining))
    for rank in range(min(k, remaining.shape[1])):
        columns[:, rank] = remaining.argmax(axis=1)
        remaining[rows, columns[:, rank]] = -np.inf
    return columns


def check_finite(embeddings: np.ndarray, kind: str) -> None:
    """Raise ValueError, with the first such row, if embeddings [N, D] are not finite: their order would be meaningless."""
    invalid = ~np.isfinite(embeddings).all(axis=1)
    if invalid.any():
        raise ValueError(f"{kind} {int(invalid.argmax())}: its embedding is not finite; the model's weights are damaged")


@dataclass(frozen=True, eq=False)
class ZeroShotScores:
    """Scores of predicted classes.

    Raises:
        ValueError: There are no samples, or a label or predicted class is out of range.
    """

    labels: np.ndarray  # [N] in 0..C-1
    predictions: np.ndarray  # [N, 5] predicted classes, best first; an image with -1 (it could not be read) counts as wrong
    num_classes: int  # C

    @classmethod
    def from_embeddings(cls, images: np.ndarray, classes: np.ndarray, labels: np.ndarray) -> "ZeroShotScores":
        """Score images [N, D] with labels [N] by their similarity with classes [C, D]."""
        return cls(np.asarray(labels), predict_classes(images, classes), len(classes))

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise ValueError("zero-shot accuracy of no samples is undefined")
        for name, values, lowest in (("label", self.labels, 0), ("predicted class", self.predictions[:, 0], NO_CLASS)):
            invalid = (values < lowest) | (values >= self.num_classes)
            if invalid.any():
                row = int(invalid.argmax())
                raise ValueError(f"sample {row}: {name} {values[row]} is not one of the {self.num_classes} classes")

    def accuracy(self, k: int = 1) -> float:
        """Return the fraction of images whose class is among the k (up to 5) most similar classes."""
        is_correct = self.predictions[:, :k] == self.labels[:, None]
        return int(is_correct.any(axis=1).sum()) / len(self.labels)

    @cached_property
    def confused(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The pairs of a true and a predicted class that occur, in order, and how many images have each: three [P] int64.

        The predicted class of an image without a prediction is C.
        """
        predicted = np.where(self.predictions[:, 0] == NO_CLASS, self.num_classes, self.predictions[:, 0])
        cells, counts = np.unique(self.labels.astype(np.int64) * (self.num_classes + 1) + predicted, return_counts=True)
        return *np.divmod(cells, self.num_classes + 1), counts

    @property
    def confusion(self) -> np.ndarray:
        """Images by true and predicted class, [C, C + 1] int64; the last column counts images without a prediction.

        It takes 8 C^2 bytes: 4 GB for the 21,841 classes of ImageNet-21k.
        """
        true, predicted, counts = self.confused
        matrix = np.zeros((self.num_classes, self.num_classes + 1), dtype=np.int64)
        matrix[true, predicted] = counts
        return matrix

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Images of each class, [C] int64."""
        return np.bincount(self.labels.astype(np.int64), minlength=self.num_classes)

    @cached_property
    def class_recalls(self) -> np.ndarray:
        """Fraction of each class's images that were predicted to be of it, [C]; NaN for a class without images."""
        num_correct = np.bincount(self.labels[self.labels == self.predictions[:, 0]], minlength=self.num_classes)
        return np.divide(num_correct, self.class_counts, out=np.full(self.num_classes, np.nan), where=self.class_counts > 0)

    @property
    def mean_class_recall(self) -> float:
        """Mean of `class_recalls` over the classes that have images."""
        return float(self.class_recalls[~np.isnan(self.class_recalls)].mean())

    @property
    def metrics(self) -> dict[str, float]:
        """Return all metrics of ZERO_SHOT_METRICS by name."""
        return {name: metric(self) for name, metric in ZERO_SHOT_METRICS.items()}

    @property
    def outcomes(self) -> dict[str, Outcomes]:
        """Return the images' outcomes whose means are the metrics, for standard errors and paired differences."""
        hits = {k: (self.predictions[:, :k] == self.labels[:, None]).any(axis=1) for k in (1, 5)}
        outcomes = {"acc1": Outcomes(hits[1]), "mean_per_class_recall": Outcomes(hits[1], self.labels.astype(np.int64))}
        return outcomes | ({"acc5": Outcomes(hits[5])} if self.num_classes >= 5 else {})

    def with_shuffled_images(self, seed: int = 0) -> "ZeroShotScores":
        """Return the scores with permuted images: a control whose accuracy must be at chance."""
        permutation = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed)).numpy()
        return ZeroShotScores(self.labels, self.predictions[permutation], self.num_classes)


# The metrics of a zero-shot set, as CLIP_benchmark names and defines them. Add a metric by adding an entry here and declaring its
# name in ray_platform/metric_registry.py.
ZERO_SHOT_METRICS: dict[str, Callable[[ZeroShotScores], float]] = {
    "acc1": lambda scores: scores.accuracy(1),
    "acc5": lambda scores: scores.accuracy(5) if scores.num_classes >= 5 else float("nan"),
    "mean_per_class_recall": lambda scores: scores.mean_class_recall,
}


def subset_accuracy(
    images: np.ndarray, classes: np.ndarray, labels: np.ndarray, subset_size: int = 100, num_subsets: int = 20, seed: int = 0
) -> float:
    """Return acc1 among `subset_size` classes: the mean over fixed random subsets, each scored on the images of its classes.

    images [N, D] and classes [C, D] are embeddings; labels [N].
    """
    generator = torch.Generator().manual_seed(seed)
    similarity = images @ classes.T  # [N, C]
    accuracies = []
    for _ in range(num_subsets):
        subset = torch.randperm(len(classes), generator=generator)[:subset_size].numpy()
        inside = np.isin(labels, subset)
        if inside.any():
            predicted = subset[similarity[inside][:, subset].argmax(axis=1)]
            accuracies.append(float((predicted == labels[inside]).mean()))
    return sum(accuracies) / len(accuracies)
