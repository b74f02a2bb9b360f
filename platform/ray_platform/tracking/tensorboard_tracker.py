"""TensorBoard: the tracker that writes its event files. Only this module imports tensorboardX."""

import io
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary

from ray_platform import storage
from ray_platform.tracking.config import TrackingConfig
from ray_platform.tracking.tracker import MetricPoint, NestedValues, Tracker, preview_of

FOLDER = "tensorboard"  # in output_dir
_OBJECT_BYTES = 2**17  # object storage cannot append: a file of this size is followed by another one


class TensorBoardTracker(Tracker):
    """Writer of a run's event files, on a disk or in object storage. Every call ends when its events are stored."""

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str) -> None:
        self._run_id = run_id or uuid.uuid4().hex
        self._url = storage.join(output_dir, FOLDER)
        self._scratch = tempfile.TemporaryDirectory(prefix="tensorboard_") if "://" in output_dir else None
        self._start_file()

    def _start_file(self) -> None:
        folder = Path(self._scratch.name if self._scratch else self._url)
        folder.mkdir(parents=True, exist_ok=True)
        known = set(folder.iterdir())
        # TensorBoard reads the files in the order of their names, which begin with the second in which they were created.
        self._events = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        [self._file] = set(folder.iterdir()) - known

    def run_id(self) -> str:
        return self._run_id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        rows = [f"| {name} | {value} |" for name, value in tags.items()]
        self._write_text("description", "\n".join([description, "", "| tag | value |", "|---|---|", *rows]))

    def log_params(self, config: NestedValues) -> None:
        self._write_text("config", f"```\n{yaml.safe_dump(dict(config), sort_keys=False)}```")

    def log_points(self, points: Sequence[MetricPoint]) -> None:
        for point in points:
            prefix = "system/" if point.is_system else ""
            values = [Summary.Value(tag=f"{prefix}{name}", simple_value=value) for name, value in point.metrics.items()]
            self._events.write_event(Event(wall_time=point.time, step=point.step, summary=Summary(value=values)))
        self._store()

    def log_bytes(self, data: bytes, path: str) -> None:
        """Show an image of a step. Other artifacts are only in `artifacts/` of the output folder."""
        if preview := preview_of(path):
            name, step = preview
            width, height = Image.open(io.BytesIO(data)).size
            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
            value = Summary.Value(tag=name, image=image)
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[value])))
            self._store()

    def _write_text(self, name: str, text: str) -> None:
        self._events.write_event(Event(wall_time=time.time(), summary=summary.text(name, text)))
        self._store()

    def _store(self) -> None:
        self._events.flush()
        if self._scratch is None:
            return
        storage.write_bytes(storage.join(self._url, self._file.name), self._file.read_bytes())
        if self._file.stat().st_size >= _OBJECT_BYTES:
            self._events.close()
            self._file.unlink()
            self._start_file()
