"""Open a tracked run: `start_run` is the one way, for a training, an evaluation, a sweep or a comparison."""

import contextlib
import importlib
import json
import logging
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partialmethod
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.redaction import redacted, redacted_values
from ray_platform.tracking.config import RUN_RECORD, TRACKERS, RunRecord, TrackingConfig, tracking_uri
from ray_platform.tracking.tracker import ModelPackage, NestedValues, RunMetadata, RunStatus, TrackedData, Tracker

logger = logging.getLogger(__name__)

_MAX_PENDING_CALLS = 1000  # further calls are dropped: a server that hangs must not fill the memory with waiting ones
_LATEST_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 120.0
_MODEL_TIMEOUT_S = 3600.0  # to upload a whole model; MLflow gives up on a server that does not answer sooner
_FILE, _ARTIFACTS = "metrics.jsonl", "artifacts"
_UPLOAD_SECONDS = 60.0  # between two uploads of the JSON lines to object storage, which cannot append


@contextlib.contextmanager
def start_run(
    config: TrackingConfig,
    output_dir: str,
    metadata: RunMetadata | None = None,
    *,
    run_id: str = "",
    record: bool = False,
    in_actor: bool = False,
) -> Iterator[Tracker]:
    """Open a tracked run; it ends as FINISHED, or as FAILED if the block raises. The tracker's methods never raise.

    Args:
        config: which trackers write the run, and where.
        output_dir: the job's output folder, local or s3://.
        metadata: description of the run; None: only add to the existing run `run_id`.
        run_id: the run to continue; empty: start a new one.
        record: write `mlflow.json` to `output_dir`, from which a resumed job continues in the same run.
        in_actor: write from an actor on this node, so that a slow store does not delay training steps. The tracker can then be
            sent to workers.

    Raises:
        DataError: `mlflow.json` cannot be written.
    """
    if metadata:
        config = replace(config, run_name=config.run_name or metadata.name)
    tracker: Tracker = start_tracker_actor(config, output_dir, run_id) if in_actor else SafeTracker(config, output_dir, run_id)
    status: RunStatus = "FAILED"
    try:
        if metadata:
            tracker.log_params(metadata.params)
            tracker.describe(metadata.description, metadata.tags)
            tracker.log_data(metadata.data)
        if record:
            content = json.dumps(redacted_values(run_record(config, output_dir, tracker)), indent=2)
            storage.write_bytes(storage.join(output_dir, RUN_RECORD), content.encode())
        yield tracker
        status = "FINISHED"
    finally:
        tracker.end(status)


def run_record(config: TrackingConfig, output_dir: str, tracker: Tracker) -> RunRecord:
    """Return the address of the run that `tracker` writes."""
    return RunRecord(tracking_uri=tracking_uri(config, output_dir), experiment=config.experiment, run_id=tracker.run_id())


def metric_history(uri: str, run_id: str, prefix: str, output_dir: str = "") -> dict[int, dict[str, float]]:
    """Return the metrics of a run whose names start with `prefix`, by step; empty if they cannot be read.

    They are read from the JSON lines in `output_dir` if `uri` is empty, and else from MLflow's store at `uri`. Of a metric that
    was logged twice at a step (a resumed run does that), the later value counts.
    """
    try:
        if uri:
            from ray_platform.tracking.mlflow_tracker import read_history  # its import takes a second

            entries = read_history(uri, run_id, prefix)
        else:
            lines = map(json.loads, storage.read_bytes(storage.join(output_dir, _FILE)).decode().splitlines())
            entries = [(line["step"], name, value) for line in lines for name, value in line.get("metrics", {}).items()]
    except Exception as error:
        logger.warning("tracking: the metrics of run %s cannot be read: %s", run_id, redacted(str(error)))
        return {}
    history: dict[int, dict[str, float]] = {}
    for step, name, value in sorted(entries, key=lambda entry: entry[0]):
        if name.startswith(prefix):
            history.setdefault(step, {})[name] = value
    return history


@contextlib.contextmanager
def _tolerate(warned: set[str], kind: str = "") -> Iterator[None]:
    """Turn a failure into a warning, logged once per kind of call (or of error): it must not stop a training."""
    try:
        yield
    except Exception as error:
        kind = kind or f"a call of the tracker's process ({type(error).__name__})"
        if kind not in warned:
            warned.add(kind)
            logger.warning("tracking: %s failed (logged once); the run continues: %s", kind, redacted(str(error)))


class SafeTracker(Tracker):
    """Writes to all trackers of `config.backends`. No method raises, and no argument reaches a tracker with a secret in it."""

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str = "") -> None:
        """Start a run, or continue `run_id`."""
        self._trackers: list[Tracker] = []
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})
        config = replace(config, tags=_redacted_tags(config.tags))
        for backend in config.backends:
            with _tolerate(self._warned, f"start of {backend}"):
                self._trackers.append(load_tracker_class(backend)(config, output_dir, run_id))

    def run_id(self) -> str:
        return next((run_id for tracker in self._trackers if (run_id := tracker.run_id())), "")

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        self._call("tags", lambda tracker: tracker.describe(redacted(description), _redacted_tags(tags)))

    def log_params(self, config: NestedValues) -> None:
        self._call("params", lambda tracker: tracker.log_params(redacted_values(config)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values that are not numbers are left out."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            with _tolerate(self._warned, f"metric {name}"):
                numbers[name] = float(value)
        self._latest = (step, self._latest[1] | numbers if step == self._latest[0] else numbers)
        self._call("metrics", lambda tracker: tracker.log_metrics(numbers, step))

    def log_system(self, metrics: Mapping[str, float]) -> None:
        self._call("system metrics", lambda tracker: tracker.log_system(metrics))

    def log_data(self, data: Sequence[TrackedData]) -> None:
        public = [replace(part, url=redacted(part.url)) for part in data]
        self._call("datasets", lambda tracker: tracker.log_data(public))

    def log_bytes(self, data: bytes, path: str) -> None:
        self._call("artifact", lambda tracker: tracker.log_bytes(data, path))

    def log_folder(self, folder: str, path: str) -> None:
        self._call("folder", lambda tracker: tracker.log_folder(folder, path))

    def log_model(self, folder: str, package: ModelPackage) -> None:
        self._call("model", lambda tracker: tracker.log_model(folder, package))

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        self._call("registry", lambda tracker: tracker.register_model(name, source, run_id, tags))

    def latest(self) -> tuple[int, dict[str, float]]:
        return self._latest

    def end(self, status: RunStatus) -> None:
        self._call("end", lambda tracker: tracker.end(status))

    def _call(self, kind: str, call: Callable[[Tracker], None]) -> None:
        for tracker in self._trackers:
            with _tolerate(self._warned, kind if len(self._trackers) == 1 else f"{kind} ({type(tracker).__name__})"):
                call(tracker)


def load_tracker_class(backend: str) -> Callable[[TrackingConfig, str, str], Tracker]:
    """Return the class of an entry of `tracking.backends`. Raises ConfigError if it does not exist."""
    module, _, name = TRACKERS.get(backend, backend).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError):
        raise ConfigError(
            f"tracking.backends: no tracker {backend!r}; use {', '.join(TRACKERS)}, or the import path module:Class of your own"
        ) from None


def _redacted_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: redacted(str(value)) for name, value in tags.items()}


class TrackerHandle(Tracker):
    """Handle of the driver and of rank 0 to a `SafeTracker` in an actor. No method raises.

    Methods do not wait for the store, except for `run_id`, `log_model` (until the model is stored) and `end` (until everything
    that this process sent is written).
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._last_call: Any = None
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})

    def run_id(self) -> str:
        return self._ask("run_id") or ""

    def log_model(self, folder: str, package: ModelPackage) -> None:
        self._ask("log_model", folder, package, timeout=_MODEL_TIMEOUT_S)

    def latest(self) -> tuple[int, dict[str, float]]:
        """While the store is slow, return the previous answer."""
        with _tolerate(self._warned):
            call = self._actor.latest.remote()
            if ray.wait([call], timeout=_LATEST_TIMEOUT_S)[0]:
                self._latest = ray.get(call)
        return self._latest

    def end(self, status: RunStatus) -> None:
        self._ask("end", status)

    def _send(self, method: str, *arguments: Any, **named: Any) -> None:
        # Look at the previous call without waiting for it: that is how a dead actor is noticed.
        with _tolerate(self._warned):
            if self._last_call is not None and ray.wait([self._last_call], timeout=0)[0]:
                ray.get(self._last_call)
        with _tolerate(self._warned):
            self._last_call = getattr(self._actor, method).remote(*arguments, **named)

    describe: Any = partialmethod(_send, "describe")
    log_params: Any = partialmethod(_send, "log_params")
    log_metrics: Any = partialmethod(_send, "log_metrics")
    log_system: Any = partialmethod(_send, "log_system")
    log_data: Any = partialmethod(_send, "log_data")
    log_bytes: Any = partialmethod(_send, "log_bytes")
    log_folder: Any = partialmethod(_send, "log_folder")
    register_model: Any = partialmethod(_send, "register_model")

    def _ask(self, method: str, *arguments: Any, timeout: float = _ANSWER_TIMEOUT_S) -> Any:
        with _tolerate(self._warned):
            return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout)
        return None

    def __getstate__(self) -> object:
        """A reference to a call belongs to the process that made it."""
        return self.__dict__ | {"_last_call": None}


def start_tracker_actor(config: TrackingConfig, output_dir: str, run_id: str = "") -> TrackerHandle:
    """Start the run's only writer in an actor on this node, where its files are. To be called by the driver."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(num_cpus=0, max_pending_calls=_MAX_PENDING_CALLS, scheduling_strategy=this_node)(SafeTracker)
    return TrackerHandle(actor.remote(config, output_dir, run_id))


class JsonLinesTracker(Tracker):
    """Appends to a file of JSON lines in the run's output folder. It needs neither a server nor a database.

    Each call writes one object: its `time` (seconds since 1970) and `step` and `metrics`, or `params`, `tags`, …. A resumed run
    appends to the file of its output folder.
    """

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str) -> None:
        self._run_id = run_id or uuid.uuid4().hex
        self._output_dir, self._url = output_dir, storage.join(output_dir, _FILE)
        self._is_local = "://" not in output_dir
        self._lines = ""  # of object storage: the whole file
        self._next_upload = time.monotonic() + _UPLOAD_SECONDS
        if not self._is_local and storage.exists(self._url):
            self._lines = storage.read_bytes(self._url).decode()
        self._write(run_id=self._run_id, run_name=config.run_name, parent_run_id=config.parent_run_id, tags=config.tags)

    def run_id(self) -> str:
        return self._run_id

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        self._write(description=description, tags=tags)

    def log_params(self, config: NestedValues) -> None:
        self._write(params=config)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._write(step=step, metrics=metrics)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        self._write(system=metrics)

    def log_data(self, data: Sequence[TrackedData]) -> None:
        self._write(data=[asdict(part) for part in data])

    def log_bytes(self, data: bytes, path: str) -> None:
        storage.write_bytes(storage.join(self._output_dir, _ARTIFACTS, path), data)

    def end(self, status: RunStatus) -> None:
        self._next_upload = 0.0
        self._write(status=status)

    def _write(self, **values: Any) -> None:
        line = json.dumps({"time": time.time()} | {name: v for name, v in values.items() if v != ""}, default=str) + "\n"
        if self._is_local:
            Path(self._output_dir).mkdir(parents=True, exist_ok=True)
            with open(self._url, "a") as file:
                file.write(line)
            return
        self._lines += line
        if time.monotonic() > self._next_upload:
            self._next_upload = time.monotonic() + _UPLOAD_SECONDS
            storage.write_bytes(self._url, self._lines.encode())
