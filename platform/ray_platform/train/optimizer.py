"""AdamW that also keeps the exponential moving average (EMA) of what it updates, as one more state beside its moments."""

from collections.abc import Iterable
from typing import Any

import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


def ema_decay_at(decay: float, num_updates: int) -> float:
    """The decay at an update: at first a short memory, so that the initial weights are soon forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class AdamW(torch.optim.AdamW):
    """As torch's. Under ZeRO it is given float32 shards, so the EMA is sharded, offloaded and float32 as the moments are.

    ema_n = ema_{n-1} + (1 - d_n) (w_n - ema_{n-1}), from ema_0 = the initial weights, with d_n = `ema_decay_at(decay, n)`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], ema_decay: float):
        super().__init__(groups, betas=(0.9, 0.999), fused=True)
        self.ema_decay = ema_decay  # 0: no EMA
        self.skip = False  # the next steps change nothing
        self.grad_scale: torch.Tensor | None = None  # what gradients were multiplied by; torch's fused kernels divide them by it

    @property
    def state_names(self) -> tuple[str, ...]:
        """Of the tensors shaped as the weights that belong to each of them."""
        return (*MOMENTS, EMA) if self.ema_decay else MOMENTS

    def begin(self, shards: Iterable[torch.Tensor]) -> None:
        """Make the states now, not at the first step: ZeRO 1 and 2 link them to parameters in the midst of it."""
        for shard in shards:
            state = {"step": torch.tensor(0.0, device=shard.device)} | {name: torch.zeros_like(shard) for name in MOMENTS}
            self.state[shard] = state | ({EMA: shard.detach().clone()} if self.ema_decay else {})

    @property
    def num_updates(self) -> int:
        """Steps that changed the weights."""
        return int(next(iter(self.state.values()))["step"])

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        for state in self.state.values():
            state["step"].fill_(number)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.skip:
            return
        super().step()
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not updated or not self.ema_decay:
            return
        decay = ema_decay_at(self.ema_decay, int(self.state[updated[0]]["step"]))
        torch._foreach_lerp_([self.state[p][EMA] for p in updated], [p.detach() for p in updated], 1 - decay)
