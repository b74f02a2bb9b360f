"""What steps cost: their floating-point operations, and profiles of single steps. docs/profiling.md explains the files."""

import logging
import tempfile
from pathlib import Path
from typing import Literal

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ray_platform import storage
from ray_platform.contracts import one_line
from ray_platform.train.collective import collective
from ray_platform.train.config import TrainConfig

logger = logging.getLogger(__name__)

# Operator of attention on CPUs, which torch's counter does not count.
_CPU_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
FOLDER = "profile"  # in output_dir
_FIRST, _LAST = 5, 7  # of the launch, unless the user chooses: the first steps are not typical
_MAX_ALLOCATIONS = 100_000  # newest ones, in a memory snapshot
_MAX_ROWS = 40  # of the table of operators


class StepProfiler:
    """Profiles of the steps `train.profile_steps` on this rank: a trace, a table of operators, and the accelerator's memory."""

    def __init__(self, config: TrainConfig, output_dir: str, rank: int, start: int):
        """`start`: the step from which this launch starts."""
        first, self.last = config.profile_steps or (start + _FIRST, start + _LAST)
        self.first, self.step_done = max(first, start + 1), start
        self.url, self.rank = storage.join(output_dir, FOLDER, f"steps_{self.first}-{self.last}"), rank
        self.has_gpu = torch.cuda.is_available()
        self._profiler: profile | None = None
        if self.last <= start:
            logger.warning(
                "train.profile_steps: %d to %d are before step %d, from which the run resumes", first, self.last, start
            )
            return
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self.has_gpu else [])
        num_before = self.first - start - 1
        warmup = min(1, num_before)
        steps = schedule(wait=num_before - warmup, warmup=warmup, active=self.last - self.first + 1, repeat=1)
        self._profiler = profile(
            activities=activities, schedule=steps, on_trace_ready=self._write, record_shapes=True, profile_memory=True
        )
        if not num_before:
            self._record_allocations("all")
        self._profiler.start()

    def step(self) -> None:
        """Report the end of a step."""
        self.step_done += 1
        if self._profiler is None:
            return
        if self.step_done == self.first - 1:
            self._record_allocations("all")
        self._profiler.step()
        if self.step_done == self.last:
            self.stop()

    def stop(self) -> None:
        """End the profile. If the run ends before its last step, what was recorded is written."""
        if self._profiler:
            self._profiler.stop()
            self._profiler = None

    def _record_allocations(self, which: Literal["all"] | None) -> None:
        if self.has_gpu:
            torch.cuda.memory._record_memory_history(which, max_entries=_MAX_ALLOCATIONS)

    def _write(self, finished: profile) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="profile_") as scratch:
                prefix = f"{scratch}/rank_{self.rank:05d}"
                finished.export_chrome_trace(f"{prefix}.json.gz")
                order = "self_device_time_total" if self.has_gpu else "self_cpu_time_total"
                Path(f"{prefix}.txt").write_text(finished.key_averages().table(sort_by=order, row_limit=_MAX_ROWS))
                if self.has_gpu:
                    torch.cuda.memory._dump_snapshot(f"{prefix}_memory.pickle")
                    self._record_allocations(None)
                storage.put_folder(Path(scratch), self.url)
            logger.info("train.profile: rank %d wrote %s", self.rank, self.url)
        except Exception as error:
            logger.warning("the profile could not be written; training continues: %s", one_line(error))


@collective
def count_flops(module: torch.nn.Module, inputs: dict[str, torch.Tensor], seed: int) -> float:
    """Return the floating-point operations of one forward and backward pass, which is run for that purpose.

    Matrix products, convolutions and attention are counted. With F the operations of the forward pass, the result is almost 3 F:
    the gradients by weights and by inputs take F each, less those of frozen weights and of inputs that need none; attention's
    backward pass counts 2.5 times its forward pass, as its fused kernels recompute the scores. Recomputed activations and
    gradient caching are not counted, as usual for MFU. The module is in eval mode, without computations for the log.

    Call it before the engine takes the module: counting selects other kernels, which may change the last bits of a real step.
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
    """Return torch's counter of matrix products, convolutions and attention, extended to attention on CPUs."""
    operators = torch.ops.aten
    # From the shapes of (the result's gradient,) query, key and value.
    forward, backward = getattr(operators, _CPU_ATTENTION), getattr(operators, f"{_CPU_ATTENTION}_backward")
    mapping = {
        forward: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        backward: lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4]),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)
