"""Counts what a training step costs besides its computations: collective operations, and waits of the host."""

import sys
from typing import NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile


class StepCounts(NamedTuple):
    collectives: int
    host_waits: int  # operations that would make the host wait for an accelerator, wherever the tensors are


class _Waits(TorchFunctionMode):
    """Counts calls that the profiler does not see on a CPU: `Tensor.tolist`, and our copies to a device that the host waits for.

    DeepSpeed's calls of `to` are left out, as its tensors are on the device already.
    """

    num_calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.num_calls += function is torch.Tensor.tolist
        if sys._getframe(1).f_globals["__name__"].startswith(("diffdis.", "ray_platform.")):
            moves = any(isinstance(value, torch.device | str) for value in [*args[1:], kwargs.get("device")])
            is_copy = function is torch.tensor or (function is torch.Tensor.to and not kwargs.get("non_blocking"))
            self.num_calls += moves and is_copy
        return function(*args, **kwargs)


def count(run) -> StepCounts:
    """Return the counts of a call of `run`."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler, _Waits() as waits:
        run()
    events = profiler.events()
    return StepCounts(sum(event.name.startswith("c10d::") for event in events), waits.num_calls + sum(map(_is_host_wait, events)))


def _is_host_wait(event) -> bool:
    """Return whether the event reads a number, or computes a shape that depends on values, as boolean indices do.

    Kernels for CPUs read numbers, too, such as the fused AdamW its step counts; those for accelerators do not.
    """
    parent = event.cpu_parent.name if event.cpu_parent is not None else ""
    is_read = event.name == "aten::item" and (not parent.startswith("aten::") or parent == "aten::is_nonzero")
    return is_read or event.name == "aten::nonzero"


def of_a_step(task, train, batches, statistics: bool = False) -> tuple[StepCounts, StepCounts] | None:
    """Return the counts of a step, after a first one, which is not typical, and of collecting a checkpoint.

    Counting takes ten times as long as the step, so only rank 0 counts; the other ranks take part and return None.
    """
    from ray_platform.train.checkpoint_format import LossHistory
    from ray_platform.train.engine import Engine
    from ray_platform.train.fault_tolerance import LossMonitor

    engine = Engine(task, train, len(batches[0].captions), len(batches))
    seeds = list(range(len(batches)))
    monitor = LossMonitor(train, LossHistory(), "")

    def step():
        loss, _ = engine.backward([task.inputs(batch, engine.device) for batch in batches], seeds, statistics=statistics)
        flags = dict.fromkeys(("stop", "checkpoint_due", "uploading", "upload_failed", "num_bad", "epoch_samples"), 0)
        engine.update(1, skip=monitor.sync_step_status(loss, **flags).is_bad, statistics=statistics)

    def checkpoint():
        list(engine.local_state())

    step()
    if torch.distributed.get_rank() == 0:
        return count(step), count(checkpoint)
    step()
    checkpoint()
    return None
