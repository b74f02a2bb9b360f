"""Delivery to services that do not answer for a while, reject calls, or cannot be used."""

import logging
from pathlib import Path

import pytest

from ray_platform.contracts import ConfigError, DataError
from ray_platform.tracking import RunMetadata, Tracker, TrackingConfig, delivery, metric_history, read_run_record, start_run
from ray_platform.tracking.runs import deliver_journal
from tests.support.messages import check_message

METADATA = RunMetadata("demo", "a test", {"recipe": "demo"}, {"steps": 3})


class Flaky(Tracker):
    """A tracker whose service does not answer while `is_down`."""

    is_down, calls = True, []

    def __init__(self, config, output_dir, run_id):
        self.check()
        self._id = run_id or "first"
        self.calls.append(("open", run_id))

    def check(self):
        if Flaky.is_down:
            raise ConnectionError("no answer from http://user:secret@host")

    def run_id(self):
        return self._id

    def log_metrics(self, metrics, step):
        self.check()
        if "bad" in metrics:
            raise ValueError("this name is not allowed")
        if "broken" in metrics:
            raise OSError("an error of the service for this metric")
        self.calls.append((step, dict(metrics)))

    def end(self, status):
        self.check()
        self.calls.append(status)


def placeholders(output_dir: Path) -> dict[str, object]:
    backend, cause = f"{__name__}:Flaky", "no answer from http://***@host"
    return {"mlflow": backend, "OUTPUT_DIR": output_dir, "CAUSE": cause, "REASON": "this name is not allowed"}


@pytest.fixture
def flaky(monkeypatch, no_waits):
    monkeypatch.setattr(Flaky, "calls", [])
    monkeypatch.setattr(Flaky, "is_down", True)
    return TrackingConfig(backends=(f"{__name__}:Flaky",))


def test_a_service_that_answers_late_receives_everything_in_order(flaky, tmp_path, caplog):
    with start_run(flaky, str(tmp_path), METADATA, record=True) as tracker:
        tracker.log_metrics({"loss": 1.0}, 1)
        assert tracker.run_id() == read_run_record(str(tmp_path))["run_id"] == ""
        Flaky.is_down = False
        tracker.log_metrics({"loss": 2.0}, 2)
    assert Flaky.calls == [("open", ""), (1, {"loss": 1.0}), (2, {"loss": 2.0}), "FINISHED"]
    assert read_run_record(str(tmp_path))["run_id"] == "first"
    assert len(caplog.messages) == 2
    assert "secret" not in caplog.text
    for fault, line in zip(("MLflow does not answer", "MLflow answers again"), caplog.messages, strict=True):
        check_message(fault, line, **placeholders(tmp_path))


def test_what_a_run_could_not_deliver_is_delivered_by_the_next_one(flaky, tmp_path, caplog):
    for step in (1, 2):
        with start_run(flaky, str(tmp_path), record=True, resume=True) as tracker:
            tracker.log_metrics({"loss": 1.0}, step)
    assert [line.endswith("no answer from http://***@host") for line in caplog.messages] == [True] * 4
    check_message("MLflow does not answer before the end of the run", caplog.messages[-1], **placeholders(tmp_path))
    assert len(deliver_journal(str(tmp_path))) == 1
    Flaky.is_down = False
    assert deliver_journal(str(tmp_path)) == []
    assert read_run_record(str(tmp_path))["run_id"] == "first"
    with start_run(flaky, str(tmp_path), record=True, resume=True) as tracker:
        tracker.log_metrics({"loss": 1.0}, 3)
    with pytest.raises(DataError, match=r"nothing: has no run"):
        deliver_journal(str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="--uri"):
        deliver_journal(str(tmp_path), "http://***@host")
    steps = [call[0] for call in Flaky.calls if isinstance(call[0], int)]
    assert (steps, Flaky.calls[0], Flaky.calls[-1]) == ([1, 2, 3], ("open", ""), "FINISHED")
    assert {call for call in Flaky.calls[1:] if call[0] == "open"} == {("open", "first")}, "one run"
    assert len(Flaky.calls) == 3 + 3 + 3, "nothing is delivered again"


def test_a_known_run_is_not_forgotten_when_the_service_does_not_answer(flaky, tmp_path):
    Flaky.is_down = False
    with start_run(flaky, str(tmp_path), record=True):
        pass
    Flaky.is_down = True
    with start_run(flaky, str(tmp_path), record=True, resume=True) as tracker:
        assert tracker.run_id() == "first"
    assert read_run_record(str(tmp_path))["run_id"] == "first"


def test_a_call_that_the_service_rejects_is_skipped_and_named_once(flaky, tmp_path, caplog, monkeypatch):
    Flaky.is_down = False
    with start_run(flaky, str(tmp_path)) as tracker:
        for step in range(4):
            tracker.log_metrics({"bad": 1.0} if step in (1, 2) else {"good": 1.0}, step)
    assert [call for call in Flaky.calls if isinstance(call[0], int)] == [(0, {"good": 1.0}), (3, {"good": 1.0})]
    [line] = caplog.messages
    monkeypatch.setattr(delivery, "_END_SECONDS", 60.0)
    with start_run(flaky, str(tmp_path)) as tracker:
        tracker.log_metrics({"broken": 1.0}, 4)
        tracker.log_metrics({"good": 1.0}, 5)
    assert Flaky.calls[-2:] == [(5, {"good": 1.0}), "FINISHED"]
    check_message("MLflow rejects a metric", line, **placeholders(tmp_path))


@pytest.mark.parametrize(
    ("uri", "cause"),
    [
        ("sqlite:////proc/no/such/folder/mlflow.db", "'/proc/no/such/folder'"),
        ("http://127.0.0.1:9", "[Errno 111] Connection refused"),
    ],
)
def test_an_unusable_store_is_one_warning_and_one_line_at_the_end(uri, cause, no_waits, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with start_run(
        TrackingConfig(uri),
        str(tmp_path),
        METADATA,
        record=True,
    ) as tracker:
        assert tracker.run_id() == ""
        tracker.log_metrics({"loss": 1.0}, step=1)
    assert metric_history("", "", "loss", str(tmp_path)) == {1: {"loss": 1.0}}
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    assert {line.rpartition(": ")[2] for line in caplog.messages} == {cause}
