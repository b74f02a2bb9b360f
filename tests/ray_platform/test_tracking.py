"""Trackers: a real SQLite store read with MLflow's client, JSON lines, and behavior without a usable store."""

import json
import logging
import math
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.tracking import (
    RunMetadata,
    TrackedData,
    Tracker,
    TrackingConfig,
    metric_history,
    read_run_record,
    start_run,
    tracking_uri,
)
from ray_platform.tracking.mlflow_tracker import ui_command
from ray_platform.tracking.node_metrics import NodeMetrics
from ray_platform.tracking.runs import SafeTracker, start_tracker_actor

CONFIG = {"train": {"lr": 3e-4, "betas": [0.9, 0.99]}, "data": {"sources": "x" * 9000}, "folder": Path("/data")}
JSON_LINES = TrackingConfig(backends=("jsonl",))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One output folder for the module: creating the tables takes two seconds."""
    return str(tmp_path_factory.mktemp("output"))


def client_of(output: str) -> MlflowClient:
    return MlflowClient(tracking_uri(TrackingConfig(), output))


def history(output: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client_of(output).get_metric_history(run_id, name)]


def warnings_of(caplog) -> list[int]:
    return [record.levelno for record in caplog.records if record.name.startswith("ray_platform.tracking")]


def metadata(**params: Any) -> RunMetadata:
    return RunMetadata("demo", "a test from s3://user:secret@bucket", {"recipe": "demo"}, params)


def test_mlflow_returns_what_was_logged(output, tmp_path):
    tracker = SafeTracker(TrackingConfig(run_name="first"), output)
    tracker.log_params(CONFIG | {f"field_{i}": i for i in range(250)})  # more than a server accepts per call
    tracker.log_metrics({"loss/generation": 1.5, "loss/alignment": 2.5}, step=1)
    tracker.log_metrics({"loss/generation": 1.25}, step=2)
    tracker.log_system({"node_0/cpu_utilization_percentage": 50.0})
    tracker.log_bytes(b"png", "previews/step_000002.png")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    tracker.log_folder(str(tmp_path), "model")
    tracker.end("FINISHED")

    run = client_of(output).get_run(tracker.run_id())
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["train.lr"] == "0.0003"
    assert (len(run.data.params), len(run.data.params["data.sources"])) == (254, 500)
    assert history(output, tracker.run_id(), "loss/generation") == [(1, 1.5), (2, 1.25)]
    [(seconds, value)] = history(output, tracker.run_id(), "system/node_0/cpu_utilization_percentage")
    assert (0 <= seconds < 60, value) == (True, 50.0)
    assert tracker.latest() == (2, {"loss/generation": 1.25}), "system metrics are not training progress"
    artifacts = Path(output) / "mlartifacts" / tracker.run_id() / "artifacts"
    assert (artifacts / "previews" / "step_000002.png").read_bytes() == b"png"
    assert (artifacts / "model" / "unet" / "config.json").exists()
    assert "x" * 9000 in (artifacts / "config.yaml").read_text()


def test_tags_description_and_datasets_of_a_run_that_is_continued(output):
    data = [
        TrackedData("train", "0123456789abcdef", "s3://bucket/train", "training", {"num_samples": 60}),
        TrackedData("heldout", "fedcba9876543210", "/data/heldout", "heldout"),
    ]
    tracker = SafeTracker(TrackingConfig(tags={"team": "vision"}), output)
    tracker.describe("trained on `s3://user:secret@bucket`", {"recipe": "demo", "long": "x" * 9000})
    tracker.log_data(data)
    tags = client_of(output).get_run(tracker.run_id()).data.tags
    assert (tags["team"], tags["recipe"], len(tags["long"])) == ("vision", "demo", 5000)
    assert tags["mlflow.note.content"] == "trained on `s3://***@bucket`"
    client_of(output).set_tag(tracker.run_id(), "mlflow.note.content", "written by a user")
    again = SafeTracker(TrackingConfig(tags={"team": "audio"}), output, tracker.run_id())
    again.describe("trained again", {"recipe": "demo"})
    again.log_data(data)
    run = client_of(output).get_run(tracker.run_id())
    assert (run.data.tags["team"], run.data.tags["mlflow.note.content"]) == ("audio", "written by a user")
    heldout, train = sorted(run.inputs.dataset_inputs, key=lambda part: part.dataset.name)
    assert (train.dataset.digest, train.dataset.source_type) == ("0123456789abcdef", "s3")
    assert json.loads(train.dataset.source) == {"uri": "s3://bucket/train"}
    assert (json.loads(train.dataset.profile), heldout.dataset.source_type) == ({"num_samples": 60}, "local")
    assert [part.tags[0].value for part in (heldout, train)] == ["heldout", "training"]


def test_a_resumed_job_continues_in_the_same_run(output, caplog):
    with pytest.raises(RuntimeError), start_run(TrackingConfig(), output, metadata(steps=10), record=True) as first:  # noqa: PT012
        first.log_metrics({"loss": 2.0}, step=1)
        raise RuntimeError
    record = read_run_record(output)
    assert client_of(output).get_run(record["run_id"]).info.status == "FAILED"
    with start_run(TrackingConfig(), output, metadata(steps=20, added=1), run_id=record["run_id"], record=True) as second:
        assert client_of(output).get_run(record["run_id"]).info.status == "RUNNING"
        second.log_metrics({"loss": 1.0}, step=2)
    assert read_run_record(output) == record
    run = client_of(output).get_run(record["run_id"])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "demo")
    assert run.data.params == {"steps": "10", "added": "1"}, "MLflow's params never change; config.yaml does"
    assert history(output, record["run_id"], "loss") == [(1, 2.0), (2, 1.0)]
    config = Path(output) / "mlartifacts" / record["run_id"] / "artifacts" / "config.yaml"
    assert "steps: 20" in config.read_text()
    assert not caplog.records
    assert SafeTracker(TrackingConfig(), output, run_id="0" * 32).run_id() not in ("", "0" * 32)
    assert "cannot be continued" in caplog.text


@pytest.mark.parametrize("backend", ["mlflow", "jsonl"])
def test_a_history_is_by_step_and_has_the_later_of_two_values(output, backend, caplog):
    config = TrackingConfig(backends=(backend,))
    tracker = SafeTracker(config, output)
    for step, value in ((1, 0.5), (2, 0.25), (2, 0.125)):
        tracker.log_metrics({"heldout/acc1": value, "loss": 1.0}, step)
        time.sleep(0.002)  # the store's timestamps have a resolution of milliseconds
    uri = tracking_uri(config, output)
    assert metric_history(uri, tracker.run_id(), "heldout/", output) == {1: {"heldout/acc1": 0.5}, 2: {"heldout/acc1": 0.125}}
    assert metric_history(uri, "0" * 32, "heldout/", output + "/missing") == {}
    assert "cannot be read" in caplog.text


@pytest.fixture(params=["folder", "s3://bucket/run"])
def jsonl_output(request, tmp_path, monkeypatch):
    """An output folder, and a bucket that is simulated by a dict: the tracker always uploads its complete file."""
    if request.param == "folder":
        return str(tmp_path), lambda name: (tmp_path / name).read_bytes()
    bucket: dict[str, bytes] = {}
    monkeypatch.setattr(storage, "exists", bucket.__contains__)
    monkeypatch.setattr(storage, "read_bytes", bucket.__getitem__)
    monkeypatch.setattr(storage, "read_json", lambda url: json.loads(bucket[url]))
    monkeypatch.setattr(storage, "write_bytes", bucket.__setitem__)
    return request.param, lambda name: bucket[f"{request.param}/{name}"]


def test_json_lines_have_everything_and_no_secret(jsonl_output):
    output, read = jsonl_output
    with start_run(JSON_LINES, output, metadata(api_key="abc"), record=True) as tracker:
        tracker.log_data([TrackedData("train", "01", "s3://user:secret@bucket/train", "training")])
        tracker.log_metrics({"loss": math.nan}, step=1)
        tracker.log_system({"node_0/cpu_utilization_percentage": 50.0})
        tracker.log_bytes(b"png", "previews/a.png")
        tracker.log_folder("model", "model")  # not supported by this tracker
    with start_run(JSON_LINES, output, run_id=read_run_record(output)["run_id"]) as again:
        again.log_metrics({"loss": 1.0}, step=2)
    text = read("metrics.jsonl").decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {line["run_id"] for line in lines if "run_id" in line} == {tracker.run_id()}
    assert [(line["step"], line["metrics"]["loss"]) for line in lines if "metrics" in line][1:] == [(2, 1.0)]
    assert [line["status"] for line in lines if "status" in line] == ["FINISHED", "FINISHED"]
    assert all(isinstance(line["time"], float) for line in lines)
    assert read("artifacts/previews/a.png") == b"png"
    assert "secret" not in text
    assert '"api_key": "***"' in text


def test_a_failing_tracker_leaves_the_other_one_alone(tmp_path, caplog):
    config = TrackingConfig(uri="sqlite:////proc/no/such/folder/mlflow.db", backends=("mlflow", "jsonl"))
    tracker = SafeTracker(config, str(tmp_path))
    tracker.log_metrics({"loss": 1.0}, step=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["metrics"] for line in lines if "metrics" in line] == [{"loss": 1.0}]
    assert tracker.run_id()
    assert warnings_of(caplog) == [logging.WARNING]


def test_a_backend_or_store_that_cannot_be_used_is_named(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"tracking.backends.*wandb.*mlflow"):
        TrackingConfig(backends=("wandb",))
    assert SafeTracker(TrackingConfig(backends=("no.such.module:Tracker",)), str(tmp_path)).run_id() == ""
    assert "no.such.module:Tracker" in caplog.text
    with pytest.raises(ConfigError, match=r"tracking.uri.*s3://bucket/run"):
        tracking_uri(TrackingConfig(), "s3://bucket/run")
    assert tracking_uri(JSON_LINES, "s3://bucket/run") == ""


def test_bad_metric_values_do_not_affect_others(output, caplog):
    tracker = SafeTracker(TrackingConfig(), output)
    assert tracker.latest() == (-1, {})
    values: dict[str, Any] = {"nan": math.nan, "inf": math.inf, "none": None, "good": 1.0}
    tracker.log_metrics(values, step=1)
    tracker.log_metrics(values, step=2)
    assert history(output, tracker.run_id(), "good") == [(1, 1.0), (2, 1.0)]
    assert [math.isnan(value) for _, value in history(output, tracker.run_id(), "nan")] == [True, True]
    assert len(history(output, tracker.run_id(), "inf")) == 2
    assert len(caplog.records) == 1, "one warning for each kind"
    assert "metric none" in caplog.text


@pytest.mark.parametrize(
    ("uri", "output"),
    [
        ("sqlite:////proc/no/such/folder/mlflow.db", "unused"),
        ("http://127.0.0.1:9", "unused"),
        ("", "s3://bucket/run"),
    ],
)
def test_an_unusable_store_is_one_warning(uri, output, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = SafeTracker(TrackingConfig(uri=uri), output)
    assert tracker.run_id() == ""
    tracker.log_params(CONFIG)
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.log_folder(str(tmp_path), "model")
    tracker.end("FINISHED")
    assert tracker.latest() == (1, {"loss": 1.0})
    assert warnings_of(caplog) == [logging.WARNING]


def test_a_store_that_disappears_is_one_warning_per_kind(output, caplog):
    tracker = SafeTracker(TrackingConfig(), output)
    client_of(output).set_terminated(tracker.run_id(), "FINISHED")
    client_of(output).delete_run(tracker.run_id())  # a deleted run accepts no data
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step=step)
    assert warnings_of(caplog) == [logging.WARNING]


def test_the_ui_command_of_a_server_is_its_address_and_of_a_store_a_server():
    assert ui_command("https://mlflow.example").endswith("-m webbrowser https://mlflow.example")
    assert "--backend-store-uri sqlite:////run/mlflow.db --port 5000" in ui_command("sqlite:////run/mlflow.db")


@ray.remote(num_cpus=0)
def log_from_a_worker(tracker: Tracker) -> None:
    for step in range(3):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_bytes(b"png", "previews/a.png")


def test_a_worker_writes_through_the_actor(ray_cluster, output):
    with start_run(TrackingConfig(), output, metadata(steps=3), in_actor=True) as tracker:
        run_id = tracker.run_id()
        ray.get(log_from_a_worker.remote(tracker))
    assert tracker.latest() == (2, {"loss": 2.0})
    run = client_of(output).get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"steps": "3"})
    assert history(output, run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_the_nodes_of_a_run_are_measured(ray_cluster, output, caplog):
    tracker = start_tracker_actor(TrackingConfig(), output)
    run_id, metrics = tracker.run_id(), NodeMetrics(tracker, seconds=0.05)
    this_node = ray.get_runtime_context().get_node_id()
    missing = "0" * 56
    name, deadline = "system/node_1/cpu_utilization_percentage", time.monotonic() + 120
    while not history(output, run_id, name):
        metrics.poll({this_node, missing})
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tracker.end("FINISHED")
    run = client_of(output).get_run(run_id)
    assert run.data.tags["node_1"] == socket.gethostname()
    assert 0 < run.data.metrics["system/node_1/system_memory_usage_percentage"] < 100
    assert {"system/node_1/disk_usage_percentage", "system/node_1/network_receive_megabytes"} <= run.data.metrics.keys()
    assert not caplog.records, "a node that disappears is not a warning"
    NodeMetrics(tracker, seconds=0.0).poll({this_node})


def test_the_death_of_the_actor_is_one_warning(ray_cluster, output, caplog):
    tracker = start_tracker_actor(TrackingConfig(), output)
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert tracker.run_id()  # wait until the run has started
    assert tracker.latest() == (1, {"loss": 1.0})
    ray.kill(tracker._actor)
    for step in range(5):
        tracker.log_metrics({"loss": 2.0}, step)
    assert tracker.latest() == (1, {"loss": 1.0})
    tracker.end("FAILED")
    assert tracker.run_id() == ""
    assert len(warnings_of(caplog)) == 1
