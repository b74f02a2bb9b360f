"""Retrieval between images and texts by their embeddings, where an image may have several texts."""

from collections.abc import Sequence

import numpy as np
import torch

from diffdis.metrics.zero_shot import SCORES_AT_ONCE, best_of, check_finite


def retrieval_recalls(
    image_embeddings: np.ndarray,
    text_embeddings: np.ndarray,
    image_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
    readable: np.ndarray | None = None,
) -> dict[str, float]:
    """CLIP_benchmark's figures: image_retrieval_recall@k, the share of texts that find their image among the k most similar,
    and text_retrieval_recall@k, the share of images that find one of their texts.

    image_embeddings [N, D] and text_embeddings [M, D] of unit norm; image_of_text [M] in 0..N-1; readable [N] bool, all unless
    given. An image that could not be read is never found, and counts as a query that failed, as its texts do. Of equally similar
    candidates the one with the lower index comes first. Raises ValueError for an embedding that is not finite.
    """
    num_images = len(image_embeddings)
    seen = np.ones(num_images, dtype=bool) if readable is None else np.asarray(readable, dtype=bool)
    image_embeddings = np.where(seen[:, None], image_embeddings, np.float32(0))
    check_finite(image_embeddings, "image")
    check_finite(text_embeddings, "text")
    images, texts, allowed = (torch.as_tensor(array) for array in (image_embeddings, text_embeddings, seen))
    owners, places = torch.as_tensor(np.asarray(image_of_text, dtype=np.int64)), torch.arange(num_images)
    text_ranks = _ranks(texts, owners, images, places, allowed)
    image_ranks = _ranks(images, places, texts, owners, torch.ones(len(texts), dtype=torch.bool))
    image_ranks[~allowed] = len(texts)
    recalls = {}
    for k in ks:
        recalls[f"image_retrieval_recall@{k}"] = _share(text_ranks < min(k, num_images))
        recalls[f"text_retrieval_recall@{k}"] = _share(image_ranks < min(k, len(texts)))
    return recalls


def most_similar(
    queries: np.ndarray, candidates: np.ndarray, k: int, readable: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar candidates of a few queries, best first: their indices and similarities, both [Q, k].

    queries [Q, D], candidates [N, D]; candidates that are not `readable` [N] bool are never found. Fewer than k columns where
    there are fewer candidates. All Q x N scores are in memory together. Raises ValueError for an embedding that is not finite.
    """
    check_finite(queries, "query")
    places = np.arange(len(candidates)) if readable is None else np.flatnonzero(readable)
    check_finite(candidates[places], "candidate")
    similarity = queries @ candidates[places].T
    best = best_of(similarity, min(k, len(places)))
    return places[best], np.take_along_axis(similarity, best, axis=1)


def recall_at_k(similarity: torch.Tensor, right: torch.Tensor, k: int = 1) -> float:
    """The share of queries with a right candidate among the k most similar. similarity and right (bool) [queries, candidates]."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return right.gather(1, top).any(dim=1).double().mean().item()


def _ranks(
    queries: torch.Tensor, query_ids: torch.Tensor, candidates: torch.Tensor, candidate_ids: torch.Tensor, allowed: torch.Tensor
) -> torch.Tensor:
    """For each query, how many candidates come before its best right one; all of them where it has none. [Q] int64.

    A candidate is right when its id is the query's. Rank < k says the same as a top-k that holds a right one, for every k at
    once and without its indices. All scores that are compared come from one product, so that rounding decides no order.
    """
    ranks = torch.empty(len(queries), dtype=torch.int64)
    columns = torch.arange(len(candidates))
    rows = max(1, SCORES_AT_ONCE // max(1, len(candidates)))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        scores = (queries[part] @ candidates.T).masked_fill_(~allowed, float("-inf"))  # [rows, candidates]
        right = query_ids[part, None] == candidate_ids
        best, place = scores.masked_fill(~right, float("-inf")).max(dim=1, keepdim=True)  # the first of equals
        before = (scores > best) | ((scores == best) & (columns < place))
        ranks[part] = torch.where(best[:, 0] == float("-inf"), len(candidates), before.sum(dim=1))
    return ranks


def _share(hits: torch.Tensor) -> float:
    return int(hits.sum()) / len(hits)
