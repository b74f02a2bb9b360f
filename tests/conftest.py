"""What all tests share: one Ray cluster."""

import dataclasses
import os
from pathlib import Path

import pytest

# Read when Ray is first imported, so before any test module does. A cluster on loopback for one test run needs no token.
os.environ["RAY_AUTH_MODE"] = "disabled"
# Tests call nobody: neither Ray's usage statistics nor a cloud's metadata service in search of credentials.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def ray_cluster():
    """A cluster of this test run's own, 4 CPUs, whose workers find the three packages. Started once, by whoever asks first."""
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
def text_encoder_folder(tmp_path_factory):
    from tests.support.tiny_checkpoints import save_mean_pool_encoder

    return save_mean_pool_encoder(tmp_path_factory.mktemp("text_encoder"))


@pytest.fixture(scope="session")
def tiny_model(text_encoder_folder):
    """The `tiny` preset with a text encoder that exists."""
    from diffdis.config import tiny

    return dataclasses.replace(tiny(), text_encoder=dataclasses.replace(tiny().text_encoder, path=str(text_encoder_folder)))
