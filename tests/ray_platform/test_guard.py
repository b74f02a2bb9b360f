"""Losses that cannot be used, and ranks that hang."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from ray_platform.train import watch
from ray_platform.train.config import TrainConfig
from ray_platform.train.engine import LossScale
from ray_platform.train.guard import Diverged, Guard, History
from ray_platform.train.watch import Beat, Heart, Watch

BATCH = SimpleNamespace(keys=("shard/1", "shard/2"), captions=("a cat", "a dog"))


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "init"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def guard(tmp_path, history=None, **fields):
    return Guard(TrainConfig(**fields), history or History(), str(tmp_path))


def step(guard, number, loss, updated=None, rescaled=False):
    verdict = guard.look(torch.tensor(loss), stop=False, uploading=False, failed=False)
    guard.judge(verdict, not verdict.bad if updated is None else updated, rescaled, number, 0, BATCH)
    return verdict


@pytest.mark.parametrize("loss", [math.nan, math.inf, 25.0])
def test_a_loss_that_cannot_be_used_is_counted_and_its_keys_are_saved(tmp_path, loss):
    guarded = guard(tmp_path)
    for number in range(30):
        assert not step(guarded, number, 2.0).bad
    assert step(guarded, 30, loss).bad
    assert not step(guarded, 31, 2.0).bad
    assert guarded.history.num_bad == 1
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


def test_a_guard_goes_on_where_another_one_was(tmp_path):
    """Also in the midst of bad steps: a run that is killed over and over must not get more of them."""
    guarded = guard(tmp_path, max_bad_steps=3)
    for number in range(30):
        step(guarded, number, 2.0)
    step(guarded, 30, 25.0)
    step(guarded, 31, 25.0)
    again = guard(tmp_path, History(**asdict(guarded.history)), max_bad_steps=3)
    assert again.history == History(guarded.history.usual_loss, 30, 2, 2)
    with pytest.raises(Diverged, match="3 steps in a row"):
        step(again, 32, 25.0)


def test_a_loss_scale_has_a_floor_and_then_the_steps_count(tmp_path):
    """A gradient that is never finite, in half precision: first the scale is at fault, and then something else."""
    scale, guarded = LossScale(8.0), guard(tmp_path, max_bad_steps=2)
    shrunk = []

    def overflow(number):
        shrunk.append(scale.update(finite=False))
        step(guarded, number, 1.0, updated=False, rescaled=shrunk[-1])

    for number in range(4):
        overflow(number)
    with pytest.raises(Diverged, match="2 steps in a row, up to step 4"):
        overflow(4)
    assert shrunk == [True, True, True, False, False]
    assert scale.value == 1.0


def test_a_loss_scale_goes_on_but_not_from_another_precision():
    scale, again, other = LossScale(), LossScale(), LossScale(1.0, growing=False)
    for finite in (False, True, True):
        scale.update(finite)
    again.load(scale.state())
    assert (again.value, again.good_steps) == (2.0**15, 2)
    again.load(other.state())
    assert again.value == 2.0**15
    other.load(scale.state())
    assert other.value == 1.0


def beat(rank, number=4, doing="training", waits=True, long=False, moves=0):
    place = "stream.py:57 _next"
    return Beat(rank, number, doing, place, waits, long, moves, "node-a", 100 + rank, "n" * 8, f"actor {rank}")


@pytest.fixture
def clock(monkeypatch):
    """The watch's, which goes on by clock.wait(seconds) alone."""
    now = [100.0]
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return SimpleNamespace(wait=lambda seconds: now.__setitem__(0, now[0] + seconds))


def test_the_rank_that_the_others_wait_for_is_named(clock):
    watched = Watch()
    for rank in range(3):
        watched.beat(beat(rank, waits=rank != 1, doing="waiting for data" if rank == 1 else "training"))
    assert watched.hanging(6.0) == ("", [])
    clock.wait(7)
    line, actors = watched.hanging(6.0)
    assert "rank 1 (node-a, pid 101) in step 5 hangs while waiting for data, at stream.py:57 _next" in line
    assert "the other 2 of 3 ranks wait" in line
    assert actors == ["actor 0", "actor 1", "actor 2"]


def test_one_rank_that_moves_is_no_hang(clock):
    watched = Watch()
    watched.beat(beat(0))
    watched.beat(beat(1))
    clock.wait(7)
    watched.beat(beat(1, number=5))
    assert watched.hanging(6.0) == ("", [])


def test_a_rank_that_says_nothing_any_more_is_named_before_those_that_are_busy(clock):
    watched = Watch()
    watched.beat(beat(0, waits=False))
    watched.beat(beat(1))
    clock.wait(20)
    watched.beat(beat(0, waits=False))
    line, _ = watched.hanging(15.0)
    assert "rank 1 (node-a, pid 101) in step 5 does not answer any more" in line


def test_what_takes_long_is_waited_for_longer_and_not_for_ever(clock):
    exporting = {"doing": "exporting the model", "long": True}
    exports, trains = Watch(), Watch()
    exports.beat(beat(0, waits=False, **exporting))
    exports.beat(beat(1, **exporting))
    trains.beat(beat(0, waits=False))
    trains.beat(beat(1))
    clock.wait(9)
    assert exports.hanging(1.0) == ("", [])
    assert "rank 0" in trains.hanging(1.0)[0]
    clock.wait(1)
    assert "rank 0 (node-a, pid 100) in step 5 hangs while exporting the model" in exports.hanging(1.0)[0]


def test_who_says_nothing_any_more_is_not_waited_for_longer(clock):
    watched = Watch()
    exporting = {"doing": "exporting the model", "long": True}
    watched.beat(beat(0, waits=False, **exporting))
    watched.beat(beat(1, **exporting))
    clock.wait(20)
    watched.beat(beat(1, **exporting))
    assert "rank 0 (node-a, pid 100) in step 5 does not answer any more" in watched.hanging(15.0)[0]


def test_an_upload_that_goes_on_is_no_hang(clock):
    watched = Watch()
    for moves in range(3):
        watched.beat(beat(0, doing="saving a checkpoint", moves=moves))
        clock.wait(4)
        assert watched.hanging(6.0) == ("", [])
        watched.beat(beat(0, doing="saving a checkpoint", moves=moves))
    clock.wait(4)
    assert watched.hanging(6.0)[0]


def test_a_rank_that_left_is_not_waited_for(clock):
    watched = Watch()
    watched.beat(beat(0))
    watched.beat(beat(1))
    assert watched.num_present() == 2
    watched.leave(0)
    assert watched.num_present() == 1
    clock.wait(20)
    assert watched.num_present() == 0, "it is dead"
    watched.leave(1)
    assert watched.hanging(1.0) == ("", [])


def test_who_waits_for_the_others_says_so():
    """NCCL's calls return at once: their results are waited for in frames that look like any other."""
    heart = Heart(None, 0)
    assert heart.whereabouts()["takes_long"], "it starts"
    heart.at("training")
    assert not heart.whereabouts()["waits_for_ranks"]
    with heart.waiting():
        with heart.waiting():
            pass
        found = heart.whereabouts()
    assert (found["waits_for_ranks"], found["doing"], found["takes_long"]) == (True, "training", False)
    assert not heart.whereabouts()["waits_for_ranks"]


def test_orders_reach_every_rank_until_the_workers_are_gone():
    watched = Watch()
    assert watched.beat(beat(0)) == ""
    watched.order_stop("stopped by SIGTERM")
    assert watched.beat(beat(1)) == "stopped by SIGTERM"
    watched.forget()
    assert watched.beat(beat(1)) == ""
