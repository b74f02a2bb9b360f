"""Runs of the engine on ranks without Ray, and the same steps as a plain torch loop."""

import math

import torch

from ray_platform.train.config import TrainConfig
from ray_platform.train.optimizer import ema_decay_at
from tests.ray_platform.small_task import SmallTask, samples
from tests.support.ranks import shared_ranks, whole_state

GLOBAL_BATCH, STEPS = 16, 6
# Otherwise ZeRO 3 keeps full copies of small parameters on every rank and does not shard a small model at all.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
ADAM = {"betas": (0.8, 0.95), "eps": 1e-6}
BASE = {"num_steps": 12, "warmup_steps": 3, "gradient_clipping": 0.5, "ema_decay": 0.9, "zero_stage": 0, **ADAM}
STAGES = (0, 1, 2, 3)


def rank_loop(rank, fields, world_size, num_micro, start, stop, state, bad_at):
    """Run steps start..stop of one rank, from a state or from the beginning.

    Returns:
        (losses, full state, whether each step changed it, last gradient norm).
    """
    from ray_platform.train.engine import Engine

    task = SmallTask()
    size = GLOBAL_BATCH // world_size // num_micro
    engine = Engine(task, TrainConfig(**fields, deepspeed=SHARDED if fields["zero_stage"] == 3 else {}), size, num_micro)
    assert not fields["zero_stage"] or hasattr(engine.optimizer, "clip_grad"), "`zero.set_clipping` sets it"
    if fields["zero_stage"]:
        timeout = engine.engine.data_parallel_group._get_backend(engine.device).options._timeout
        assert timeout.total_seconds() == engine.config.collective_timeout_s
    if state is not None:
        engine.load_state(start, lambda name, shape: state.get(name))
    losses, changed = [], []
    for step in range(start, stop):
        batch = samples(step, GLOBAL_BATCH)
        if step == bad_at and rank == 0:
            batch["y"][0] = math.inf
        parts = [{k: v[(rank * num_micro + m) * size :][:size] for k, v in batch.items()} for m in range(num_micro)]
        loss, _ = engine.backward(parts, [step * 100 + rank * num_micro + m for m in range(num_micro)])
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world_size)
        update = engine.update(step)
        changed.append(update.updated)
        if fields["zero_stage"] == 3:
            assert not [name for name, p in task.module.named_parameters() if p.numel()], "every rank holds them whole"
        if engine.config.compile and step == start:
            task.compile()
    return losses, whole_state(engine), changed, update.grad_norm if start < stop else 0.0


def train(world_size=2, *, num_micro=2, start=0, stop=STEPS, state=None, bad_at=-1, **fields):
    results = shared_ranks(world_size).run(rank_loop, BASE | fields, world_size, num_micro, start, stop, state, bad_at)
    for _, tensors, *_ in results[1:]:
        assert_equal(tensors, results[0][1])
    return results[0]


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


def plain_run():
    """Losses, weights and EMA of a plain loop with AdamW, clipping, schedule and EMA written out."""
    task = SmallTask()
    module, config = task.module, TrainConfig(**BASE)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(task.parameter_groups(), **ADAM)
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(STEPS):
        batch, size = samples(step, GLOBAL_BATCH), GLOBAL_BATCH // 4
        optimizer.zero_grad()
        parts = [module({k: v[i * size :][:size] for k, v in batch.items()}, step * 100 + i)[0] for i in range(4)]
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
