"""AdamW with moments of 8 bits (Dettmers et al. 2022), by bitsandbytes' kernels for CPUs and accelerators."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.optimizer import ParamsT

from ray_platform.contracts import ConfigError

try:
    from bitsandbytes import functional
except ImportError:
    raise ConfigError(
        "train.optimizer: adamw_8bit needs the package bitsandbytes, which is not installed; run "
        "pip install 'diffdis-platform[bitsandbytes]', or use adamw"
    ) from None

BLOCK = 256  # elements with a common scale, as the kernels require
_PART_SIZE = BLOCK * 2**16  # elements that are rounded at a time, which takes 8 bytes for each of them


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A flat float32 tensor as codes: element i is scales[i // BLOCK] * levels[codes[i]]."""

    codes: torch.Tensor  # [n] uint8
    scales: torch.Tensor  # [ceil(n / BLOCK)]: the largest magnitude of each block
    levels: torch.Tensor  # [256], ascending

    @classmethod
    def of(cls, values: torch.Tensor, signed: bool) -> "QuantizedTensor":
        """Round `values` to the nearest levels. Values that `part` returned for whole blocks get their codes and scales again.

        bitsandbytes' function does not always round to the nearest level, so its values would change at every resume.
        """
        levels = functional.create_dynamic_map(signed=signed).to(values.device)
        if signed:
            levels[0] = -1.0  # as 1.0 at the other end, so that the largest magnitude of a block is a level
        boundaries, codes, scales = (levels[1:] + levels[:-1]) / 2, [], []
        for part in values.split(_PART_SIZE):
            blocks = F.pad(part, (0, -len(part) % BLOCK)).view(-1, BLOCK)
            scales.append(blocks.abs().amax(dim=1))
            relative = blocks / scales[-1].clamp(min=torch.finfo(torch.float32).tiny)[:, None]
            codes.append(torch.bucketize(relative, boundaries).to(torch.uint8).flatten()[: len(part)])
        return cls(torch.cat(codes), torch.cat(scales), levels)

    def part(self, start: int, size: int) -> torch.Tensor:
        """Return `size` elements from `start` on, as float32."""
        first = start // BLOCK * BLOCK
        codes, scales = self.codes[first : start + size], self.scales[first // BLOCK : -(-(start + size) // BLOCK)]
        values = functional.dequantize_blockwise(codes, absmax=scales, code=self.levels, blocksize=BLOCK)
        return values[start - first :]


class AdamW8bit(torch.optim.Optimizer):
    """AdamW on flat float32 tensors, whose moments are `QuantizedTensor`s in `state`, next to the step count on the CPU."""

    def __init__(self, groups: ParamsT, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"betas": betas, "eps": eps})
        self.grad_scale: torch.Tensor | None = None  # a scalar by which the gradients are divided, as in torch's fused kernels

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                gradient, state = tensor.grad, self.state[tensor]
                if self.grad_scale is not None:
                    gradient = gradient.div_(self.grad_scale)
                state["step"] += 1
                first, second = state["exp_avg"], state["exp_avg_sq"]
                functional.optimizer_update_8bit_blockwise(
                    "adam", gradient, tensor.detach(), first.codes, second.codes, *group["betas"], 0.0, 0.0, group["eps"],
                    int(state["step"]), group["lr"], first.levels, second.levels, first.scales, second.scales,
                    weight_decay=group["weight_decay"],
                )  # fmt: skip
