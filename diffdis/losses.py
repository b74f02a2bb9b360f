"""The losses L_IG and L_ITA of Algorithm 1: tensors in, scalars and per-sample values out.

To add an alignment loss, write a class like `SigLIP` in a file of its own and enter it in `ALIGNMENT_LOSSES`; see
docs/extending.md.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

TEXT_CHUNK = 4096  # the logits of a rank's images and this many texts are in memory together


def world_size() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather(x: torch.Tensor) -> torch.Tensor:
    """Concatenate [B, ...] of every rank to [world_size * B, ...] in the order of ranks, without gradient."""
    if world_size() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.contiguous())
    return torch.cat(parts)


def gather_texts(query: torch.Tensor, caption_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `gather` of the text queries [b, D] and of their int64 caption ids [b], by one collective operation."""
    packed = gather(torch.cat([x.contiguous().view(torch.uint8) for x in (query, caption_ids[:, None])], dim=1))
    size = query.shape[1] * query.element_size()
    return packed[:, :size].contiguous().view(query.dtype), packed[:, size:].contiguous().view(torch.int64)[:, 0]


def rank_offset(num_local: int) -> int:
    """Return the index of this rank's first sample in the result of `gather`."""
    return dist.get_rank() * num_local if world_size() > 1 else 0


def generation_loss(prediction: torch.Tensor, target: torch.Tensor, channel_weights: torch.Tensor | None = None) -> torch.Tensor:
    """Return L_IG per sample: the mean squared error over [C, H, W], with weights [C, 1, 1] if they are given. [B]"""
    error = (prediction.float() - target.float()).square()
    if channel_weights is not None:
        error = error * channel_weights
    return error.flatten(1).mean(dim=1)


class AlignmentResult(NamedTuple):
    """Loss of this rank's b pairs for each of n query noise samples; only `mean` has a gradient."""

    mean: torch.Tensor  # scalar: the mean of `loss`; its mean over the ranks is L_ITA of the global batch
    loss: torch.Tensor  # [n, b]
    correct: torch.Tensor  # [n, b] float: 1 where the image's own text has the highest score of all
    # (text queries [B, D], their caption ids [B]) of all ranks, for metrics; without them, the metrics gather them again
    texts: tuple[torch.Tensor, torch.Tensor] | None = None


class AlignmentLoss(Protocol):
    """Loss between the predicted and the true text queries.

    A loss with trainable parameters is an nn.Module; they are trained at `objective.lr_new`.
    """

    def __call__(
        self, predicted: torch.Tensor, query: torch.Tensor, caption_ids: torch.Tensor, scale: torch.Tensor
    ) -> AlignmentResult:
        """Compute the loss of this rank's pairs; the texts of all ranks are the negatives.

        Args:
            predicted: [b, n, D], unit norm, with gradient: n predictions per image.
            query: [b, D], unit norm: the true text queries. The text encoder is frozen, so they have no gradient.
            caption_ids: [b] int64, equal for equal captions, which are not negatives of each other.
            scale: scalar 1 / temperature, trainable.
        """
        ...


class InfoNCE:
    """L_ITA: symmetric InfoNCE between the predicted and the true text queries of all ranks [P].

    The loss of a sample is the mean of the two directions. Pairs of one caption are not negatives of each other: their logits are
    left out [D].

    Equal to the plain loss on the concatenated batch, in value and, once the trainer has averaged the ranks' gradients, in
    gradient. But no rank holds more than its own rows of the [B, B] logits, and of those `TEXT_CHUNK` columns.
    """

    def __call__(
        self, predicted: torch.Tensor, query: torch.Tensor, caption_ids: torch.Tensor, scale: torch.Tensor
    ) -> AlignmentResult:
        texts, ids = gather_texts(query, caption_ids)
        mean, loss, correct = _ChunkedInfoNCE.apply(predicted, scale, texts, ids)
        return AlignmentResult(mean, loss, correct, (texts, ids))


class LossParameter(nn.Module):
    """A trainable parameter of a loss. A module, whose call ZeRO 3 sees: it holds all elements only meanwhile."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))

    def forward(self) -> torch.Tensor:
        """Return a copy of the value, float32 [1]."""
        return self.value.float().clone()


class SigLIP(nn.Module):
    """Sigmoid loss over the pairs of an image and a text of all ranks, with a trainable bias (Zhai et al. 2023, eq. 1).

    With z_ij = 1 for an image and its own text and -1 for all others, the loss of an image is

    loss_i = -sum_j log sigmoid(z_ij (S_ij + bias))

    Pairs of one caption are neither: they are left out, as in `InfoNCE`. The sum has one term per pair, so the ranks communicate
    nothing but the texts, and the logits of `TEXT_CHUNK` texts are in memory at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bias = LossParameter(-10.0)  # nearly all pairs are negatives

    def forward(
        self, predicted: torch.Tensor, query: torch.Tensor, caption_ids: torch.Tensor, scale: torch.Tensor
    ) -> AlignmentResult:
        texts, ids = gather_texts(query, caption_ids)
        with torch.autocast(predicted.device.type, enabled=False):
            images, offset = predicted.float().transpose(0, 1), rank_offset(len(query))  # [n, b, D]
            bias, arguments = self.bias(), (images, texts.float(), ids, scale, offset)
            chunks = [
                # The backward pass computes the logits of a chunk again.
                checkpoint(_sigmoid_loss, bias, *arguments, start, use_reentrant=False, preserve_rng_state=False)
                for start in range(0, len(texts), TEXT_CHUNK)
            ]
            losses, positives, best_negatives = zip(*chunks, strict=True)
            loss = torch.stack(losses).sum(dim=0)
            correct = (torch.cat(positives, dim=1) >= torch.stack(best_negatives).amax(dim=0)).float()
        return AlignmentResult(loss.mean(), loss.detach(), correct, (texts, ids))


# Names for objective.alignment_loss.
ALIGNMENT_LOSSES: dict[str, Callable[[], AlignmentLoss]] = {"infonce": InfoNCE, "siglip": SigLIP}


def build_alignment_loss(name: str) -> AlignmentLoss:
    """Return the loss called `name`. Raises ValueError for a name that is not in `ALIGNMENT_LOSSES`."""
    if name not in ALIGNMENT_LOSSES:
        raise ValueError(f"objective.alignment_loss: no loss is called {name!r}; use {', '.join(ALIGNMENT_LOSSES)}")
    return ALIGNMENT_LOSSES[name]()


class _ChunkedInfoNCE(torch.autograd.Function):
    """With S [n, b, B] the scaled logits of local images and all texts, i an image and j a text:

    loss_i = (logsumexp_j S_ij - S_ii) / 2 + (logsumexp_i S_ij - S_jj) / 2 for text j = i

    The text encoder is frozen, so only this rank's e0_hat needs a gradient: dL/dS e scale with
    dL/dS_ij = (softmax over j + softmax over i - 2 [i = j]) / (2 n b). Other ranks contribute only the sums of a column.
    """

    @staticmethod
    def forward(ctx: Any, predicted: torch.Tensor, scale: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor) -> Any:
        with torch.autocast(predicted.device.type, enabled=False):
            images, texts = predicted.float().transpose(0, 1), texts.float()  # [n, b, D], [B, D]
            offset = rank_offset(images.shape[1])
            n, b, total = images.shape[0], images.shape[1], len(texts)
            row_lse = images.new_full((n, b), float("-inf"))  # logsumexp over all texts
            best_negative = row_lse.clone()
            column_lse = images.new_empty((n, total))  # logsumexp over this rank's images
            positive = images.new_empty((n, b))
            for start, logits, diagonal in _logit_chunks(images, texts, ids, scale, offset):
                row_lse = torch.logaddexp(row_lse, logits.logsumexp(dim=2))
                column_lse[:, start : start + logits.shape[2]] = logits.logsumexp(dim=1)
                positive[:, diagonal.rows] = diagonal.of(logits)
                diagonal.of(logits).fill_(float("-inf"))
                best_negative = torch.maximum(best_negative, logits.amax(dim=2))
            column_lse = _logsumexp_over_ranks(column_lse, scale)
            loss = (row_lse + column_lse[:, offset : offset + b]) / 2 - positive
            ctx.save_for_backward(predicted, scale, texts, ids, row_lse, column_lse)
            correct = (positive >= best_negative).float()
            ctx.mark_non_differentiable(loss, correct)
            return loss.mean(), loss, correct

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *_: Any) -> Any:
        predicted, scale, texts, ids, row_lse, column_lse = ctx.saved_tensors
        with torch.autocast(predicted.device.type, enabled=False):
            images = predicted.float().transpose(0, 1)  # [n, b, D]
            offset = rank_offset(images.shape[1])
            images_grad, scale_grad = torch.zeros_like(images), images.new_zeros(())
            for start, logits, diagonal in _logit_chunks(images, texts, ids, scale, offset):
                stop = start + logits.shape[2]
                slope = (logits - row_lse[:, :, None]).exp()  # [n, b, chunk]
                slope += (logits - column_lse[:, None, start:stop]).exp()
                diagonal.of(slope).sub_(2.0)
                images_grad += slope @ texts[start:stop]
                # S = scale * dot; a logit that is left out has slope 0.
                scale_grad += (slope * logits.masked_fill(slope == 0, 0.0)).sum() / scale.float()
            factor = gradient.float() / (2 * row_lse.numel())
            images_grad *= factor * scale.float()
            predicted_grad = images_grad.transpose(0, 1).to(predicted.dtype)
            return predicted_grad, (scale_grad * factor).to(scale.dtype).view_as(scale), None, None


class _Diagonal(NamedTuple):
    """Indices, within a chunk of logits, of the pairs of local images and their own texts.

    They come from the host's numbers: a boolean mask would make the host wait for the accelerator.
    """

    rows: slice
    columns: slice

    def of(self, logits: torch.Tensor) -> torch.Tensor:
        """Return a view [..., number of pairs] of the pairs in `logits` [..., b, chunk]."""
        return logits[..., self.rows, self.columns].diagonal(dim1=-2, dim2=-1)


def _logit_chunks(
    images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, offset: int
) -> Iterator[tuple[int, torch.Tensor, _Diagonal]]:
    """Yield (index of the first text, *`_logits`) for chunks of the texts."""
    for start in range(0, len(texts), TEXT_CHUNK):
        yield start, *_logits(images, texts, ids, scale, offset, start)


def _logits(
    images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, offset: int, start: int
) -> tuple[torch.Tensor, _Diagonal]:
    """Return the scaled logits [n, b, chunk] of the texts from `start` on, and their diagonal.

    A logit of two samples with the same caption is -inf, except on the diagonal.
    """
    b, chunk = images.shape[1], texts[start : start + TEXT_CHUNK]
    logits = scale.float() * (images @ chunk.T)
    first, stop = (min(max(own, start), start + len(chunk)) for own in (offset, offset + b))
    diagonal = _Diagonal(slice(first - offset, stop - offset), slice(first - start, stop - start))
    same_caption = ids[offset : offset + b, None] == ids[None, start : start + len(chunk)]
    diagonal.of(same_caption).fill_(False)
    return logits.masked_fill_(same_caption, float("-inf")), diagonal


def _sigmoid_loss(
    bias: torch.Tensor, images: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor, offset: int, start: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the part of a chunk of the texts in the loss of each image [n, b], and two tensors without gradient:
    the logits of the chunk's diagonal [n, number of pairs], and the highest other logit of each image [n, b]."""
    logits, diagonal = _logits(images, texts, ids, scale, offset, start)
    signed = -(logits + bias)  # z_ij (S_ij + bias); a logit that is left out is -inf, and its part of the loss 0
    diagonal.of(signed).neg_()
    scores = logits.detach()  # no gradient needs their values
    positive = diagonal.of(scores).clone()
    diagonal.of(scores).fill_(float("-inf"))
    return -F.logsigmoid(signed).sum(dim=2), positive, scores.amax(dim=2)


def _logsumexp_over_ranks(column: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Combine every rank's [n, B]. A rank whose images are all left out for a text contributes -inf, that is nothing.

    Logits are at most `scale` (unit vectors), which is at most 100. So float64 holds their exponentials relative to it, and the
    ranks need not agree on the highest logit first.
    """
    if world_size() == 1:
        return column
    total = (column.double() - scale).exp()
    dist.all_reduce(total)
    return (total.log() + scale).float()


# --- auxiliary losses, each off by default: not part of Algorithm 1 -------------------------------------------------------------


def noised_alignment_loss(
    predicted: torch.Tensor, own: torch.Tensor, texts: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Return InfoNCE's direction from image to text for some images, loss_i = logsumexp_j S_ij - S_ii. [M]

    The other direction would need all images. Texts of the same caption are left out, as in `InfoNCE`.

    Args:
        predicted: [M, n, D], unit norm: queries that were predicted from noisy images.
        own: [M] int64: the indices of their own texts.
        texts: [B, D], unit norm: the texts of all ranks.
        ids: [B] int64: their captions.
        scale: scalar 1 / temperature.
    """
    logits = scale * (predicted.float() @ texts.float().T)  # [M, n, B]
    same_caption = ids[own][:, None] == ids[None, :]
    same_caption.scatter_(1, own[:, None], False)
    logits = logits.masked_fill(same_caption[:, None], float("-inf"))
    positive = logits.gather(2, own[:, None, None].expand(-1, logits.shape[1], 1)).squeeze(2)  # [M, n]
    return (logits.logsumexp(dim=2) - positive).mean(dim=1)


def caption_contrast_loss(error: torch.Tensor, wrong_error: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the cross-entropy of a diffusion classifier over two captions, the own one and a wrong one. [B]

    p(c | z) is the softmax over captions of -error(c) / temperature (Li et al. 2023, eq. 5, with one sample of t and eps for both
    captions), so loss = log(1 + exp((error - wrong_error) / temperature)). As in contrastive flow matching (Stoica et al. 2025),
    another sample of the batch is the negative; there its target, here its caption.
    """
    return F.softplus((error - wrong_error) / temperature)


def dispersive_loss(features: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return log mean_ij exp(-|h_i - h_j|^2 / (d temperature)) over all pairs of a batch, i = j included. Scalar.

    The dispersive loss with InfoNCE and squared distances (Wang & He 2025, algorithm 1), which the authors' code divides by the
    number d of features. `features` [B, ...]
    """
    flat = features.float().flatten(1)
    logits = -F.pdist(flat).square() / (flat.shape[1] * temperature)  # [B (B - 1) / 2]
    return torch.cat([logits, logits, logits.new_zeros(len(flat))]).logsumexp(dim=0) - 2 * math.log(len(flat))


def repa_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Return REPA's loss per image, minus the cosine of its projected and its frozen features (Yu et al. 2025, eq. 8). [B]

    Of the whole image instead of each patch, as the frozen networks here pool their features. Both [B, d].
    """
    return -F.cosine_similarity(projected.float(), features.float(), dim=1)
