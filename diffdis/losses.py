"""L_IG and L_ITA (METHOD: Algorithm 1). Tensors in, scalars and per-sample values out."""

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


class _GatherWithGradient(torch.autograd.Function):
    """all_gather along axis 0 whose backward sums every rank's gradient: exact when each rank computes the global loss."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.batch = x.shape[0]
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.batch :][: ctx.batch]


def gather(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] of every rank -> [world_size * B, ...] in the order of ranks, differentiable; x itself without a group."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return x
    return _GatherWithGradient.apply(x)


def generation_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_IG a sample: the mean squared error over [C, H, W]. [B]"""
    return (prediction - target).square().flatten(1).mean(dim=1)


class Alignment(NamedTuple):
    """Per (draw, sample) over the global batch of B pairs."""

    loss: torch.Tensor  # [n, B]: mean of the two directions of InfoNCE
    correct: torch.Tensor  # [n, B] float: the image's own text scored highest


def alignment_loss(predicted: torch.Tensor, query: torch.Tensor, caption_ids: torch.Tensor, scale: torch.Tensor) -> Alignment:
    """L_ITA: symmetric InfoNCE between predicted and true text queries, for each of n draws.

    predicted [B, n, D] and query [B, D] have unit norm; caption_ids [B] int64; scale = 1 / temperature. Pairs of one caption are
    not negatives of each other: their logits are left out [D].
    """
    logits = scale * torch.einsum("ind,jd->nij", predicted, query)  # [n, B, B]
    same = caption_ids[:, None] == caption_ids[None, :]
    same.fill_diagonal_(False)
    logits = logits.masked_fill(same, float("-inf"))
    target = torch.arange(len(query), device=logits.device).expand(len(logits), -1)  # [n, B]
    image_to_text = F.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # [n, B]: over j
    text_to_image = F.cross_entropy(logits, target, reduction="none")  # [n, B]: over i
    correct = (logits.argmax(dim=2) == target).float()
    return Alignment((image_to_text + text_to_image) / 2, correct)
