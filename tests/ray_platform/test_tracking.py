"""A real SQLite store, read back with MLflow's own client; and what happens when there is no usable store."""

import json
import logging
import math
import shlex
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient

from ray_platform.tracking import (
    DataSet,
    Tracker,
    TrackerHandle,
    TrackingConfig,
    metric_history,
    start_tracker,
    tracking_uri,
    ui_command,
)
from ray_platform.tracking.node_metrics import NodeMetrics

CONFIG = {"train": {"lr": 3e-4, "betas": [0.9, 0.99]}, "data": {"sources": "x" * 9000}, "folder": Path("/data")}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One output folder for the module: a first use creates the tables, which takes two seconds."""
    return str(tmp_path_factory.mktemp("output"))


def read(output: str) -> MlflowClient:
    return MlflowClient(tracking_uri(TrackingConfig(), output))


def history(output: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in read(output).get_metric_history(run_id, name)]


def test_what_is_logged_can_be_read_back(output, tmp_path):
    tracker = Tracker(TrackingConfig(run_name="first"), output)
    tracker.log_params(CONFIG)
    tracker.log_metrics({"loss/generation": 1.5, "loss/alignment": 2.5}, step=1)
    tracker.log_metrics({"loss/generation": 1.25}, step=2)
    tracker.log_bytes(b"png", "previews/step_000002.png")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    tracker.log_folder(str(tmp_path), "model")
    tracker.end("FINISHED")

    run = read(output).get_run(tracker.run_id())
    assert run.info.run_name == "first"
    assert run.info.status == "FINISHED"
    assert run.data.params["train.lr"] == "0.0003"
    assert len(run.data.params["data.sources"]) == 500
    assert history(output, tracker.run_id(), "loss/generation") == [(1, 1.5), (2, 1.25)]
    artifacts = Path(output) / "mlartifacts" / tracker.run_id() / "artifacts"
    assert (artifacts / "previews" / "step_000002.png").read_bytes() == b"png"
    assert (artifacts / "model" / "unet" / "config.json").exists()
    assert "x" * 9000 in (artifacts / "config.yaml").read_text()


def test_a_run_says_what_it_is_and_a_description_of_ones_own_stays(output):
    tracker = Tracker(TrackingConfig(tags={"team": "vision"}), output)
    tracker.describe("trained on `s3://user:secret@bucket`", {"recipe": "demo", "long": "x" * 9000})
    tags = read(output).get_run(tracker.run_id()).data.tags
    assert (tags["team"], tags["recipe"], len(tags["long"])) == ("vision", "demo", 5000)
    assert tags["mlflow.note.content"] == "trained on `s3://***@bucket`", "and no password"
    read(output).set_tag(tracker.run_id(), "mlflow.note.content", "the good one")
    again = Tracker(TrackingConfig(tags={"team": "audio"}), output, tracker.run_id())
    again.describe("trained again", {"recipe": "demo"})
    tags = read(output).get_run(tracker.run_id()).data.tags
    assert (tags["team"], tags["mlflow.note.content"]) == ("audio", "the good one")


def test_data_sets_are_recorded_once_with_digest_and_context(output):
    tracker = Tracker(TrackingConfig(), output)
    data_sets = [
        DataSet("train", "0123456789abcdef", "s3://bucket/train", "training", {"num_samples": 60}),
        DataSet("heldout", "fedcba9876543210", "/data/heldout", "heldout"),
    ]
    tracker.log_data_sets(data_sets)
    tracker.log_data_sets(data_sets)  # a resumed run does that
    found = {given.dataset.name: given for given in read(output).get_run(tracker.run_id()).inputs.dataset_inputs}
    assert len(read(output).get_run(tracker.run_id()).inputs.dataset_inputs) == 2
    train, heldout = found["train"].dataset, found["heldout"].dataset
    assert (train.digest, train.source_type, json.loads(train.source)) == ("0123456789abcdef", "s3", {"uri": "s3://bucket/train"})
    assert (json.loads(train.profile), heldout.source_type) == ({"num_samples": 60}, "local")
    assert {name: given.tags[0].value for name, given in found.items()} == {"train": "training", "heldout": "heldout"}


def test_system_metrics_are_steps_of_seconds_and_no_progress(output):
    tracker = Tracker(TrackingConfig(), output)
    tracker.log_metrics({"train/loss": 1.0}, step=3)
    tracker.log_system({"node_0/cpu_utilization_percentage": 50.0})
    [(step, value)] = history(output, tracker.run_id(), "system/node_0/cpu_utilization_percentage")
    assert (0 <= step < 60, value) == (True, 50.0)
    assert tracker.latest() == (3, {"train/loss": 1.0})


def test_many_params_are_all_kept(output):
    tracker = Tracker(TrackingConfig(), output)
    tracker.log_params({f"field_{i}": i for i in range(250)})
    assert len(read(output).get_run(tracker.run_id()).data.params) == 250


def test_a_resumed_run_goes_on_in_the_same_run(output, caplog):
    first = Tracker(TrackingConfig(), output)
    first.log_params({"steps": 10})
    first.log_metrics({"loss": 2.0}, step=1)
    first.end("FAILED")
    second = Tracker(TrackingConfig(), output, run_id=first.run_id())
    assert second.run_id() == first.run_id()
    assert read(output).get_run(first.run_id()).info.status == "RUNNING"
    second.log_params({"steps": 20, "added": 1})  # a param cannot change; config.yaml can
    second.log_metrics({"loss": 1.0}, step=2)
    second.end("FINISHED")
    run = read(output).get_run(first.run_id())
    assert run.info.status == "FINISHED"
    assert run.data.params == {"steps": "10", "added": "1"}
    assert history(output, first.run_id(), "loss") == [(1, 2.0), (2, 1.0)]
    config = Path(output) / "mlartifacts" / first.run_id() / "artifacts" / "config.yaml"
    assert "steps: 20" in config.read_text()
    assert not caplog.records


def test_a_history_is_by_step_and_has_the_later_of_two_values(output, caplog):
    tracker = Tracker(TrackingConfig(), output)
    for step, value in ((1, 0.5), (2, 0.25), (2, 0.125)):
        tracker.log_metrics({"heldout/acc1": value, "loss": 1.0}, step)
        time.sleep(0.002)  # the store's times are in milliseconds
    uri = tracking_uri(TrackingConfig(), output)
    assert metric_history(uri, tracker.run_id(), "heldout/") == {1: {"heldout/acc1": 0.5}, 2: {"heldout/acc1": 0.125}}
    assert metric_history(uri, "0" * 32, "heldout/") == {}
    assert "cannot be read" in caplog.text


def test_an_unknown_run_is_replaced_by_a_new_one(output, caplog):
    tracker = Tracker(TrackingConfig(), output, run_id="0" * 32)
    assert tracker.run_id() not in ("", "0" * 32)
    assert "going on with run" in caplog.text


def test_bad_metric_values_do_not_raise_and_spoil_no_others(output, caplog):
    tracker = Tracker(TrackingConfig(), output)
    values: dict[str, Any] = {"nan": math.nan, "inf": math.inf, "none": None, "good": 1.0}
    tracker.log_metrics(values, step=1)
    tracker.log_metrics(values, step=2)
    assert history(output, tracker.run_id(), "good") == [(1, 1.0), (2, 1.0)]
    assert [math.isnan(value) for _, value in history(output, tracker.run_id(), "nan")] == [True, True]
    assert len(history(output, tracker.run_id(), "inf")) == 2
    assert len(caplog.records) == 1, "once for each kind"
    assert "metric none" in caplog.text


def test_latest_is_what_was_logged_last(output):
    tracker = Tracker(TrackingConfig(), output)
    assert tracker.latest() == (-1, {})
    tracker.log_metrics({"loss": 3.0}, step=7)
    assert tracker.latest() == (7, {"loss": 3.0})


@pytest.mark.parametrize(
    ("uri", "output"),
    [
        ("sqlite:////proc/no/such/folder/mlflow.db", "unused"),
        ("http://127.0.0.1:9", "unused"),
        ("no-such-scheme://host", "unused"),
        ("", "s3://bucket/run"),
    ],
)
def test_a_store_that_cannot_be_used_is_one_warning(uri, output, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker = Tracker(TrackingConfig(uri=uri), output)
    assert tracker.run_id() == ""
    tracker.log_params(CONFIG)
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.log_bytes(b"png", "previews/a.png")
    tracker.log_folder(str(tmp_path), "model")
    tracker.end("FINISHED")
    assert tracker.latest() == (1, {"loss": 1.0})
    assert [record.levelno for record in caplog.records if record.name.startswith("ray_platform.tracking")] == [logging.WARNING]


def test_a_store_that_goes_away_is_one_warning_a_kind(tmp_path, caplog):
    tracker = Tracker(TrackingConfig(), str(tmp_path / "gone"))
    tracker._client.set_terminated(tracker.run_id(), "FINISHED")
    read(str(tmp_path / "gone")).delete_run(tracker.run_id())  # a deleted run takes nothing
    for step in range(3):
        tracker.log_metrics({"loss": 1.0}, step=step)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.slow
def test_the_ui_command_serves_the_pages(output):
    Tracker(TrackingConfig(), output)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = shlex.split(ui_command(tracking_uri(TrackingConfig(), output), port))
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert "MLflow" in _page(f"http://127.0.0.1:{port}/", server)
    finally:
        server.terminate()
        server.wait(timeout=30)


def _page(url: str, server: subprocess.Popen) -> str:
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return reply.read().decode()
        except OSError:
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server did not answer"
            time.sleep(0.2)


def test_the_ui_of_a_server_is_its_address():
    assert ui_command("https://mlflow.example").endswith("-m webbrowser https://mlflow.example")


@ray.remote(num_cpus=0)
def log_from_a_worker(tracker: TrackerHandle) -> None:
    for step in range(3):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_bytes(b"png", "previews/a.png")


def test_a_worker_writes_through_the_actor(ray_cluster, output):
    tracker = start_tracker(TrackingConfig(), output)
    tracker.log_params({"steps": 3})
    run_id = tracker.run_id()
    ray.get(log_from_a_worker.remote(tracker))
    tracker.end("FINISHED")
    assert tracker.latest() == (2, {"loss": 2.0})
    run = read(output).get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"steps": "3"}
    assert history(output, run_id, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_the_machines_of_a_run_are_watched(ray_cluster, output, caplog):
    tracker = start_tracker(TrackingConfig(), output)
    run_id, machines = tracker.run_id(), NodeMetrics(tracker, seconds=0.05)
    here = ray.get_runtime_context().get_node_id()
    gone = "0" * 56  # no such node
    name, deadline = "system/node_1/cpu_utilization_percentage", time.monotonic() + 120
    while not history(output, run_id, name):
        machines.poll({here, gone})
        assert time.monotonic() < deadline
        time.sleep(0.1)
    tracker.end("FINISHED")
    run = read(output).get_run(run_id)
    assert run.data.tags["node_1"] == socket.gethostname()
    assert 0 < run.data.metrics["system/node_1/system_memory_usage_percentage"] < 100
    assert {"system/node_1/disk_usage_percentage", "system/node_1/network_receive_megabytes"} <= run.data.metrics.keys()
    assert not caplog.records, "a node that goes away is no news here"
    NodeMetrics(tracker, seconds=0.0).poll({here})  # none are watched


def test_the_actors_death_is_one_warning(ray_cluster, output, caplog):
    tracker = start_tracker(TrackingConfig(), output)
    tracker.log_metrics({"loss": 1.0}, step=1)
    assert tracker.run_id()  # it has started
    assert tracker.latest() == (1, {"loss": 1.0})
    ray.kill(tracker._actor)
    for step in range(5):
        tracker.log_metrics({"loss": 2.0}, step)
    assert tracker.latest() == (1, {"loss": 1.0})
    tracker.end("FAILED")
    assert tracker.run_id() == ""
    assert len([record for record in caplog.records if record.name.startswith("ray_platform.tracking")]) == 1
