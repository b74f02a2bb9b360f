"""500 steps with bf16 weights and float32 masters end where 500 float32 steps end, within the noise between seeds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffdis.config import ObjectiveConfig
from diffdis.task import DiffDisTask
from ray_platform.train.config import TrainConfig
from tests.support import ranks

pytestmark = [pytest.mark.ranks, pytest.mark.slow, pytest.mark.timeout(3600)]

COLORS = {"red": (230, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 230), "white": (240, 240, 240), "black": (15, 15, 15)}
STEPS, BATCH, WINDOW = 500, 16, 100
CPU = torch.device("cpu")


def colored(rng, number):
    """Return images of a color with noise, and the color's name as their captions."""
    captions = rng.choice(list(COLORS), number)
    noise = rng.normal(0, 25, (number, 16, 16, 3))
    images = np.clip(np.array([COLORS[caption] for caption in captions])[:, None, None] + noise, 0, 255)
    return SimpleNamespace(tensors={"image": images.astype(np.uint8)}, captions=captions.tolist())


def train(rank, model, precision, seed):
    """Return the loss of every step, and the validation losses and accuracy after the last one."""
    from ray_platform.train.engine import Engine

    torch.manual_seed(seed)
    task = DiffDisTask(model, ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3, lambda_alignment=0.1))
    config = TrainConfig(num_steps=STEPS, warmup_steps=20, zero_stage=0, precision=precision)
    engine, rng, losses = Engine(task, config, BATCH, 1), np.random.default_rng(seed), []
    for step in range(STEPS):
        loss, _ = engine.backward([task.inputs(colored(rng, BATCH), CPU)], [1000 * seed + step])
        engine.update(step)
        losses.append(loss.item())
    validation = task.inputs(colored(np.random.default_rng(100), 200), CPU)
    with engine.inference():
        _, metrics = task.module(validation, 0)
        accuracy = task.score(task.embed_heldout(validation))["heldout/acc1"]
    names = ("loss_generation", "loss_alignment")
    return losses, [float(metrics[name][0] / metrics[name][1]) for name in names] + [accuracy]


def test_half_precision_trains_as_well_as_float32(tiny_model, monkeypatch):
    monkeypatch.setattr(ranks, "_TIMEOUT_S", 1800)  # a CPU without bf16 instructions takes half a second per step
    group = ranks.shared_ranks(1)
    results = {}
    for precision in ("fp32", "bf16"):
        runs = [group.run(train, tiny_model, precision, seed)[0] for seed in (0, 1)]
        curves = [np.reshape(losses, (-1, WINDOW)).mean(axis=1) for losses, _ in runs]
        results[precision] = np.array(
            [[*curve, *scores] for curve, (_, scores) in zip(curves, runs, strict=True)]
        )  # [seeds, values]
    noise = 2 * np.max([np.ptp(values, axis=0) for values in results.values()], axis=0)
    difference = np.abs(results["bf16"].mean(axis=0) - results["fp32"].mean(axis=0))
    assert (difference <= noise).all(), results
    assert results["bf16"][:, -1].min() > 0.9, "both learn the colors"
