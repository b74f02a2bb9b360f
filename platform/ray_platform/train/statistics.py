"""Statistics of a training: its throughput (samples/s, FLOP/s, MFU, time waiting for data), averaged metrics and memory.

And those that show where and when it becomes unstable: gradients and activations by block, and a rising norm.
"""

import contextlib
import math
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import psutil
import torch
import torch.distributed as dist

from ray_platform.placement import PEAK_FLOPS, known_accelerator
from ray_platform.train.collective import collective, gather_objects
from ray_platform.train.zero import Fragment

_RECENT, _USUAL = 0.8, 0.99  # decays of the averages of the gradient norm's logarithm: about 5 and 100 steps
_MIN_STEPS = 50  # before a norm can be called unusual
_RISE, _CALM = math.log(5.0), math.log(2.0)  # of the recent norm over the usual one: a warning, and its end
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
    return PEAK_FLOPS.get(known_accelerator(torch.cuda.get_device_name(device)), 0.0)


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


# --- stability -----------------------------------------------------------------------------------------------------------


def block_of(name: str) -> str:
    """Return the block of a layer: `unet.down_blocks.0` of `model.unet.down_blocks.0.resnets.1.conv1`."""
    parts = name.removeprefix("model.").split(".")
    return ".".join(parts[: 3 if len(parts) > 2 and parts[2].isdigit() else 2])


class BlockGradients:
    """Norms of the gradients by block, computed from the shards that the optimizer updates. The host waits for nothing.

    They precede clipping, except under ZeRO 3 and with an offloaded optimizer, where DeepSpeed clips before that.
    """

    def __init__(self, fragments: Sequence[Fragment], names: Mapping[torch.nn.Parameter, str], is_sharded: bool):
        """`fragments` of this rank; `names` of all trained parameters, in the same order on all ranks."""
        blocks = {parameter: block_of(name.rpartition(".")[0] or name) for parameter, name in names.items()}
        self.names, self.is_sharded = list(dict.fromkeys(blocks.values())), is_sharded
        self._runs: dict[torch.Tensor, list[tuple[str, Fragment]]] = defaultdict(list)  # neighbors of a block, joined
        self._squares: dict[str, list[torch.Tensor]] = defaultdict(list)
        for fragment in fragments:
            runs, block = self._runs[fragment.shard], blocks[fragment.parameter]
            if runs and runs[-1][0] == block and runs[-1][1].touches(fragment):
                runs[-1] = block, replace(runs[-1][1], size=runs[-1][1].size + fragment.size)
            else:
                runs.append((block, fragment))

    def add(self, shard: torch.Tensor) -> None:
        """Add the gradient of a shard."""
        for block, run in self._runs[shard]:
            gradient = run.of_shard(shard.grad)  # type: ignore[arg-type]
            self._squares[block].append(torch.linalg.vector_norm(gradient, dtype=torch.float32).square())

    @collective
    def norms(self, device: torch.device, scale: float) -> dict[str, torch.Tensor]:
        """Return the norm of each block over all ranks, of gradients that were multiplied by `scale`, and start anew."""
        zero = torch.zeros(
            (), device=next((shard.device for shard in self._runs), device)
        )  # of the shards, if they are offloaded
        totals = torch.stack([sum(self._squares[name], zero) for name in self.names]).to(device, non_blocking=True)
        self._squares.clear()
        if self.is_sharded:
            dist.all_reduce(totals)
        return dict(zip(self.names, totals.sqrt() / scale, strict=True))


@contextlib.contextmanager
def activation_statistics(module: torch.nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the outputs of all layers with parameters. At the end, the dictionary has [RMS, 1] of every block of the module.

    The RMS is that of all elements of all outputs of a block's layers, in float32. The tensors are on the device.
    """
    squares: dict[str, list[torch.Tensor]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    rms: dict[str, torch.Tensor] = {}

    def recorder(block: str) -> Callable[[torch.nn.Module, Any, Any], None]:
        def record(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                squares[block].append(torch.linalg.vector_norm(output.detach(), dtype=torch.float32).square())
                sizes[block] += output.numel()

        return record

    layers = [(name, layer) for name, layer in module.named_modules() if list(layer.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(recorder(block_of(name))) for name, layer in layers]
    try:
        yield rms
    finally:
        for hook in hooks:
            hook.remove()
        for block, parts in squares.items():
            value = (torch.stack(parts).sum() / sizes[block]).sqrt()
            rms[block] = torch.stack([value, torch.ones_like(value)])


class GradientMonitor:
    """Reports when the gradient norm rises far above its usual value, which it often does some steps before a run diverges."""

    def __init__(self) -> None:
        self.recent = self.usual = 0.0  # averages of the logarithm
        self.num_steps, self.is_rising = 0, False

    def add(self, norm: float) -> str:
        """Add the finite norm of a step. Return a line when it starts to rise, otherwise an empty string."""
        value = math.log(max(norm, 1e-30))
        self.num_steps += 1
        if self.num_steps == 1:
            self.recent = self.usual = value
        # The usual norm is the mean of all steps at first.
        self.usual += max(1 - _USUAL, 1 / self.num_steps) * (value - self.usual)
        self.recent += (1 - _RECENT) * (value - self.recent)
        rise = self.recent - self.usual
        was_rising, self.is_rising = self.is_rising, rise > (_CALM if self.is_rising else _RISE)
        if self.num_steps < _MIN_STEPS or was_rising or not self.is_rising:
            return ""
        return (
            f"the gradient norm rises: {math.exp(self.recent):.2g} in the last steps, {math.exp(rise):.1f} times its usual "
            "value; if the loss rises, too, resume from an earlier checkpoint with a lower learning rate"
        )
