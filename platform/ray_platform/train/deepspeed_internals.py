"""All uses of DeepSpeed's undocumented attributes; test_engine.py fails when a new version changes them.

`optimizer` is the wrapper that `deepspeed.initialize` returns for ZeRO 1 to 3.
"""

import logging
from collections.abc import Iterable
from typing import Any

import torch

from ray_platform.train.optimizer import Fragment

UNTESTED = "ZeRO with an untested optimizer"


def disable_inference_kernels(deepspeed: Any) -> None:
    """Clear the table of kernels that DeepSpeed would compile at its first use, although only inference needs them.

    That takes half a minute and a compiler on every new host, and a process killed meanwhile leaves a lock on which others wait.
    """
    deepspeed.ops.__compatible_ops__ = {}


def silence_optimizer_warning() -> None:
    """Drop DeepSpeed's warning that AdamW is an "untested optimizer". There is no setting: the one that allows it logs it."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: UNTESTED not in record.getMessage())


def zero_1_and_2_fragments(optimizer: Any, rank: int) -> list[Fragment]:
    """Return what this rank updates under ZeRO 1 and 2: an equal part of the flat tensor of which the parameters are views."""
    fragments = []
    for parameters, flat, shard in zip(
        optimizer.bit16_groups, optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups, strict=True
    ):
        for parameter in parameters:
            place = parameter.storage_offset() - flat.storage_offset() - rank * shard.numel()  # relative to the shard's first one
            start, stop = max(0, -place), min(parameter.numel(), shard.numel() - place)
            if start < stop:
                fragments.append(Fragment(parameter, start, shard, place + start, stop - start))
    return fragments


def zero_3_fragments(optimizer: Any, parameters: Iterable[torch.nn.Parameter], rank: int) -> list[Fragment]:
    """Return what this rank updates under ZeRO 3: an equal part of every parameter, in flat tensors."""
    fragments = []
    for parameter in parameters:
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        fragments.append(Fragment(parameter, rank * size, optimizer.fp32_partitioned_groups_flat[group], offset, size))
    return fragments


def partition(parameter: Any, rank: int) -> Fragment:
    """Return the part of a parameter that this rank holds under ZeRO 3, whether it is trained or not."""
    part = parameter.ds_tensor
    return Fragment(parameter, rank * part.numel(), part, 0, part.numel())


def reduced_gradients(optimizer: Any) -> list[torch.Tensor]:
    """Return this rank's part of the averaged gradients under ZeRO 1 and 2, between the last backward pass and the step."""
    return [gradient for group in optimizer.averaged_gradients.values() for gradient in group]


def set_clipping(optimizer: Any, max_norm: float) -> None:
    """Set the maximum global norm of the (scaled) gradients of the next step; 0: no clipping."""
    optimizer.clip_grad = max_norm


def has_overflowed(optimizer: Any) -> bool:
    """Return whether a gradient of the last step was not finite on any rank, so that the step was skipped."""
    return optimizer.overflow


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, of which a rank holds a part under ZeRO 3."""
    return getattr(parameter, "ds_shape", parameter.shape)
