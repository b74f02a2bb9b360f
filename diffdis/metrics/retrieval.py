"""Recall at k from similarities of queries and candidates, where a query may have several right candidates."""

import torch


def recall_at_k(similarity: torch.Tensor, right: torch.Tensor, k: int = 1) -> float:
    """The share of queries with a right candidate among the k most similar. similarity and right (bool) [queries, candidates]."""
    top = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return right.gather(1, top).any(dim=1).double().mean().item()
