"""Record the samples that every rank trains on, to compare a run that lost workers with an undisturbed run."""

import json
import os
import time
from pathlib import Path

import torch

from ray_platform.train.worker import step_seed


def recording(folder, build_task, *arguments):
    """Build a Task with `build_task(*arguments)` that records every step.

    The Task writes (seed, time, keys, world size) of every step to one file per process. The seed of a step's first micro-batch
    is unique to the step and the rank.
    """
    task = build_task(*arguments)
    Path(folder).mkdir(parents=True, exist_ok=True)
    file = (Path(folder) / f"{time.time_ns()}-{os.getpid()}.jsonl").open("w")
    inputs, prepare, asked = task.inputs, task.precompute_step_loss, []

    def recorded_inputs(batch, device):
        asked.append(batch.keys)
        return inputs(batch, device)

    def recorded_prepare(parts, seeds, control, progress):
        # Inputs are also built to count the FLOPs of a step; the inputs of the step itself are the last ones.
        keys = [key for keys in asked[-len(parts) :] for key in keys]
        file.write(json.dumps([seeds[0], time.time(), keys, torch.distributed.get_world_size()]) + "\n")
        file.flush()
        asked.clear()
        return prepare(parts, seeds, control, progress)

    task.inputs, task.precompute_step_loss = recorded_inputs, recorded_prepare
    return task


class Records:
    """The records in one folder, or in several folders that match `pattern`."""

    def __init__(self, folder, seed=0, num_steps=0, world_size=2, pattern="*.jsonl"):
        self.folder, self.pattern = Path(folder), pattern
        places = [(step, rank) for step in range(num_steps) for rank in range(world_size)]
        self.places = {step_seed(seed, step, rank, 0): (step, rank) for step, rank in places}

    def entries(self):
        for file in self.folder.glob(self.pattern):
            for line in file.read_text().splitlines():
                if line.endswith("]"):  # the last line may be truncated
                    yield json.loads(line)

    def count(self):
        """Return the number of recorded steps over all ranks, including repeated ones."""
        return sum(1 for _ in self.entries())

    def last(self):
        """Return (highest step that was started, time at which it was first started)."""
        when = {}
        for seed, time_, *_ in self.entries():
            step = self.places[seed][0]
            when[step] = min(when.get(step, time_), time_)
        return max(when.items(), default=(-1, 0.0))

    def trained_on(self):
        """Return {(step, rank): keys} of the effective history: for a repeated step, the last execution and its ranks."""
        last, ranks = {}, {}
        for seed, when, keys, world_size in self.entries():
            step, rank = self.places[seed]
            last[step, rank] = max(last.get((step, rank), (0.0, [])), (when, keys))
            ranks[step] = max(ranks.get(step, (0.0, 0)), (when, world_size))
        return {(step, rank): keys for (step, rank), (_, keys) in sorted(last.items()) if rank < ranks[step][1]}
