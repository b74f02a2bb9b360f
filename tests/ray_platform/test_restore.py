"""A checkpoint of another model is rejected where trained weights would be lost, and what was not restored is named."""

import logging
import re
from collections import OrderedDict

import pytest
from torch import nn

from ray_platform.contracts import ConfigError
from ray_platform.train.config import TrainConfig
from tests.ray_platform.small_task import SmallTask
from tests.ray_platform.test_engine import checkpoint_manager, save_checkpoint
from tests.support.ranks import whole_state


def task_with(change):
    task = SmallTask()
    if change in ("frozen", "last"):  # in a wrapper, as peft puts a layer with an adapter in one
        setattr(task.module, change, nn.Sequential(OrderedDict(base_layer=getattr(task.module, change))))
    elif change == "new":
        task.module.new = nn.Linear(2, 2)
    elif change == "new frozen":
        task.module.new = nn.Linear(2, 2).requires_grad_(False)
    elif change == "fewer":
        task.module.frozen = nn.Identity()
    return task


def restored_on_a_rank(rank, output, saved, current, fields):
    """Save a checkpoint of one task and restore it in another. Return the error, or the warnings and the restored names."""
    from ray_platform.train import checkpointing
    from ray_platform.train.engine import Engine

    assert save_checkpoint(checkpoint_manager(Engine(task_with(saved), TrainConfig(**fields), 2, 1), output), 1) == ""
    engine, lines = Engine(task_with(current), TrainConfig(**fields), 2, 1), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    for _, tensor, _ in engine.local_state():
        tensor.detach().fill_(7)
    checkpointing.logger.addHandler(handler)
    try:
        checkpointing.restore(checkpointing.find_checkpoint("auto", output, "b", "d"), engine, weights_only=True)
    except ConfigError as error:
        return str(error), []
    finally:
        checkpointing.logger.removeHandler(handler)
    tensors = whole_state(engine)
    return lines, [name for name in tensors if name.startswith("weights/") and not (tensors[name] == 7).all()]


@pytest.mark.ranks
@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize(
    ("saved", "current", "words"),
    [
        ("", "frozen", r"frozen\.base_layer\.weight.*frozen\.bias.*model\.warm_start"),
        ("", "last", r"last\.base_layer\.weight.*last\.bias.*model\.warm_start"),
        ("frozen", "", r"frozen\.weight.*frozen\.base_layer\.bias.*model\.warm_start"),
        ("last", "", r"last\.weight.*last\.base_layer\.bias.*model\.warm_start"),
        ("", "new frozen", r"new\.weight.*model\.warm_start"),
    ],
)
def test_a_checkpoint_in_which_parameters_have_other_names_is_rejected(two_ranks, tmp_path, saved, current, words, zero_stage):
    for error, _ in two_ranks.run(restored_on_a_rank, str(tmp_path), saved, current, {"zero_stage": zero_stage}):
        assert re.fullmatch(f"model: {tmp_path}/checkpoints/a/step_00000001 lacks .*{words}", error)


@pytest.mark.ranks
@pytest.mark.parametrize(("saved", "current", "named"), [("", "new", "new.weight"), ("", "fewer", "frozen.bias"), ("", "", "")])
def test_what_is_not_restored_is_named(two_ranks, tmp_path, saved, current, named):
    lines, restored = two_ranks.run(restored_on_a_rank, str(tmp_path), saved, current, {"zero_stage": 0})[0]
    assert [named in line for line in lines] == [True] * bool(named)
    kept = {"weights/first.weight", "weights/first.bias", "weights/last.weight", "weights/last.bias", "weights/shift"}
    assert set(restored) == kept | ({"weights/frozen.weight", "weights/frozen.bias"} if current != "fewer" else set())
