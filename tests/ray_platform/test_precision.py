"""Weights in half precision with float32 copies in the optimizer, on ranks without Ray."""

import pytest
import torch

from ray_platform.train.config import TrainConfig
from tests.ray_platform.engine_runs import SHARDED, STAGES, assert_equal, train
from tests.ray_platform.small_task import SmallTask, samples
from tests.support.ranks import shared_ranks, whole_state

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_weights_in_half_precision_have_float32_copies(reference, zero_stage, num_micro):
    """They train about as well, and a checkpoint has what is not rounded, of the frozen weights, too."""
    losses, tensors, *_ = train(num_micro=num_micro, zero_stage=zero_stage, precision="bf16")
    if num_micro == 2:  # the batches of the reference
        torch.testing.assert_close(losses, reference[0], rtol=0.03, atol=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    trained = tensors["weights/first.weight"]
    assert not torch.equal(trained, trained.bfloat16().float())
    for name in ("frozen.weight", "frozen.bias"):
        assert torch.equal(tensors[f"weights/{name}"], reference[1][name]), name


@pytest.mark.parametrize("zero_stage", STAGES)
def test_training_in_half_precision_starts_from_the_weights_before_they_are_rounded(zero_stage):
    """As for a warm start, whose weights a checkpoint and the EMA would otherwise have in half precision only."""
    tensors = train(zero_stage=zero_stage, precision="bf16", stop=0)[1]
    for name, value in SmallTask().module.named_parameters():
        for state in ("weights", "ema") if value.requires_grad else ("weights",):
            assert torch.equal(tensors[f"{state}/{name}"], value), f"{state}/{name}"


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 3), (3, 0)])
def test_a_state_of_half_precision_is_loaded_to_the_last_bit(first, then):
    state = train(zero_stage=first, precision="bf16", stop=3)[1]
    for precision in ("bf16", "fp32"):
        assert_equal(train(zero_stage=then, precision=precision, start=3, stop=3, state=state)[1], state)


class ScaledTask(SmallTask):
    """With a parameter that stays float32, and with the type in which the module uses each parameter."""

    def __init__(self):
        super().__init__()
        self.module.log_scale = torch.nn.Parameter(torch.zeros(1))
        forward = self.module.forward

        def scaled(inputs, seed):
            loss, metrics = forward(inputs, seed)
            self.used = {name: parameter.dtype for name, parameter in self.module.named_parameters()}
            self.uses_flash_attention = torch.backends.cuda.flash_sdp_enabled()  # the switch for CPUs, too
            return loss * self.module.log_scale.exp().squeeze(), metrics

        self.module.forward = scaled

    def parameter_groups(self):
        own = self.module.log_scale
        others = [group | {"params": [p for p in group["params"] if p is not own]} for group in super().parameter_groups()]
        return [*others, {"name": "scale", "params": [own], "lr": 1e-3, "weight_decay": 0.0, "float32": True}]


def scaled_step(rank, zero_stage):
    from ray_platform.train.engine import Engine

    task = ScaledTask()
    shards = SHARDED if zero_stage == 3 else {}
    engine = Engine(task, TrainConfig(zero_stage=zero_stage, precision="bf16", warmup_steps=0, deepspeed=shards), 4, 1)
    for step in range(2):
        engine.backward([samples(step, 8) | {}], [step])
        assert engine.update(step).updated
    return task.used, whole_state(engine)


def attention_on_a_rank(rank, precision):
    from ray_platform.train.engine import Engine

    task = ScaledTask()
    Engine(task, TrainConfig(zero_stage=0, precision=precision), 4, 1).backward([samples(0, 4)], [0])
    return task.uses_flash_attention, torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cpus_steps_in_bf16_use_the_plain_attention_kernels(precision):
    """Flash attention in bf16 took several times as long (LOG.md). What is outside the step keeps its kernels."""
    assert shared_ranks(1).run(attention_on_a_rank, precision) == [(precision == "fp32", True)]


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_group_stays_in_float32_except_under_zero_3(two_ranks, zero_stage):
    (used, state), (_, other) = two_ranks.run(scaled_step, zero_stage)
    assert {name for name, dtype in used.items() if dtype == torch.float32} == ({"log_scale"} if zero_stage < 3 else set())
    assert state["weights/log_scale"].item() == pytest.approx(-2e-3, rel=0.01), "two steps down, at the rate of its group"
    assert_equal(other, state)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_fp16_scales_its_loss_and_finds_a_scale(reference, zero_stage):
    """The initial scale overflows; those steps are skipped."""
    losses, tensors, changed, grad_norm = train(zero_stage=zero_stage, precision="fp16", gpus_per_worker=1, stop=16)
    assert changed.count(True) >= 4
    first = changed.index(True)
    torch.testing.assert_close(losses[: first + 1], [reference[0][0]] * (first + 1), rtol=0.3, atol=0)
    assert losses[-1] < losses[first]
    assert 0 < grad_norm < 10, "as if there were no scale"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def large_norm(rank, zero_stage):
    """Run a step whose gradients are finite in fp16, and their norm, times the loss scale, is above its range."""
    from ray_platform.train import zero
    from ray_platform.train.engine import Engine

    found = []
    for scale in (1.0, None):
        engine = Engine(SmallTask(), TrainConfig(zero_stage=zero_stage, precision="fp16", gpus_per_worker=1), 8, 1)
        engine.loss_scale.value = scale or 6e4 / found[0][0]
        engine.backward([samples(0, 8)], [0])
        gradients = zero.reduced_gradients(engine.optimizer)
        largest = max(gradient.abs().max().item() for gradient in gradients)
        update = engine.update(0)
        found.append((largest, update.updated, update.grad_norm, engine.loss_scale.value))
    return found


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_the_norm_of_gradients_may_exceed_the_range_of_fp16(zero_stage):
    (_, _, norm, _), (largest, updated, same_norm, scale) = shared_ranks(1).run(large_norm, zero_stage)[0]
    assert largest < 65504 < same_norm * scale
    assert updated
    assert same_norm == pytest.approx(norm, rel=0.01)
