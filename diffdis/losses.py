"""L_IG and L_ITA (METHOD: Algorithm 1). Tensors in, scalars and per-sample values out."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

TEXTS_AT_ONCE = 4096  # logits of a rank's images with so many texts are in memory together


def world_size() -> int:
    """1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: torch.Tensor) -> torch.Tensor:
    """[B, ...] of every rank -> [world_size * B, ...] in the order of ranks, without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def first_of_rank(num_local: int) -> int:
    """The place of this rank's first sample in what `gather` gives."""
    return dist.get_rank() * num_local if world_size() > 1 else 0


def generation_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """L_IG a sample: the mean squared error over [C, H, W]. [B]"""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)


class Alignment(NamedTuple):
    """Over this rank's b pairs and n draws; only `mean` has a gradient."""

    mean: torch.Tensor  # scalar: of `loss`; its mean over the ranks is L_ITA of the global batch
    loss: torch.Tensor  # [n, b]: mean of the two directions of InfoNCE
    correct: torch.Tensor  # [n, b] float: the image's own text scored highest of all


def alignment_loss(predicted: torch.Tensor, query: torch.Tensor, caption_ids: torch.Tensor, scale: torch.Tensor) -> Alignment:
    """L_ITA: symmetric InfoNCE between the predicted and the true text queries of all ranks, for each of n draws.

    predicted [b, n, D] and query [b, D] have unit norm and are this rank's, as caption_ids [b] int64; scale = 1 / temperature.
    Pairs of one caption are not negatives of each other: their logits are left out [D].

    Equal to the plain loss on the concatenated batch, in value and, once the trainer has averaged the ranks' gradients, in
    gradient. But no rank holds more than its own rows of the [B, B] logits, and of those `TEXTS_AT_ONCE` columns.
    """
    return Alignment(*_ChunkedInfoNCE.apply(predicted, scale, gather(query), gather(caption_ids)))


class _ChunkedInfoNCE(torch.autograd.Function):
    """With S [n, b, B] the scaled logits of local images and all texts, i an image and j a text:

    loss_i = (logsumexp_j S_ij - S_ii) / 2 + (logsumexp_i S_ij - S_jj) / 2 for text j = i

    e comes from a frozen encoder, so only this rank's e0_hat needs a gradient, and it is dL/dS e scale with
    dL/dS_ij = (softmax over j + softmax over i - 2 [i = j]) / (2 n b). Of other ranks it takes the sums of a text's column alone.
    """

    @staticmethod
    def forward(ctx: Any, predicted: torch.Tensor, scale: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor) -> Any:
        with torch.autocast(predicted.device.type, enabled=False):
            images, texts = predicted.float().transpose(0, 1), texts.float()  # [n, b, D], [B, D]
            first = first_of_rank(images.shape[1])
            n, b, total = images.shape[0], images.shape[1], len(texts)
            row = images.new_full((n, b), float("-inf"))  # logsumexp over texts
            best = row.clone()  # of the other texts
            column = images.new_empty((n, total))  # logsumexp over this rank's images
            own = images.new_empty((n, b))
            for start, logits, diagonal in _blocks(images, texts, ids, scale, first):
                row = torch.logaddexp(row, logits.logsumexp(dim=2))
                column[:, start : start + logits.shape[2]] = logits.logsumexp(dim=1)
                own[:, diagonal.rows] = logits[:, diagonal.rows, diagonal.columns]
                logits[:, diagonal.rows, diagonal.columns] = float("-inf")
                best = torch.maximum(best, logits.amax(dim=2))
            column = _logsumexp_over_ranks(column)
            mine = column[:, first : first + b]
            loss = (row + mine) / 2 - own
            ctx.save_for_backward(predicted, scale, texts, ids, row, column)
            correct = (own >= best).float()
            ctx.mark_non_differentiable(loss, correct)
            return loss.mean(), loss, correct

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        predicted, scale, texts, ids, row, column = ctx.saved_tensors
        with torch.autocast(predicted.device.type, enabled=False):
            images = predicted.float().transpose(0, 1)  # [n, b, D]
            first = first_of_rank(images.shape[1])
            to_images, to_scale = torch.zeros_like(images), images.new_zeros(())
            for start, logits, diagonal in _blocks(images, texts, ids, scale, first):
                stop = start + logits.shape[2]
                slope = (logits - row[:, :, None]).exp()  # [n, b, chunk]
                slope += (logits - column[:, None, start:stop]).exp()
                slope[:, diagonal.rows, diagonal.columns] -= 2.0
                to_images += slope @ texts[start:stop]
                # S = scale * dot, and where a logit is left out its slope is 0
                to_scale += (slope * logits.masked_fill(slope == 0, 0.0)).sum() / scale.float()
            factor = gradient.float() / (2 * row.numel())
            to_images *= factor * scale.float()
            return to_images.transpose(0, 1).to(predicted.dtype), (to_scale * factor).to(scale.dtype).view_as(scale), None, None


class _Diagonal(NamedTuple):
    """Where, in a block of logits, local images meet their own texts."""

    rows: torch.Tensor
    columns: torch.Tensor


def _blocks(images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, first: int) -> Any:
    """(first text, scaled logits [n, b, chunk], where the diagonal is) chunk by chunk."""
    b = images.shape[1]
    places = torch.arange(first, first + b, device=images.device)
    for start in range(0, len(texts), TEXTS_AT_ONCE):
        part = texts[start : start + TEXTS_AT_ONCE]
        logits = scale.float() * (images @ part.T)
        here = (places >= start) & (places < start + len(part))
        diagonal = _Diagonal(here.nonzero()[:, 0], places[here] - start)
        same = ids[first : first + b, None] == ids[None, start : start + len(part)]
        same[diagonal.rows, diagonal.columns] = False
        yield start, logits.masked_fill_(same, float("-inf")), diagonal


def _logsumexp_over_ranks(column: torch.Tensor) -> torch.Tensor:
    """Of every rank's [n, B]. A rank all of whose images are left out for a text gives -inf, which counts for nothing."""
    if world_size() == 1:
        return column
    highest = column.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    total = (column - highest).exp()
    dist.all_reduce(total)
    return highest + total.log()
