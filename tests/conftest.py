"""Test tiers and the fixtures that all tests share.

Every test has one tier: `unit` (this process alone), `ranks` (other processes: gloo ranks, a server, a command), `ray` (a Ray
cluster or a training) or `slow`. A fixture that starts processes gives a test its tier; a test that starts them itself is marked.
A unit test that starts a process fails.
"""

import dataclasses
import multiprocessing.process
import os
import sys
from pathlib import Path

import pytest

# Ray reads this at its first import, so it is set before any test module is imported. A test cluster on loopback needs no token.
os.environ["RAY_AUTH_MODE"] = "disabled"
# By default Ray's workers yield to all other processes, so the tiers that run at the same time would stop the Ray tier.
os.environ.setdefault("RAY_worker_niceness", "0")
# Tests send neither Ray's usage statistics nor requests for credentials to a cloud's metadata service.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

ROOT = Path(__file__).parents[1]
TIERS = ("ray", "ranks", "unit")  # in the order in which they run: the longest first
TIER_OF_FIXTURE = {"ray_cluster": "ray", "trained_run": "ray", "s3_server": "ranks", "ranks": "ranks", "two_ranks": "ranks"}
HARMLESS_COMMANDS = ("git",)  # the version of the code is asked for everywhere

_unit_test_running = False


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Give every test its tier."""
    for item in items:
        marked = [tier for tier in TIERS if item.get_closest_marker(tier)]
        started = [TIER_OF_FIXTURE[name] for name in item.fixturenames if name in TIER_OF_FIXTURE]
        started += ["ranks"] * bool(item.get_closest_marker("s3"))
        tier = min(marked + started, key=TIERS.index, default="unit")
        item.add_marker(getattr(pytest.mark, tier))
        item.tier = tier
    items.sort(key=lambda item: TIERS.index(item.tier))  # stable


def _refuse_processes(event, arguments):
    if _unit_test_running and event == "subprocess.Popen" and os.path.basename(str(arguments[0])) not in HARMLESS_COMMANDS:
        raise AssertionError(f"a unit test started {arguments[0]}: mark it `ranks`, `ray` or `slow`")


sys.addaudithook(_refuse_processes)


@pytest.fixture(autouse=True)
def _no_processes_in_unit_tests(request, monkeypatch):
    global _unit_test_running
    _unit_test_running = request.node.tier == "unit" and not request.node.get_closest_marker("slow")
    if _unit_test_running:

        def refuse(process):
            raise AssertionError(f"a unit test started {process}: mark it `ranks`, `ray` or `slow`")

        monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    yield
    _unit_test_running = False


def pytest_sessionfinish():
    if ranks := sys.modules.get("tests.support.ranks"):
        ranks.stop_shared_ranks()


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray cluster of this test run with 4 CPUs, whose workers can import the three packages. Started at its first use."""
    import ray

    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "platform"))
    context = ray.init(
        address="local",  # never a cluster that the environment names
        num_cpus=4,
        num_gpus=0,
        object_store_memory=512 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    yield context
    ray.shutdown()


@pytest.fixture(scope="session")
def two_ranks():
    """Two gloo ranks without Ray, which all tests share."""
    from tests.support.ranks import shared_ranks

    return shared_ranks(2)


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory):
    from tests.support.tiny_checkpoints import save_mean_pool_encoder

    return save_mean_pool_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="session")
def tiny_model(text_encoder_folder):
    """The `tiny` preset with a text encoder that exists."""
    from diffdis.config import tiny

    return dataclasses.replace(tiny(), text_encoder=dataclasses.replace(tiny().text_encoder, path=str(text_encoder_folder)))


@pytest.fixture(scope="session")
def training_shards(tmp_path_factory):
    """Four LAION-style tars of 12 samples."""
    from tests.support.training import write_shards

    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def trained_run(ray_cluster, tiny_model, training_shards, tmp_path_factory):
    """The one real training of the everyday gate: see tests/support/training.py:TrainedRun."""
    from tests.support.training import train_once

    return train_once(tiny_model, training_shards, tmp_path_factory.mktemp("trained_run"))
