"""What each rank holds under ZeRO: `DataParallel` is stage 0, without DeepSpeed, and the functions below are stages 1 to 3.

The latter have DeepSpeed's import and all uses of its undocumented attributes; test_engine.py fails when a new version changes
them. Their `optimizer` is the wrapper that `deepspeed.initialize` returns.
"""

import functools
import logging
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ray_platform.train.collective import collective


@dataclass(frozen=True, eq=False)
class Fragment:
    """The part of a parameter that this rank updates: a range of its elements, as they lie in memory."""

    parameter: torch.nn.Parameter  # of the module
    start: int  # first element in the flattened parameter
    shard: torch.Tensor  # flat float32 tensor that the optimizer updates, with many fragments one after the other
    offset: int  # first element in the shard
    size: int  # number of elements, which may include padding behind those of the parameter
    channels_last: bool = False  # the elements of an image filter [O, I, h, w] lie in the order (O, h, w, I)

    def touches(self, other: "Fragment") -> bool:
        """Return whether `other` follows in the same shard."""
        return self.shard is other.shard and other.offset == self.offset + self.size

    def contains(self, other: "Fragment") -> bool:
        """Return whether `other` is a part of this range of the same shard."""
        return self.offset <= other.offset < self.offset + self.size

    def of_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the view of `tensor`, which has the shape of the shard, that belongs to this fragment."""
        return tensor.detach().narrow(0, self.offset, self.size)

    def of_parameter(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return this fragment's part of `tensor`, which has the shape of the parameter, zero-padded."""
        part = _flatten(tensor, self.channels_last)[self.start :][: self.size]
        return torch.nn.functional.pad(part, (0, self.size - part.numel()))

    def shaped(self, elements: torch.Tensor) -> torch.Tensor:
        """Return a view, with the parameter's shape, of all of its elements."""
        shape = self.parameter.shape
        if not self.channels_last:
            return elements.view(shape)
        return elements.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)


def _flatten(tensor: torch.Tensor, channels_last: bool) -> torch.Tensor:
    return (tensor.permute(0, 2, 3, 1) if channels_last else tensor).flatten()


class FlatWeights:
    """The trained parameters of one data type, as views of a flat tensor, and their float32 copies."""

    def __init__(self, parameters: list[torch.nn.Parameter], channels_last: bool):
        """With `channels_last`, convolution weights get that layout, which is how they lie in the flat tensors."""
        self.flat = torch.cat([_flatten(p.detach(), channels_last and p.ndim == 4) for p in parameters])
        # What the optimizer updates, in float32.
        self.master = self.flat.float() if self.flat.dtype != torch.float32 else self.flat
        self.fragments, offset = [], 0
        for parameter in parameters:
            permuted = channels_last and parameter.ndim == 4
            fragment = Fragment(parameter, 0, self.master, offset, parameter.numel(), permuted)
            parameter.data = fragment.shaped(self.flat.narrow(0, offset, parameter.numel()))
            self.fragments.append(fragment)
            offset += parameter.numel()

    def take_gradients(self) -> torch.Tensor:
        """Return the gradients of all parameters, joined, and remove them from the parameters."""
        gradients = []
        for fragment in self.fragments:
            parameter = fragment.parameter
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(_flatten(gradient, fragment.channels_last))
            parameter.grad = None
        return torch.cat(gradients)


class DataParallel:
    """A module whose gradients are averaged over the ranks after the backward pass of a step: ZeRO stage 0.

    Every rank has all weights and optimizer states. The interface is the part of DeepSpeed's engine that `Engine` uses.
    DeepSpeed's own stage 0 copies every gradient into a buffer and back, which costs the host as many kernel launches as the
    model has parameters. Here the weights are views of a flat tensor, so that gradients are joined once, and averaging, norm,
    update and EMA are a few operations on flat tensors.
    """

    @collective
    def __init__(
        self, module: torch.nn.Module, trained: Iterable[torch.nn.Parameter], num_micro_batches: int, channels_last: bool
    ):
        """`trained`: the parameters that the optimizer updates."""
        self.module, self.num_micro_batches = module, num_micro_batches
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))  # as DeepSpeed does
            torch.cuda.set_device(self.device)
        module.to(self.device)
        for tensor in [*(parameter.data for parameter in module.parameters()), *module.buffers()]:
            dist.broadcast(tensor, 0)
        by_type: dict[torch.dtype, list[torch.nn.Parameter]] = {}
        for parameter in trained:
            by_type.setdefault(parameter.dtype, []).append(parameter)
        self.weights = [FlatWeights(parameters, channels_last) for parameters in by_type.values()]
        self._gradients: list[torch.Tensor] = []

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)

    def backward(self, loss: torch.Tensor) -> None:
        """Run the backward pass of a micro-batch; the gradient is that of the mean over the micro-batches and ranks."""
        (loss / (self.num_micro_batches * dist.get_world_size())).backward()
        gradients = [weights.take_gradients() for weights in self.weights]
        if self.num_micro_batches > 1:  # small ones would vanish in a sum of half precision
            gradients = [gradient.float() for gradient in gradients]
        for earlier, gradient in zip(self._gradients, gradients, strict=False):
            gradient.add_(earlier)
        self._gradients = gradients

    @collective
    def reduce_gradients(self) -> torch.Tensor:
        """Average the gradients of all micro-batches over the ranks. Return their norm, float32, on the device."""
        gradients = []
        for gradient, weights in zip(self._gradients, self.weights, strict=True):
            dist.all_reduce(gradient)
            gradients.append(gradient.float())
            weights.master.grad = gradients[-1]
        self._gradients = []
        return torch.nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the optimizer update the float32 weights, and round them to those that the module computes with."""
        optimizer.step()
        for weights in self.weights:
            weights.master.grad = None
        self.round_weights()

    @torch.no_grad()
    def round_weights(self) -> None:
        """Copy the float32 weights to those that the module computes with, in their type."""
        for weights in self.weights:
            if weights.master is not weights.flat:
                weights.flat.copy_(weights.master)

    def eval(self) -> None:
        self.module.eval()

    def train(self) -> None:
        self.module.train()


# --- DeepSpeed: stages 1 to 3 --------------------------------------------------------------------------------------------

UNTESTED = "ZeRO with an untested optimizer"


def name_accelerator() -> None:
    """Tell DeepSpeed that there is no accelerator, before the first import; otherwise it warns that it found none.

    transformers imports DeepSpeed, where it is installed, to save a model.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


@functools.cache
def import_deepspeed() -> Any:
    """Return the package deepspeed, whose import takes seconds that ZeRO 0 does not need to spend."""
    name_accelerator()
    import deepspeed

    # DeepSpeed would compile the kernels of this table at its first use, although only inference needs them. That takes half a
    # minute and a compiler on every new host, and a process killed meanwhile leaves a lock on which others wait.
    deepspeed.ops.__compatible_ops__ = {}
    # There is no setting for this warning: the one that allows an optimizer logs it.
    logging.getLogger("DeepSpeed").addFilter(lambda record: UNTESTED not in record.getMessage())
    return deepspeed


@collective
def clone_process_group(timeout_s: int) -> None:
    """Create DeepSpeed's copy of the process group with this timeout; its own one would have torch's, 600 s with NCCL."""
    groups = import_deepspeed().utils.groups
    groups._WORLD_GROUP = groups._WORLD_GROUP or dist.new_group(timeout=timedelta(seconds=timeout_s))


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
