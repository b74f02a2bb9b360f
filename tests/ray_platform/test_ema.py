"""Scores, previews, `keep_best` and the export use the same weights: the EMA where it exists."""

import numpy as np
import pytest
import torch
from torch import nn

from ray_platform.contracts import Batch
from ray_platform.train.checkpoint_format import list_checkpoints, read_manifest, read_weights
from ray_platform.train.config import TrainConfig
from ray_platform.train.heldout import score
from tests.ray_platform.engine_runs import BASE, SHARDED, assert_equal
from tests.ray_platform.small_task import SmallTask, samples
from tests.ray_platform.test_engine import checkpoint_manager, save_checkpoint
from tests.support.ranks import whole_state

pytestmark = pytest.mark.ranks


def evaluated_on_a_rank(rank, fields, deepspeed):
    """Return the state before and after an evaluation between two steps, its output, and the state after both steps."""
    from ray_platform.train.engine import Engine

    task = SmallTask()
    engine = Engine(task, TrainConfig(**BASE | fields, deepspeed=deepspeed), 4, 1)
    states = []
    for step in range(2):
        engine.backward([samples(10 * step + rank, 4)], [step])
        engine.update(step)
        states.append(whole_state(engine))
        with engine.inference():
            output = task.module(samples(99, 8), 0)[0]
        states.append(whole_state(engine))
    return states, output


@pytest.mark.parametrize("eval_weights", ["best", "weights", "ema_0.5"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("zero_stage", "deepspeed"),
    # ZeRO 3 with parameters of which a rank has only its part, and with some that all ranks hold.
    [(0, {}), (1, {}), (2, {}), (3, SHARDED), (3, {"zero_optimization": {"stage3_param_persistence_threshold": 50}})],
)
def test_an_evaluation_sees_the_ema_and_training_does_not(two_ranks, zero_stage, deepspeed, precision, eval_weights):
    fields = {"zero_stage": zero_stage, "precision": precision, "eval_weights": eval_weights, "ema_decays": (0.5,)}
    found = two_ranks.run(evaluated_on_a_rank, fields, deepspeed)
    for states, output in found:
        assert_equal(states[1], states[0])
        assert_equal(states[3], states[2])
        tensors, module = states[2], SmallTask().module
        name = "ema" if eval_weights == "best" else eval_weights
        module.load_state_dict({n: tensors.get(f"{name}/{n}", tensors[f"weights/{n}"]) for n in module.state_dict()})
        assert not torch.equal(tensors["ema/first.weight"], tensors["weights/first.weight"])
        if precision == "bf16":
            for parameter in module.parameters():
                parameter.data = parameter.data.bfloat16()
        torch.testing.assert_close(output, module(samples(99, 8), 0)[0], rtol=1e-6, atol=0)


class Climb:
    """A Task whose only weight rises by 0.1 per step, past 1, where its validation error is 0."""

    def __init__(self):
        self.module = nn.Module()
        self.module.position = nn.Parameter(torch.zeros(1))
        self.module.forward = lambda inputs, seed: (-self.module.position.sum(), {})

    def parameter_groups(self):
        return [{"name": "all", "params": [self.module.position], "lr": 0.1, "weight_decay": 0.0}]

    def precompute_step_loss(self, inputs, seeds, control, progress):
        return [{} for _ in inputs]

    def inputs(self, batch, device):
        return {"x": torch.from_numpy(batch.tensors["x"])}

    def embed_heldout(self, inputs):
        return {"error": (self.module.position - 1).square().expand(len(inputs["x"]))}

    def score(self, rows):
        return {"heldout/error": float(rows["error"].mean())}


def climbed_on_a_rank(rank, output, fields):
    """Train 14 steps with a score and a checkpoint after each."""
    from ray_platform.train.engine import Engine

    keep = {"keep_checkpoints": 1, "keep_best": "heldout/error", "keep_best_mode": "min"}
    constant = {"lr_schedule": "constant", "warmup_steps": 0, "betas": (0.0, 0.0), "ema_decay": 0.9, "zero_stage": 0}
    train = TrainConfig(**constant, **keep, **fields)
    task = Climb()
    engine = Engine(task, train, 1, 1)
    manager = checkpoint_manager(engine, output, **keep)
    heldout = Batch({"x": np.zeros((3, 1), dtype=np.float32)}, ["a", "b", "c"], ["0", "1", "2"], (), {})
    for step in range(14):
        engine.backward([{"x": torch.zeros(1)}], [step])
        engine.update(step)
        assert save_checkpoint(manager, step + 1, **score(engine, heldout, 2, lambda: None)) == ""


@pytest.mark.parametrize(("eval_weights", "best"), [("weights", 10), ("best", 11)])
def test_the_best_checkpoint_is_that_of_the_weights_that_are_exported(two_ranks, tmp_path, eval_weights, best):
    """The EMA passes 1 a step after the weights, so its best checkpoint is another one."""
    two_ranks.run(climbed_on_a_rank, str(tmp_path), {"eval_weights": eval_weights})
    kept = {read_manifest(url).step: url for url in list_checkpoints(str(tmp_path))}
    assert sorted(kept) == [best, 14]
    (position,) = dict(read_weights(kept[best], "weights" if eval_weights == "weights" else "ema")).values()
    logged = read_manifest(kept[best]).metrics["heldout/error"]
    assert float((position - 1).square()) == pytest.approx(logged, rel=1e-6)
    assert 0 <= logged < 0.01
