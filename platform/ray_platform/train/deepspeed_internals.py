"""DeepSpeed's import and all uses of its undocumented attributes; test_engine.py fails when a new version changes them.

`optimizer` is the wrapper that `deepspeed.initialize` returns for ZeRO 1 to 3.
"""

import functools
import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch

from ray_platform.train.optimizer import Fragment

UNTESTED = "ZeRO with an untested optimizer"


@functools.cache
def import_deepspeed() -> Any:
    """Return the package deepspeed, whose import takes seconds that ZeRO 0 does not need to spend."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, at the import
    import deepspeed

    # DeepSpeed would compile the kernels of this table at its first use, although only inference needs them. That takes half a
    # minute and a compiler on every new host, and a process killed meanwhile leaves a lock on which others wait.
    deepspeed.ops.__compatible_ops__ = {}
    # There is no setting for this warning: the one that allows an optimizer logs it.
    logging.getLogger("DeepSpeed").addFilter(lambda record: UNTESTED not in record.getMessage())
    return deepspeed


def whole_on_rank_0(parameter: torch.nn.Parameter) -> AbstractContextManager[None]:
    """Gather a parameter of ZeRO 3 for a block, after which every rank has its part of what rank 0 wrote to it."""
    return import_deepspeed().zero.GatheredParameters([parameter], modifier_rank=0)


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


def load_zero_3_weights(optimizer: Any, fragments: Iterable[Fragment]) -> None:
    """Copy what every rank updates to its part of the module's parameters under ZeRO 3, also of those that all ranks hold."""
    optimizer.checkpoint_event_prologue()  # frees the parameters that a rank holds besides its part
    for fragment in fragments:
        parameter: Any = fragment.parameter
        parameter.ds_tensor.copy_(fragment.of_shard(fragment.shard))
    optimizer.checkpoint_event_epilogue()  # gathers those that it always holds


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
