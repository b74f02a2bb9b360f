"""Losses that cannot be used, and ranks that hang."""

import json
import math
import time
from types import SimpleNamespace

import pytest
import torch

from ray_platform.train import watch
from ray_platform.train.config import TrainConfig
from ray_platform.train.guard import Diverged, Guard
from ray_platform.train.watch import Beat, Watch

BATCH = SimpleNamespace(keys=("shard/1", "shard/2"), captions=("a cat", "a dog"))


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "init"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def guard(tmp_path, **fields):
    return Guard(TrainConfig(**fields), 0.0, 0, str(tmp_path))


def step(guard, number, loss, updated=None):
    verdict = guard.look(torch.tensor(loss), stop=False, uploading=False, failed=False)
    guard.judge(verdict, not verdict.bad if updated is None else updated, number, 0, BATCH)
    return verdict


@pytest.mark.parametrize("loss", [math.nan, math.inf, 25.0])
def test_a_loss_that_cannot_be_used_is_counted_and_its_keys_are_saved(tmp_path, loss):
    guarded = guard(tmp_path)
    for number in range(30):
        assert not step(guarded, number, 2.0).bad
    assert step(guarded, 30, loss).bad
    assert not step(guarded, 31, 2.0).bad
    assert guarded.num_bad == 1
    saved = json.loads((tmp_path / "bad_steps" / "step_00000030_rank_00000.json").read_text())
    assert (saved["keys"], saved["captions"]) == (["shard/1", "shard/2"], ["a cat", "a dog"])


def test_a_loss_is_not_called_unusual_before_it_is_known_what_is_usual(tmp_path):
    guarded = guard(tmp_path)
    assert not step(guarded, 0, 1.0).bad
    assert not step(guarded, 1, 100.0).bad


def test_too_many_in_a_row_end_the_run(tmp_path):
    guarded = guard(tmp_path, max_bad_steps=3)
    for _ in range(2):  # not in a row
        step(guarded, 1, math.nan)
        step(guarded, 2, math.nan)
        step(guarded, 3, 1.0)
    step(guarded, 4, math.nan)
    step(guarded, 5, 1.0, updated=False)  # a gradient that is not finite
    with pytest.raises(Diverged, match=r"3 steps in a row, up to step 6; .*bad_steps"):
        step(guarded, 6, math.nan)


def beat(rank, number=4, doing="training", waits=True, host="node-a"):
    return Beat(rank, number, doing, "stream.py:57 _next", waits, host, 100 + rank, "n" * 8, f"actor {rank}")


def test_the_rank_that_the_others_wait_for_is_named():
    watched = Watch()
    for rank in range(3):
        watched.beat(beat(rank, waits=rank != 1, doing="waiting for data" if rank == 1 else "training"))
    assert watched.hanging(60.0) == ("", [])
    time.sleep(0.05)
    line, actors = watched.hanging(0.01)
    assert "rank 1 (node-a, pid 101) in step 5 hangs while waiting for data, at stream.py:57 _next" in line
    assert "the other 2 of 3 ranks wait" in line
    assert actors == ["actor 0", "actor 1", "actor 2"]


def test_one_rank_that_moves_is_no_hang():
    watched = Watch()
    watched.beat(beat(0))
    watched.beat(beat(1))
    time.sleep(0.05)
    watched.beat(beat(1, number=5))
    assert watched.hanging(0.04) == ("", [])


def test_a_rank_that_says_nothing_any_more_is_named_before_those_that_are_busy(monkeypatch):
    monkeypatch.setattr(watch, "_SILENT_SECONDS", 0.1)
    watched = Watch()
    watched.beat(beat(0, waits=False))
    watched.beat(beat(1))
    time.sleep(0.2)
    watched.beat(beat(0, waits=False))
    line, _ = watched.hanging(0.15)
    assert "rank 1 (node-a, pid 101) in step 5 does not answer any more" in line


def test_orders_reach_every_rank_until_the_workers_are_gone():
    watched = Watch()
    assert watched.beat(beat(0)) == ""
    watched.order_stop("stopped by SIGTERM")
    assert watched.beat(beat(1)) == "stopped by SIGTERM"
    watched.forget()
    assert watched.beat(beat(1)) == ""
