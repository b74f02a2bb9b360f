"""ZeRO stage 0: every rank has all weights and optimizer states, and the ranks average their gradients.

The interface is the part of DeepSpeed's engine that `Engine` uses. DeepSpeed's own stage 0 copies every gradient into a buffer
and back, which costs the host as many kernel launches as the model has parameters. Here the weights are views of a flat tensor,
so that gradients are joined once, and averaging, norm, update and EMA are a few operations on flat tensors.
"""

import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from ray_platform.train.collective import collective
from ray_platform.train.optimizer import Fragment


class FlatWeights:
    """The trained parameters of one data type, as views of a flat tensor, and their float32 copies."""

    def __init__(self, parameters: list[torch.nn.Parameter], channels_last: bool):
        """With `channels_last`, convolution weights get that layout, which is how they lie in the flat tensors."""
        self.parameters = parameters
        self.permuted = [channels_last and parameter.ndim == 4 for parameter in parameters]
        self.flat = torch.cat([self._flatten(p.detach(), i) for i, p in enumerate(parameters)])
        # What the optimizer updates, in float32.
        self.master = self.flat.float() if self.flat.dtype != torch.float32 else self.flat
        self.fragments, offset = [], 0
        for parameter, permuted in zip(parameters, self.permuted, strict=True):
            fragment = Fragment(parameter, 0, self.master, offset, parameter.numel(), permuted)
            parameter.data = fragment.shaped(self.flat.narrow(0, offset, parameter.numel()))
            self.fragments.append(fragment)
            offset += parameter.numel()

    def _flatten(self, tensor: torch.Tensor, index: int) -> torch.Tensor:
        return (tensor.permute(0, 2, 3, 1) if self.permuted[index] else tensor).reshape(-1)

    def take_gradients(self) -> torch.Tensor:
        """Return the gradients of all parameters, joined, and remove them from the parameters."""
        gradients = []
        for index, parameter in enumerate(self.parameters):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradients.append(self._flatten(gradient, index))
            parameter.grad = None
        return torch.cat(gradients)


class DataParallel:
    """A module whose gradients are averaged over the ranks after the backward pass of a step."""

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
