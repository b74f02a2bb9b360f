"""All uses of DeepSpeed's undocumented attributes; test_engine.py fails when a new version changes them.

`optimizer` is the wrapper that `deepspeed.initialize` returns for ZeRO 1 to 3.
"""

import logging
from typing import Any

import torch
from deepspeed.utils import lazy_init_hp_params_optimizer_state

UNTESTED = "ZeRO with an untested optimizer"


def disable_inference_kernels(deepspeed: Any) -> None:
    """Clear the table of kernels that DeepSpeed would compile at its first use, although only inference needs them.

    That takes half a minute and a compiler on every new host, and a process killed meanwhile leaves a lock on which others wait.
    """
    deepspeed.ops.__compatible_ops__ = {}


def silence_optimizer_warning() -> None:
    """Drop DeepSpeed's warning that AdamW is an "untested optimizer". There is no setting: the one that allows it logs it."""
    logging.getLogger("DeepSpeed").addFilter(lambda record: UNTESTED not in record.getMessage())


def link_optimizer_state(optimizer: Any) -> None:
    """Link the state of the wrapped optimizer to the parameters now (ZeRO 1 and 2), instead of in the first step."""
    for parameters, shard in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, shard, optimizer.state)


def flat_shards(optimizer: Any) -> list[torch.Tensor]:
    """Return the float32 tensors that this rank's optimizer updates under ZeRO 3."""
    return optimizer.fp32_partitioned_groups_flat


def set_clipping(optimizer: Any, max_norm: float) -> None:
    """Set the maximum global norm of the (scaled) gradients of the next step; 0: no clipping."""
    optimizer.clip_grad = max_norm


def has_overflowed(optimizer: Any) -> bool:
    """Return whether a gradient of the last step was not finite on any rank, so that the step was skipped."""
    return optimizer.overflow


def refresh_model_weights(optimizer: Any) -> None:
    """Copy changed float32 weights to the tensors that the module computes with (ZeRO 1 and 2)."""
    optimizer.update_lp_params()


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of the whole parameter, of which a rank holds a part under ZeRO 3."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_part(parameter: Any, value: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    """Return this rank's part of `value`, zero-padded, as ZeRO 3 splits `parameter`."""
    size = parameter.ds_tensor.numel()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * world_size - value.numel()))
    return padded[rank * size :][:size]
