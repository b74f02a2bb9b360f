"""Reference InfoNCE that computes all logits of the concatenated batch at once. Tests compare the chunked loss with it."""

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
