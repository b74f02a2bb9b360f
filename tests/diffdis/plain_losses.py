"""Reference losses that compute all logits of the concatenated batch at once. Tests compare the chunked losses with them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F


class PlainAlignment(NamedTuple):
    loss: torch.Tensor  # [n, B]
    correct: torch.Tensor  # [n, B]


def plain_alignment_loss(predicted, query, caption_ids, scale) -> PlainAlignment:
    """Return the loss of the global batch.

    Args:
        predicted: [B, n, D].
        query: [B, D].
        caption_ids: [B].
        scale: Factor of the logits (inverse temperature).
    """
    logits = scale * torch.einsum("ind,jd->nij", predicted, query)  # [n, B, B]
    same = caption_ids[:, None] == caption_ids[None, :]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(query), device=logits.device).expand(len(logits), -1)  # [n, B]
    image_to_text = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # [n, B]: over j
    text_to_image = F.cross_entropy(logits, target, reduction="none")  # [n, B]: over i
    return PlainAlignment((image_to_text + text_to_image) / 2, (logits.argmax(dim=2) == target).float())


def plain_sigmoid_loss(predicted, query, caption_ids, scale, bias) -> PlainAlignment:
    """Return SigLIP's loss of the global batch, with the arguments of `plain_alignment_loss` and the bias of the logits."""
    logits = scale * torch.einsum("ind,jd->nij", predicted, query) + bias  # [n, B, B]
    is_own = torch.eye(len(query), device=logits.device)
    is_counted = (caption_ids[:, None] != caption_ids[None, :]).float() + is_own
    labels = is_own.expand_as(logits)
    loss = F.binary_cross_entropy_with_logits(logits, labels, weight=is_counted, reduction="none").sum(dim=2)
    best = logits.masked_fill(is_counted == 0, float("-inf")).argmax(dim=2)
    return PlainAlignment(loss, (best == torch.arange(len(query), device=logits.device)).float())
