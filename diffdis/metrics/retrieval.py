"""Retrieval between images and texts by their embeddings, where an image may have several texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from diffdis.metrics.uncertainty import Outcomes
from diffdis.metrics.zero_shot import MAX_SIMILARITIES, check_finite, largest

KS = (1, 5, 10)  # of the recalls


@dataclass(frozen=True, eq=False)
class RetrievalRanks:
    """How many candidates precede the best match of each query, in both directions; all of them if there is no match."""

    texts: np.ndarray  # [M] of texts that look for their image
    images: np.ndarray  # [N] of images that look for one of their texts
    image_of_text: np.ndarray  # [M] in 0..N-1

    @classmethod
    def of(
        cls, images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray, is_readable: np.ndarray | None = None
    ) -> "RetrievalRanks":
        """Rank embeddings of unit norm.

        An image that could not be read is never retrieved, and counts as a failed query, as its texts do. Of equally similar
        candidates the one with the lower index comes first.

        Args:
            images: [N, D].
            texts: [M, D].
            image_of_text: [M] in 0..N-1.
            is_readable: [N] bool; None: all images could be read.

        Raises:
            ValueError: An embedding is not finite.
        """
        num_images = len(images)
        readable = np.ones(num_images, dtype=bool) if is_readable is None else np.asarray(is_readable, dtype=bool)
        images = np.where(readable[:, None], images, np.float32(0))
        check_finite(images, "image")
        check_finite(texts, "text")
        image_rows, text_rows, is_candidate = (torch.as_tensor(array) for array in (images, texts, readable))
        owners, indices = torch.as_tensor(np.asarray(image_of_text, dtype=np.int64)), torch.arange(num_images)
        ranks_of_texts = _ranks(text_rows, owners, image_rows, indices, is_candidate)
        ranks_of_images = _ranks(image_rows, indices, text_rows, owners, torch.ones(len(texts), dtype=torch.bool))
        ranks_of_images[~is_candidate] = len(texts)
        return cls(ranks_of_texts.numpy(), ranks_of_images.numpy(), owners.numpy())

    def outcomes(self, ks: Sequence[int] = KS) -> dict[str, Outcomes]:
        """Return the hits of all queries by CLIP_benchmark's names of the recalls. The texts of an image are one cluster."""
        hits = {}
        for k in ks:
            found = self.texts < min(k, len(self.images))
            hits[f"image_retrieval_recall@{k}"] = Outcomes(found, clusters=self.image_of_text)
            hits[f"text_retrieval_recall@{k}"] = Outcomes(self.images < min(k, len(self.texts)))
        return hits

    def recalls(self, ks: Sequence[int] = KS) -> dict[str, float]:
        """Return CLIP_benchmark's recalls in both directions.

        `image_retrieval_recall@k` is the fraction of texts whose image is among the k most similar images,
        `text_retrieval_recall@k` the fraction of images that have one of their texts among the k most similar texts.
        """
        return {name: int(each.values.sum()) / len(each.values) for name, each in self.outcomes(ks).items()}


def most_similar(
    queries: np.ndarray, candidates: np.ndarray, k: int, is_readable: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices and similarities of the k most similar candidates of a few queries, best first: both [Q, k].

    There are fewer than k columns when there are fewer candidates. All similarities of queries [Q, D] and candidates [N, D] are
    in memory at once. Candidates that are not `is_readable` [N] are never retrieved. Raises ValueError for
    embeddings that are not finite.
    """
    check_finite(queries, "query")
    indices = np.arange(len(candidates)) if is_readable is None else np.flatnonzero(is_readable)
    check_finite(candidates[indices], "candidate")
    similarity = queries @ candidates[indices].T
    best = largest(similarity, min(k, len(indices)))
    return indices[best], np.take_along_axis(similarity, best, axis=1)


def recall_at_k(similarity: torch.Tensor, is_match: torch.Tensor, k: int = 1) -> float:
    """Return the fraction of queries with a match among the k most similar candidates; both arguments [queries, candidates]."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return is_match.gather(1, top).any(dim=1).double().mean().item()


def _ranks(
    queries: torch.Tensor,
    query_ids: torch.Tensor,
    candidates: torch.Tensor,
    candidate_ids: torch.Tensor,
    is_candidate: torch.Tensor,
) -> torch.Tensor:
    """Return how many candidates precede each query's best match; all of them if it has none. [Q] int64.

    A candidate matches when its id is the query's. A rank below k is equivalent to a match in the top k, for every k at once.
    All similarities that are compared come from one product, so that rounding decides no order.
    """
    ranks = torch.empty(len(queries), dtype=torch.int64)
    columns = torch.arange(len(candidates))
    rows = max(1, MAX_SIMILARITIES // max(1, len(candidates)))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        similarity = (queries[part] @ candidates.T).masked_fill_(~is_candidate, float("-inf"))  # [rows, candidates]
        is_match = query_ids[part, None] == candidate_ids
        best, column = similarity.masked_fill(~is_match, float("-inf")).max(dim=1, keepdim=True)  # the first of equals
        precedes = (similarity > best) | ((similarity == best) & (columns < column))
        ranks[part] = torch.where(best[:, 0] == float("-inf"), len(candidates), precedes.sum(dim=1))
    return ranks
