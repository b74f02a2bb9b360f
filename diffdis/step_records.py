"""Records and metrics of a training step. A metric is a [sum, weight], added over ranks, micro-batches and steps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from diffdis.losses import AlignmentResult
from diffdis.model import ImageCondition, ImageKVCache

NUM_TIMESTEP_BINS = 4  # of t_z and t_e, for the logged losses and accuracy: the shortcut shows as a slope over those of t_e
Inputs = dict[str, torch.Tensor]
Metrics = dict[str, torch.Tensor]  # name -> [2]: weighted sum and weight


class StepNoise(NamedTuple):
    """All random numbers of one micro-batch on one rank. B images, n query noise samples per image."""

    timesteps: torch.Tensor  # [B]: t_z
    noise: torch.Tensor  # [B, C, H, W]
    drop_caption: torch.Tensor  # [B] bool
    query_timesteps: torch.Tensor  # [B, n]: t_e
    query_noise: torch.Tensor  # [B, n, D]
    drop_image: torch.Tensor  # [B] bool
    noised_rows: torch.Tensor  # [M] int64: images without a caption, not too noisy to be recognized; one other if there are none


class ImagePrediction(NamedTuple):
    """What the U-Net predicted from the noisy latents of a batch: their noise, v or the clean latents."""

    predicted: torch.Tensor  # [B, C, H, W]
    target: torch.Tensor  # [B, C, H, W]
    abar: torch.Tensor  # [B]
    features: torch.Tensor | None = None  # [B, C', H', W'] behind the middle block, if a loss needs them
    wrong: torch.Tensor | None = None  # [B, C, H, W]: predicted with a wrong caption, if a loss needs it


class QueryPrediction(NamedTuple):
    """Text queries predicted from the images of a batch, and the inputs of the prediction."""

    queries: torch.Tensor  # [B, n, D], unit norm
    condition: Any  # the ImageCondition; None for the clip task
    noisy_queries: torch.Tensor  # [B, n, D]
    noised: torch.Tensor | None = None  # [M, n, D]: queries that were predicted from the noisy images `noised_rows`


class GradCache(NamedTuple):
    """Alignment loss of one micro-batch's rows, and its gradients, computed over all micro-batches of a step."""

    queries_grad: torch.Tensor  # [b, n, D]: gradient of the step's mean loss, times the number of micro-batches
    scale_grad: torch.Tensor  # scalar: gradient of the step's mean loss
    parameter_grads: tuple[torch.Tensor, ...]  # for the parameters of the alignment loss; InfoNCE has none
    loss: torch.Tensor  # [n, b]
    correct: torch.Tensor  # [n, b]
    texts: tuple[torch.Tensor, torch.Tensor] | None  # of the micro-batch on all ranks: queries [B, D] and caption ids [B]


class StepConstants(NamedTuple):
    """Tensors that no step changes. They are not buffers, which `to(dtype)` would convert."""

    timestep_bins: torch.Tensor  # [bins, T]: 1 where a timestep is in a bin
    channel_weights: torch.Tensor  # [C, 1, 1], their mean is 1

    @classmethod
    def of(cls, num_timesteps: int, channel_weights: Sequence[float]) -> "StepConstants":
        bins = torch.tensor([[float(t in part) for t in range(num_timesteps)] for part in timestep_bins(num_timesteps)])
        weights = torch.tensor(channel_weights or [1.0])
        return cls(bins, (weights / weights.mean())[:, None, None])


def roll_condition(condition: ImageCondition, part: slice) -> ImageCondition:
    """Return the condition of some images, each in the place of the next one."""

    def roll(x: torch.Tensor) -> torch.Tensor:
        return x[part].roll(1, dims=0)

    if isinstance(condition, ImageKVCache):
        unet = [[(roll(keys), roll(values)) for keys, values in layers] for layers in condition.unet]
        return ImageKVCache(unet, [(roll(keys), roll(values)) for keys, values in condition.head])
    return roll(condition[0]), condition[1]


def chance(own_ids: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return [sum, weight] of the retrieval accuracy of guessing among a text and those with other captions.

    `own_ids` [b] are the captions of this rank's images, and `ids` [B_all] those of all ranks.
    """
    num_texts = 1 + (own_ids[:, None] != ids[None, :]).sum(dim=1)  # [b]
    return torch.stack([(1 / num_texts).sum(), torch.ones_like(num_texts, dtype=torch.float32).sum()])


def sums(result: AlignmentResult, has_image: torch.Tensor) -> Metrics:
    ones, counted = torch.ones_like(result.loss), has_image.float().expand_as(result.correct)
    return {
        "loss_alignment": torch.stack([result.loss.sum(), ones.sum()]),
        "alignment/retrieval": torch.stack([(result.correct * counted).sum(), counted.sum()]),
    }


def sums_by_timestep(result: AlignmentResult, has_image: torch.Tensor, in_bin: torch.Tensor, num_timesteps: int) -> Metrics:
    """Return the loss, and the retrieval accuracy of the samples with an image [B], by bins of t_e: `in_bin` [bins, n, B]."""
    counted = in_bin * has_image.float()
    parts = torch.stack([in_bin * result.loss, in_bin, counted * result.correct, counted], dim=1)  # [bins, 4, n, B]
    losses, retrievals = parts.sum(dim=(2, 3)).unflatten(1, (2, 2)).unbind(dim=1)  # [bins, 2] each
    return named_by_timestep("alignment/loss", losses, num_timesteps) | named_by_timestep(
        "alignment/retrieval", retrievals, num_timesteps
    )


def timestep_bins(num_timesteps: int) -> list[range]:
    width = -(-num_timesteps // NUM_TIMESTEP_BINS)
    return [range(low, min(low + width, num_timesteps)) for low in range(0, num_timesteps, width)]


def named_by_timestep(name: str, sums: torch.Tensor, num_timesteps: int) -> Metrics:
    """Return the metrics of the bins, whose [sum, weight] are the rows of `sums`."""
    return {
        f"{name}_t{part.start:03d}-{part.stop:03d}": row for part, row in zip(timestep_bins(num_timesteps), sums, strict=True)
    }
