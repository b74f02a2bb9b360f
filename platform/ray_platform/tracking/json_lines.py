"""Tracker that appends to a file of JSON lines in the run's output folder. It needs neither a server nor a database."""

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_platform import storage
from ray_platform.tracking.config import TrackingConfig
from ray_platform.tracking.tracker import RunStatus, TrackedData, Tracker

FILE, ARTIFACTS = "metrics.jsonl", "artifacts"
_UPLOAD_SECONDS = 60.0  # between two uploads of the file to object storage, which cannot append


class JsonLinesTracker(Tracker):
    """Writes one JSON object per call: its `time` (seconds since 1970) and `step` and `metrics`, or `params`, `tags`, ….

    A resumed run appends to the file of its output folder: of two values of a metric at a step, the later one counts.
    """

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str) -> None:
        self._run_id = run_id or uuid.uuid4().hex
        self._output_dir, self._url = output_dir, storage.join(output_dir, FILE)
        self._is_local = "://" not in output_dir
        self._lines: list[str] = []  # of object storage: the whole file
        self._uploaded = time.monotonic()
        if not self._is_local and storage.exists(self._url):
            self._lines = storage.read_bytes(self._url).decode().splitlines(keepends=True)
        self._write(run_id=self._run_id, run_name=config.run_name, parent_run_id=config.parent_run_id, tags=config.tags)

    def run_id(self) -> str:
        return self._run_id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        self._write(description=description, tags=tags)

    def log_params(self, config: Mapping[str, Any]) -> None:
        self._write(params=config)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._write(step=step, metrics=metrics)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        self._write(system=metrics)

    def log_data(self, data: Sequence[TrackedData]) -> None:
        self._write(data=[asdict(part) for part in data])

    def log_bytes(self, data: bytes, path: str) -> None:
        storage.write_bytes(storage.join(self._output_dir, ARTIFACTS, path), data)

    def end(self, status: RunStatus) -> None:
        self._write(status=status)
        self._upload()

    def _write(self, **values: Any) -> None:
        line = json.dumps({"time": time.time()} | {name: v for name, v in values.items() if v != ""}, default=str) + "\n"
        if self._is_local:
            Path(self._output_dir).mkdir(parents=True, exist_ok=True)
            with open(self._url, "a") as file:
                file.write(line)
            return
        self._lines.append(line)
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._upload()

    def _upload(self) -> None:
        if not self._is_local:
            self._uploaded = time.monotonic()
            storage.write_bytes(self._url, "".join(self._lines).encode())


def read_history(output_dir: str, prefix: str) -> dict[int, dict[str, float]]:
    """Return the metrics whose names start with `prefix`, by step. Raises DataError if the file cannot be read."""
    history: dict[int, dict[str, float]] = {}
    for line in storage.read_bytes(storage.join(output_dir, FILE)).decode().splitlines():
        values = json.loads(line)
        for name, value in values.get("metrics", {}).items():
            if name.startswith(prefix):
                history.setdefault(values["step"], {})[name] = value
    return dict(sorted(history.items()))
