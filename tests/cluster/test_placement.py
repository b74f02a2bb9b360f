"""Who runs where on a cluster of labelled nodes."""

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
    """What `placed_run.py` saw."""
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
    """On which pools something ran whose process is named so."""
    return [pool for pool, processes in names.items() if any(part in process for process in processes)]


@pytest.mark.slow
class TestOnThreeNodes:
    def test_reads_and_trainers_have_their_own_pools_and_the_driver_keeps_its_own(self, found):
        assert pools(found["trained"], "ReadShardSource") == ["cpu"]
        assert pools(found["trained"], "RayTrainWorker") == ["gpu"]
        for part in ("Watch", "Tracker", "TrainController"):
            assert pools(found["trained"], part) == ["head"], part

    def test_precomputing_decodes_on_one_and_encodes_on_the_other(self, found):
        assert pools(found["encoded"], "ReadShardSource") == ["cpu"]
        assert pools(found["encoded"], "MapWorker") == ["gpu"]

    def test_an_evaluation_stays_on_its_pool(self, found):
        assert found["units"] == 40
        assert pools(found["evaluated"], "ReplicaActor") == ["gpu"]

    def test_the_room_is_that_of_the_pool_and_too_little_is_refused(self, found):
        assert found["cpus"] == {"head": 0, "cpu": 4, "gpu": 4, "none": 0}
        evaluation, encoding, elastic = found["refusals"]
        assert "do not fit on the part of the cluster with pool=gpu (4 CPUs" in evaluation
        assert "need 4.5 CPUs, but the part of the cluster with pool=gpu has 4" in encoding
        assert elastic.startswith("train.placement: the workers of an elastic run would take the CPUs of data.placement")

    def test_too_little_is_waited_for_where_an_autoscaler_is(self, found):
        assert found["size_where_nodes_may_come"] == 5


def test_labels_are_read_from_the_command_line_and_checked():
    arguments = ["--recipe", "demo", "--data.placement", '{"pool": "cpu"}', "--train.placement", '{"zone": "a", "pool": "gpu"}']
    config = parse(arguments).config
    assert (config.data.placement, config.train.placement) == ({"pool": "cpu"}, {"zone": "a", "pool": "gpu"})
    assert parse(["--recipe", "demo"]).config.data.placement == {}
    with pytest.raises(ConfigError, match=r"train\.placement"):
        parse(["--recipe", "demo", "--train.placement", '{"pool": 3}'])


@pytest.mark.parametrize("config", [DataConfig, TrainConfig, EvalConfig, PrecomputeConfig])
def test_what_no_node_can_be_labelled_with_is_refused(config):
    for labels in ({"pool": "not(cpu)"}, {"-pool": "cpu"}):
        with pytest.raises(ConfigError, match=r"placement: Invalid label key"):
            config(placement=labels)
