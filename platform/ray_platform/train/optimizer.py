"""AdamW with an EMA of the weights, the loss scale of fp16 and the learning-rate schedule."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim.optimizer import ParamsT
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ray_platform.train.config import TrainConfig, width_state
from ray_platform.train.posthoc_ema import power_decay_at
from ray_platform.train.zero import Fragment

WEIGHTS = "weights"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"  # number of updates of a parameter's moments: fewer than the run's for a parameter that was frozen at first

_SWAP_SIZE = 2**24  # elements that `AdamW.swap_ema` exchanges at a time


def ema_decay_at(decay: float, num_updates: int) -> float:
    """Return the EMA decay at an update: small at first, so that the initial weights are soon forgotten."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def _decay_at(state: str, value: float, num_updates: int) -> float:
    """Return the decay of an EMA of `TrainConfig.ema_states` at an update."""
    return power_decay_at(value, num_updates) if state == width_state(value) else ema_decay_at(value, num_updates)


class AdamW(torch.optim.AdamW):
    """torch's AdamW by the Task's groups on flat float32 shards, with moving averages (EMA) of the weights.

    ema_n = ema_{n-1} + (1 - d_n) (w_n - ema_{n-1}), from ema_0 = the initial weights, with d_n = `ema_decay_at(decay, n)`
    or, for a width, `power_decay_at(width, n)`.
    The shards have the float32 weights, also of a module in half precision. EMA and moments are sharded and offloaded with them.

    DeepSpeed sees one group of parameters per data type, because it communicates per group. `optimizer` has the Task's groups.
    Its tensors are runs of neighboring fragments with equal step counts, as one call for a long tensor is faster than many for
    short ones. A parameter that is trained later than the others has a step count of its own, which starts at 0, as its moments
    do.

    With `train.optimizer` adamw_8bit, the moments are 8-bit codes (`adamw_8bit.QuantizedTensor`) between steps. They are float32
    while a state is loaded, and in checkpoints: the same ranks get the same codes again.
    """

    def __init__(self, groups: ParamsT, config: TrainConfig):
        """`groups` of the Task, with their parameters in the data types of the module."""
        self.groups: list[Any] = list(groups)
        by_type: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in (p for group in self.groups for p in group["params"]):
            by_type.setdefault(parameter.dtype, []).append(parameter)
        super().__init__([{"params": parameters} for parameters in by_type.values()], fused=True)
        self.config = config
        self.num_updates = 0  # steps that changed the weights
        self.optimizer: Any  # torch's AdamW or an `AdamW8bit`
        self._fragments: dict[torch.Tensor, Fragment] = {}  # by parameter
        self._states: dict[torch.Tensor, dict[str, torch.Tensor]] = {}  # by shard, of its shape
        self._steps: dict[torch.Tensor, torch.Tensor] = {}  # by parameter; scalars, which the parameters of a run share
        self._runs: dict[torch.Tensor, list[tuple[Fragment, torch.Tensor]]] = {}  # by shard, with the tensors of `optimizer`
        self._is_quantized = False  # the moments are in `optimizer` instead of `_states`
        self._skip = False
        self._grad_scale: torch.Tensor | None = None
        self._observe: Callable[[torch.Tensor], None] | None = None

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the state tensors that have the shape of their parameter."""
        return *MOMENTS, *self.config.ema_states

    def init_state(self, fragments: Sequence[Fragment]) -> None:
        """Create the state of all that this rank updates."""
        self._fragments = {fragment.parameter: fragment for fragment in fragments}
        for shard in {fragment.shard for fragment in fragments}:
            self._states[shard] = {name: torch.zeros_like(shard) for name in MOMENTS}
            self._states[shard] |= {name: shard.detach().clone() for name in self.config.ema_states}
        self._build(dict.fromkeys(self._fragments, 0))

    def _build(self, steps: Mapping[torch.Tensor, int]) -> None:
        """Build `optimizer` over the runs of fragments that have the same group and step count."""
        self._dequantize()
        in_8_bits = self.config.optimizer == "adamw_8bit"
        self._runs, groups, run_steps = {}, [], {}
        for group in self.groups:
            runs: list[tuple[Fragment, list[torch.Tensor]]] = []  # a fragment that covers the whole run, and its parameters
            for parameter in (p for p in group["params"] if p in self._fragments):
                fragment = self._fragments[parameter]
                if runs and runs[-1][0].touches(fragment) and steps[runs[-1][1][0]] == steps[parameter]:
                    longer = replace(runs[-1][0], size=runs[-1][0].size + fragment.size)
                    runs[-1] = longer, [*runs[-1][1], parameter]
                else:
                    runs.append((fragment, [parameter]))
            tensors = []
            for run, parameters in runs:
                tensors.append(run.of_shard(run.shard))
                run_steps[tensors[-1]] = torch.full(
                    (), float(steps[parameters[0]]), device="cpu" if in_8_bits else run.shard.device
                )
                self._steps |= dict.fromkeys(parameters, run_steps[tensors[-1]])
                self._runs.setdefault(run.shard, []).append((run, tensors[-1]))
            groups.append({**group, "params": tensors})
        betas, eps = self.config.betas, self.config.eps
        if in_8_bits:
            from ray_platform.train.adamw_8bit import AdamW8bit  # needs bitsandbytes

            self.optimizer = AdamW8bit(groups, betas, eps)
        else:
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
        for shard, of_shard in self._runs.items():
            for run, tensor in of_shard:
                states = {name: run.of_shard(state) for name, state in self._states[shard].items()}
                self.optimizer.state[tensor] = {STEP: run_steps[tensor]} | states
        if in_8_bits:
            self._quantize()

    def _quantize(self) -> None:
        """Move the moments from float32 tensors to codes."""
        from ray_platform.train.adamw_8bit import QuantizedTensor

        for shard, runs in self._runs.items():
            for name in MOMENTS:
                for _, tensor in runs:
                    state = self.optimizer.state[tensor]
                    state[name] = QuantizedTensor.of(state[name], signed=name == MOMENTS[0])
                del self._states[shard][name]
        self._is_quantized = True

    def _dequantize(self) -> None:
        """Move the moments back to float32 tensors, which `_build` moves to codes again."""
        for shard, runs in self._runs.items() if self._is_quantized else ():
            for name in MOMENTS:
                self._states[shard][name] = torch.zeros_like(shard)
                for run, tensor in runs:
                    run.of_shard(self._states[shard][name]).copy_(self.optimizer.state[tensor][name].part(0, run.size))
        self._is_quantized = False

    def set_learning_rates(self, step: int, rewarm: "Rewarm | None") -> None:
        """Set the rate of each group to that of the Task times its factor at a step."""
        for group, initial in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = initial["lr"] * learning_rate_factor(self.config, step, rewarm, initial["name"])

    def local_state(self, parameter: torch.nn.Parameter) -> tuple[Fragment, dict[str, torch.Tensor]] | None:
        """Return this rank's range of a trained parameter, and weights and states by name; None when it holds nothing of it."""
        if (fragment := self._fragments.get(parameter)) is None:
            return None
        shard, states = fragment.shard, {STEP: self._steps[parameter]}
        states |= {name: fragment.of_shard(state) for name, state in ({WEIGHTS: shard} | self._states[shard]).items()}
        if self._is_quantized:
            run, tensor = next(pair for pair in self._runs[shard] if pair[0].contains(fragment))
            moments = {name: self.optimizer.state[tensor][name] for name in MOMENTS}
            states |= {name: moment.part(fragment.offset - run.offset, fragment.size) for name, moment in moments.items()}
        return fragment, states

    @torch.no_grad()
    def load_parameter(self, parameter: torch.nn.Parameter, states: Mapping[str, torch.Tensor]) -> None:
        """Set weights and states from tensors of the parameter's shape; states that are not given stay as they are.

        `load_steps` must follow, for moments of 8 bits.
        """
        if not states.keys().isdisjoint(MOMENTS):
            self._dequantize()
        if (local := self.local_state(parameter)) is not None:
            fragment, own = local
            for name, value in states.items():
                own[name].copy_(fragment.of_parameter(value))

    def load_steps(self, steps: Mapping[torch.Tensor, int]) -> None:
        """Set the step counts of parameters of which this rank has a part; those that are not given stay as they are."""
        self._build({parameter: int(steps.get(parameter, own)) for parameter, own in self._steps.items()})

    @torch.no_grad()
    def swap_ema(self, state: str) -> None:
        """Exchange the weights and an EMA of them, in parts, so that no third copy is in memory."""
        for shard, states in self._states.items():
            for weights, ema in zip(shard.split(_SWAP_SIZE), states[state].split(_SWAP_SIZE), strict=True):
                kept = weights.clone()
                weights.copy_(ema)
                ema.copy_(kept)

    @property
    def device(self) -> torch.device:
        """Device of the weights that are updated, which may be offloaded."""
        return next((shard.device for shard in self._states), torch.device("cpu"))

    @contextlib.contextmanager
    def step_options(
        self, *, skip: bool, grad_scale: torch.Tensor | None, observe: Callable[[torch.Tensor], None] | None
    ) -> Iterator[None]:
        """Have the `step` that DeepSpeed calls inside this block change nothing, or divide the gradients by a scalar.

        `observe` is called with every shard before it is updated.
        """
        self._skip, self._grad_scale, self._observe = skip, grad_scale, observe
        try:
            yield
        finally:
            self._skip, self._grad_scale, self._observe = False, None, None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the shards that have a gradient. ZeRO calls it once per data type, ZeRO 3 once per part of its shards."""
        if self._skip:
            return
        shards = [shard for group in self.param_groups for shard in group["params"] if shard.grad is not None]
        for shard in shards if self._observe else ():
            self._observe(shard)  # type: ignore[misc]
        updated = [run for shard in shards for run in self._runs.get(shard, ())]
        for run, tensor in updated:
            tensor.grad = run.of_shard(run.shard.grad)  # type: ignore[arg-type]
        # torch's fused kernels divide the gradients by it, as for torch.amp.GradScaler.
        self.optimizer.grad_scale = self._grad_scale
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            for tensor in group["params"] if "max_value" in group else ():
                tensor.clamp_(max=group["max_value"])
        tensors = [tensor.detach() for _, tensor in updated]
        for state, value in self.config.ema_states.items() if updated else ():
            average = get_ema_multi_avg_fn(_decay_at(state, value, self.num_updates + 1))
            average([self.optimizer.state[tensor][state] for _, tensor in updated], tensors, self.num_updates + 1)
        for _, tensor in updated:
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
    """Where a run that resumed with another schedule or other peaks starts to raise its learning rates to those."""

    step: int  # the first one with the new schedule
    factor: float  # of the schedule in the step before
    factors: dict[str, float] = field(default_factory=dict)  # by group: rate in the step before / new peak


def learning_rate_factor(config: TrainConfig, step: int, rewarm: Rewarm | None = None, group: str = "") -> float:
    """Return the factor of a group's learning rate at `step` (from 0), relative to its peak.

    It is a linear warm-up, then `train.lr_schedule`; from `rewarm.step` on, it moves linearly from that of the step before to the
    schedule, in `train.rewarm_steps`.
    """
    factor = _schedule_factor(config, step)
    if rewarm is None or step >= rewarm.step + config.rewarm_steps:
        return factor
    start = rewarm.factors.get(group, rewarm.factor)
    return start + (factor - start) * (step - rewarm.step + 1) / config.rewarm_steps


def _schedule_factor(config: TrainConfig, step: int) -> float:
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return 1.0
    start = config.num_steps - config.cooldown_steps if config.lr_schedule == "wsd" else config.warmup_steps
    progress = min(1.0, max(0, step - start) / max(1, config.num_steps - start))
    decayed = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "wsd": 1 - math.sqrt(progress),  # better than linear (Hägele et al. 2024)
    }[config.lr_schedule]
    return config.min_lr_factor + (1 - config.min_lr_factor) * decayed
