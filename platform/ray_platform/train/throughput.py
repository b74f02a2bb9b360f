"""What a run measures about itself: losses, rates, waiting, operations and memory."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# Dense 16 bit peak in FLOP/s, by what the device's name contains (the first that fits), from the vendor's data sheets.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "L40S": 362e12,
    "A100": 312e12,
    "V100": 125e12,
    "L4": 121e12,
}
# Attention on CPUs, which torch's counter does not know: of the shapes of (the result's gradient,) query, key and value.
_MORE_OPERATIONS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
_MAX_RANKS_SHOWN = 16  # with a memory metric of their own


class Meter:
    """Sums of weighted metrics and of time between two log lines."""

    def __init__(self, flops_a_step: float) -> None:
        self.flops_a_step = flops_a_step  # of one rank
        self.all_samples, self.all_seconds = 0, 0.0
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.steps, self.samples, self.waited, self.worked, self.stalled = 0, 0, 0.0, 0.0, 0.0

    def add(self, metrics: dict[str, torch.Tensor], *, samples: int, waited: float, worked: float) -> None:
        for name, value in metrics.items():
            value = value.detach().double()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps, self.samples = self.steps + 1, self.samples + samples
        self.waited, self.worked = self.waited + waited, self.worked + worked

    @contextlib.contextmanager
    def stalling(self) -> Iterator[None]:
        """Around what is neither training nor waiting for data: its time is a share of its own, and slows no rate down."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stalled += time.perf_counter() - begun

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Means over all ranks and the steps since the last call, of which there must be one, and which end here. Every rank
        must call it."""
        world_size = dist.get_world_size()
        names = sorted(self.sums)
        times = torch.tensor([self.waited, self.worked, self.stalled], dtype=torch.float64, device=device)
        totals = torch.cat([torch.stack([self.sums[name] for name in names]).flatten(), times])
        dist.all_reduce(totals)
        values = totals.tolist()
        waited, worked, stalled = (seconds / world_size for seconds in values[-3:])
        metrics = {n: s / w for n, s, w in zip(names, values[:-3:2], values[1:-3:2], strict=True) if w > 0}
        samples, seconds = self.samples * world_size, waited + worked
        self.all_samples, self.all_seconds = self.all_samples + samples, self.all_seconds + seconds
        metrics["train/samples_per_second"] = samples / seconds
        metrics["train/samples_per_second_mean"] = self.all_samples / self.all_seconds
        metrics["train/seconds_a_step"] = seconds / self.steps
        metrics["data/share_waiting"] = waited / seconds
        metrics["train/share_stalled"] = stalled / (seconds + stalled)  # by checkpoints, scores and previews
        rate = self.flops_a_step * self.steps / seconds  # of one rank
        metrics["train/flops_per_second"] = rate * world_size
        if peak := peak_flops(device):
            metrics["train/mfu"] = rate / peak
        self._reset()
        return metrics


def count_flops(module: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int) -> float:
    """Operations of matrix products, convolutions and attention in one forward and backward pass, which it runs for that.

    For a module that no engine has touched: counting takes other kernels, and so may change the last bits of a real step.
    This is the model's own work: activations are not computed again yet, nor is a step's alignment to cache its gradients; and
    the module is in eval mode, in which it leaves out what it computes for the log alone. With F the operations of the forward
    pass, it is nearly 3 F: as many again for the gradients by weights, and by inputs; less those by weights of frozen layers and
    by inputs that need none (a first layer's); attention's backward pass is counted as 2.5 times its forward pass, with the
    scores that its fused kernels compute again. Every rank must call it.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    training = module.training
    module.eval()
    with operation_counter() as counter:
        loss, _ = module(inputs, seed)
        torch.autograd.grad(loss, trained, allow_unused=True)
    module.train(training)
    return float(counter.get_total_flops())


def operation_counter() -> FlopCounterMode:
    """Of matrix products, convolutions and attention, on CPUs too."""
    return FlopCounterMode(display=False, custom_mapping=_MORE_OPERATIONS)


def peak_flops(device: torch.device) -> float:
    """Of a known accelerator, in 16 bit; 0 of others and of CPUs."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


def memory(device: torch.device) -> dict[str, float]:
    """GB of every rank: its process, and the most that tensors took on its accelerator. Every rank must call it."""
    mine = {"memory/process_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        mine["memory/accelerator_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, mine)
    metrics = {f"{name}_max": max(part[name] for part in parts) for name in mine}
    for rank, part in enumerate(parts[:_MAX_RANKS_SHOWN] if len(parts) > 1 else []):
        metrics |= {f"{name}_rank_{rank}": value for name, value in part.items()}
    return metrics
