"""Zero-shot classification: embeddings of classes, the predicted classes of an image, accuracies over all images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

SCORES_AT_ONCE = 2**23  # of all queries with all candidates, so many similarities are in memory together
NONE = -1  # in a row of predicted classes: the image could not be read, or there are fewer classes than places


def class_embeddings(
    embed_texts: Callable[[Sequence[str]], torch.Tensor | np.ndarray], class_names: Sequence[str], templates: Sequence[str]
) -> torch.Tensor:
    """A class's embedding is the normalised mean of its templates' unit-norm embeddings. [C, D], unit norm.

    All texts of all classes are given to `embed_texts` at once, which batches them as it likes. Raises ValueError for a
    template without {c}.
    """
    for template in templates:
        if "{c}" not in template:
            raise ValueError(f"template {template!r} has no {{c}} for the class name")
    texts = [template.replace("{c}", name) for name in class_names for template in templates]
    embedded = torch.as_tensor(embed_texts(texts)).unflatten(0, (len(class_names), len(templates)))
    return F.normalize(embedded.mean(dim=1), dim=-1)


def top_k(queries: np.ndarray, candidates: np.ndarray, k: int) -> np.ndarray:
    """For each query the k candidates that are most similar to it, best first. [N, k] int64, -1 where there are fewer than k.

    queries [N, D], candidates [C, D]; order as of `best_of`. Part of the N x C similarities is in memory at a time. Raises
    ValueError for an embedding that is not finite.
    """
    check_finite(queries, "query")
    check_finite(candidates, "candidate")
    rows = max(1, SCORES_AT_ONCE // max(1, len(candidates)))
    parts = [best_of(queries[i : i + rows] @ candidates.T, k) for i in range(0, len(queries), rows)]
    return np.concatenate([np.empty((0, k), dtype=np.int64), *parts])


def best_of(similarity: np.ndarray, k: int) -> np.ndarray:
    """The places of each row's k largest similarities, the largest first; of equals the one with the lower index comes first.

    similarity [N, C], finite -> [N, k] int64, -1 where there are fewer than k.
    """
    left = np.array(similarity)
    best = np.full((len(left), k), NONE, dtype=np.int64)
    queries = np.arange(len(left))
    for place in range(min(k, left.shape[1])):
        best[:, place] = left.argmax(axis=1)  # the first of equals
        left[queries, best[:, place]] = -np.inf
    return best


def check_finite(embeddings: np.ndarray, what: str) -> None:
    """embeddings [N, D]. Raises ValueError that names the first row with a NaN or an infinity: its order would mean nothing."""
    broken = ~np.isfinite(embeddings).all(axis=1)
    if broken.any():
        raise ValueError(f"{what} {int(broken.argmax())}: its embedding is not finite; the model's weights are broken")


def confusion_matrix(labels: np.ndarray, top5: np.ndarray, num_classes: int) -> np.ndarray:
    """Images by true class and predicted class; the last column counts those that could not be read. [C, C + 1] int64.

    labels [N] in 0..C-1; top5 [N, 5] the predicted classes, best first, -1 for none. Raises ValueError for other values.
    """
    labels, predicted = np.asarray(labels, dtype=np.int64), np.asarray(top5, dtype=np.int64)[:, 0]
    for name, values, lowest in (("label", labels, 0), ("predicted class", predicted, NONE)):
        wrong = (values < lowest) | (values >= num_classes)
        if wrong.any():
            row = int(wrong.argmax())
            raise ValueError(f"sample {row}: {name} {values[row]} is not one of the {num_classes} classes")
    column = np.where(predicted == NONE, num_classes, predicted)
    counts = np.bincount(labels * (num_classes + 1) + column, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1).astype(np.int64)


def recall_per_class(confusion: np.ndarray) -> np.ndarray:
    """The share of each class's images that were predicted to be of it. [C, C + 1] -> [C], NaN for a class without images."""
    of_class = confusion.sum(axis=1)
    right = np.diagonal(confusion)[: len(confusion)].astype(np.float64)
    return np.divide(right, of_class, out=np.full(len(confusion), np.nan), where=of_class > 0)


def accuracies(labels: np.ndarray, top5: np.ndarray, num_classes: int) -> dict[str, float]:
    """acc1, acc5 and mean_per_class_recall, as CLIP_benchmark names and defines them; an image without a prediction is wrong.

    acc5 is NaN below 5 classes; the mean of recalls is over the classes that occur. Arguments and errors as of
    `confusion_matrix`; ValueError also where there is no sample.
    """
    if not len(labels):
        raise ValueError("zero-shot accuracy of no samples: there is nothing to divide by")
    recalls = recall_per_class(confusion_matrix(labels, top5, num_classes))
    right = np.asarray(top5)[:, :5] == np.asarray(labels)[:, None]
    return {
        "acc1": int(right[:, 0].sum()) / len(labels),
        "acc5": int(right.any(axis=1).sum()) / len(labels) if num_classes >= 5 else float("nan"),
        "mean_per_class_recall": float(recalls[~np.isnan(recalls)].mean()),
    }


def top_k_accuracy(similarity: torch.Tensor, labels: torch.Tensor, k: int = 1) -> float:
    """The share of images whose class is among the k most similar. similarity [N, C], labels [N] in 0..C-1."""
    k = min(k, similarity.shape[1])
    return (similarity.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def subset_accuracy(
    similarity: torch.Tensor, labels: torch.Tensor, num_classes: int = 100, num_subsets: int = 20, seed: int = 0
) -> float:
    """acc1 among `num_classes` classes: the mean over fixed random subsets, each scored on the images of its classes."""
    generator = torch.Generator().manual_seed(seed)
    num_classes = min(num_classes, similarity.shape[1])
    accuracies = []
    for _ in range(num_subsets):
        subset = torch.randperm(similarity.shape[1], generator=generator)[:num_classes]
        inside = torch.isin(labels, subset)
        if inside.any():
            predicted = subset[similarity[inside][:, subset].argmax(dim=1)]
            accuracies.append((predicted == labels[inside]).double().mean().item())
    return sum(accuracies) / len(accuracies)


def shuffled_images(similarity: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """The control: every query and label as they were, the images permuted. Its accuracy must be at chance."""
    return similarity[torch.randperm(len(similarity), generator=torch.Generator().manual_seed(seed))]
