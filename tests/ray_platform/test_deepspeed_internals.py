"""DeepSpeed's undocumented attributes, as train.deepspeed_internals uses them: fails when a new version changes them."""

import pytest
import torch

from ray_platform.train.config import TrainConfig
from tests.ray_platform.small_task import SmallTask, samples

pytestmark = pytest.mark.ranks


def use_every_attribute(rank, zero_stage):
    import deepspeed

    from ray_platform.train import deepspeed_internals
    from ray_platform.train.engine import Engine

    sharded = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if zero_stage == 3 else {}
    engine = Engine(SmallTask(), TrainConfig(zero_stage=zero_stage, deepspeed=sharded), 4, 1)
    weight, optimizer = engine.task.module.first.weight, engine.optimizer
    assert deepspeed.ops.__compatible_ops__ == {}
    assert deepspeed_internals.full_shape(weight) == (40, 24)
    if zero_stage == 3:
        assert sum(shard.numel() for shard in deepspeed_internals.flat_shards(optimizer)) >= 40 * 24 / 2
        part = deepspeed_internals.local_part(weight, torch.arange(40 * 24.0), rank, 2)
        assert part.tolist() == list(range(rank * 480, rank * 480 + 480))
    else:
        deepspeed_internals.link_optimizer_state(optimizer)
        deepspeed_internals.refresh_model_weights(optimizer)
    assert hasattr(optimizer, "clip_grad")
    before = {name: tensor.clone() for name, tensor in engine.state(("weights",))}
    batch = samples(0, 4)
    batch["y"][0] = float("inf")
    engine.backward([batch], [0])
    engine.update(0)
    assert deepspeed_internals.has_overflowed(optimizer)
    engine.backward([samples(1, 4)], [0])
    engine.update(1)
    assert not deepspeed_internals.has_overflowed(optimizer)
    return any(not torch.equal(tensor, before[name]) for name, tensor in engine.state(("weights",)))


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_the_attributes_that_are_used_exist_and_work(two_ranks, zero_stage):
    assert two_ranks.run(use_every_attribute, zero_stage) == [True, True]
