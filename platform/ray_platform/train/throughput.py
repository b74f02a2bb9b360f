"""Throughput of a run (samples/s, FLOP/s, MFU, time waiting for data), its averaged metrics and its memory."""

import contextlib
import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

import psutil
import torch
import torch.distributed as dist

from ray_platform.placement import PEAK_FLOPS
from ray_platform.train.collective import collective, gather_objects

_STEPS_OF_ESTIMATE = 100
_MAX_RANKS_SHOWN = 16  # ranks with their own memory metrics


class ThroughputMeter:
    """Sums of metrics, samples and seconds between two log lines."""

    def __init__(self, flops_per_step: float) -> None:
        self.flops_per_step = flops_per_step  # of one rank
        self.total_samples, self.total_seconds = 0, 0.0
        self._step_seconds: deque[float] = deque(maxlen=_STEPS_OF_ESTIMATE)
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[tuple[str, ...], torch.Tensor] = {}  # names of metrics that occur together -> [number, 2]
        self.steps, self.samples, self.words, self.waited, self.worked, self.stalled = 0, 0, 0, 0.0, 0.0, 0.0

    def add(self, metrics: dict[str, torch.Tensor], *, captions: Sequence[str], waited: float, worked: float) -> None:
        """Add a step: metrics as [2] tensors (weighted sum, weight), this rank's captions, and the seconds of both kinds."""
        names, values = tuple(metrics), torch.stack([value.detach() for value in metrics.values()]).double()
        self.sums[names] = self.sums[names] + values if names in self.sums else values
        self.steps, self.samples = self.steps + 1, self.samples + len(captions)
        self.words += sum(len(caption.split()) for caption in captions)
        self.waited, self.worked = self.waited + waited, self.worked + worked
        self._step_seconds.append(waited + worked)

    def seconds_left(self, num_steps: int) -> float:
        """Estimate the seconds of `num_steps` steps by the median of the last ones, which slow first steps do not change."""
        return num_steps * statistics.median(self._step_seconds)

    @contextlib.contextmanager
    def stalled_time(self) -> Iterator[None]:
        """Time a block that neither trains nor waits for data (checkpoints, scores, previews); it is not training time."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.stalled += time.perf_counter() - started

    @collective
    def reduce(self, device: torch.device) -> dict[str, float]:
        """Return means over all ranks and the steps since the last call (at least one), and start anew."""
        world_size = dist.get_world_size()
        of_host = torch.tensor([self.waited, self.worked, self.stalled, self.words], dtype=torch.float64, device=device)
        totals = torch.cat([*(self.sums[names].flatten() for names in sorted(self.sums)), of_host])
        dist.all_reduce(totals)
        values = totals.tolist()
        waited, worked, stalled, words = (value / world_size for value in values[-4:])
        sums: dict[str, tuple[float, float]] = {}
        for name, value, weight in zip(chain.from_iterable(sorted(self.sums)), values[:-4:2], values[1:-4:2], strict=True):
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + value, before[1] + weight
        metrics = {name: value / weight for name, (value, weight) in sums.items() if weight > 0}
        metrics["data/caption_words"] = words / self.samples
        samples, seconds = self.samples * world_size, waited + worked
        self.total_samples, self.total_seconds = self.total_samples + samples, self.total_seconds + seconds
        metrics["train/samples_per_second"] = samples / seconds
        metrics["train/samples_per_second_mean"] = self.total_samples / self.total_seconds
        metrics["train/seconds_per_step"] = seconds / self.steps
        metrics["data/waiting_fraction"] = waited / seconds
        metrics["train/stalled_fraction"] = stalled / (seconds + stalled)  # by checkpoints, scores and previews
        rate = self.flops_per_step * self.steps / seconds  # of one rank
        metrics["train/flops_per_second"] = rate * world_size
        if peak := peak_flops(device):
            metrics["train/mfu"] = rate / peak
        self._reset()
        return metrics


def peak_flops(device: torch.device) -> float:
    """Return the dense 16-bit peak in FLOP/s of a known accelerator; 0 for others and for CPUs."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), 0.0)


@collective
def memory_metrics(device: torch.device) -> dict[str, float]:
    """Return GB per rank and their maximum: of its process, and the peak of its tensors on the accelerator."""
    local = {"memory/process_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        local["memory/accelerator_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
    parts = gather_objects(local)
    metrics = {f"{name}_max": max(part[name] for part in parts) for name in local}
    for rank, part in enumerate(parts[:_MAX_RANKS_SHOWN] if len(parts) > 1 else []):
        metrics |= {f"{name}_rank_{rank}": value for name, value in part.items()}
    return metrics
