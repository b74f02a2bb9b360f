"""AdamW with an EMA of the weights, the loss scale of fp16 and the learning-rate schedule."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ray_platform.train.config import TrainConfig

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
EMA = "ema"
STEP = "step"  # number of updates of a parameter's moments: fewer than the run's for a parameter that was frozen at first


def ema_decay_at(decay: float, num_updates: int) -> float:
    """Return the EMA decay at an update: small at first, so that the initial weights are soon forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part of a parameter that this rank updates: all of it without ZeRO, otherwise a range of its elements."""

    parameter: torch.nn.Parameter  # of the module
    start: int  # first element in the flattened parameter
    shard: torch.Tensor  # what DeepSpeed passes to the optimizer; under ZeRO, many fragments one after the other
    offset: int = 0  # first element in the shard
    size: int = -1  # number of elements, which may include padding behind those of the parameter; -1: all of the shard

    @property
    def is_whole(self) -> bool:
        """Return whether the shard is the parameter itself."""
        return self.size < 0

    def of_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of `tensor`, which has the shape of the shard, that belongs to this fragment."""
        return tensor if self.is_whole else tensor.detach().narrow(0, self.offset, self.size)

    def of_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this fragment's part of `tensor`, which has the shape of the parameter, zero-padded."""
        if self.is_whole:
            return tensor
        part = tensor.flatten()[self.start :][: self.size]
        return torch.nn.functional.pad(part, (0, self.size - part.numel()))


class AdamW(torch.optim.AdamW):
    """torch's AdamW per parameter, also where ZeRO passes flat shards, with an exponential moving average (EMA) of the weights.

    ema_n = ema_{n-1} + (1 - d_n) (w_n - ema_{n-1}), from ema_0 = the initial weights, with d_n = `ema_decay_at(decay, n)`.
    Under ZeRO the weights are float32 shards, so the EMA is sharded, offloaded and float32, like the moments.

    DeepSpeed sees one group of parameters, because it communicates per group. `optimizer` has the Task's groups, and one tensor
    and one step count per parameter: those of a parameter that is trained later than the others start at 0, as its moments do.
    """

    def __init__(self, groups: ParamsT, ema_decay: float):
        """`ema_decay` 0: no EMA."""
        self.groups: list[Any] = list(groups)
        super().__init__([p for group in self.groups for p in group["params"]], fused=True)
        self.ema_decay = ema_decay
        self.num_updates = 0  # steps that changed the weights
        self.optimizer: torch.optim.AdamW
        self.fragments: dict[torch.Tensor, list[tuple[Fragment, torch.Tensor]]] = {}  # by shard, with the tensor to update
        self._tensors: dict[torch.nn.Parameter, tuple[Fragment, torch.Tensor]] = {}
        self._skip = False
        self._grad_scale: torch.Tensor | None = None

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state tensors that have the shape of their parameter."""
        return (*MOMENTS, EMA) if self.ema_decay else MOMENTS

    def init_state(self, fragments: Sequence[Fragment]) -> None:
        """Create the state of all that this rank updates."""
        self._tensors = {fragment.parameter: (fragment, fragment.of_shard(fragment.shard)) for fragment in fragments}
        for fragment, tensor in self._tensors.values():
            self.fragments.setdefault(fragment.shard, []).append((fragment, tensor))
        groups = [
            {**group, "params": [self._tensors[p][1] for p in group["params"] if p in self._tensors]} for group in self.groups
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=True)
        for _, tensor in self._tensors.values():
            state = {STEP: torch.zeros((), device=tensor.device)} | {name: torch.zeros_like(tensor) for name in MOMENTS}
            self.optimizer.state[tensor] = state | ({EMA: tensor.detach().clone()} if self.ema_decay else {})

    def set_learning_rates(self, factor: float) -> None:
        """Set the rate of each group to `factor` times that of the Task."""
        for group, initial in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = initial["lr"] * factor

    def local_state(self, parameter: torch.nn.Parameter) -> tuple[Fragment, dict[str, torch.Tensor]] | None:
        """Return this rank's range of a trained parameter, and weights and states by name; None when it holds nothing of it."""
        if parameter not in self._tensors:
            return None
        fragment, tensor = self._tensors[parameter]
        return fragment, {WEIGHTS: tensor, **self.optimizer.state[tensor]}

    @torch.no_grad()
    def load_parameter(self, parameter: torch.nn.Parameter, states: Mapping[str, torch.Tensor], step: torch.Tensor | int) -> None:
        """Set the states of `local_state` from tensors of the parameter's shape; states that are not given stay as they are."""
        if (local := self.local_state(parameter)) is not None:
            fragment, own = local
            own[STEP].fill_(step)
            for name, value in states.items():
                own[name].copy_(fragment.of_parameter(value))

    @property
    def device(self) -> torch.device:
        """Device of the weights that are updated, which may be offloaded."""
        return next((tensor.device for _, tensor in self._tensors.values()), torch.device("cpu"))

    @contextlib.contextmanager
    def step_options(self, *, skip: bool, grad_scale: torch.Tensor | None) -> Iterator[None]:
        """Have the `step` that DeepSpeed calls inside this block change nothing, or divide the gradients by a scalar."""
        self._skip, self._grad_scale = skip, grad_scale
        try:
            yield
        finally:
            self._skip, self._grad_scale = False, None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self._skip:
            return
        # ZeRO 3 calls once per part of its shards.
        shards = [shard for group in self.param_groups for shard in group["params"] if shard.grad is not None]
        updated = [pair for shard in shards for pair in self.fragments.get(shard, ())]
        for fragment, tensor in updated:
            if fragment.shard.grad is not None:
                tensor.grad = fragment.of_shard(fragment.shard.grad)
        # torch's fused kernels divide the gradients by it, as for torch.amp.GradScaler.
        self.optimizer.grad_scale = self._grad_scale  # type: ignore[attr-defined]
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            for tensor in group["params"] if "max_value" in group else ():
                tensor.clamp_(max=group["max_value"])
        if updated and self.ema_decay:
            average = get_ema_multi_avg_fn(ema_decay_at(self.ema_decay, self.num_updates + 1))
            tensors = [tensor.detach() for _, tensor in updated]
            average([self.optimizer.state[tensor][EMA] for _, tensor in updated], tensors, self.num_updates + 1)
        for fragment, tensor in updated:
            if tensor is not fragment.shard:
                tensor.grad = None


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


@dataclass(frozen=True)
class Rewarm:
    """Where a run that resumed with another schedule starts to raise its learning rate to that schedule."""

    step: int  # the first one with the new schedule
    factor: float  # of the learning rates in the step before


def learning_rate_factor(config: TrainConfig, step: int, rewarm: Rewarm | None = None) -> float:
    """Return the factor of every group's learning rate at `step` (from 0).

    It is a linear warm-up, then `train.lr_schedule`; from `rewarm.step` on, it moves linearly from `rewarm.factor` to that, in
    `train.rewarm_steps`.
    """
    factor = _schedule_factor(config, step)
    if rewarm is None or step >= rewarm.step + config.rewarm_steps:
        return factor
    return rewarm.factor + (factor - rewarm.factor) * (step - rewarm.step + 1) / config.rewarm_steps


def _schedule_factor(config: TrainConfig, step: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps))
    if config.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1.0 - progress if config.lr_schedule == "linear" else 1.0
