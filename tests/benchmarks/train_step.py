"""What the framework costs a training step, what the joint task costs over its halves, and what global negatives take of memory.

    PYTHONPATH=platform:jobs:. python tests/benchmarks/train_step.py [--rounds 3] [--steps 40]

Three contenders train the demo's model on samples of equal size, two processes each, one after the other in every round: (a) the
worker loop under Ray Train and DeepSpeed, fed by the data plane; (b) the same engine and model in a bare loop over batches in
memory; (c) the same model under torch's DDP. Rates are medians over the rounds, ratios medians of the rounds' ratios. Ends in one
JSON line.
"""

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from tests.benchmarks import own_ray  # isort: skip (before ray)

import numpy as np
import torch
import webdataset
from PIL import Image

from diffdis.task import DiffDisTask
from ray_platform.contracts import Batch
from ray_platform.data.config import DataConfig
from ray_platform.tracking import TrackingConfig
from ray_platform.train.launch import Run
from recipes.demo import demo
from tests.benchmarks.contrastive_memory import LOCAL, WIDTH
from tests.ranks import Ranks
from tests.recording import Records, recording

WARM_UP = 8  # steps that are not timed
NUM_SHARDS, SAMPLES_A_SHARD = 16, 256
WORDS = ("red", "green", "blue", "heart", "circle", "star", "cat", "tree", "car", "apple")


def write_source(folder: Path, size: int) -> tuple[np.ndarray, list[str]]:
    """PNGs with some structure, as drawings have it; also returns what a batch of each would hold."""
    rng = np.random.default_rng(0)
    images, captions = [], []
    for shard in range(NUM_SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for i in range(SAMPLES_A_SHARD):
                small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize((size, size), Image.Resampling.NEAREST)
                caption = " ".join(rng.choice(WORDS, 2))
                tar.write({"__key__": f"{shard:05d}{i:04d}", "png": encoded(image), "txt": caption.encode()})
                images.append(np.asarray(image))
                captions.append(caption)
    return np.stack(images), captions


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


class Clock:
    """Steps a second, without the first ones."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.perf_counter())

    @property
    def rate(self) -> float:
        return (len(self.times) - 1 - WARM_UP) / (self.times[-1] - self.times[WARM_UP])


def ours(config, sources: Path, steps: int) -> float:
    """Samples/s of (a), by when each step was begun."""
    with tempfile.TemporaryDirectory() as output:
        train = replace(
            config.train, num_steps=steps, checkpoint_every=10**6, preview_every=0, log_every=10, warmup_steps=2, max_failures=0
        )
        run = Run(
            functools.partial(recording, f"{output}/records", DiffDisTask, config.model, config.objective),
            DataConfig(sources=(str(sources),), image_size=config.model.image_size),
            train, TrackingConfig(), output, {"train": {}}, dict,
        )  # fmt: skip
        run.fit()
        records = Records(f"{output}/records", num_steps=steps)
        begun = {}
        for seed, when, _ in records.entries():
            step, rank = records.places[seed]
            if rank == 0:
                begun[step] = when
        return (steps - 1 - WARM_UP) / (begun[steps - 1] - begun[WARM_UP]) * train.max_workers * train.micro_batch_size


def batches(images: np.ndarray, captions: list[str], rank: int, size: int, steps: int) -> list[Batch]:
    rng = np.random.default_rng(rank)
    chosen = [rng.choice(len(images), size, replace=False) for _ in range(steps)]
    return [Batch({"image": images[c]}, [captions[i] for i in c], [str(i) for i in c], (), {}) for c in chosen]


def bare(rank: int, config, images: np.ndarray, captions: list[str], steps: int) -> float:
    """Steps/s of (b): the engine alone."""
    from ray_platform.train.engine import Engine

    size = config.train.micro_batch_size
    task = DiffDisTask(config.model, config.objective)
    engine = Engine(task, config.train, size, 1)
    clock = Clock()
    for step, batch in enumerate(batches(images, captions, rank, size, steps)):
        clock.tick()
        engine.backward([task.inputs(batch, engine.device)], [step * 2 + rank])
        engine.update(step)
    return clock.rate


def ddp(rank: int, config, images: np.ndarray, captions: list[str], steps: int) -> float:
    """Steps/s of (c): torch alone."""
    size = config.train.micro_batch_size
    task = DiffDisTask(config.model, config.objective)
    module = torch.nn.parallel.DistributedDataParallel(task.module)
    optimizer = torch.optim.AdamW(task.parameter_groups(), fused=True)
    clock = Clock()
    for step, batch in enumerate(batches(images, captions, rank, size, steps)):
        clock.tick()
        loss, _ = module(task.inputs(batch, torch.device("cpu")), step * 2 + rank)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return clock.rate


def tasks(rank: int, config, images: np.ndarray, captions: list[str], steps: int) -> dict[str, float]:
    """Median seconds of a step of each task, taken in turns."""
    from ray_platform.train.engine import Engine

    size, engines, seconds = config.train.micro_batch_size, {}, {}
    for name in ("joint", "generation", "alignment"):
        task = DiffDisTask(config.model, replace(config.objective, task=name))
        engines[name], seconds[name] = Engine(task, config.train, size, 1), []
    for step, batch in enumerate(batches(images, captions, rank, size, steps)):
        for name, engine in engines.items():
            torch.distributed.barrier()
            begun = time.perf_counter()
            engine.backward([engine.task.inputs(batch, engine.device)], [step * 2 + rank])
            engine.update(step)
            torch.distributed.barrier()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def memory(which: str, global_batch: int) -> float:
    """GB that a process needs at most for one loss and its gradient, beyond its inputs."""
    command = [sys.executable, "-m", "tests.benchmarks.contrastive_memory", which, str(global_batch)]
    env = os.environ | {"PYTHONPATH": own_ray.PATHS}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def rounds(config, sources: Path, images: np.ndarray, captions: list[str], number: int, steps: int) -> list[dict[str, float]]:
    size, found = 2 * config.train.micro_batch_size, []
    for _ in range(number):
        own_ray.start(num_cpus=2)
        rates = {"ours": ours(config, sources, steps)}
        own_ray.stop()
        group = Ranks(2)
        rates["bare"] = statistics.mean(group.run(bare, config, images, captions, steps)) * size
        rates["ddp"] = statistics.mean(group.run(ddp, config, images, captions, steps)) * size
        group.stop()
        print(json.dumps(rates), flush=True)
        found.append(rates)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    config = demo()
    with tempfile.TemporaryDirectory() as folder:
        images, captions = write_source(Path(folder), config.model.image_size)
        found = rounds(config, Path(folder), images, captions, arguments.rounds, arguments.steps)
        group = Ranks(2)
        seconds = group.run(tasks, config, images, captions, 12)[0]
        group.stop()
    median = {name: statistics.median(rates[name] for rates in found) for name in found[0]}
    print(
        json.dumps(
            {f"samples_per_second_{name}": round(rate, 1) for name, rate in median.items()}
            | {
                "ratio_to_bare": round(statistics.median(r["ours"] / r["bare"] for r in found), 3),
                "ratio_to_ddp": round(statistics.median(r["ours"] / r["ddp"] for r in found), 3),
                "joint_cost_ratio": round(seconds["joint"] / (seconds["generation"] + seconds["alignment"]), 3),
                "seconds_a_step": {name: round(value, 3) for name, value in seconds.items()},
                "contrastive_local_batch": LOCAL,
                "contrastive_width": WIDTH,
                "contrastive_gb_chunked_32k": memory("chunked", 32768),
                "contrastive_gb_chunked_16k": memory("chunked", 16384),
                "contrastive_gb_plain_16k": memory("plain", 16384),
            }
        )
    )


if __name__ == "__main__":
    main()
