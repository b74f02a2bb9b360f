"""Test tiers and shared fixtures.

Every test has one tier: `unit` (only this process), `ranks` (other processes: gloo ranks, a server, a command), `ray` (a Ray
cluster or a training run) or `slow`. A fixture that starts processes determines the tier of its tests; a test that starts
processes itself carries a marker. A unit test fails if it or one of its fixtures starts a process.
"""

import dataclasses
import gc
import os
import shutil
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import hypothesis
import pytest

# Ray reads this at its first import, so it is set before any test module is imported. A test cluster on loopback needs no token.
os.environ["RAY_AUTH_MODE"] = "disabled"
# By default Ray's workers have a lower priority than other processes, so tiers that run concurrently would starve the Ray tier.
os.environ.setdefault("RAY_worker_niceness", "0")
# As in LocalHead: no workers before they are needed.
os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
# Tests send neither Ray's usage statistics nor requests for credentials to a cloud's metadata service.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

# A deadline per example would be a timing assertion.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")

ROOT = Path(__file__).parents[1]
TIERS = ("ray", "ranks", "unit")  # in execution order: the longest first
TIER_OF_FIXTURE = {"ray_cluster": "ray", "trained_run": "ray", "s3_server": "ranks", "ranks": "ranks", "two_ranks": "ranks"}
HARMLESS_COMMANDS = ("git", "uname")  # reading the code version runs git in many places, and importing mlflow `uname -p`

_unit_test_running = False


@pytest.hookimpl(tryfirst=True)  # run before pytest deselects by marker
def pytest_collection_modifyitems(items):
    """Assign a tier to every test and sort the tests by tier."""
    for item in items:
        marked = [tier for tier in TIERS if item.get_closest_marker(tier)]
        started = [TIER_OF_FIXTURE[name] for name in item.fixturenames if name in TIER_OF_FIXTURE]
        started += ["ranks"] * bool(item.get_closest_marker("s3"))
        tier = min(marked + started, key=TIERS.index, default="unit")
        if marked or started or not item.get_closest_marker("slow"):  # `-m unit` selects no slow test
            item.add_marker(getattr(pytest.mark, tier))
        item.tier = tier
    items.sort(key=lambda item: TIERS.index(item.tier))  # stable


def _refuse_in_unit_tests(program):
    if _unit_test_running and program not in HARMLESS_COMMANDS:
        raise AssertionError(f"a unit test or its fixture started {program}: mark it `ranks`, `ray` or `slow`")


def _watch_commands(event, arguments):
    if event == "subprocess.Popen":
        _refuse_in_unit_tests(os.path.basename(str(arguments[0])))


def _start(process, start=BaseProcess.start):
    _refuse_in_unit_tests(str(process))
    start(process)


sys.addaudithook(_watch_commands)
BaseProcess.start = _start


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    global _unit_test_running
    _unit_test_running = item.tier == "unit" and not item.get_closest_marker("slow")
    try:
        return (yield)
    finally:
        _unit_test_running = False


gc.disable()  # until all tests are imported: until then there is nothing to collect


def pytest_collection_finish():
    """Exclude what was imported from garbage collection, which would otherwise take a fifth of the tests' time."""
    gc.freeze()
    gc.enable()


def pytest_sessionfinish():
    if ranks := sys.modules.get("tests.support.ranks"):
        ranks.stop_shared_ranks()


@pytest.fixture(scope="session", autouse=True)
def _copied_mlflow_stores(tmp_path_factory):
    """Copy the first SQLite store for every new one, because MLflow takes more than a second to create a store."""
    patch, first = pytest.MonkeyPatch(), tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    if "mlflow" in sys.modules:  # only if a collected test imports it
        import mlflow.store.db.utils as stores

        def copy_or_create(engine, create=stores._initialize_tables):
            if engine.dialect.name != "sqlite":
                create(engine)
            elif first.exists():
                engine.dispose()
                shutil.copyfile(first, engine.url.database)
            else:
                create(engine)
                shutil.copyfile(engine.url.database, first)

        patch.setattr(stores, "_initialize_tables", copy_or_create)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def ray_cluster():
    """Ray cluster with 4 CPUs for this test run, whose workers can import the three packages. Starts at its first use."""
    import ray

    paths = os.pathsep.join(str(path) for path in (ROOT, ROOT / "platform"))
    context = ray.init(
        address="local",  # never connect to a cluster from the environment
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
    """Two gloo ranks without Ray, shared by all tests."""
    from tests.support.ranks import shared_ranks

    return shared_ranks(2)


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory):
    from tests.support.tiny_checkpoints import save_mean_pool_encoder

    return save_mean_pool_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="session")
def tiny_model(text_encoder_folder):
    """The `tiny` preset with the path of an existing text encoder."""
    from diffdis.config import tiny

    return dataclasses.replace(tiny(), text_encoder=dataclasses.replace(tiny().text_encoder, path=str(text_encoder_folder)))


@pytest.fixture(scope="session")
def training_shards(tmp_path_factory):
    """Four LAION-style tars of 12 samples each."""
    from tests.support.training import write_shards

    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def trained_run(ray_cluster, tiny_model, training_shards, tmp_path_factory):
    """The only full training run of `make test`: see tests/support/training.py:TrainedRun."""
    from tests.support.training import train_once

    return train_once(tiny_model, training_shards, tmp_path_factory.mktemp("trained_run"))
