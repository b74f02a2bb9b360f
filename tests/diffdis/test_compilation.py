"""Compiled blocks compute the same, without graph breaks, and are compiled once."""

import numpy as np
import pytest
import torch
from diffusers.models.attention import FeedForward
from torch import nn
from torch._dynamo.utils import counters

from diffdis.autoencoder import to_latents
from diffdis.config import ObjectiveConfig
from diffdis.image_branch import compile_blocks

CPU = torch.device("cpu")


def steps(task, batch, before_second):
    """Return losses and gradients of three steps, and the number of compiled graphs after each."""
    losses, gradients, graphs = [], [], []
    for seed in range(3):
        if seed == 1:
            before_second()
        task.module.zero_grad()
        loss, _ = task.module(task.inputs(batch, CPU), seed)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None]))
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, gradients, graphs


@pytest.mark.parametrize(
    ("visibility", "checkpointing", "lora_rank"),
    [
        ("one_way", True, 0),
        *(pytest.param(*rest, marks=pytest.mark.slow) for rest in (("joint", False, 0), ("one_way", False, 2))),
    ],
)
def test_compiled_blocks_compute_the_same_and_are_compiled_in_one_step(make_task, batch, visibility, checkpointing, lora_rank):
    """Compiled without code generation, which takes minutes: what is compiled, and that it is one graph each, does not differ."""
    torch.compiler.reset()
    counters.clear()
    tasks = [make_task(ObjectiveConfig(lora_rank=lora_rank), query_visibility=visibility) for _ in range(2)]
    for task in tasks:
        if checkpointing:
            task.enable_activation_checkpointing()
    expected, expected_gradients, _ = steps(tasks[0], batch, lambda: None)
    losses, gradients, graphs = steps(tasks[1], batch, lambda: compile_blocks(tasks[1].module.model, backend="aot_eager"))
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-6)
    for found, value in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
    assert graphs[0] == 0
    assert 5 < graphs[1] == graphs[2] < 64, "the third step compiles nothing"
    assert not counters["graph_break"]


def test_a_compiled_encoder_of_images_computes_the_same(small_vae):
    torch.compiler.reset()
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = to_latents(small_vae, images, CPU)
    counters.clear()
    compile_blocks(small_vae.vae.encoder, backend="aot_eager")
    torch.testing.assert_close(to_latents(small_vae, images, CPU), expected, rtol=1e-5, atol=1e-5)
    assert counters["stats"]["unique_graphs"] > 1
    assert not counters["graph_break"]


@pytest.mark.slow
def test_images_of_many_shapes_are_compiled():
    """Each of `data.aspect_ratios` has as many shapes as Stable Diffusion has blocks of other widths."""
    torch.compiler.reset()
    network, sizes, compiled = nn.Sequential(FeedForward(2)), range(1, 70), []
    compile_blocks(network, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    for size in sizes:
        network(torch.zeros(size, 2))
    assert len(compiled) == len(sizes)


@pytest.mark.slow
def test_generated_code_computes_the_same(make_task, batch):
    tasks = [make_task() for _ in range(2)]
    expected, _, _ = steps(tasks[0], batch, lambda: None)
    losses, _, _ = steps(tasks[1], batch, tasks[1].compile)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
