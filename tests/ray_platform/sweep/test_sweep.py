"""Sweeps on Ray Tune over a job of seconds: who is stopped, who takes over, what fails, what is left behind."""

import pytest
import ray

from ray_platform.contracts import ConfigError
from ray_platform.placement import ResourceRequest
from ray_platform.sweep.space import Choice, Range
from ray_platform.sweep.sweep import Sweep
from tests.ray_platform.sweep.curves import Curves, notes

pytestmark = pytest.mark.usefixtures("ray_cluster")

SPACE = {"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)}
FIELDS = {
    "space": SPACE, "default": {"x": 0.5, "y": 0.5}, "objectives": {"accuracy": "max", "loss": "min"}, "search": "random",
    "scheduler": "asha", "num_trials": 6, "num_milestones": 3, "reduction": 2, "seed": 0,
    "needs": [ResourceRequest({}, {"CPU": 1.0, "GPU": 0.0})], "max_concurrent": 2,
}  # fmt: skip


@pytest.fixture
def make(tmp_path):
    (tmp_path / "notes").mkdir()

    def sweep(job=None, **fields):
        curves = Curves(str(tmp_path / "notes"), **(job or {}))
        return Sweep(job=curves, output_dir=str(tmp_path / "out"), **(FIELDS | fields))

    return sweep


@pytest.fixture
def seen(tmp_path):
    return lambda: notes(tmp_path / "notes")


def nothing_is_left():
    """No placement group, and no actor that is not another test's."""
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    actors = [a for a in ray._private.state.actors().values() if a["State"] != "DEAD" and "ImplicitFunc" in a["ActorClassName"]]
    return not groups and not actors


def test_asha_stops_some_never_the_recipe_and_leaves_nothing(make, seen, capsys):
    outcomes = make().run()
    assert nothing_is_left()
    assert [outcome.name for outcome in outcomes] == [f"trial_{i:03d}" for i in range(6)]
    assert outcomes[0].default
    assert outcomes[0].values == {"x": 0.5, "y": 0.5}
    assert outcomes[0].state == "finished"
    assert {outcome.state for outcome in outcomes} == {"finished", "stopped"}
    for outcome in outcomes:
        assert len(outcome.history) == {"finished": 3}.get(outcome.state, len(outcome.history))
        assert [entry["step"] for entry in outcome.history] == [16, 32, 64][: len(outcome.history)]
        assert outcome.history[-1]["metrics"]["accuracy"] == pytest.approx(outcome.values["x"] * outcome.history[-1]["step"] / 64)
    best = max(outcomes, key=lambda outcome: outcome.values["x"])
    assert best.state == "finished"
    stopped = min(outcomes[1:], key=lambda outcome: outcome.values["x"])
    assert stopped.state == "stopped"
    assert "milestone 1/3, step 16" in capsys.readouterr().out
    assert len([entry for entry in seen() if entry["what"] == "train"]) == sum(len(outcome.history) for outcome in outcomes)


@pytest.mark.slow
def test_a_grid_without_scheduler_runs_every_point_to_its_end(make):
    space = {"x": Choice((0.1, 0.9)), "y": Choice((0.2, 0.4, 0.6))}
    fields = {"space": space, "default": {"x": 0.1, "y": 0.2}, "search": "grid", "scheduler": "none"}
    outcomes = make(num_trials=0, num_milestones=2, **fields).run()
    assert {(o.values["x"], o.values["y"]) for o in outcomes} == {(x, y) for x in (0.1, 0.9) for y in (0.2, 0.4, 0.6)}
    assert {(o.state, len(o.history)) for o in outcomes} == {("finished", 2)}
    assert [entry["step"] for entry in outcomes[0].history] == [32, 64]
    with pytest.raises(ConfigError, match="num_trials: 5, but the grid has 6 points"):
        make(num_trials=5, **fields).points()


@pytest.mark.slow
def test_optuna_searches_both_objectives_at_once(make):
    outcomes = make(search="optuna", num_trials=8).run()
    assert [outcome.name for outcome in outcomes] == [f"trial_{i:03d}" for i in range(8)]
    assert outcomes[0].values == {"x": 0.5, "y": 0.5}
    assert all(0 <= outcome.values["y"] <= 1 for outcome in outcomes)
    assert nothing_is_left()


@pytest.mark.slow
def test_a_population_takes_over_weights_and_values_of_the_best(make, seen):
    outcomes = make(scheduler="pbt", num_trials=5, num_milestones=4, max_concurrent=3).run()
    taken_over = [entry for entry in seen() if entry["what"] == "train" and entry["origin"]]
    assert taken_over, "someone took over another one's weights"
    for entry in taken_over:
        assert entry["trial"] not in entry["origin"]
        assert entry["trial"] != "trial_000"
        assert 0 <= entry["values"]["x"] <= 1, "perturbed values stay in their range"
    assert outcomes[0].values == {"x": 0.5, "y": 0.5}
    assert {(outcome.state, len(outcome.history)) for outcome in outcomes} == {("finished", 4)}
    assert nothing_is_left()


def test_a_failing_trial_is_tried_once_more_and_ends_nothing(make, seen, capsys):
    space = {"x": Choice((0.1, 0.5, 0.9))}
    fields = {"space": space, "default": {"x": 0.5}, "search": "grid", "num_trials": 0, "scheduler": "none"}
    outcomes = make({"fail_at": 0.9}, **fields).run()
    states = {outcome.values["x"]: outcome for outcome in outcomes}
    assert {x: outcome.state for x, outcome in states.items()} == {0.1: "finished", 0.5: "finished", 0.9: "failed"}
    assert states[0.9].error == "data.sources: the shard is damaged"
    assert [entry["step"] for entry in states[0.9].history] == [21], "what it reached is kept"
    assert len([entry for entry in seen() if entry["what"] == "failed"]) == 2
    assert "trial_002 failed: data.sources: the shard is damaged" in capsys.readouterr().out
    assert nothing_is_left()
    before = len(seen())
    mended = make(**fields).run()
    assert {outcome.state for outcome in mended} == {"finished"}, "the same sweep again goes on with those that failed"
    assert {entry["trial"] for entry in seen()[before:]} == {"trial_002"}


@pytest.mark.slow
def test_a_trial_that_fails_once_goes_on_from_where_it_was(make, seen):
    fields = {"default": {"x": 0.5}, "search": "grid", "num_trials": 0, "scheduler": "none"}
    outcomes = make({"fail_at": 0.9, "fail_once": True}, space={"x": Choice((0.5, 0.9))}, **fields).run()
    assert {outcome.state for outcome in outcomes} == {"finished"}
    trained = [entry["step"] for entry in seen() if entry["what"] == "train" and entry["trial"] == "trial_001"]
    assert trained == [21, 43, 43, 64], "the first milestone is not trained again"


def test_too_large_for_the_cluster_is_one_line(make):
    with pytest.raises(ConfigError, match=r"max_concurrent: 1 trials of 8 CPUs each do not fit the cluster's 4 CPUs"):
        make(needs=[ResourceRequest({}, {"CPU": 8.0, "GPU": 0.0})], max_concurrent=0).concurrency()
    with pytest.raises(ConfigError, match=r"max_concurrent: 5 trials of 1 CPUs"):
        make(max_concurrent=5).concurrency()
    assert make(needs=[ResourceRequest({}, {"CPU": 1.5, "GPU": 0.0})], max_concurrent=0).concurrency() == 2
