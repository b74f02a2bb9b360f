"""Open a tracked run: `start_run` is the one way, for a training, an evaluation, a sweep or a comparison."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform.redaction import redacted, redacted_values
from ray_platform.tracking import json_lines
from ray_platform.tracking.config import RunRecord, TrackingConfig, tracking_uri, write_run_record
from ray_platform.tracking.tracker import ModelPackage, RunMetadata, RunStatus, TrackedData, Tracker, load_tracker_class

logger = logging.getLogger(__name__)

_MAX_PENDING_CALLS = 1000  # further calls are dropped: a server that hangs must not fill the memory with waiting ones
_LATEST_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 120.0
_UPLOAD_TIMEOUT_S = 3600.0  # for a whole model; MLflow gives up on a server that does not answer sooner


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
            write_run_record(output_dir, run_record(config, output_dir, tracker))
        yield tracker
        status = "FINISHED"
    finally:
        tracker.end(status)


def run_record(config: TrackingConfig, output_dir: str, tracker: Tracker) -> RunRecord:
    """Return the address of the run that `tracker` writes."""
    return RunRecord(tracking_uri=tracking_uri(config, output_dir), experiment=config.experiment, run_id=tracker.run_id())


def metric_history(uri: str, run_id: str, prefix: str, output_dir: str = "") -> dict[int, dict[str, float]]:
    """Return the metrics of a run whose names start with `prefix`, by step; empty if they cannot be read.

    They are read from the JSON lines in `output_dir` if `uri` is empty, and else from MLflow's store at `uri`.
    """
    try:
        if not uri:
            return json_lines.read_history(output_dir, prefix)
        from ray_platform.tracking import mlflow_tracker  # its import takes a second

        return mlflow_tracker.read_history(uri, run_id, prefix)
    except Exception as error:
        logger.warning("tracking: the metrics of run %s cannot be read: %s", run_id, redacted(str(error)))
        return {}


class SafeTracker(Tracker):
    """Writes to all trackers of `config.backends`. No method raises, and no argument reaches a tracker with a secret in it.

    A failure is a warning, logged once for each kind of call: it must not stop a training.
    """

    def __init__(self, config: TrackingConfig, output_dir: str, run_id: str = "") -> None:
        """Start a run, or continue `run_id`."""
        self._trackers: list[Tracker] = []
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})
        config = replace(config, tags=_redacted_tags(config.tags))
        for backend in config.backends:
            with self._tolerate(f"start of {backend}"):
                self._trackers.append(load_tracker_class(backend)(config, output_dir, run_id))

    def run_id(self) -> str:
        return next((run_id for tracker in self._trackers if (run_id := tracker.run_id())), "")

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        self._call("tags", lambda tracker: tracker.describe(redacted(description), _redacted_tags(tags)))

    def log_params(self, config: Mapping[str, Any]) -> None:
        self._call("params", lambda tracker: tracker.log_params(redacted_values(config)))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values that are not numbers are left out."""
        numbers: dict[str, float] = {}
        for name, value in metrics.items():
            with self._tolerate(f"metric {name}"):
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
            with self._tolerate(kind if len(self._trackers) == 1 else f"{kind} ({type(tracker).__name__})"):
                call(tracker)

    @contextlib.contextmanager
    def _tolerate(self, kind: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("tracking: %s failed (logged once); the run continues: %s", kind, redacted(str(error)))


def _redacted_tags(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: redacted(str(value)) for name, value in tags.items()}


# In a process of its own, so that a slow store does not delay training steps.
_TrackerActor: Any = ray.remote(num_cpus=0)(SafeTracker)


class TrackerHandle(Tracker):
    """Handle of the driver and of rank 0 to a `SafeTracker` in an actor. No method raises.

    The `log_` methods do not wait for the store, except for `log_model`.
    """

    def __init__(self, actor: Any) -> None:
        """`actor`: the actor, or None for a tracker that does nothing."""
        self._actor = actor
        self._last_call: Any = None
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})

    def run_id(self) -> str:
        """Wait until the run is started and return its id."""
        return self._ask("run_id") or ""

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        self._send("describe", description, tags)

    def log_params(self, config: Mapping[str, Any]) -> None:
        self._send("log_params", config)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self._send("log_metrics", metrics, step)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        self._send("log_system", metrics)

    def log_data(self, data: Sequence[TrackedData]) -> None:
        self._send("log_data", data)

    def log_bytes(self, data: bytes, path: str) -> None:
        self._send("log_bytes", data, path)

    def log_folder(self, folder: str, path: str) -> None:
        """`folder` is on the driver's node and must exist until `end`."""
        self._send("log_folder", folder, path)

    def log_model(self, folder: str, package: ModelPackage) -> None:
        """Wait until the model is stored."""
        self._ask("log_model", folder, package, timeout=_UPLOAD_TIMEOUT_S)

    def register_model(self, name: str, source: str, run_id: str, tags: Mapping[str, str]) -> None:
        self._send("register_model", name, source, run_id, tags)

    def latest(self) -> tuple[int, dict[str, float]]:
        """While the store is slow, return the previous answer."""
        with self._tolerate():
            if self._actor is not None:
                call = self._actor.latest.remote()
                if ray.wait([call], timeout=_LATEST_TIMEOUT_S)[0]:
                    self._latest = ray.get(call)
        return self._latest

    def end(self, status: RunStatus) -> None:
        """Mark the run as ended, once everything that this process sent is written."""
        self._ask("end", status)

    def _send(self, method: str, *arguments: Any) -> None:
        # Look at the previous call without waiting for it: that is how a dead actor is noticed.
        with self._tolerate():
            if self._last_call is not None and ray.wait([self._last_call], timeout=0)[0]:
                ray.get(self._last_call)
        with self._tolerate():
            if self._actor is not None:
                self._last_call = getattr(self._actor, method).remote(*arguments)

    def _ask(self, method: str, *arguments: Any, timeout: float = _ANSWER_TIMEOUT_S) -> Any:
        with self._tolerate():
            if self._actor is not None:
                return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout)
        return None

    @contextlib.contextmanager
    def _tolerate(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("tracking: the tracker does not answer (logged once); the run continues: %s", redacted(str(error)))

    def __getstate__(self) -> dict[str, Any]:
        """A reference to a call belongs to the process that made it."""
        return self.__dict__ | {"_last_call": None}


def start_tracker_actor(config: TrackingConfig, output_dir: str, run_id: str = "") -> TrackerHandle:
    """Start the run's only writer in an actor on this node, where its files are. To be called by the driver."""
    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        options = _TrackerActor.options(scheduling_strategy=this_node, max_pending_calls=_MAX_PENDING_CALLS)
        return TrackerHandle(options.remote(config, output_dir, run_id))
    except Exception as error:
        logger.warning("tracking: the tracker could not be started; the run continues without it: %s", redacted(str(error)))
        return TrackerHandle(None)
