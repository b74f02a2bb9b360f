"""One optimisation step under DeepSpeed ZeRO, and its whole state as named tensors. Nothing else imports deepspeed.

The state is told apart by parameter, not by rank: whatever wrote it, any number of ranks at any ZeRO stage can take it.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, at deepspeed's import

import deepspeed
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from ray_platform.contracts import Task
from ray_platform.train.config import TrainConfig
from ray_platform.train.optimizer import EMA, AdamW

# DeepSpeed asks this table for an operation of inference alone, which it would compile on every CPU host that trains for the
# first time: half a minute, for which a host needs a compiler. A process that is killed meanwhile leaves a lock, and whatever
# trains there next waits for ever. The table's own way to be filled starts compilers, too.
deepspeed.ops.__compatible_ops__ = {}

WEIGHTS = "weights"  # state name; the others are the optimizer's
Inputs = dict[str, torch.Tensor]
Metrics = dict[str, torch.Tensor]


class Engine:
    """A Task's module and its optimizer, sharded over the ranks of the current process group."""

    def __init__(self, task: Task, config: TrainConfig, micro_batch_size: int, num_micro_batches: int):
        self.task, self.config = task, config
        if config.activation_checkpointing:
            task.enable_activation_checkpointing()
        groups = task.parameter_groups()
        self.base_rates = [group["lr"] for group in groups]
        self.adam = AdamW(groups, config.ema_decay)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=task.module,
            optimizer=self.adam,
            config=deepspeed_config(config, micro_batch_size, num_micro_batches),
            dist_init_required=False,
        )
        if config.channels_last:
            self._lay_out_channels_last()
        self.adam.begin(self._shards())
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):  # ZeRO 1 and 2
            self.optimizer._lazy_init_hp_params_optimizer_state()
        self.device = torch.device(self.engine.device)
        self.num_micro_batches = num_micro_batches
        self.grad_norm = float("nan")  # before clipping, of the last step
        self.scale = LossScale() if config.precision == "fp16" else LossScale(1.0, growing=False)
        self.rescaled = False  # the last step changed nothing, but found a smaller loss scale
        task.module.forward = self._in_precision(task.module.forward)

    # --- a step ----------------------------------------------------------------------------------------------------------

    def backward(self, micro_batches: Sequence[Inputs], seeds: Sequence[int]) -> tuple[torch.Tensor, Metrics]:
        """Forward and backward of all micro-batches of a step: this rank's mean loss (scalar), and its metrics summed."""
        micro_batches = [self._placed(inputs) for inputs in micro_batches]
        more = self.task.precompute_step_loss(micro_batches, seeds)
        losses: list[torch.Tensor] = []
        metrics: Metrics = {}
        for inputs, seed, extra in zip(micro_batches, seeds, more, strict=True):
            loss, parts = self.engine(inputs, seed, **extra)
            self.engine.backward(loss * self.scale.value)
            if len(losses) < len(micro_batches) - 1:
                self.engine.step()  # counts the micro-batch; the last one's is `update`
            losses.append(loss.detach())
            for name, value in parts.items():
                metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
        return torch.stack(losses).mean(), metrics

    def update(self, step: int, skip: bool = False) -> bool:
        """Clip, and take the optimizer's step at the rates of `step`. Returns whether the weights were changed.

        They are not where `skip` says so, or where a gradient is not finite on any rank.
        """
        factor = rate_factor(self.config)(step)
        for group, rate in zip(self.adam.param_groups, self.base_rates, strict=True):
            group["lr"] = rate * factor
        scale, self.adam.grad_scale = self.scale.value, None
        if scale != 1:  # beside the shards, which may be offloaded: a copy from the accelerator would not be waited for
            self.adam.grad_scale = torch.tensor(scale, device=self._shards()[0].device)
        finite = True
        if self.config.zero_stage == 0:  # the other stages clip, and look whether all is finite, themselves
            trained = [parameter for parameter in self.engine.module.parameters() if parameter.grad is not None]
            norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
            finite = bool(torch.isfinite(norm))
            if self.config.gradient_clipping:
                torch.nn.utils.clip_grads_with_norm_(trained, self.config.gradient_clipping * scale, norm)
        else:
            self.optimizer.clip_grad = self.config.gradient_clipping * scale
        self.adam.skip = skip or not finite
        self.engine.step()
        if self.config.zero_stage:
            finite, norm = not self.optimizer.overflow, self.engine.get_global_grad_norm()
        self.grad_norm = float(norm) / scale if finite and norm is not None else float("nan")
        self.rescaled = not skip and self.scale.update(finite)
        return finite and not skip

    def learning_rates(self) -> dict[str, float]:
        """By the name of the Task's parameter group."""
        return {group["name"]: group["lr"] for group in self.adam.param_groups}

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Around calls of the Task that need no gradient."""
        self.engine.eval()
        try:
            with torch.no_grad(), self._autocast():
                yield
        finally:
            self.engine.train()

    def compile(self) -> None:
        """Have torch compile the module from its next call on."""
        self.engine.compile()

    def _autocast(self) -> Any:
        """Parameters stay float32 (their casts are cached within a pass), so norms, losses and schedules keep their precision.

        A new one for each use: one that is entered within itself forgets what was before, and stays on.
        """
        dtype = torch.float16 if self.config.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.config.precision != "fp32")

    def _in_precision(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*arguments: Any, **more: Any) -> Any:
            with self._autocast():
                return forward(*arguments, **more)

        return run

    def _lay_out_channels_last(self) -> None:
        """Weights, but for those that ZeRO holds in flat memory: with such inputs, convolutions convert these as they use them.

        Not before DeepSpeed has sent rank 0's to all: it takes no other layout than the plain one.
        """
        for parameter in self.engine.module.parameters():
            whole = self.config.zero_stage == 0 or (self.config.zero_stage < 3 and not parameter.requires_grad)
            if whole and parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def _placed(self, inputs: Inputs) -> Inputs:
        if not self.config.channels_last:
            return inputs
        return {n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in inputs.items()}

    # --- its state -------------------------------------------------------------------------------------------------------

    def state(self, names: Sequence[str] = ()) -> Iterator[tuple[str, torch.Tensor]]:
        """(`<state name>/<parameter>`, the whole tensor) of weights, moments and EMA in float32, or of `names` alone; and the
        buffers. Every rank must go through all of it; all see the same tensors, one at a time. `copied` makes one's own of them.
        """
        names = names or (WEIGHTS, *self.adam.state_names)
        for parameter_name, parameter in self.engine.module.named_parameters():
            for name in (WEIGHTS,) if not parameter.requires_grad else names:
                yield f"{name}/{parameter_name}", self._get(parameter, name)
        trained = {name for name, _ in self.engine.module.named_parameters()}
        for buffer_name, buffer in self.engine.module.state_dict().items():
            if buffer_name not in trained:
                yield f"{WEIGHTS}/{buffer_name}", buffer

    def weights(self) -> dict[str, torch.Tensor] | None:
        """What a user would take: the EMA where there is one, else the weights; whole, on rank 0's CPU, None elsewhere.

        Every rank must call it.
        """
        keep = torch.distributed.get_rank() == 0
        best = EMA if self.config.ema_decay else WEIGHTS
        whole = {}
        for name, tensor in self.state((best,)):
            if keep:
                whole[name.partition("/")[2]] = copied(tensor)
        return whole if keep else None

    def load_state(self, num_updates: int, get: Callable[[str, torch.Size], torch.Tensor | None]) -> list[str]:
        """The inverse of `state`: `get(name, shape)` gives each tensor, on every rank, or None for one that it lacks.

        Returns the names of those that it lacked. An EMA that it lacks begins with the weights.
        """
        lacking = []
        self.adam.num_updates = num_updates
        for parameter_name, parameter in self.engine.module.named_parameters():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            weights = get(f"{WEIGHTS}/{parameter_name}", shape)
            if weights is None:
                lacking.append(f"{WEIGHTS}/{parameter_name}")
                continue
            self._set(parameter, WEIGHTS, weights)
            for name in self.adam.state_names if parameter.requires_grad else ():
                value = get(f"{name}/{parameter_name}", shape)
                if value is None and name != EMA:
                    lacking.append(f"{name}/{parameter_name}")
                    continue
                self._set(parameter, name, weights if value is None else value)
        if hasattr(self.optimizer, "update_lp_params"):
            self.optimizer.update_lp_params()
        self._load_buffers(get)
        return lacking

    def _load_buffers(self, get: Callable[[str, torch.Size], torch.Tensor | None]) -> None:
        known = {name for name, _ in self.engine.module.named_parameters()}
        for name, buffer in self.engine.module.state_dict().items():
            if name not in known and (value := get(f"{WEIGHTS}/{name}", buffer.shape)) is not None:
                buffer.copy_(value)

    def _shards(self) -> list[torch.Tensor]:
        """What the optimizer updates on this rank."""
        if self.config.zero_stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [parameter for group in self.adam.param_groups for parameter in group["params"]]

    def _get(self, parameter: torch.nn.Parameter, name: str) -> torch.Tensor:
        if self.config.zero_stage and parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter) if name == WEIGHTS else safe_get_full_optimizer_state(parameter, name)
            return whole.detach()
        if name != WEIGHTS:
            return self.adam.state[parameter][name]
        with deepspeed.zero.GatheredParameters([parameter], enabled=self.config.zero_stage == 3):
            return parameter.detach().float().clone()

    def _set(self, parameter: Any, name: str, value: torch.Tensor) -> None:
        value = value.to(self.device)
        if self.config.zero_stage == 3 and parameter.requires_grad:
            # By this rank's part: for a size that the number of ranks does not divide, DeepSpeed's call with the whole fails.
            size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
            padded = F.pad(value.flatten(), (0, size * torch.distributed.get_world_size() - value.numel()))
            part = padded[rank * size :][:size]
            if name == WEIGHTS:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, name)
        elif self.config.zero_stage and parameter.requires_grad:
            if name == WEIGHTS:
                safe_set_full_fp32_param(parameter, value)
            else:
                safe_set_full_optimizer_state(parameter, value, name)
        elif name != WEIGHTS:
            self.adam.state[parameter][name].copy_(value)
        if name == WEIGHTS:  # and what the module computes with
            gathered = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self.config.zero_stage == 3)
            with gathered, torch.no_grad():
                parameter.copy_(value)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, and contiguous, as safetensors wants it: a convolution's weights may be laid out channels last."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


class LossScale:
    """What a loss is multiplied by, so that its gradients do not vanish in half precision; the optimizer divides them again.

    Halved where a gradient is not finite, down to a floor: there, it is not the scale that makes it so. Doubled after so many
    steps where all were finite.
    """

    GROWTH_STEPS, FLOOR = 2000, 1.0

    def __init__(self, value: float = 2.0**16, growing: bool = True):
        self.value, self.growing, self.good_steps = value, growing, 0

    def update(self, finite: bool) -> bool:
        """Returns whether it was made smaller."""
        if not self.growing:
            return False
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite and self.value > self.FLOOR:
            self.value = max(self.value / 2, self.FLOOR)
            return True
        if self.good_steps == self.GROWTH_STEPS:
            self.value, self.good_steps = self.value * 2, 0
        return False

    def state(self) -> dict[str, float]:
        """Empty for a precision that needs none."""
        return {"value": self.value, "good_steps": self.good_steps} if self.growing else {}

    def load(self, state: Mapping[str, float]) -> None:
        """From a checkpoint, of another precision perhaps: that says nothing about the scale that this one needs."""
        if self.growing and state:
            self.value, self.good_steps = state["value"], int(state["good_steps"])


def rate_factor(config: TrainConfig) -> Callable[[int], float]:
    """What each group's rate is multiplied by at a step (the first is 0): a linear warm-up, then the schedule."""

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        progress = min(1.0, (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps))
        if config.lr_schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0 - progress if config.lr_schedule == "linear" else 1.0

    return factor


def deepspeed_config(config: TrainConfig, micro_batch_size: int, num_micro_batches: int) -> dict[str, Any]:
    """DeepSpeed's own configuration: generated from ours, extended by `train.deepspeed`."""
    zero: dict[str, Any] = {"stage": config.zero_stage, "overlap_comm": torch.cuda.is_available()}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    generated = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": config.gradient_clipping if config.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # ours is torch's fused AdamW, which has a kernel for CPUs too
        "steps_per_print": 10**9,  # our own progress line says it
    }
    return _merged(generated, config.deepspeed)


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
