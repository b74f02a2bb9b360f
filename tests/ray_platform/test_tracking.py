"""Trackers: a real SQLite store read with MLflow's client, and the journal."""

import base64
import json
import logging
import math
import socket
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from mlflow import MlflowClient

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.tracking import (
    RunMetadata,
    TrackedData,
    TrackedRun,
    TrackingConfig,
    journal,
    metric_history,
    node_metrics,
    read_run_record,
    start_run,
    tracking_uri,
)
from ray_platform.tracking.journal import Journal
from ray_platform.tracking.mlflow_tracker import run_page, ui_command
from ray_platform.tracking.node_metrics import NodeMetrics
from ray_platform.tracking.runs import write_run_record
from tests.support.messages import check_message

CONFIG = {"train": {"lr": 3e-4, "betas": [0.9, 0.99]}, "data": {"sources": "x" * 9000}, "folder": Path("/data")}
JSON_LINES = TrackingConfig(backends=("jsonl",))


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """One output folder for the module: creating the tables takes two seconds. Its name is not a pattern, query or escape."""
    parent = tmp_path_factory.mktemp("output")
    (parent / "run[1] q?x a%20b #{y}").mkdir()
    yield str(parent / "run[1] q?x a%20b #{y}")
    assert len(list(parent.iterdir())) == 1, "something was written next to the folder"


PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)  # 1 x 1 pixels


def client_of(output: str) -> MlflowClient:
    return MlflowClient(tracking_uri(TrackingConfig(), output))


def history(output: str, run_id: str, name: str) -> list[tuple[int, float]]:
    return [(metric.step, metric.value) for metric in client_of(output).get_metric_history(run_id, name)]


def warnings_of(caplog) -> list[int]:
    return [record.levelno for record in caplog.records if record.name.startswith("ray_platform.tracking")]


def metadata(**params: Any) -> RunMetadata:
    return RunMetadata("demo", "a test from s3://user:secret@bucket", {"recipe": "demo"}, params)


def test_mlflow_returns_what_was_logged(output, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    with start_run(TrackingConfig(run_name="first"), output, record=True) as tracker:
        tracker.log_params(CONFIG | {f"field_{i}": i for i in range(250)})  # more than a server accepts per call
        tracker.log_metrics({"loss/generation": 1.5, "loss/alignment": 2.5}, step=1)
        tracker.log_metrics({"loss/generation": 1.25}, step=2)
        tracker.log_system({"node_0/cpu_utilization_percentage": 50.0})
        for _ in range(2):  # a call of unknown outcome is repeated
            tracker.log_bytes(PNG, "previews/step_000002.png")
        tracker.log_metrics({"train/loss_generation": 0.5}, step=3)
        tracker.log_folder(str(tmp_path), "model")

    run = client_of(output).get_run(read_run_record(output)["run_id"])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["train.lr"] == "0.0003"
    assert (len(run.data.params), len(run.data.params["data.sources"])) == (254, 500)
    assert history(output, tracker.run_id(), "loss/generation") == [(1, 1.5), (2, 1.25)]
    [(seconds, value)] = history(output, tracker.run_id(), "system/node_0/cpu_utilization_percentage")
    assert (0 <= seconds < 60, value) == (True, 50.0)
    artifacts = Path(output) / "mlartifacts" / tracker.run_id() / "artifacts"
    assert (artifacts / "previews" / "step_000002.png").read_bytes() == PNG
    assert len(list((artifacts / "images").glob("*previews*step*2*.png"))) == 1, "an image of the slider"
    assert history(output, tracker.run_id(), "_overview/loss_generation") == [(3, 0.5)], "the first charts of the run's page"
    assert (artifacts / "model" / "unet" / "config.json").exists()
    assert "x" * 9000 in (artifacts / "config.yaml").read_text()


def test_tags_description_and_datasets_of_a_run_that_is_continued(output):
    data = [
        TrackedData("train", "0123456789abcdef", "s3://bucket/train", "training", {"num_samples": 60}),
        TrackedData("heldout", "fedcba9876543210", "/data/heldout", "heldout"),
    ]
    with start_run(TrackingConfig(tags={"team": "vision"}), output) as tracker:
        tracker.describe("trained on `s3://user:secret@bucket`", {"recipe": "demo", "long": "x" * 9000})
        tracker.log_data(data)
    tags = client_of(output).get_run(tracker.run_id()).data.tags
    assert (tags["team"], tags["recipe"], len(tags["long"])) == ("vision", "demo", 5000)
    assert tags["mlflow.note.content"] == "trained on `s3://***@bucket`"
    client_of(output).set_tag(tracker.run_id(), "mlflow.note.content", "written by a user")
    with start_run(TrackingConfig(tags={"team": "audio"}), output, run_id=tracker.run_id()) as again:
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
    with start_run(TrackingConfig(), output, metadata(steps=20, added=1), resume=True, record=True) as second:
        assert second.run_id() == record["run_id"]
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


def test_a_run_that_was_deleted_is_written_again_from_its_journal(output, caplog):
    with start_run(TrackingConfig(), output, record=True) as first:
        first.log_metrics({"loss": 2.0}, step=1)
    client_of(output).delete_run(first.run_id())
    with start_run(TrackingConfig(), output, record=True, resume=True) as second:
        second.log_metrics({"loss": 1.0}, step=2)
    assert read_run_record(output)["run_id"] == second.run_id() != first.run_id()
    assert history(output, second.run_id(), "loss") == [(1, 2.0), (2, 1.0)]
    assert first.run_id() in caplog.text


def test_what_is_delivered_twice_is_in_mlflow_once(output):
    """A process that is killed, or an answer that is lost, leaves open what the store has received."""
    state = Path(output) / "metrics.delivered.json"
    with start_run(TrackingConfig(), output, metadata(steps=1), record=True) as tracker:
        tracker.run_id()
        earlier = state.read_bytes()
        tracker.log_metrics({"loss": 2.0, "nan": math.nan}, step=1)
        tracker.log_metrics({"loss": 2.0}, step=2)
        tracker.log_system({"node_0/cpu": 1.0})
    state.write_bytes(earlier)
    with start_run(TrackingConfig(), output, record=True, resume=True) as again:
        again.log_metrics({"loss": 3.0}, step=3)
    assert again.run_id() == tracker.run_id()
    assert history(output, tracker.run_id(), "loss") == [(1, 2.0), (2, 2.0), (3, 3.0)]
    assert len(history(output, tracker.run_id(), "nan")) == len(history(output, tracker.run_id(), "system/node_0/cpu")) == 1


@pytest.mark.parametrize("backend", ["mlflow", "jsonl"])
def test_a_history_is_by_step_and_has_the_later_of_two_values(tmp_path, output, backend, caplog):
    config = TrackingConfig(tracking_uri(TrackingConfig(), output), backends=(backend,))
    with start_run(config, str(tmp_path)) as tracker:
        for step, value in ((1, 0.5), (2, 0.25), (2, 0.125)):
            tracker.log_metrics({"heldout/acc1": value, "loss": 1.0}, step)
            time.sleep(0.002)  # the store's timestamps have a resolution of milliseconds
    uri, curve = tracking_uri(config, str(tmp_path)), {1: {"heldout/acc1": 0.5}, 2: {"heldout/acc1": 0.125}}
    assert metric_history(uri, tracker.run_id(), "heldout/", str(tmp_path)) == curve
    assert metric_history("sqlite:////proc/no/such/mlflow.db", "0" * 32, "heldout/", str(tmp_path)) == curve, "from the journal"
    (tmp_path / "metrics.jsonl").unlink()
    assert metric_history(uri, tracker.run_id(), "heldout/", str(tmp_path)) == (curve if backend == "mlflow" else {})
    assert "cannot be read" in caplog.text


def check_journal(output: str) -> None:
    with start_run(JSON_LINES, output, metadata(api_key="abc"), record=True) as tracker:
        tracker.log_data([TrackedData("train", "01", "s3://user:secret@bucket/train", "training")])
        tracker.log_metrics({"loss": math.inf}, step=1)
        tracker.log_system({"node_0/cpu_utilization_percentage": 50.0})
        tracker.log_bytes(b"png", "previews/a.png")
        tracker.log_folder("model", "model")
    with start_run(JSON_LINES, output, resume=True) as again:
        again.log_metrics({"loss": 1.0}, step=2)
    text = b"".join(storage.read_bytes(file.url) for file in storage.list_folder(output, "metrics.jsonl*")).decode()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines == [entry for entry, _ in Journal(output).entries()]
    assert {line["run"]["run_id"] for line in lines if "run" in line} == {tracker.run_id()} == {again.run_id()}
    assert [(line["step"], line["metrics"]["loss"]) for line in lines if "metrics" in line][1:] == [(2, 1.0)]
    assert [line["status"] for line in lines if "status" in line] == ["FINISHED", "FINISHED"]
    assert all(isinstance(line["time"], float) for line in lines)
    assert storage.read_bytes(f"{output}/artifacts/previews/a.png") == b"png"
    assert "secret" not in text
    assert '"api_key": "***"' in text


def test_the_journal_has_everything_and_no_secret(tmp_path):
    check_journal(str(tmp_path))


def test_a_journal_in_object_storage_consists_of_small_objects(s3_url, monkeypatch):
    monkeypatch.setattr(journal, "_OBJECT_BYTES", 300)
    check_journal(f"{s3_url}/run")
    assert len(storage.list_folder(f"{s3_url}/run", "metrics.jsonl*")) > 2


def test_a_journal_survives_a_torn_line_a_full_disk_and_a_call_that_is_repeated(tmp_path, caplog):
    file, entries = tmp_path / "metrics.jsonl", [{"time": float(i), "step": i} for i in range(4)]
    first = Journal(str(tmp_path))
    first.append(entries[0])
    with file.open("ab") as torn:
        torn.write(b'{"time": 9')
    second = Journal(str(tmp_path))
    second.append(entries[0])  # its process was killed before it could answer
    second.append(entries[1])
    size = file.stat().st_size
    file.rename(tmp_path / "moved")
    file.mkdir()  # cannot be written for a while
    second.append(entries[2])
    file.rmdir()
    (tmp_path / "moved").rename(file)
    assert (file.stat().st_size, second.end() > size) == (size, True)
    second.append(entries[3])
    assert [entry for entry, _ in Journal(str(tmp_path)).entries() if entry] == entries
    assert len(caplog.records) == 1


def test_a_trial_waits_for_the_run_of_its_sweep(no_waits, output, tmp_path):
    """MLflow did not answer when the sweep started, so its trials know their parent's output folder instead of its id."""
    parent = f"{tmp_path}/sweep"
    write_run_record(TrackingConfig(), parent, "")
    config = TrackingConfig(tracking_uri(TrackingConfig(), output), parent_run_id=parent)
    with start_run(config, f"{tmp_path}/trial", record=True) as tracker:
        assert tracker.run_id() == ""
        write_run_record(TrackingConfig(), parent, "the-sweep")
    assert client_of(output).get_run(tracker.run_id()).data.tags["mlflow.parentRunId"] == "the-sweep"


def test_a_backend_or_store_that_cannot_be_used_is_named(no_waits, tmp_path, caplog):
    with pytest.raises(ValueError, match=r"tracking.backends.*comet.*mlflow"):
        TrackingConfig(backends=("comet",))
    with start_run(TrackingConfig(backends=("no.such.module:Tracker",)), str(tmp_path)) as tracker:
        assert tracker.run_id() == ""
    assert "no.such.module:Tracker" in caplog.text
    with pytest.raises(ConfigError, match=r"tracking.uri.*s3://bucket/run"):
        tracking_uri(TrackingConfig(), "s3://bucket/run")
    assert tracking_uri(JSON_LINES, "s3://bucket/run") == ""


def test_bad_metric_values_do_not_affect_others(output, caplog):
    values: dict[str, Any] = {"nan": math.nan, "inf": math.inf, "none": None, "good": 1.0}
    with start_run(TrackingConfig(), output) as tracker:
        tracker.log_metrics(values, step=1)
        tracker.log_metrics(values, step=2)
    assert history(output, tracker.run_id(), "good") == [(1, 1.0), (2, 1.0)]
    assert [math.isnan(value) for _, value in history(output, tracker.run_id(), "nan")] == [True, True]
    assert len(history(output, tracker.run_id(), "inf")) == 2
    assert len(caplog.records) == 1, "one warning"
    assert "none" in caplog.text


def test_a_run_that_disappears_while_it_is_written_is_one_warning(output, caplog):
    with start_run(TrackingConfig(), output) as tracker:
        client_of(output).set_terminated(tracker.run_id(), "FINISHED")
        client_of(output).delete_run(tracker.run_id())  # a deleted run accepts no data
        for step in range(3):
            tracker.log_metrics({"loss": 1.0}, step=step)
    assert warnings_of(caplog) == [logging.WARNING] * 2, "for the metrics and the status"


@pytest.mark.slow
def test_a_model_is_registered_whatever_the_number_of_models(output):
    client = client_of(output)
    for number in range(100):  # a page
        client.create_registered_model(f"a_{number:03d}")
    with start_run(TrackingConfig(), output) as tracker:
        run_id = tracker.run_id()
        for _ in range(2):
            tracker.register_model("model", f"{output}/first", run_id, {"rank": "1"})
        tracker.register_model("model", f"{output}/second", run_id, {})
    versions = client.search_model_versions("name='model'")
    assert sorted(version.source for version in versions) == [f"{output}/first", f"{output}/second"]


def test_the_page_of_a_run_opens_on_its_curves(output):
    with start_run(TrackingConfig(), output, record=True) as tracker:
        pass
    record = read_run_record(output)
    experiment = client_of(output).get_run(tracker.run_id()).info.experiment_id
    path = f"/#/experiments/{experiment}/runs/{tracker.run_id()}/model-metrics?workflowType=machine_learning"
    assert run_page(record, 5001) == f"http://127.0.0.1:5001{path}"


def test_the_ui_command_of_a_server_is_its_address_and_of_a_store_a_server():
    assert ui_command("https://mlflow.example").endswith("-m webbrowser https://mlflow.example")
    assert "--backend-store-uri sqlite:////run/mlflow.db --port 5000" in ui_command("sqlite:////run/mlflow.db")


@ray.remote(num_cpus=0)
def log_from_a_worker(tracker: TrackedRun, first: int) -> None:
    for step in range(first, first + 3):
        tracker.log_metrics({"loss": float(step)}, step)
    tracker.log_bytes(b"png", "previews/a.png")
    tracker.flush()


def test_a_worker_writes_through_an_actor_whose_process_may_be_killed(ray_cluster, output):
    """What was sent to the process while it was dead is not lost, and nothing is there twice."""
    with start_run(TrackingConfig(), output, metadata(steps=3), in_actor=True) as tracker:
        assert "run" in json.loads(Path(output, "metrics.jsonl").read_text().splitlines()[0]), "before any worker logs"
        ray.get(log_from_a_worker.remote(tracker, 0))
        run_id = tracker.run_id()
        processes = [child for child in psutil.Process().children(recursive=True) if "RunWriter" in " ".join(child.cmdline())]
        process = max(processes, key=psutil.Process.create_time)  # that of an earlier run may not have ended yet
        process.kill()
        ray.get(log_from_a_worker.remote(tracker, 3))
        assert tracker.run_id() == run_id
    logs = [file.read_text() for file in Path(ray_cluster.address_info["session_dir"], "logs").glob("worker-*.err")]
    [line] = {
        line for log in logs for line in log.splitlines() if "writes the run died" in line
    }  # other tests may restart it, too
    check_message("the tracker's process is killed", line)
    run = client_of(output).get_run(run_id)
    assert (run.info.status, run.data.params) == ("FINISHED", {"steps": "3"})
    assert history(output, run_id, "loss") == [(step, float(step)) for step in range(6)]


def test_the_nodes_of_a_run_are_measured(ray_cluster, output, caplog, monkeypatch):
    monkeypatch.setattr(node_metrics, "_MAX_NODES", 2)
    this_node = ray.get_runtime_context().get_node_id()
    missing, left, unnamed = "0" * 56, "1" * 56, "f" * 56
    name, deadline = "system/node_1/cpu_utilization_percentage", time.monotonic() + 120
    with start_run(TrackingConfig(), output, in_actor=True) as tracker:
        run_id, metrics = tracker.run_id(), NodeMetrics(tracker, seconds=1e-9)
        metrics.poll({missing, left})
        while not history(output, run_id, name):
            metrics.poll({this_node, missing, unnamed})
            assert time.monotonic() < deadline
            time.sleep(0.1)
    run = client_of(output).get_run(run_id)
    assert run.data.tags["node_1"] == socket.gethostname()
    assert 0 < run.data.metrics["system/node_1/system_memory_usage_percentage"] < 100
    assert {"system/node_1/disk_usage_percentage", "system/node_1/network_receive_megabytes"} <= run.data.metrics.keys()
    [record] = caplog.records  # not of the node that disappears
    assert "2 nodes" in record.message
    NodeMetrics(tracker, seconds=0.0).poll({this_node})
