"""The data type of the weights that a module computes with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch


def convert_weights(module: torch.nn.Module, kept: Sequence[Mapping[str, Any]], precision: str) -> dict[str, torch.Tensor]:
    """Convert the weights to `train.precision`, except those of the parameter groups `kept`.

    Return the original values of the converted weights by name, on the CPU: the optimizer starts from them, and a checkpoint has
    them, without rounding.
    """
    if precision == "fp32":
        return {}
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    stay = {parameter for group in kept for parameter in group["params"]}
    originals = {}
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter not in stay:
            originals[name] = parameter.detach().to("cpu", torch.float32, copy=True)
            parameter.data = parameter.data.to(dtype)
    return originals
