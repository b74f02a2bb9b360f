"""MLflow from a user's perspective: a real run, its datasets and model, in SQLite and on a server, and its web pages."""

import base64
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator

import fsspec
import pytest
from mlflow import MlflowClient
from PIL import Image

from diffdis_platform.serving.package import model_package
from ray_platform.tracking import TrackingConfig
from tests.support.html_page import browser_page
from tests.support.mlflow_pages import Pages
from tests.support.mlflow_server import MlflowServer
from tests.support.postgres_server import PostgresServer
from tests.support.s3_server import ACCESS_KEY, SECRET_KEY, S3Server
from tests.support.training import diffdis_run

pytestmark = pytest.mark.usefixtures("ray_cluster")

# Runs in a process that does not have the project on its path and knows only the store.
USE = """
import base64, json, sys
import mlflow
uri, version = sys.argv[1:]
mlflow.set_tracking_uri(uri)
model = mlflow.pyfunc.load_model(f"models:/tiny/{version}")
rows, params = model.input_example, {"classes": ["red circle", "blue star"], "num_steps": 2}
chosen = model.predict(rows, params)["class"][0]
drawn = model.predict({"caption": "red heart"}, {"task": "generate", "num_steps": 2})["image"][0]
print(json.dumps([chosen, base64.b64encode(drawn).decode()]))
"""


def check_run(tracked, shards, previews):
    """Check the properties of a finished run that do not depend on its store. Returns the version of its model."""
    client = MlflowClient(tracked["tracking_uri"])
    run = client.get_run(tracked["run_id"])
    assert run.info.status == "FINISHED"
    assert re.fullmatch(r"test-\d{4}-\d{4}-seed0", run.info.run_name)
    tags = run.data.tags
    assert (tags["recipe"], tags["team"], tags["data.sources"]) == ("test", "vision", str(shards))
    assert tags["code_version"].startswith(("git-", "files-"))
    assert "`test`" in tags["mlflow.note.content"]
    [training] = run.inputs.dataset_inputs
    assert (training.dataset.name, json.loads(training.dataset.source)["uri"]) == (shards.name, str(shards))
    assert json.loads(training.dataset.profile)["num_shards"] == 4
    assert training.dataset.digest in tags["mlflow.note.content"]
    ungrouped = {name for name in run.data.metrics if "/" not in name}
    assert not ungrouped, "MLflow's pages group metrics by what precedes the slash"
    assert {name.partition("/")[0] for name in run.data.metrics} >= {"train", "data", "memory", "system"}
    assert 0 < run.data.metrics["system/node_0/system_memory_usage_percentage"] < 100
    assert tags["node_0"] == os.uname().nodename
    assert [file.path for file in client.list_artifacts(tracked["run_id"], "previews")] == [
        f"previews/step_{step:08d}.png" for step in previews
    ]
    version = max(client.search_model_versions("name='tiny'"), key=lambda version: int(version.version))
    assert (version.run_id, version.tags["recipe"]) == (tracked["run_id"], "test")
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert {metric.key for metric in model.metrics} >= {"train/loss_generation", "train/loss_alignment"}
    return version.version


def check_model(uri, version, folder):
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH" and not n.startswith("AWS_")}
    command = [sys.executable, "-c", USE, uri, str(version)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    chosen, drawn = json.loads(done.stdout.strip().splitlines()[-1])
    assert chosen in ("red circle", "blue star")
    assert Image.open(io.BytesIO(base64.b64decode(drawn))).size == (16, 16)


def test_a_finished_run_in_sqlite(trained_run, training_shards):
    check_run(trained_run.tracked, training_shards, previews=(6, 12))
    tags = MlflowClient(trained_run.tracked["tracking_uri"]).get_run(trained_run.tracked["run_id"]).data.tags
    assert "http://***@mlflow.example" in tags["mlflow.note.content"]
    assert "secret" not in json.dumps(tags)


@pytest.fixture
def bucket(tmp_path):
    """An S3 server and the URL of one of its buckets."""
    (tmp_path / "s3").mkdir()
    server = S3Server(tmp_path / "s3")
    try:
        server.start()
        yield server, "s3://tests/mlflow"
    finally:
        server.stop()


@pytest.mark.slow
@pytest.mark.s3
def test_a_finished_run_on_a_server_over_postgresql_and_s3(tiny_model, training_shards, bucket, tmp_path):
    """The client has no credentials for the bucket: artifacts go through the server."""
    s3, url = bucket
    where = ("--artifacts-destination", url)
    with PostgresServer() as postgres, MlflowServer(tmp_path, postgres.url, *where, environment=s3.environment) as server:
        run = diffdis_run(tiny_model, training_shards, tmp_path / "run", preview_every=20, num_steps=40, log_every=2)
        config = TrackingConfig(server.url, registered_model="tiny", tags={"team": "vision"}, system_metrics_seconds=1.0)
        tracked = dataclasses.replace(run, tracking=config, package=model_package("joint")).fit()
        check_model(server.url, check_run(tracked, training_shards, previews=(20, 40)), tmp_path)
    assert not (tmp_path / "run" / "mlflow.db").exists()
    stored = fsspec.filesystem(
        "s3", key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=s3.endpoint, skip_instance_cache=True,
        config_kwargs={"s3": {"addressing_style": "path"}}, client_kwargs={"region_name": "us-east-1"},
    ).find("tests/mlflow")  # fmt: skip
    for part in ("previews/step_00000040.png", "unet/diffusion_pytorch_model.safetensors", "MLmodel"):
        assert any(name.endswith(part) for name in stored), part


@pytest.fixture
def page() -> Iterator:
    with browser_page() as shown:
        yield shown


@pytest.mark.slow
def test_the_pages_show_curves_grids_and_the_model(trained_run, page, tmp_path):
    finished = trained_run.tracked
    with MlflowServer(tmp_path, finished["tracking_uri"]) as server:
        pages = Pages(page, server.url, finished["tracking_uri"], finished["run_id"])
        overview = pages.overview()
        assert "Pretraining by the recipe" in overview
        assert "team" in overview
        names, drawn = pages.curves()
        assert "loss_generation" in names
        assert drawn >= 3, "lines of the losses"
        assert "node_0" in pages.machines()
        assert pages.grid("previews/step_00000012.png") > 32, "pixels of the preview's width"
        assert "caption" in pages.model(), "its signature"
        assert not pages.errors, pages.errors
