"""MLflow from a user's perspective: a real run, its datasets and model, in SQLite and on a server, and its web pages."""

import base64
import dataclasses
import io
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator

import fsspec
import pytest
from mlflow import MlflowClient
from PIL import Image

from diffdis_platform.config.pretrain import model_package
from ray_platform.tracking import RunMetadata, TrackedData, TrackingConfig, delivery, read_run_record, start_run
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
    assert {name.partition("/")[0] for name in run.data.metrics} >= {"_overview", "train", "data", "memory", "system"}
    assert run.data.metrics["alignment/retrieval_chance"] > 0
    assert run.data.metrics["data/spilled_bytes"] >= 0
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
    check_run(trained_run.tracked, training_shards, previews=(12,))
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


@pytest.mark.slow
def test_a_server_that_is_down_for_a_while_has_everything_afterwards(tmp_path, monkeypatch, caplog):
    """It is down at the start, in between, at the end, and when the run is resumed."""
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 0.5)
    monkeypatch.setattr(delivery, "_END_SECONDS", 0.0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = MlflowServer(tmp_path, f"sqlite:///{tmp_path}/store.db", "--artifacts-destination", str(tmp_path / "artifacts"))
    output, config, client = (
        str(tmp_path / "run"),
        TrackingConfig(server.url, system_metrics_seconds=0.0),
        MlflowClient(server.url),
    )
    metadata = RunMetadata("test", "a test", {"team": "vision"}, {"lr": 0.5}, [TrackedData("train", "01", "/x", "training")])

    def log(tracker, step):
        tracker.log_metrics({"loss": float(step), "nan": math.nan}, step)
        tracker.log_bytes(b"png", f"previews/{step}.png")

    def curve(run_id):
        return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, "loss")]

    def count(text):
        return sum(text in line for line in caplog.messages)

    def wait_for_recovery(number):
        deadline = time.monotonic() + 120
        while count("answers again") < number:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    with start_run(config, output, metadata, record=True) as tracker:
        log(tracker, 1)
        assert tracker.run_id() == ""
        with server:
            wait_for_recovery(1)
            log(tracker, 2)
        log(tracker, 3)
        with server:
            wait_for_recovery(2)
        log(tracker, 4)
    run_id = tracker.run_id()
    assert read_run_record(output)["run_id"] == run_id
    assert (count("does not answer"), count("answers again"), count("has not received")) == (3, 2, 1)
    with start_run(config, output, record=True, resume=True) as resumed:
        log(resumed, 5)
        with server:
            wait_for_recovery(3)
    with server:
        with start_run(config, output, record=True, resume=True) as last:
            pass
        run = client.get_run(run_id)
        assert {tracker.run_id(), resumed.run_id(), last.run_id(), read_run_record(output)["run_id"]} == {run_id}
        assert curve(run_id) == [(step, float(step)) for step in range(1, 6)]
        assert len(client.get_metric_history(run_id, "nan")) == 5
        assert (run.info.status, run.data.params, run.data.tags["team"]) == ("FINISHED", {"lr": "0.5"}, "vision")
        assert [part.dataset.name for part in run.inputs.dataset_inputs] == ["train"]
        assert len(client.list_artifacts(run_id, "previews")) == 5
        assert len(client.search_runs([run.info.experiment_id])) == 1


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
        assert names.index("loss_alignment") < names.index("loss_generation") < names.index("retrieval"), "the losses come first"
        assert "Model training" in names
        assert drawn >= 3, "lines of the losses"
        step, visible = pages.slider()
        assert step == 12
        assert visible > 32, "pixels of the preview's height"
        assert "node_0" in pages.machines()
        assert pages.grid("previews/step_00000012.png") > 32, "pixels of the preview's width"
        assert "caption" in pages.model(), "its signature"
        assert not pages.errors, pages.errors
