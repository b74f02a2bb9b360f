"""Sweeps on Ray Tune over trials that take seconds."""

import time

import pytest
import ray

from ray_platform.contracts import ConfigError
from ray_platform.placement import ResourceRequest
from ray_platform.sweep.config import Choice, Range, SearchConfig, describe_space
from ray_platform.sweep.sweep import HEAD, Sweep
from tests.ray_platform.sweep.curves import Curves, read_notes

pytestmark = pytest.mark.usefixtures("ray_cluster")

SPACE = {"x": Range(0.0, 1.0), "y": Range(0.0, 1.0)}


@pytest.fixture
def make(tmp_path):
    """Return make(runner={}, space, **SearchConfig fields), which builds a sweep that writes its notes to tmp_path/notes."""
    (tmp_path / "notes").mkdir()

    def sweep(runner=None, space=SPACE, cpus=1.0, **fields):
        fields = {"search": "random", "num_trials": 6, "max_concurrent": 2, **fields}
        config = SearchConfig(
            str(tmp_path / "out"), describe_space(space), objectives={"accuracy": "max", "loss": "min"}, **fields
        )  # fmt: skip
        needs = [ResourceRequest({}, {"CPU": cpus, "GPU": 0.0})]
        return Sweep(config, Curves(str(tmp_path / "notes"), **(runner or {})), space, dict.fromkeys(space, 0.5), needs)

    return sweep


@pytest.fixture
def notes(tmp_path):
    return lambda what: [note for note in read_notes(tmp_path / "notes") if note["what"] == what]


def is_cleaned_up():
    """Return whether no placement group is left and the trials' processes have released their resources."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get(HEAD, 0) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    return not groups and ray.available_resources().get(HEAD, 0) == 1


def test_asha_stops_trials_and_failed_trials_are_retried(make, notes, capsys):
    """In the grid 0.5 (baseline), 0.1, 0.7, 0.9, trial 0.7 fails once and 0.9 always."""
    space = {"x": Choice((0.5, 0.1, 0.7, 0.9))}
    fields = {"space": space, "search": "grid", "num_trials": 0, "max_concurrent": 1}
    outcomes = make({"fails": (0.9,), "fails_once": (0.7,)}, **fields).run()
    assert is_cleaned_up()
    assert [outcome["name"] for outcome in outcomes] == [f"trial_{i:03d}" for i in range(4)]
    assert [outcome["values"]["x"] for outcome in outcomes] == [0.5, 0.1, 0.7, 0.9]
    assert [outcome["default"] for outcome in outcomes] == [True, False, False, False]
    assert [outcome["state"] for outcome in outcomes] == ["finished", "stopped", "finished", "failed"]
    for outcome in outcomes:
        x, history = outcome["values"]["x"], outcome["history"]
        assert [entry["step"] for entry in history] == [16, 32, 64][: len(history)]
        assert history[-1]["metrics"]["accuracy"] == pytest.approx(x * history[-1]["step"] / 64)
    assert outcomes[3]["error"] == "data.sources: the shard is damaged"
    assert len(outcomes[3]["history"]) == 1, "the results of a failed trial are kept"
    steps = {name: [note["step"] for note in notes("train") if note["trial"] == name] for name in ("trial_002", "trial_003")}
    assert steps == {"trial_002": [16, 32, 32, 64], "trial_003": [16, 32, 32]}, "a retry continues after the last milestone"
    out = capsys.readouterr().out
    assert "milestone 1/3, step 16" in out
    assert "trial_003 failed: data.sources: the shard is damaged" in out
    num_notes = len(notes("train"))
    again = make(**fields).run()
    assert [outcome["state"] for outcome in again] == ["finished", "stopped", "finished", "finished"]
    assert [(n["trial"], n["step"]) for n in notes("train")[num_notes:]] == [("trial_003", 32), ("trial_003", 64)]


@pytest.mark.slow
def test_optuna_searches_both_objectives_at_once(make):
    outcomes = make(search="optuna", num_trials=8).run()
    assert [outcome["name"] for outcome in outcomes] == [f"trial_{i:03d}" for i in range(8)]
    assert outcomes[0]["values"] == {"x": 0.5, "y": 0.5}
    assert all(0 <= outcome["values"]["y"] <= 1 for outcome in outcomes)
    assert is_cleaned_up()


@pytest.mark.slow
def test_a_population_clones_weights_and_values_of_the_best(make, notes):
    outcomes = make(scheduler="pbt", num_trials=5, num_milestones=4, max_concurrent=3).run()
    clones = [note for note in notes("train") if note["origin"]]
    assert clones, "at least one trial continues from the weights of another"
    for note in clones:
        assert note["trial"] not in note["origin"]
        assert note["trial"] != "trial_000"
        assert 0 <= note["values"]["x"] <= 1, "perturbed values stay in their range"
    assert outcomes[0]["values"] == {"x": 0.5, "y": 0.5}
    assert {(outcome["state"], len(outcome["history"])) for outcome in outcomes} == {("finished", 4)}
    assert is_cleaned_up()


def test_trials_that_do_not_fit_the_cluster_are_rejected_in_one_line(make):
    with pytest.raises(ConfigError, match=r"max_concurrent: 1 trial of 8 CPUs each do not fit the cluster's 4 CPUs"):
        make(cpus=8.0, max_concurrent=0).concurrency()
    with pytest.raises(ConfigError, match=r"max_concurrent: 5 trials of 1 CPUs"):
        make(max_concurrent=5).concurrency()
    assert make(cpus=1.5, max_concurrent=0).concurrency() == 2
