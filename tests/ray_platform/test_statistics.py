"""Estimates of the remaining time, statistics by block, and the warning before a run diverges."""

import itertools
import math
import random

import pytest
import torch

from ray_platform.placement import PEAK_FLOPS
from ray_platform.train.config import TrainConfig
from ray_platform.train.statistics import GradientMonitor, ThroughputMeter, activation_statistics, block_of, peak_flops
from tests.ray_platform.engine_runs import ADAM, GLOBAL_BATCH, SHARDED
from tests.ray_platform.small_task import SmallTask, samples
from tests.support.messages import check_message


def test_slow_first_steps_and_single_outliers_do_not_change_the_remaining_time():
    meter = ThroughputMeter(1.0)
    for seconds in (30.0, *[1.0] * 8, 12.0, 1.0):
        meter.add({"loss": torch.tensor([1.0, 1.0])}, captions=["a"], waited=0.25 * seconds, worked=0.75 * seconds)
    assert meter.seconds_left(600) == pytest.approx(600.0)
    assert meter.seconds_left(0) == 0


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA GH200 480GB", "H200"), ("NVIDIA GB200", "B200"), ("Tesla V100-SXM2-16GB", "V100"),
        ("Tesla V100S-PCIE-32GB", "V100"),
        ("NVIDIA A100-SXM4-40GB", "A100"), ("CPU GPU accelerator_type:A100 memory", "A100"),
        ("NVIDIA L4", "L4"), ("NVIDIA L40", "L40"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A1000 Laptop GPU", ""), ("NVIDIA A10", ""), ("NVIDIA H20", ""),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_whole_name_of_an_accelerator(monkeypatch, name, known):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == PEAK_FLOPS.get(known, 0.0)


def test_names_of_blocks():
    names = {
        "model.unet.down_blocks.0.resnets.1.conv1": "unet.down_blocks.0",
        "model.unet.mid_block.attentions.0.proj_in": "unet.mid_block",
        "model.unet.conv_in": "unet.conv_in",
        "model.temperature": "temperature",
        "alignment": "alignment",
    }
    assert {name: block_of(name) for name in names} == names


def test_activations_are_those_of_the_layers_inside_the_block_only():
    torch.manual_seed(0)
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "b": torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU())})
    x = torch.randn(5, 2)
    with activation_statistics(module) as rms:
        first = module["a"](x)
        second = module["b"][0](first)
        module["b"][0](first)
    expected = {"a": first.square().mean().sqrt(), "b.0": second.square().mean().sqrt()}
    torch.testing.assert_close(rms, {block: torch.stack([value, torch.tensor(1.0)]) for block, value in expected.items()})
    before = rms["a"].clone()
    module["a"](x * 100)
    assert not any(layer._forward_hooks for layer in module.modules())
    assert torch.equal(rms["a"], before), "nothing is recorded after the block"


def norms_on_a_rank(rank, fields):
    """Return the norm of all gradients, and those of the blocks, of a step with two micro-batches."""
    from ray_platform.train.engine import Engine

    task, size = SmallTask(), GLOBAL_BATCH // 4
    config = TrainConfig(**fields, **ADAM, gradient_clipping=0.01, deepspeed=SHARDED if fields["zero_stage"] == 3 else {})
    engine = Engine(task, config, size, 2)
    batch = samples(0, GLOBAL_BATCH)
    parts = [{k: v[(rank * 2 + m) * size :][:size] for k, v in batch.items()} for m in range(2)]
    engine.backward(parts, [rank * 2 + m for m in range(2)])
    update = engine.update(0, statistics=True)
    return update.grad_norm, {name: norm.item() for name, norm in update.block_norms.items()}


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_norms_of_blocks_are_those_of_one_process_whatever_the_shards(two_ranks, zero_stage):
    task, size = SmallTask(), GLOBAL_BATCH // 4
    batch = samples(0, GLOBAL_BATCH)
    losses = [task.module({k: v[i * size :][:size] for k, v in batch.items()}, i)[0] for i in range(4)]
    torch.stack(losses).mean().backward()
    squares = {}
    for name, parameter in task.module.named_parameters():
        if parameter.grad is not None:
            block = block_of(name.rpartition(".")[0] or name)
            squares[block] = squares.get(block, 0.0) + parameter.grad.square().sum().item()
    for grad_norm, norms in two_ranks.run(norms_on_a_rank, {"zero_stage": zero_stage}):
        assert norms == pytest.approx({block: math.sqrt(value) for block, value in squares.items()}, rel=1e-4)
        assert grad_norm == pytest.approx(math.sqrt(sum(squares.values())), rel=1e-4)


def test_a_rising_norm_is_reported_before_the_loss_is_not_finite():
    """Gradient descent whose learning rate becomes too large for one direction after 200 steps."""
    curvature, weights = torch.tensor([1.0, 10.0]), torch.tensor([1.0, 1e-3])
    monitor, warned, generator = GradientMonitor(), [], torch.Generator().manual_seed(0)
    for step in itertools.count():
        gradient = curvature * weights + 0.01 * torch.randn(2, generator=generator)
        if not math.isfinite(norm := gradient.square().sum().sqrt().item()):
            break
        if line := monitor.add(norm):
            warned.append((step, line))
        weights = weights - (0.05 if step < 200 else 0.23) * gradient
    [(first, line)] = warned
    assert 200 < first < step - 50
    recent, rise = line.partition("rises: ")[2].split(" in the last steps, ")
    check_message("the gradient norm rises", f"step {first}: {line}", STEP=first, NORM=recent, FACTOR=rise.split()[0])


@pytest.mark.parametrize("trend", [-0.002, 0.0, 0.001])
def test_noise_trends_and_single_spikes_are_not_reported(trend):
    """Norms vary by a factor of 1.6, and change by one of 2.7 in 500 to 1,000 steps; some steps have 100 times as much."""
    numbers, monitor = random.Random(0), GradientMonitor()
    for step in range(3000):
        spike = 100.0 if step % 400 == 399 else 1.0
        assert not monitor.add(spike * math.exp(numbers.gauss(0.0, 0.5) + trend * step)), step
