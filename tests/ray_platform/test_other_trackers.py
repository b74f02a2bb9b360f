"""TensorBoard and Weights & Biases: their files, read by their own readers, have the same curves as MLflow."""

import io
import math
import struct
import sys
import time
from pathlib import Path

import psutil
import pytest
import wandb
from mlflow import MlflowClient
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.tracking import RunMetadata, TrackedData, TrackingConfig, delivery, start_run, tensorboard_tracker, tracking_uri
from ray_platform.tracking.delivery import check_trackers
from ray_platform.tracking.journal import Journal
from ray_platform.tracking.runs import deliver_journal

Curves = dict[str, list[tuple[int, float]]]  # (step, value) by name
METADATA = RunMetadata("demo", "a test", {"recipe": "demo"}, {"train": {"lr": 3e-4, "api_key": "a-private-key"}})


def png(width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 3), "red").save(buffer, "PNG")
    return buffer.getvalue()


def log_run(config: TrackingConfig, output: str) -> None:
    """Log two launches, of which the second one resumes from an earlier step than the last of the first."""
    for first, last in ((1, 5), (4, 8)):
        with start_run(config, output, METADATA, resume=True, record=True) as tracker:
            for step in range(first, last):
                tracker.log_metrics({"train/loss": 1 / step, "alignment/loss_t000-250": math.sqrt(step)}, step)
            tracker.log_metrics({"heldout/acc1": 0.5, "train/nan": math.nan}, last)
            tracker.log_system({"node_0/cpu_utilization_percentage": 50.0})
            tracker.log_data([TrackedData("train", "01", "s3://user:secret@bucket/train", "training")])
            tracker.log_bytes(b"{}", "model.json")
            tracker.log_bytes(png(last), f"previews/step_{last:08d}.png")


def mlflow_curves(output: str, run_id: str) -> Curves:
    client = MlflowClient(tracking_uri(TrackingConfig(), output))
    names = client.get_run(run_id).data.metrics
    return {name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)] for name in names}


def tensorboard_curves(folder: str) -> Curves:
    events = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def wandb_records(output: str) -> list:
    """Return the records of all of W&B's files. They are protocol buffers in LevelDB's log format: blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted(Path(output, "wandb").glob("*run-*-*/*.wandb")):
        content, position, message = file.read_bytes(), 7, b""
        assert content.startswith(b":W&B")
        while position + 7 <= len(content):
            rest = 2**15 - position % 2**15
            if rest < 7:
                position += rest
                continue
            _, size, kind = struct.unpack_from("<IHB", content, position)
            message += content[position + 7 : position + 7 + size]
            position += 7 + size
            if kind in (1, 4):  # complete, or the last part
                records.append(Record.FromString(message))
                message = b""
    return records


def wandb_curves(output: str) -> Curves:
    curves: Curves = {}
    for record in wandb_records(output):
        numbers = [item for item in record.history.item if len(item.nested_key) < 2]  # others describe an image
        row = {item.key or item.nested_key[0]: float(item.value_json) for item in numbers}
        axis = "system/age_seconds" if "system/age_seconds" in row else "step"
        for name in row.keys() - {axis} if axis in row else ():
            if not name.startswith("_"):
                curves.setdefault(name, []).append((int(row[axis]), row[name]))
    return curves


def comparable(curves: Curves) -> dict[str, list[tuple[int, object]]]:
    """Round to float32, which TensorBoard has, and sort, as MLflow does."""
    return {name: sorted((step, str(struct.pack("f", value))) for step, value in curve) for name, curve in curves.items()}


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_DIR", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    wandb.teardown()  # a process reads its settings once


@pytest.mark.ranks
def test_several_trackers_at_the_same_time_have_the_same_curves(tmp_path, offline, caplog):
    output, config = str(tmp_path), TrackingConfig(backends=("mlflow", "tensorboard", "wandb"), tags={"team": "vision"})
    check_trackers(config, output)
    log_run(config, output)
    run_id = storage.read_json(f"{output}/mlflow.json")["run_id"]
    expected = comparable(mlflow_curves(output, run_id))
    assert len(expected) == 5
    assert len(expected["train/loss"]) == 8
    assert comparable(tensorboard_curves(f"{output}/tensorboard")) == expected
    assert comparable(wandb_curves(output)) == expected
    assert not [record for record in caplog.records if "tracking" in record.name]

    records = wandb_records(output)
    assert len({record.run.run_id for record in records if record.HasField("run")}) == 1, "the second launch continues the run"
    config_items = {
        item.key: item.value_json for record in records for item in (*record.run.config.update, *record.config.update)
    }
    assert '"team":"vision"' in config_items["tags"].replace(" ", "")
    assert '"lr":0.0003' in config_items["train"].replace(" ", "")
    assert not {text for text in map(str, records) if "secret" in text or "a-private-key" in text}
    assert len(list(tmp_path.glob("wandb/offline-run-*/files/model.json"))) == 2
    images = {Path(file).read_bytes() for file in tmp_path.glob("wandb/offline-run-*/files/media/images/previews_*.png")}
    assert images == {png(5), png(8)}
    events = EventAccumulator(f"{output}/tensorboard").Reload()
    shown = [(image.step, image.width, image.height, image.encoded_image_string) for image in events.Images("previews")]
    assert shown == [(5, 5, 3, png(5)), (8, 8, 3, png(8))]
    assert b"lr: 0.0003" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.s3
def test_event_files_in_object_storage(s3_url, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard_tracker, "_OBJECT_BYTES", 100)
    url = f"{s3_url}/tensorboard_run"
    log_run(TrackingConfig(backends=("tensorboard",)), url)
    storage.get_folder(f"{url}/tensorboard", tmp_path)
    assert len(list(tmp_path.iterdir())) > 2
    logged: Curves = {}
    for entry, _ in Journal(url).entries():
        for name, value in entry.get("metrics", {}).items():
            logged.setdefault(name, []).append((entry["step"], value))
    curves = tensorboard_curves(str(tmp_path))
    curves.pop("system/node_0/cpu_utilization_percentage")
    assert comparable(curves) == comparable(logged)


@pytest.mark.ranks
def test_wandb_receives_everything_after_its_server_and_its_process_were_down(tmp_path, offline, monkeypatch, caplog):
    from ray_platform.tracking import wandb_tracker

    output, config = str(tmp_path), TrackingConfig(backends=("wandb",))
    monkeypatch.setattr(delivery, "_END_SECONDS", 0.0)
    monkeypatch.setitem(wandb_tracker._SETTINGS, "init_timeout", 2.0)
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()
    with start_run(config, output, METADATA, record=True) as tracker:
        tracker.log_metrics({"train/loss": 1.0}, 1)
    assert [record.levelname for record in caplog.records if "tracking" in record.name] == ["WARNING"] * 2
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    monkeypatch.setattr(delivery, "_END_SECONDS", 60.0)
    assert deliver_journal(output) == []
    with start_run(config, output, METADATA, record=True, resume=True) as tracker:
        tracker.log_metrics({"train/loss": 2.0}, 2)
        deadline = time.monotonic() + 60
        while (2, 2.0) not in wandb_curves(output)["train/loss"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        [process] = [child for child in psutil.Process().children(recursive=True) if "wandb-core" in child.name()]
        process.kill()
        process.wait()
        tracker.log_metrics({"train/loss": 3.0}, 3)
    assert {step for step, _ in wandb_curves(output)["train/loss"]} == {1, 2, 3}


def test_a_tracker_that_cannot_work_is_named_with_the_remedy(offline, monkeypatch):
    with pytest.raises(ConfigError, match=r"tracking.backends: wandb .*s3://bucket/run.*WANDB_DIR"):
        check_trackers(TrackingConfig(backends=("wandb",)), "s3://bucket/run")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", "/dev/null")
    wandb.teardown()
    with pytest.raises(ConfigError, match=r"tracking.backends: wandb .*WANDB_API_KEY"):
        check_trackers(TrackingConfig(backends=("wandb",)), "/data/run")
    for backend, package in (("wandb", "wandb"), ("tensorboard", "tensorboardX")):
        monkeypatch.delitem(sys.modules, f"ray_platform.tracking.{backend}_tracker", raising=False)
        monkeypatch.setitem(sys.modules, package, None)  # as if it was not installed
        with pytest.raises(ConfigError, match=rf"tracking.backends: {backend} .*{package}.*diffdis-platform\[{backend}\]"):
            check_trackers(TrackingConfig(backends=("mlflow", backend)), "/data/run")
