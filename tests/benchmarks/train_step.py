"""Measure the framework's overhead per training step, the joint task against its halves, and the memory of global negatives.

    PYTHONPATH=platform:. python tests/benchmarks/train_step.py [--rounds 3]

Three contenders take turns training a model like the demo's at 256 px: (a) the worker loop under Ray Train and DeepSpeed, with
the platform's data loading; (b) the same engine and model in a bare loop over batches in memory; (c) the same model under DDP.
They are measured once with one worker per core, so that Ray and the reads compete with training, and once with a spare core, as
on hosts with accelerators. The collective operations and host waits of a step are counted for each ZeRO stage. The last
line is one JSON object.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks import own_ray  # isort: skip (before ray)

import numpy as np
import torch
import webdataset
from PIL import Image
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from diffdis.config import AutoencoderConfig
from diffdis.losses import InfoNCE
from diffdis.task import DiffDisTask
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes.demo import demo
from ray_platform.contracts import Batch
from ray_platform.data.config import DataConfig
from ray_platform.tracking import TrackingConfig
from ray_platform.train.launch import Run
from tests.benchmarks.measuring import in_turns, medians, ratio
from tests.diffdis.plain_losses import plain_alignment_loss
from tests.support.ranks import Ranks
from tests.support.recording import Records, recording
from tests.support.step_counts import StepCounts, of_a_step

WARM_UP, TIMED = 4, 24  # steps
FILLING = 60  # additional untimed steps of (a), in which the reads fill their buffers
NUM_SHARDS, SAMPLES_A_SHARD, SIZE = 16, 64, 256
MICRO_BATCH = 8
LOCAL, WIDTH = 512, 768  # samples per rank and embedding dimension in `contrastive_memory`
WORDS = ("red", "green", "blue", "heart", "circle", "star", "cat", "tree", "car", "apple")


def configuration() -> PretrainConfig:
    base = demo()
    unet = replace(base.model.unet, in_channels=192, sample_size=32)
    model = replace(base.model, image_size=SIZE, unet=unet, autoencoder=AutoencoderConfig(kind="haar", haar_levels=3))
    train = replace(
        base.train, micro_batch_size=MICRO_BATCH, warmup_steps=2, max_failures=0, checkpoint_every=10**6, preview_every=0
    )
    objective = replace(base.objective, channel_weights=())  # the demo's are of its own latents
    return replace(base, model=model, objective=objective, train=train, data=DataConfig(image_size=SIZE, reads_per_rank=1))


def write_source(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Write JPEGs with some structure to shards. Returns the images [N, H, W, 3] and their captions."""
    rng = np.random.default_rng(0)
    images, captions = [], []
    for shard in range(NUM_SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for i in range(SAMPLES_A_SHARD):
                small = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
                image = small.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                image.save(buffer, format="JPEG", quality=90)
                caption = " ".join(rng.choice(WORDS, 2))
                tar.write({"__key__": f"{shard:05d}{i:04d}", "jpg": buffer.getvalue(), "txt": caption.encode()})
                images.append(np.asarray(image))
                captions.append(caption)
    return np.stack(images), captions


def rate(times: list[float]) -> float:
    """Return steps/s after the warm-up, from the start time of each step."""
    return (len(times) - 1 - WARM_UP) / (times[-1] - times[WARM_UP])


def ours(config: PretrainConfig, sources: Path, num_workers: int) -> float:
    """Return steps/s of (a), from the times at which rank 0 started each step."""
    num_steps = FILLING + WARM_UP + TIMED
    own_ray.start(num_cpus=2)
    try:
        with tempfile.TemporaryDirectory() as output:
            build_task = partial(recording, f"{output}/records", DiffDisTask, config.model, config.objective)
            data = replace(config.data, sources=(str(sources),))
            train = replace(config.train, num_workers=num_workers, num_steps=num_steps)
            Run(build_task, data, train, TrackingConfig(), output, {"train": {}}, dict).fit()
            records = Records(f"{output}/records", num_steps=num_steps, world_size=num_workers)
            times = {records.places[seed]: when for seed, when, *_ in records.entries()}
            return rate([times[step, 0] for step in range(FILLING, num_steps)])
    finally:
        own_ray.stop()


def batches(images: np.ndarray, captions: list[str], rank: int, steps: int) -> list[Batch]:
    rng = np.random.default_rng(rank)
    chosen = [rng.choice(len(images), MICRO_BATCH, replace=False) for _ in range(steps)]
    return [Batch({"image": images[c]}, [captions[i] for i in c], [str(i) for i in c], (), {}) for c in chosen]


def bare(rank: int, config: PretrainConfig, images: np.ndarray, captions: list[str]) -> float:
    """Return steps/s of (b): only the engine."""
    from ray_platform.train.engine import Engine

    task = DiffDisTask(config.model, config.objective)
    engine = Engine(task, config.train, MICRO_BATCH, 1)
    times = []
    for step, batch in enumerate(batches(images, captions, rank, WARM_UP + TIMED)):
        times.append(time.perf_counter())
        engine.backward([task.inputs(batch, engine.device)], [step * 2 + rank])
        engine.update(step)
    return rate(times)


def ddp(rank: int, config: PretrainConfig, images: np.ndarray, captions: list[str]) -> float:
    """Return steps/s of (c): only torch."""
    task = DiffDisTask(config.model, config.objective)
    module = torch.nn.parallel.DistributedDataParallel(task.module)
    optimizer = torch.optim.AdamW(task.parameter_groups(), fused=True)
    times = []
    for step, batch in enumerate(batches(images, captions, rank, WARM_UP + TIMED)):
        times.append(time.perf_counter())
        loss, _ = module(task.inputs(batch, torch.device("cpu")), step * 2 + rank)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
    return rate(times)


def tasks(rank: int, config: PretrainConfig, images: np.ndarray, captions: list[str], steps: int) -> dict[str, float]:
    """Return the median seconds per step of each task. The tasks take turns."""
    from ray_platform.train.engine import Engine

    engines, seconds = {}, {}
    for name in ("joint", "generation", "alignment"):
        task = DiffDisTask(config.model, replace(config.objective, task=name))
        engines[name], seconds[name] = Engine(task, config.train, MICRO_BATCH, 1), []
    for step, batch in enumerate(batches(images, captions, rank, steps)):
        for name, engine in engines.items():
            torch.distributed.barrier()
            begun = time.perf_counter()
            engine.backward([engine.task.inputs(batch, engine.device)], [step * 2 + rank])
            engine.update(step)
            torch.distributed.barrier()
            seconds[name].append(time.perf_counter() - begun)
    return {name: statistics.median(times[2:]) for name, times in seconds.items()}


def counts(rank: int, config: PretrainConfig, images: np.ndarray, captions: list[str], zero_stage: int) -> StepCounts | None:
    """Return the collective operations of a step, and the places where the host would wait for an accelerator; only on rank 0."""
    task = DiffDisTask(config.model, config.objective)
    counted = of_a_step(task, replace(config.train, zero_stage=zero_stage), batches(images, captions, rank, 1))
    return counted and counted[0]


def memory(which: str, global_batch: int) -> float:
    """Return the peak GB for InfoNCE and its gradient, excluding inputs: `contrastive_memory` in a new process."""
    code = f"from tests.benchmarks.train_step import contrastive_memory; contrastive_memory({which!r}, {global_batch})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": own_ray.PATHS}, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def contrastive_memory(which: str, global_batch: int) -> None:
    """Print the memory of one rank, when ranks of LOCAL samples each make up the global batch.

    The other ranks' data are not communicated (torch's fake process group), which changes neither the sizes nor the order of
    the computations.
    """

    def gb(name: str) -> float:  # VmRSS (current) or VmHWM (peak) of this process
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024 / 1e9

    torch.distributed.init_process_group("fake", rank=0, world_size=global_batch // LOCAL, store=FakeStore())
    scale = torch.tensor(14.0, requires_grad=True)
    num = LOCAL if which == "chunked" else global_batch
    predicted = F.normalize(torch.randn(num, 1, WIDTH), dim=-1).requires_grad_()
    query, ids = F.normalize(torch.randn(num, WIDTH), dim=-1), torch.arange(num)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = gb("VmRSS")
    if which == "chunked":
        loss = InfoNCE()(predicted, query, ids, scale).mean
    else:
        loss = plain_alignment_loss(predicted, query, ids, scale).loss.mean()
    loss.backward()
    print(round(gb("VmHWM") - before, 3))


def on_ranks(function: Callable, num_workers: int, *arguments: Any) -> float:
    """Return the mean of the ranks' results."""
    group = Ranks(num_workers)
    try:
        return statistics.mean(group.run(function, *arguments))
    finally:
        group.stop()


def rates(config: PretrainConfig, sources: Path, images: tuple, num_workers: int, rounds: int, suffix: str) -> dict[str, float]:
    """Return samples/s of every contender, and the ratios of (a) to the others."""
    contenders = {
        "ours": partial(ours, config, sources, num_workers),
        "bare": partial(on_ranks, bare, num_workers, config, *images),
        "ddp": partial(on_ranks, ddp, num_workers, config, *images),
    }
    steps = in_turns(contenders, rounds, warm_up=0)
    samples = {name: [value * num_workers * MICRO_BATCH for value in values] for name, values in steps.items()}
    result = {f"samples_per_second_{name}{suffix}": value for name, value in medians(samples).items()}
    return result | {f"ratio_to_{other}{suffix}": ratio(samples, "ours", other) for other in ("bare", "ddp")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    config = configuration()
    with tempfile.TemporaryDirectory() as folder:
        images = write_source(Path(folder))
        result = rates(config, Path(folder), images, 2, arguments.rounds, "")
        result |= rates(config, Path(folder), images, 1, arguments.rounds, "_with_a_core_to_spare")
        group = Ranks(2)
        seconds = group.run(tasks, config, *images, 16)[0]
        by_stage = [group.run(counts, config, *images, zero_stage)[0] for zero_stage in range(4)]
        group.stop()
    result |= {f"collectives_zero_{stage}": number.collectives for stage, number in enumerate(by_stage)}
    result |= {f"host_waits_zero_{stage}": number.host_waits for stage, number in enumerate(by_stage)}
    result["joint_cost_ratio"] = round(seconds["joint"] / (seconds["generation"] + seconds["alignment"]), 3)
    result |= {f"seconds_per_step_{name}": round(value, 3) for name, value in seconds.items()}
    for which, global_batch in (("chunked", 32768), ("chunked", 16384), ("plain", 16384), ("plain", 8192)):
        result[f"contrastive_gb_{which}_{global_batch // 1024}k"] = memory(which, global_batch)
    print(json.dumps(result | {"contrastive_local_batch": LOCAL, "contrastive_width": WIDTH}))


if __name__ == "__main__":
    main()
