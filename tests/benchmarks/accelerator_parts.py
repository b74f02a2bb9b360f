"""What accelerator.py measures, in a process of its own: single kernels, and the steps of one setting after another."""

import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from diffdis.task import DiffDisTask
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes.demo import PREVIEW_CAPTIONS
from ray_platform.contracts import Batch, one_line

BATCHES, FEW = 4, 2  # distinct batches; samples of a step that the host limits
TOP_KERNELS = 15
Rows = list[dict[str, Any]]


def measure_all(results: Connection, jobs: Sequence[tuple[str, PretrainConfig | None]], in_full: str, smoke: bool) -> None:
    """Send (name, what was measured) of each job. The first failure is sent, too, and ends this process.

    A job without a configuration is one of `KERNELS`. The setting called `in_full` is measured in full.
    """
    sys.stdout = sys.stderr  # DeepSpeed logs to stdout
    begin_alone()
    for name, config in jobs:
        try:
            found = measure_step(config, smoke, in_full=name == in_full) if config else {"rows": KERNELS[name](smoke)}
        except (torch.OutOfMemoryError, RuntimeError, AssertionError) as error:
            results.send((name, {"failed": one_line(error, 200)}))
            return
        results.send((name, found))
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def begin_alone() -> None:
    """Initialize a process group with this process as its only member."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any], rounds: int) -> float:
    """Return the median seconds of a call, without the first, warm-up call."""
    found = []
    for _ in range(rounds + 1):
        wait()
        begun = time.perf_counter()
        function()
        wait()
        found.append(time.perf_counter() - begun)
    return statistics.median(found[1:])


# --- kernels, forward and backward, at the sizes of Stable Diffusion v1 and 512 px ------------------------------------------


def _kernel_seconds(run: Callable[..., torch.Tensor], *inputs: torch.Tensor, smoke: bool) -> float:
    calls, given = (1 if smoke else 10), [tensor.requires_grad_() for tensor in inputs]
    gradient = torch.ones_like(run(*given))

    def passes() -> None:
        for _ in range(calls):
            torch.autograd.grad(run(*given), given, gradient)

    return seconds(passes, 3) / calls


def _random(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(*shape, device=device, dtype=torch.bfloat16).to(memory_format=layout)


_LAYOUTS = {"channels_first": torch.contiguous_format, "channels_last": torch.channels_last}
_LEVELS = [(320, 64), (640, 32), (1280, 16)]  # channels, height and width


def convolutions(smoke: bool) -> Rows:
    """Return the time of a 3 x 3 convolution at each level, by the layout of its memory."""
    rows = []
    for channels, side in [(8, 4)] if smoke else _LEVELS:
        batch = 1 if smoke else 24
        for name, layout in _LAYOUTS.items():
            x, weight = _random(batch, channels, side, side, layout=layout), _random(channels, channels, 3, 3, layout=layout)
            found = _kernel_seconds(lambda x, w: F.conv2d(x, w, padding=1), x, weight, smoke=smoke)
            operations = 3 * 2 * batch * side**2 * 9 * channels**2
            rows.append({"channels": channels, "layout": name, "ms": 1e3 * found, "tflops_per_second": operations / found / 1e12})
    return rows


def attention(smoke: bool) -> Rows:
    """Return the time of self-attention, by the width of a head and the number of tokens; the joint mask has one more."""
    rows = []
    for width in (40, 64, 80, 160):
        for tokens in (16, 17) if smoke else (4096, 4097):
            batch, heads = (1, 1) if smoke else (8, 8)
            parts = [_random(batch, heads, tokens, width) for _ in range(3)]
            found = _kernel_seconds(F.scaled_dot_product_attention, *parts, smoke=smoke)
            operations = 3.5 * 4 * batch * heads * tokens**2 * width  # the backward pass computes the scores again
            rows.append(
                {"head_width": width, "tokens": tokens, "ms": 1e3 * found, "tflops_per_second": operations / found / 1e12}
            )
    return rows


def group_norm_silu(smoke: bool) -> Rows:
    """Return the time of GroupNorm and SiLU, by the layout of their memory."""
    shape, rows = (1, 8, 4, 4) if smoke else (24, 320, 64, 64), []
    for name, layout in _LAYOUTS.items():
        x, gain, bias = _random(*shape, layout=layout), _random(shape[1]), _random(shape[1])
        groups = 4 if smoke else 32
        found = _kernel_seconds(lambda x, g, b, n=groups: F.silu(F.group_norm(x, n, g, b)), x, gain, bias, smoke=smoke)
        rows.append({"layout": name, "ms": 1e3 * found, "gigabytes_of_input": x.nbytes / 1e9})
    return rows


KERNELS: dict[str, Callable[[bool], Rows]] = {
    "convolution": convolutions,
    "attention": attention,
    "group_norm_silu": group_norm_silu,
}


# --- steps --------------------------------------------------------------------------------------------------------------------


class Stepper:
    """The engine of a worker, and batches of random inputs in memory."""

    def __init__(self, config: PretrainConfig, captions: tuple[str, ...]):
        """`captions`: of the images that are generated."""
        from ray_platform.train.engine import Engine

        self.task, self.config = DiffDisTask(config.model, config.objective, captions), config
        self.size, self.number = config.train.micro_batch_size, 0
        self.engine = Engine(self.task, config.train, self.size, 1)
        rng, px = np.random.default_rng(0), config.model.image_size
        words = list("".join(PREVIEW_CAPTIONS).replace(" ", ""))
        self.pictures = [
            Batch(
                {"image": rng.integers(0, 256, (self.size, px, px, 3), dtype=np.uint8)},
                [" ".join(rng.choice(words, 8)) for _ in range(self.size)],
                [str(i) for i in range(self.size)],
                (),
                {},
            )
            for _ in range(BATCHES)
        ]
        self.inputs = [self.task.inputs(batch, self.engine.device) for batch in self.pictures]

    def __call__(self) -> None:
        self.run(self.inputs[self.number % BATCHES])

    def with_few_samples(self) -> None:
        """Run a step that the host limits."""
        self.run({name: x if name == "null_states" else x[:FEW] for name, x in self.inputs[0].items()})

    def run(self, inputs: dict[str, torch.Tensor]) -> None:
        self.number += 1
        loss, _ = self.engine.backward([inputs], [self.number])
        self.engine.update(self.number)
        if self.config.train.precision != "fp16" and not torch.isfinite(loss):
            raise AssertionError(f"step {self.number}: the loss is {float(loss)}")


def measure_step(config: PretrainConfig, smoke: bool, in_full: bool) -> dict[str, Any]:
    """Measure the steps of a setting; `in_full`: also its kernels, host time, encoding, checkpoint and inference."""
    has_gpu = torch.cuda.is_available()
    found: dict[str, Any] = {"memory_before_gb": torch.cuda.memory_allocated() / 1e9} if has_gpu else {}
    step = Stepper(config, PREVIEW_CAPTIONS[: 1 if smoke else None])
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    step()
    if config.train.compile:
        begun = time.perf_counter()
        step.task.compile()
        step()
        wait()
        found["compile_seconds"] = time.perf_counter() - begun
    for _ in range(1 if smoke else 5):
        step()
    found["seconds_per_step"] = seconds(step, 2 if smoke else 15)
    if has_gpu:
        found["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["memory_reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found | (_in_full(step, smoke) if in_full else {})


def _in_full(step: Stepper, smoke: bool) -> dict[str, Any]:
    from ray_platform.train.checkpoint_format import contiguous_on_cpu

    task, engine, rounds = step.task, step.engine, 1 if smoke else 5
    found: dict[str, Any] = {"kernels": top_kernels(step)}
    found["host_seconds_per_step"] = seconds(step.with_few_samples, rounds)
    found["encode_seconds_per_sample"] = seconds(lambda: task.inputs(step.pictures[0], engine.device), rounds) / step.size
    wait()
    begun = time.perf_counter()
    num_bytes = sum(contiguous_on_cpu(tensor).nbytes for _, tensor, _ in engine.local_state())
    found |= {"checkpoint_copy_seconds": time.perf_counter() - begun, "checkpoint_gb": num_bytes / 1e9}
    with engine.inference():
        drawing = seconds(lambda: task.preview(0, 1), 1)
        embedding = seconds(lambda: task.embed_heldout(step.inputs[0]), rounds)
    found["images_generated_per_second"] = len(task.preview_captions) / drawing
    found["images_embedded_per_second"] = step.size / embedding
    return found


def top_kernels(step: Callable[[], None]) -> Rows:
    """Return the kernels that take the most time in a step, with their milliseconds and calls."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as profiler:
        step()
        wait()
    own = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))[:TOP_KERNELS]
    return [{"name": e.key[:100], "ms": round(getattr(e, own) / 1e3, 3), "calls": e.count} for e in events]
