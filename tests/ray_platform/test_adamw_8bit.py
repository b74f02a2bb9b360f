"""AdamW with moments of 8 bits: close to AdamW, and resumed to the last bit."""

import sys

import pytest
import torch

from ray_platform.contracts import ConfigError
from ray_platform.train.config import TrainConfig
from ray_platform.train.preflight import RunPlan
from tests.ray_platform.engine_runs import BASE, assert_equal, train
from tests.support.environments import BITSANDBYTES

sys.path.append(BITSANDBYTES)

import bitsandbytes

from ray_platform.train.adamw_8bit import AdamW8bit, QuantizedTensor


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [3, 1280, 100_000])
def test_rounded_values_are_rounded_to_themselves(size, signed):
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    values = values if signed else values.square()
    values[: size // 3] = 0
    once = QuantizedTensor.of(values, signed)
    rounded = once.part(0, size)
    twice = QuantizedTensor.of(rounded, signed)
    assert torch.equal(once.codes, twice.codes)
    assert torch.equal(once.scales, twice.scales)
    torch.testing.assert_close(rounded, values, rtol=0.1, atol=0.01 * float(values.abs().max()))
    assert torch.equal(once.part(size // 2, size // 3), rounded[size // 2 :][: size // 3])


def test_steps_equal_those_of_bitsandbytes_own_optimizer():
    """Whose most negative level is 0.993 of ours."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(10_000, generator=generator)
    ours, theirs = (torch.nn.Parameter(weights.clone()) for _ in range(2))
    fields = {"betas": (0.9, 0.95), "eps": 1e-6}
    optimizer = AdamW8bit([{"params": [ours], "lr": 1e-2, "weight_decay": 0.1}], **fields)
    zeros = {name: QuantizedTensor.of(torch.zeros(10_000), name == "exp_avg") for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[ours] = {"step": torch.zeros(())} | zeros
    optimizer.grad_scale = torch.tensor(2.0)
    reference = bitsandbytes.optim.AdamW8bit([theirs], lr=1e-2, weight_decay=0.1, **fields)
    for _ in range(5):
        ours.grad = torch.randn(10_000, generator=generator)
        theirs.grad = ours.grad / 2
        optimizer.step()
        reference.step()
    assert (ours - weights).abs().mean() > 0.01
    assert (ours - theirs).abs().mean() < 1e-3 * (ours - weights).abs().mean()


@pytest.mark.ranks
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_run_is_close_to_that_of_adamw_and_continues_to_the_last_bit(zero_stage):
    fields = {"zero_stage": zero_stage, "optimizer": "adamw_8bit"}
    losses, tensors, *_ = train(**fields)
    expected = train(zero_stage=zero_stage)
    torch.testing.assert_close(losses, expected[0], rtol=1e-2, atol=0)
    assert losses != expected[0]
    state = train(stop=3, **fields)[1]
    resumed = train(start=3, state=state, **fields)
    assert resumed[0] == losses[3:]
    assert_equal(resumed[1], tensors)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    plan = RunPlan(None, None, TrainConfig(**BASE, optimizer="adamw_8bit"), None, str(tmp_path), {}, dict)
    monkeypatch.delattr("ray_platform.train.adamw_8bit")
    monkeypatch.delitem(sys.modules, "ray_platform.train.adamw_8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it raises ImportError
    with pytest.raises(ConfigError, match=r"^train\.optimizer: .*bitsandbytes"):
        plan.check_packages()
