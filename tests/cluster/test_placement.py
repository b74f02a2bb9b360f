"""Processes run on the nodes whose labels the configuration specifies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffdis_platform.commands.precompute import PrecomputeConfig
from diffdis_platform.commands.pretrain import parse_arguments as parse
from diffdis_platform.config.evaluate import EvalConfig
from ray_platform.contracts import ConfigError
from ray_platform.data.config import DataConfig
from ray_platform.train.config import TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return the content of found.json, which `placed_run.py` writes."""
    folder = tmp_path_factory.mktemp("placed")
    paths = os.pathsep.join(str(path) for path in (ROOT / "platform", ROOT))
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "cluster" / "placed_run.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def pools(names, part):
    """Return the pools that had a process whose name contains `part`."""
    return [pool for pool, processes in names.items() if any(part in process for process in processes)]


@pytest.mark.slow
def test_every_process_is_on_the_pool_that_its_labels_name(found):
    trained, encoded, evaluated = found["trained"], found["encoded"], found["evaluated"]
    assert pools(trained, "ReadShardSource") == pools(encoded, "ReadShardSource") == ["cpu"]
    assert pools(trained, "RayTrainWorker") == pools(encoded, "MapWorker") == pools(evaluated, "ReplicaActor") == ["gpu"]
    assert [pools(trained, part) for part in ("HangDetector", "RunWriter", "TrainController")] == [["head"]] * 3
    assert found["units"] == 40


@pytest.mark.slow
def test_a_pool_that_is_too_small_is_an_error_unless_an_autoscaler_adds_nodes(found):
    assert found["cpus"] == {"head": 0, "cpu": 4, "gpu": 4, "none": 0}
    evaluation, encoding, elastic = found["refusals"]
    assert "pool=gpu" in evaluation
    assert "pool=gpu" in encoding
    assert elastic.startswith("train.placement: ")
    assert found["size_where_nodes_may_come"] == 5


def test_labels_are_read_from_the_command_line_and_checked():
    arguments = ["--recipe", "demo", "--data.placement", '{"pool": "cpu"}', "--train.placement", '{"zone": "a", "pool": "gpu"}']
    config = parse(arguments).config
    assert (config.data.placement, config.train.placement) == ({"pool": "cpu"}, {"zone": "a", "pool": "gpu"})
    assert parse(["--recipe", "demo"]).config.data.placement == {}
    with pytest.raises(ConfigError, match=r"train\.placement"):
        parse(["--recipe", "demo", "--train.placement", '{"pool": 3}'])


@pytest.mark.parametrize("config", [DataConfig, TrainConfig, EvalConfig, PrecomputeConfig])
def test_invalid_labels_are_rejected(config):
    for labels in ({"pool": "not(cpu)"}, {"-pool": "cpu"}):
        with pytest.raises(ConfigError, match=r"placement: Invalid label key"):
            config(placement=labels)
