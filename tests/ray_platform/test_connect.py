"""Which cluster a driver connects to, and its errors. test_local_head.py tests the connection itself."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from diffdis_platform.commands.inspect import InspectConfig
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import parse
from ray_platform import connect as module
from ray_platform.connect import ClusterError, connect

ROOT = Path(__file__).parents[2]


@pytest.fixture
def attached(monkeypatch):
    """The arguments that `ray.init` would have received, in a process that is not attached to a cluster."""
    calls: list[dict] = []
    monkeypatch.setattr(module.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(module.ray, "init", lambda **options: calls.append(options))
    for name in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.fixture
def listening():
    """Address of a listening socket."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_workers_of_a_driver_get_absolute_paths_and_the_environments_address(attached, listening, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", listening)
    monkeypatch.setenv("DIFFDIS_PUBLIC_BUCKETS", "set-by-the-user")
    argv = ["--storage.public_buckets", "laion", "coyo", "--output_dir", "/out", "--data.sources", "s3://laion/shards"]
    parse(InspectConfig, argv, CommandHelp("inspect", ""))
    connect("127.0.0.1:1")
    assert attached[0]["address"] == listening
    variables = attached[0]["runtime_env"]["env_vars"]
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(ROOT / "platform")]
    assert variables["DIFFDIS_PUBLIC_BUCKETS"] == "coyo,laion,set-by-the-user"


def test_the_workers_of_a_submitted_job_get_the_path_in_their_copy(attached, listening, monkeypatch):
    job = {"runtime_env": {"working_dir": "gcs://package.zip", "env_vars": {}}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    connect(listening)
    assert attached[0]["runtime_env"] == {"env_vars": {"PYTHONPATH": "platform", "RAY_ADDRESS": listening}}


def test_the_variables_of_a_jobs_runtime_environment_are_merged(attached, listening, monkeypatch):
    """Ray itself merges the two, and must not reject what both have."""
    ours = {"PYTHONPATH": "/their/code", "RAY_ADDRESS": "auto", "TEAM": "vision"}
    job = {"runtime_env": {"working_dir": "gcs://package.zip", "env_vars": ours}, "metadata": {}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    connect(listening)
    merged = attached[0]["runtime_env"]["env_vars"]
    assert merged == {"PYTHONPATH": f"platform{os.pathsep}/their/code", "RAY_ADDRESS": listening}
    assert os.environ["RAY_OVERRIDE_JOB_RUNTIME_ENV"] == "1"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "ray job submit"),
        *((address, "host:port") for address in ("http://127.0.0.1:8265", "ray://127.0.0.1:10001", "auto", "127.0.0.1", ":6379")),
        ("unused", "no Ray cluster answers at"),
    ],
)
def test_an_address_without_a_cluster_is_an_error_of_one_line(attached, address, message):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound without listening, so that no process can listen there
        address = f"127.0.0.1:{unused.getsockname()[1]}" if address == "unused" else address
        with pytest.raises(ClusterError, match=message) as caught:
            connect(address)
    assert "\n" not in str(caught.value)
    assert not attached


def test_a_rejection_by_ray_becomes_one_line(attached, listening, monkeypatch):
    def reject(**_options):
        raise ConnectionError("Failed to connect\nand much more")

    monkeypatch.setattr(module.ray, "init", reject)
    with pytest.raises(ClusterError, match=r"rejected this driver: Failed to connect$"):
        connect(listening)


def test_a_process_that_is_attached_stays_as_it_is(ray_cluster, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    connect()
    assert ray.is_initialized()


@pytest.mark.ranks
def test_a_job_finds_the_packages_from_anywhere(tmp_path):
    """The driver of a submitted job has neither the project root nor `platform/` on its path."""
    job = "import sys; sys.path[:0] = [sys.argv[1]]; import _bootstrap; import ray_platform.contracts, platform, diffdis"
    program = f"{job}; assert platform.system()"
    command = [sys.executable, "-c", program, str(ROOT / "jobs")]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, check=True)
