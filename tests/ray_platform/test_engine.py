"""The DeepSpeed engine against a plain torch loop, on ranks without Ray."""

import math

import pytest
import torch

from ray_platform.contracts import ConfigError
from ray_platform.train.config import BatchPlan, TrainConfig
from ray_platform.train.optimizer import ema_decay_at
from tests.ranks import Ranks
from tests.ray_platform.small_task import SmallTask, samples

GLOBAL_BATCH, STEPS = 16, 6
BASE = {"num_steps": 12, "warmup_steps": 3, "gradient_clipping": 0.5, "ema_decay": 0.9, "zero_stage": 0}


def rank_loop(rank, fields, world_size, num_micro, start, stop, state, bad_at):
    """Steps start..stop of one rank, from a state or the beginning: losses, the whole state and what was skipped."""
    from ray_platform.train.engine import Engine

    task = SmallTask()
    size = GLOBAL_BATCH // world_size // num_micro
    engine = Engine(task, TrainConfig(**fields), size, num_micro)
    if state is not None:
        engine.load_state(start, lambda name, shape: state.get(name))
    losses, changed = [], []
    for step in range(start, stop):
        batch = samples(step, GLOBAL_BATCH)
        if step == bad_at and rank == 0:
            batch["y"][0] = math.inf
        mine = [{k: v[(rank * num_micro + m) * size :][:size] for k, v in batch.items()} for m in range(num_micro)]
        loss, _ = engine.backward(mine, [step * 100 + rank * num_micro + m for m in range(num_micro)])
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world_size)
        changed.append(engine.update(step))
        if engine.config.compile and step == start:
            engine.compile()
    found = {name: tensor.detach().clone() for name, tensor in engine.state()}
    return losses, found, changed, engine.weights(), engine.grad_norm


GROUPS = {}


@pytest.fixture(scope="module", autouse=True)
def stop_groups():
    yield
    for group in GROUPS.values():
        group.stop()
    GROUPS.clear()


def train(world_size, *, num_micro=1, start=0, stop=STEPS, state=None, bad_at=-1, **fields):
    group = GROUPS.setdefault(world_size, Ranks(world_size))
    results = group.run(rank_loop, BASE | fields, world_size, num_micro, start, stop, state, bad_at)
    for _, found, *_ in results[1:]:
        for name, tensor in results[0][1].items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    return results[0]


def plain_loop(num_seeds, num_steps=STEPS):
    """AdamW, clipping, the schedule and the EMA by hand."""
    task = SmallTask()
    module, config = task.module, TrainConfig(**BASE)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(task.parameter_groups(), betas=(0.9, 0.999))
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(num_steps):
        batch, size = samples(step, GLOBAL_BATCH), GLOBAL_BATCH // num_seeds
        optimizer.zero_grad()
        parts = [module({k: v[i * size :][:size] for k, v in batch.items()}, step * 100 + i)[0] for i in range(num_seeds)]
        loss = torch.stack(parts).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        progress = (step - 3) / (config.num_steps - 3)
        factor = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        losses.append(loss.item())
        for name, parameter in trained.items():
            ema[name].lerp_(parameter.detach(), 1 - ema_decay_at(0.9, step + 1))
    return losses, module.state_dict(), ema


@pytest.fixture(scope="module")
def reference():
    return plain_loop(num_seeds=4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_losses_weights_and_ema_equal_those_of_a_plain_loop(reference, zero_stage):
    """Two ranks with two micro-batches each; clipping, warm-up, cosine, a frozen layer and a buffer."""
    losses, found, _, exported, _ = train(2, num_micro=2, zero_stage=zero_stage)
    expected_losses, weights, ema = reference
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert {n.partition("/")[2] for n in found} == set(weights)
    for name, value in weights.items():
        torch.testing.assert_close(found[f"weights/{name}"], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, value in ema.items():
        torch.testing.assert_close(found[f"ema/{name}"], value, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(value, weights[name]), "this EMA never changed"
        torch.testing.assert_close(exported[name], found[f"ema/{name}"], rtol=0, atol=0)
    assert torch.equal(exported["frozen.weight"], weights["frozen.weight"])


@pytest.mark.parametrize(("first", "then"), [((2, 3), (1, 1)), ((1, 1), (2, 3)), ((2, 2), (2, 0)), ((2, 0), (1, 2))])
def test_a_state_goes_on_at_another_world_size_and_zero_stage(reference, first, then):
    _, state, *_ = train(first[0], num_micro=4 // first[0], zero_stage=first[1], stop=3)
    losses, found, *_ = train(then[0], num_micro=4 // then[0], zero_stage=then[1], start=3, state=state)
    torch.testing.assert_close(losses, reference[0][3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["ema/first.weight"], reference[2]["first.weight"], rtol=1e-5, atol=1e-5)


def test_whatever_stage_a_state_is_at_it_exports_the_same_weights():
    """To the last bit, EMA and plain."""
    _, state, *_ = train(2, zero_stage=3, stop=3)
    for stage in (0, 1, 2):
        _, found, _, exported, _ = train(2, zero_stage=stage, start=3, stop=3, state=state)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert torch.equal(exported["first.weight"], state["ema/first.weight"])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_same_ranks_go_on_to_the_last_bit(zero_stage):
    whole = train(2, zero_stage=zero_stage)
    _, state, *_ = train(2, zero_stage=zero_stage, stop=3)
    losses, found, *_ = train(2, zero_stage=zero_stage, start=3, state=state)
    assert losses == whole[0][3:]
    for name, tensor in whole[1].items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_with_an_infinite_gradient_changes_nothing(zero_stage):
    """On one rank of two: both leave the step out, and go on."""
    losses, found, changed, *_ = train(2, zero_stage=zero_stage, stop=3, bad_at=2)
    assert changed == [True, True, False]
    assert math.isinf(losses[2])
    before = train(2, zero_stage=zero_stage, stop=2)
    for name, tensor in before[1].items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("fields", [{"precision": "bf16"}, {"offload_optimizer": True}, {"channels_last": True}])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_precision_and_offload_train_as_well(reference, zero_stage, fields):
    losses, found, *_ = train(2, num_micro=2, zero_stage=zero_stage, **fields)
    torch.testing.assert_close(losses, reference[0], rtol=0.03 if "precision" in fields else 1e-5, atol=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_fp16_scales_its_loss_and_finds_a_scale(reference, zero_stage):
    """From a scale that overflows at first: those steps are left out, and then it trains."""
    losses, found, changed, _, grad_norm = train(2, num_micro=2, zero_stage=zero_stage, precision="fp16", gpus_per_worker=1)
    assert changed.count(True) >= 4
    first = changed.index(True)
    torch.testing.assert_close(losses[: first + 1], [reference[0][0]] * (first + 1), rtol=0.3, atol=0)
    assert losses[-1] < losses[first]
    assert 0 < grad_norm < 10, "as if there were no scale"
    assert all(tensor.isfinite().all() for tensor in found.values())


@pytest.mark.slow
def test_a_compiled_module_trains_as_well(reference):
    losses, *_ = train(2, num_micro=2, zero_stage=2, compile=True)
    torch.testing.assert_close(losses, reference[0], rtol=1e-4, atol=1e-5)


def test_deepspeeds_own_configuration_can_be_extended():
    from ray_platform.train.engine import deepspeed_config

    config = TrainConfig(zero_stage=2, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True})
    made = deepspeed_config(config, 4, 2)
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["wall_clock_breakdown"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [((128, 8, 16), (16, 1)), ((128, 4, 16), (16, 2)), ((128, 7, 16), (9, 2)), ((8, 1, 4), (4, 2)), ((3, 4, 4), (1, 1))],
)
def test_a_global_batch_is_shared_out(asked, expected):
    plan = BatchPlan.of(*asked)
    assert (plan.micro_batch_size, plan.num_micro_batches) == expected
    assert plan.micro_batch_size <= asked[2]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_workers": (4, 2)}, "num_workers"),
        ({"num_workers": 0}, "num_workers"),
        ({"global_batch_size": 1, "num_workers": 2}, "global_batch_size"),
        ({"precision": "fp16"}, "precision"),
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"max_loss_factor": 1.0}, "max_loss_factor"),
    ],
)
def test_what_cannot_work_is_refused_by_its_field(fields, named):
    with pytest.raises(ConfigError, match=f"train.{named}"):
        TrainConfig(**fields)
