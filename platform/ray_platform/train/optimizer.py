"""AdamW with an EMA of the weights, the loss scale of fp16 and the learning-rate schedule."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ray_platform.train.config import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"


def ema_decay_at(decay: float, num_updates: int) -> float:
    """Return the EMA decay at an update: small at first, so that the initial weights are soon forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which also keeps an exponential moving average (EMA) of the weights as one more state per parameter.

    ema_n = ema_{n-1} + (1 - d_n) (w_n - ema_{n-1}), from ema_0 = the initial weights, with d_n = `ema_decay_at(decay, n)`.
    Under ZeRO its parameters are float32 shards, so the EMA is sharded, offloaded and float32, like the moments.
    """

    def __init__(self, groups: ParamsT, ema_decay: float):
        """`ema_decay` 0: no EMA."""
        super().__init__(groups, betas=(0.9, 0.999), fused=True)
        self.ema_decay = ema_decay
        self._skip = False
        # torch's fused kernels divide the gradients by it, as for torch.amp.GradScaler.
        self.grad_scale: torch.Tensor | None = None

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state tensors that have the shape of their parameter."""
        return (*MOMENTS, EMA) if self.ema_decay else MOMENTS

    def init_state(self, shards: Iterable[torch.Tensor]) -> None:
        """Create the state now instead of at the first step, in which ZeRO 1 and 2 link it to their parameters."""
        for shard in shards:
            state = {"step": torch.tensor(0.0, device=shard.device)} | {name: torch.zeros_like(shard) for name in MOMENTS}
            self.state[shard] = state | ({EMA: shard.detach().clone()} if self.ema_decay else {})

    @property
    def num_updates(self) -> int:
        """Number of steps that changed the weights."""
        return int(next(iter(self.state.values()))["step"])

    @num_updates.setter
    def num_updates(self, number: int) -> None:
        for state in self.state.values():
            state["step"].fill_(number)

    @contextlib.contextmanager
    def step_options(self, *, skip: bool, grad_scale: torch.Tensor | None) -> Iterator[None]:
        """Have the `step` that DeepSpeed calls inside this block change nothing, or divide the gradients by a scalar."""
        self._skip, self.grad_scale = skip, grad_scale
        try:
            yield
        finally:
            self._skip, self.grad_scale = False, None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self._skip:
            return
        super().step()
        updated = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if updated and self.ema_decay:
            num_updates = int(self.state[updated[0]]["step"])
            average = get_ema_multi_avg_fn(ema_decay_at(self.ema_decay, num_updates))
            average([self.state[p][EMA] for p in updated], [p.detach() for p in updated], num_updates)


class LossScale:
    """Factor of the loss that keeps its gradients from vanishing in fp16; the optimizer divides the gradients by it.

    It is halved when a gradient is not finite, down to a floor at which the scale is not the cause, and doubled after
    `GROWTH_STEPS` steps with finite gradients.
    """

    GROWTH_STEPS, FLOOR = 2000, 1.0

    def __init__(self, value: float = 2.0**16, is_dynamic: bool = True):
        self.value, self.is_dynamic, self.good_steps = value, is_dynamic, 0

    def update(self, finite: bool) -> bool:
        """Adjust the scale after a step. Return whether it was halved."""
        if not self.is_dynamic:
            return False
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite and self.value > self.FLOOR:
            self.value = max(self.value / 2, self.FLOOR)
            return True
        if self.good_steps == self.GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
        return False

    def state(self) -> dict[str, float]:
        """Return what a checkpoint saves; empty for a precision without a loss scale."""
        return {"value": self.value, "good_steps": self.good_steps} if self.is_dynamic else {}

    def load(self, state: Mapping[str, float]) -> None:
        """Restore `state`, except from or into a precision without a loss scale."""
        if self.is_dynamic and state:
            self.value, self.good_steps = state["value"], int(state["good_steps"])


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """Return the factor of every group's learning rate at `step` (from 0): a linear warm-up, then `train.lr_schedule`."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps))
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_schedule == "linear" else 1.0
