"""One optimization step under DeepSpeed ZeRO, and the engine's state as named tensors.

With `train.precision` bf16 or fp16, the module has weights of that type, and the optimizer float32 copies of them. The state is
addressed by parameter, and its parts by their elements: any number of ranks at any ZeRO stage can load it.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from ray_platform.contracts import Task
from ray_platform.train import zero
from ray_platform.train.collective import collective
from ray_platform.train.config import TrainConfig
from ray_platform.train.optimizer import MOMENTS, STEP, WEIGHTS, AdamW, LossScale, Rewarm
from ray_platform.train.statistics import BlockGradients, activation_statistics
from ray_platform.train.tensor_parts import part_key
from ray_platform.train.zero import DataParallel, Fragment

TaskInputs = dict[str, torch.Tensor]
WeightedMetrics = dict[str, torch.Tensor]  # name -> [2]: weighted sum and weight


@dataclass(frozen=True)
class Update:
    """Result of an optimizer step, the same on all ranks."""

    updated: bool  # the weights were changed
    rescaled: bool  # they were not, but the loss scale of fp16 was halved
    grad_norm: float  # before clipping; NaN when a gradient is not finite
    block_norms: Mapping[str, torch.Tensor]  # see `BlockGradients`: scalars on the device; empty unless asked for


class Engine:
    """A Task's module and its optimizer, sharded over the ranks of the current process group."""

    def __init__(
        self, task: Task, config: TrainConfig, micro_batch_size: int, num_micro_batches: int, rewarm: Rewarm | None = None
    ):
        """`rewarm`: where the learning rates of a resumed run start to rise to their schedule."""
        self.task, self.config, self.rewarm = task, config, rewarm
        if config.activation_checkpointing:
            task.enable_activation_checkpointing()
        groups = task.parameter_groups()
        # DeepSpeed's ZeRO 3 takes weights of one type only.
        kept = [group for group in groups if group.get("float32") and config.zero_stage < 3]
        originals = convert_weights(task.module, kept, config.precision)
        self.adam = AdamW(groups, config)
        self.replicas: DataParallel | None = None
        self.engine: Any
        if config.zero_stage == 0:
            trained = [parameter for group in self.adam.param_groups for parameter in group["params"]]
            self.engine = self.replicas = DataParallel(task.module, trained, num_micro_batches, config.channels_last)
            # The optimizer updates the flat weights instead.
            for group, weights in zip(self.adam.param_groups, self.replicas.weights, strict=True):
                group["params"] = [weights.master]
        else:
            zero.clone_process_group(config.collective_timeout_s)
            self.engine, self.optimizer, _, _ = zero.import_deepspeed().initialize(
                model=task.module,
                optimizer=self.adam,
                config=deepspeed_config(config, micro_batch_size, num_micro_batches),
                dist_init_required=False,
            )
        if config.channels_last:  # only now: rank 0's weights are broadcast, which must be contiguous for that
            self._convert_frozen_to_channels_last()
        fragments = self._fragments()
        self.adam.init_state(fragments)
        names = {parameter: name for name, parameter in self.engine.module.named_parameters() if parameter.requires_grad}
        self.block_gradients = BlockGradients(fragments, names, is_sharded=config.zero_stage > 0)
        self.device = torch.device(self.engine.device)
        # In bf16, torch's flash attention for CPUs is several times slower than its plain kernels at small head widths.
        plain = self.device.type == "cpu" and config.precision == "bf16"
        self._attention_kernels = partial(sdpa_kernel, SDPBackend.MATH) if plain else contextlib.nullcontext
        self._frozen = self._load_originals(originals)  # frozen weights in half precision by name, without rounding
        self.loss_scale = LossScale() if config.precision == "fp16" else LossScale(1.0, is_dynamic=False)

    @collective
    def _load_originals(self, originals: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Give the optimizer the weights as they were before they were rounded, on every rank those of rank 0.

        Return those of the frozen parameters, on the CPU.
        """
        frozen = {}
        for name, parameter in self.engine.module.named_parameters():
            if name in originals:
                original = originals[name].to(self.device)
                torch.distributed.broadcast(original, 0)
                if parameter.requires_grad:
                    names = WEIGHTS, *self.config.ema_states
                    self.adam.load_parameter(parameter, dict.fromkeys(names, original))
                else:
                    frozen[name] = original.cpu()
        return frozen

    # --- a step ----------------------------------------------------------------------------------------------------------

    @collective
    def backward(
        self,
        micro_batches: Sequence[TaskInputs],
        seeds: Sequence[int],
        control: bool = False,
        statistics: bool = False,
        step: int = 0,
    ) -> tuple[torch.Tensor, WeightedMetrics]:
        """Run forward and backward of all micro-batches of a step, each with the seed of all its randomness.

        `control`: whether the Task also computes its control metrics, which cost additional operations. `statistics`: whether the
        metrics have the RMS of the activations of each block, which compiled blocks do not report. `step`: steps of the run
        before this one.

        Returns this rank's mean loss (scalar), and its metrics summed over the micro-batches.
        """
        micro_batches = [self._to_channels_last(inputs) for inputs in micro_batches]
        losses: list[torch.Tensor] = []
        metrics: WeightedMetrics = {}
        scale = self.loss_scale.value
        recording: contextlib.AbstractContextManager[WeightedMetrics] = contextlib.nullcontext({})
        if statistics:
            recording = activation_statistics(self.engine.module)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._attention_kernels())
            step_arguments = self.task.precompute_step_loss(micro_batches, seeds, control, step / self.config.num_steps)
            activations = stack.enter_context(recording)  # not of the pass before
            for inputs, seed, arguments in zip(micro_batches, seeds, step_arguments, strict=True):
                loss, parts = self.engine(inputs, seed, **arguments)
                self.engine.backward(loss * scale if scale != 1 else loss)
                if self.replicas is None and len(losses) < len(micro_batches) - 1:
                    self.engine.step()  # only counts the micro-batch; the step of the last one is in `update`
                losses.append(loss.detach())
                for name, value in parts.items():
                    metrics[name] = metrics[name] + value.detach() if name in metrics else value.detach()
        metrics |= {f"activations/{block}": value for block, value in activations.items()}
        return (torch.stack(losses).mean() if len(losses) > 1 else losses[0]), metrics

    @collective
    def update(self, step: int, skip: bool = False, statistics: bool = False) -> Update:
        """Clip the gradients and run the optimizer with the learning rates of `step`.

        The weights stay as they are with `skip`, or when a gradient is not finite on any rank. `statistics`: whether the result
        has the norm of the gradients of each block.
        """
        observe = self.block_gradients.add if statistics else None
        scale = self.loss_scale.value
        self.adam.set_learning_rates(step, self.rewarm)
        if _clips_itself(self.config):
            norm = self._gradient_norm()
            grad_norm = norm.item()  # the host waits for the accelerator
            finite = math.isfinite(grad_norm)
            divisor = norm / self.config.gradient_clipping if self.config.gradient_clipping else torch.zeros_like(norm)
            with self.adam.step_options(skip=skip or not finite, grad_scale=divisor.clamp(min=scale), observe=observe):
                if self.replicas is None:
                    self.engine.step()
                else:
                    self.replicas.update(self.adam)
        else:  # ZeRO clips, and skips the step when a gradient is not finite
            zero.set_clipping(self.optimizer, self.config.gradient_clipping * scale)
            # On the device of the weights, which may be offloaded: a copy from the accelerator would not be waited for.
            grad_scale = torch.full((), scale, device=self.adam.device) if scale != 1 else None
            with self.adam.step_options(skip=skip, grad_scale=grad_scale, observe=observe):
                self.engine.step()
            finite = not zero.has_overflowed(self.optimizer)
            grad_norm = float(self.engine.get_global_grad_norm()) if finite else math.nan
        self.adam.num_updates += finite and not skip
        rescaled = not skip and self.loss_scale.update(finite)
        block_norms = self.block_gradients.norms(self.device, scale) if statistics else {}
        return Update(finite and not skip, rescaled, grad_norm / scale if finite else math.nan, block_norms)

    def _gradient_norm(self) -> torch.Tensor:
        """Return the norm of the gradients over all ranks, times the loss scale: a scalar on the device."""
        if self.replicas is not None:
            return self.replicas.reduce_gradients()
        # Joined, so that the norm of gradients in half precision is a float32, which their squares need, in one kernel.
        joined = torch.cat([part.flatten() for part in zero.reduced_gradients(self.optimizer)])
        squared = torch.linalg.vector_norm(joined, dtype=torch.float32).square()
        torch.distributed.all_reduce(squared)
        return squared.sqrt()

    def learning_rates(self) -> dict[str, float]:
        """Return the current learning rate of each of the Task's parameter groups, by name."""
        return {group["name"]: group["lr"] for group in self.adam.optimizer.param_groups}

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """Switch the module to evaluation without gradients, and to the EMA that `train.eval_weights` names, if any.

        Compiled parts run as they are: other batch sizes and modes would compile all of them again in the middle of a run. All
        ranks enter and leave the block together, as ZeRO gathers the other weights.
        """
        self.engine.eval()
        if self.config.eval_state != WEIGHTS:
            self._swap_ema()
        try:
            with torch.no_grad(), torch.compiler.set_stance("force_eager") if self.config.compile else contextlib.nullcontext():
                yield
        finally:
            if self.config.eval_state != WEIGHTS:
                self._swap_ema()
            self.engine.train()

    @collective
    def _swap_ema(self) -> None:
        """Exchange the weights and their EMA, in the optimizer and in the module."""
        self.adam.swap_ema(self.config.eval_state)
        if self.replicas is not None:
            self.replicas.round_weights()
        elif self.config.zero_stage == 3:
            zero.load_zero_3_weights(self.optimizer, self._fragments())
        else:
            self.optimizer.update_lp_params()

    def _convert_frozen_to_channels_last(self) -> None:
        """Convert the frozen convolution weights, as `DataParallel` does with the trained ones."""
        for parameter in self.engine.module.parameters():
            if not parameter.requires_grad and parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def _to_channels_last(self, inputs: TaskInputs) -> TaskInputs:
        if not self.config.channels_last:
            return inputs
        return {n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for n, x in inputs.items()}

    # --- state -----------------------------------------------------------------------------------------------------------

    def local_state(self) -> Iterator[tuple[str, torch.Tensor, bool]]:
        """Yield (key of `tensor_parts.part_key`, tensor, whether all ranks hold the same) of all that this rank holds.

        That is its part of the weights, moments and EMA in float32, of the step counts, and of the buffers, which are yielded as
        weights. No rank waits for another one. A tensor is valid until the next step (`contiguous_on_cpu` copies).
        """
        for name, parameter in self.engine.module.named_parameters():
            shape, fragment = zero.full_shape(parameter), self._frozen_fragment(parameter)
            states = {WEIGHTS: self._frozen.get(name, parameter.detach())}
            if parameter.requires_grad:
                if (local := self.adam.local_state(parameter)) is None:
                    continue
                fragment, states = local
            elif fragment is not None:
                states = {WEIGHTS: fragment.shard}
            for state, tensor in states.items():
                if fragment is None or self.replicas is not None:
                    yield f"{state}/{name}", fragment.shaped(tensor) if fragment and state != STEP else tensor, True
                elif state == STEP and fragment.start == 0:
                    yield f"{state}/{name}", tensor, False
                elif state != STEP and (part := tensor[: max(0, shape.numel() - fragment.start)]).numel():
                    yield *part_key(f"{state}/{name}", shape, fragment.start, part), False
        for name, buffer in self._buffers():
            yield f"{WEIGHTS}/{name}", buffer, True

    @collective
    def load_state(self, num_updates: int, get: Callable[[str, torch.Size], torch.Tensor | None]) -> list[str]:
        """Load what `local_state` yielded on all ranks after `num_updates` changes of the weights. Return the missing names.

        `get` returns the tensor of a name and shape on every rank, or None; that tensor stays as it is, except for a missing EMA,
        which is initialized with the weights, and a missing step count: it is that of the run for a parameter with moments.
        """
        missing, steps = [], dict[torch.Tensor, int]()
        self.adam.num_updates = num_updates
        for name, parameter in self.engine.module.named_parameters():
            shape = zero.full_shape(parameter)
            weights = get(f"{WEIGHTS}/{name}", shape)
            if weights is None:
                missing.append(f"{WEIGHTS}/{name}")
                continue
            # The tensor that the module computes with; under ZeRO, the optimizer has a copy of its part.
            gathered = zero.whole_on_rank_0(parameter) if self.config.zero_stage == 3 else contextlib.nullcontext()
            with gathered, torch.no_grad():
                parameter.copy_(weights)
            if name in self._frozen:
                self._frozen[name].copy_(weights)
            if not parameter.requires_grad:
                continue
            states = {WEIGHTS: weights}
            for state in self.adam.state_names:
                value = get(f"{state}/{name}", shape)
                if value is None and state in MOMENTS:
                    missing.append(f"{state}/{name}")
                    continue
                states[state] = weights if value is None else value
            step = get(f"{STEP}/{name}", torch.Size())
            steps[parameter] = num_updates * (MOMENTS[0] in states) if step is None else int(step)
            self.adam.load_parameter(parameter, states)
        self.adam.load_steps(steps)
        for name, buffer in self._buffers():
            if (value := get(f"{WEIGHTS}/{name}", buffer.shape)) is not None:
                buffer.copy_(value)
        return missing

    def _buffers(self) -> list[tuple[str, torch.Tensor]]:
        parameters = {name for name, _ in self.engine.module.named_parameters()}
        return [(name, buffer) for name, buffer in self.engine.module.state_dict().items() if name not in parameters]

    def _fragments(self) -> list[Fragment]:
        """Return what the optimizer updates on this rank."""
        rank, parameters = torch.distributed.get_rank(), [p for p in self.engine.module.parameters() if p.requires_grad]
        if self.config.zero_stage == 3:
            return zero.zero_3_fragments(self.optimizer, parameters, rank)
        if self.replicas is None:
            return zero.zero_1_and_2_fragments(self.optimizer, rank)
        return [fragment for weights in self.replicas.weights for fragment in weights.fragments]

    def _frozen_fragment(self, parameter: torch.nn.Parameter) -> Fragment | None:
        """Return this rank's part of a frozen parameter under ZeRO 3; None for one that all ranks hold."""
        if self.config.zero_stage < 3 or parameter.requires_grad or self._frozen:
            return None
        return zero.partition(parameter, torch.distributed.get_rank())


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


def _clips_itself(config: TrainConfig) -> bool:
    """Return whether the engine computes the norm of the gradients. For DeepSpeed's, the host starts a kernel per tensor."""
    return config.zero_stage < 3 and not config.offload_optimizer


def deepspeed_config(config: TrainConfig, micro_batch_size: int, num_micro_batches: int) -> Mapping[str, Any]:
    """Return DeepSpeed's configuration, generated from `config` and extended by `train.deepspeed`.

    Its own `bf16` and `fp16` stay off: they would convert all weights, and keep another loss scale.
    """
    has_gpu = torch.cuda.is_available()
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": has_gpu}} if config.offload_optimizer else {}
    clips_itself = _clips_itself(config)
    # Where communication overlaps the backward pass, the host waits for both at its end. ZeRO 1 sums its gradients once, without
    # hooks of every parameter.
    gradients = {"overlap_comm": has_gpu and config.zero_stage > 1, "contiguous_gradients": config.zero_stage > 1}
    zero_options = {"stage": config.zero_stage, **gradients, **offload}
    generated = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": 0.0 if clips_itself else config.gradient_clipping,
        "zero_optimization": zero_options | ({"compute_grad_norm": False} if clips_itself else {}),
        "fp16": {"enabled": False, "loss_scale": 1.0},
        "communication_data_type": config.precision,
        # The sum of many small gradients would lose them in half precision.
        "data_types": {"grad_accum_dtype": "fp32" if num_micro_batches > 1 else config.precision},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW has a CPU kernel, too
        "steps_per_print": 10**9,  # DriverMonitor prints the progress
    }
    return _merged(generated, config.deepspeed)


def _merged(base: Any, changes: Any) -> Any:
    """Return `changes` on top of `base`, merging mappings at every level."""
    if not (isinstance(base, Mapping) and isinstance(changes, Mapping)):
        return changes
    return {**base, **{name: _merged(base.get(name), value) for name, value in changes.items()}}
