"""Delivery of a run's journal to a tracker, by a thread that waits for a service that does not answer."""

import contextlib
import importlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace

from ray_platform import storage
from ray_platform.contracts import ConfigError, one_line, root_cause
from ray_platform.json_values import JsonObject
from ray_platform.tracking.config import JOURNAL_ONLY, TRACKERS, TrackingConfig
from ray_platform.tracking.journal import JOURNAL_FORMAT, Journal
from ray_platform.tracking.tracker import MetricPoint, ModelPackage, TrackedData, Tracker

logger = logging.getLogger(__name__)

ARTIFACTS = "artifacts"  # folder in output_dir
_FIRST_WAIT_S, _MAX_WAIT_S = 1.0, 60.0  # between two attempts
_CONNECT_SECONDS = 60.0  # to wait for the id of a run, unless an attempt fails sooner
_END_SECONDS = 10.0  # at the end of a run, to wait for a service that does not answer
_MAX_END_SECONDS = 3600.0  # to wait for a whole model to be stored
_SAVE_SECONDS = 5.0  # between two saves of how many metrics were delivered
_MAX_POINTS = 200  # per call
_MAX_ATTEMPTS, _MAX_MODEL_ATTEMPTS = 10, 3  # of a call that fails although the run can be opened
_REJECTED = {"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST", "RESOURCE_ALREADY_EXISTS"}  # MLflow's error codes


@dataclass
class DeliveryState:
    """How far a tracker has got in the journal. Positions are numbers of bytes."""

    run_id: str = ""  # the tracker's id of the run; empty: not known yet
    position: int = 0  # before it, everything was delivered or skipped
    begin: int = 0  # where the run begins
    started: float = 0.0  # seconds since 1970
    header: JsonObject = field(default_factory=dict)  # the newest `run` entry before `position`


class Delivery:
    """Thread that delivers a journal, in its order, to one tracker."""

    def __init__(
        self,
        backend: str,
        config: TrackingConfig,
        output_dir: str,
        journal: Journal,
        state: DeliveryState,
        save: Callable[[], None],
    ) -> None:
        """`save` saves `state`, and the id of the run. It may raise StorageError."""
        self.backend, self.state, self.problem = backend, state, ""
        self._config, self._output_dir, self._journal, self._save = config, output_dir, journal, save
        self._tracker: Tracker | None = None
        self._max_points = self._next_points = 1
        self._num_problems, self._num_failures, self._saved_at = 0, 0, 0.0
        self._warned: set[str] = set()
        self._new_entries, self._changed = threading.Event(), threading.Condition()
        self._is_ending, self._is_stopped = threading.Event(), threading.Event()
        threading.Thread(target=self._run, daemon=True, name=f"tracking: {backend}").start()

    # --- called by the writer of the journal -----------------------------------------------------------------------------

    def notify(self) -> None:
        """Deliver the new entries of the journal."""
        self._new_entries.set()

    def wait_for_run(self) -> None:
        """Wait until the run is open, and `state.run_id` known, or the service has failed to answer."""
        with self._changed:
            self._changed.wait_for(lambda: self._tracker or self.problem, _CONNECT_SECONDS)

    def finish(self) -> str:
        """Wait until everything is delivered, and stop. Return why that was not possible, or an empty string."""
        give_up_at, num_problems = time.monotonic() + _END_SECONDS, self._num_problems
        self._is_ending.set()
        self.notify()
        with self._changed:
            self._changed.wait_for(
                # `problem` is empty again once the thread has logged that the service answers.
                lambda: (
                    (self._is_complete() and not self.problem)
                    or (self._num_problems > num_problems + 1 and time.monotonic() > give_up_at)
                ),
                _MAX_END_SECONDS,
            )
        self._is_stopped.set()
        self.notify()
        return "" if self._is_complete() else self.problem or "it takes too long"

    def _is_complete(self) -> bool:
        return self.state.position >= self._journal.end()

    # --- thread ----------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        wait = 0.0
        while not self._is_stopped.is_set():
            self._new_entries.clear()
            try:
                while not self._is_stopped.is_set() and not self._is_complete():
                    self._deliver_rest()
                self._report_recovery()
                wait = 0.0
            except Exception as error:
                self._report_problem(error)
                wait = min(2 * wait, _MAX_WAIT_S) or _FIRST_WAIT_S
            with self._changed:
                self._changed.notify_all()
            if not wait:
                self._new_entries.wait()
            elif self._is_ending.wait(wait):  # at once, and then every second
                self._is_stopped.wait(_FIRST_WAIT_S)

    def _deliver_rest(self) -> None:
        for entry, position in self._pending():
            if self._is_stopped.is_set() or not self._deliver(entry, position):
                return
            with self._changed:
                self._changed.notify_all()

    def _pending(self) -> Iterator[tuple[JsonObject | list[MetricPoint], int]]:
        """Return what was not delivered: the points of up to `_next_points` entries together, and every other entry alone."""
        points: list[MetricPoint] = []
        last = 0
        for entry, position in self._journal.entries(self.state.position):
            point = self._metric_point(entry)
            if points and (point is None or len(points) >= self._next_points):
                yield points, last
                points = []
            if point is None:
                yield entry, position
            else:
                points.append(point)
                last = position
        if points:
            yield points, last

    def _metric_point(self, entry: JsonObject) -> MetricPoint | None:
        if "metrics" in entry:
            return MetricPoint(entry["time"], entry["step"], entry["metrics"])
        if "system" in entry:
            return MetricPoint(entry["time"], max(0, int(entry["time"] - self.state.started)), entry["system"], is_system=True)
        return None

    def _deliver(self, entry: JsonObject | list[MetricPoint], position: int) -> bool:
        """Deliver an entry, and set `state.position` behind it. Return False if another entry, or fewer points, are next."""
        if isinstance(entry, dict) and "run" in entry:
            self._start_section(entry, position)
            return self._open()
        if not self.state.header:  # of an older version, which delivered it itself
            self.state.position = position
            return True
        if self._tracker is None and not self._open():
            return False
        try:
            _call(self._tracker, entry, self._output_dir)
        except Exception as error:
            if isinstance(entry, list) and len(entry) > 1:
                self._next_points = 1  # one of them may be rejected
                return False
            self._num_failures += 1
            limit = _MAX_MODEL_ATTEMPTS if "model" in entry else _MAX_ATTEMPTS
            if not _is_rejection(error) and self._num_failures < limit:
                self._tracker = None
                raise
            self._report_skipped(entry, error)
        else:
            self._next_points = min(2 * self._next_points, self._max_points)
        self._num_failures, self.state.position = 0, position
        if isinstance(entry, dict) or time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self._saved_at = time.monotonic()
            with contextlib.suppress(storage.StorageError):  # MLflow ignores points that it receives again
                self._save()
        return True

    def _start_section(self, entry: JsonObject, position: int) -> None:
        """Enter the part of the journal that belongs to a run, or to a launch that continues the run."""
        state, header = self.state, entry["run"]
        JOURNAL_FORMAT.check_version(header, self._journal.url)
        known = (header["continues"] and state.run_id) or header["run_id"]
        if not known or known != state.run_id:
            state.begin, state.started = position, entry["time"]
        state.run_id, state.header, state.position = known, header, position
        self._tracker = None

    def _open(self) -> bool:
        """Connect to the service. Return False if the run had to be started again there, and is delivered from its beginning."""
        config = replace(config_of(self.state.header), uri=self._config.uri, backends=self._config.backends)
        tracker = load_tracker_class(self.backend)(config, self._output_dir, self.state.run_id)
        run_id = tracker.run_id()
        is_lost = bool(self.state.run_id) and run_id != self.state.run_id
        self.state.run_id = run_id
        if is_lost:
            self.state.position = self.state.begin
        self._save()
        self._tracker = tracker
        takes_many = type(tracker).log_points is not Tracker.log_points
        self._max_points = self._next_points = _MAX_POINTS if takes_many else 1
        return not is_lost

    # --- messages --------------------------------------------------------------------------------------------------------

    def _report_problem(self, error: Exception) -> None:
        self._num_problems += 1
        message = one_line(root_cause(error), max_length=300)
        if not self.problem:
            logger.warning(
                "tracking: %s does not answer; the run continues, its metrics are kept in %s and delivered later: %s",
                *(self.backend, self._journal.url, message),
            )
        self.problem = message

    def _report_recovery(self) -> None:
        if self.problem:
            logger.warning("tracking: %s answers again and has received everything since then", self.backend)
            self.problem = ""

    def _report_skipped(self, entry: JsonObject | list[MetricPoint], error: Exception) -> None:
        kind = "metrics" if isinstance(entry, list) else next(name for name in entry if name != "time")
        if kind not in self._warned:
            self._warned.add(kind)
            message = "tracking: %s does not accept an entry (%s; logged once), it is skipped: %s"
            logger.warning(message, self.backend, kind, one_line(error, max_length=500))


def config_of(header: JsonObject) -> TrackingConfig:
    """Return the configuration in a `run` entry of a journal. Secrets in its URI are redacted."""
    known = JOURNAL_FORMAT.read(header["tracking"], [item.name for item in fields(TrackingConfig)], JOURNAL_FORMAT.name)
    return TrackingConfig(**known | {"backends": tuple(known["backends"])})


def check_trackers(config: TrackingConfig, output_dir: str) -> None:
    """Raise ConfigError for a tracker that does not exist, is not installed or cannot work with these settings."""
    for backend in config.services:
        load_tracker_class(backend).check(config, output_dir)


def load_tracker_class(backend: str) -> type[Tracker]:
    """Return the class of an entry of `tracking.backends`. Raises ConfigError if it cannot be imported."""
    module, _, name = TRACKERS.get(backend, backend).partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if backend in TRACKERS:
            raise ConfigError(
                f"tracking.backends: {backend} needs the package {error.name}, which is not installed; install it with "
                f"pip install 'diffdis-platform[{backend}]'"
            ) from None
        raise _no_tracker(backend) from None
    except (ImportError, AttributeError, ValueError, TypeError):
        raise _no_tracker(backend) from None


def _no_tracker(backend: str) -> ConfigError:
    names = ", ".join((*TRACKERS, JOURNAL_ONLY))
    return ConfigError(f"tracking.backends: no tracker {backend!r}; use {names}, or the import path module:Class of your own")


def _call(tracker: Tracker | None, entry: JsonObject | list[MetricPoint], output_dir: str) -> None:
    if tracker is None:
        raise ConnectionError("the run is not open")
    if isinstance(entry, list):
        tracker.log_points(entry)
    elif "params" in entry:
        tracker.log_params(entry["params"])
    elif "description" in entry:
        tracker.describe(entry["description"], entry["tags"])
    elif "data" in entry:
        tracker.log_data([TrackedData(**part) for part in entry["data"]])
    elif "artifact" in entry:
        tracker.log_bytes(storage.read_bytes(storage.join(output_dir, ARTIFACTS, entry["artifact"])), entry["artifact"])
    elif "folder" in entry:
        tracker.log_folder(entry["folder"], entry["path"])
    elif "model" in entry:
        tracker.log_model(entry["model"], ModelPackage(**entry["package"]))
    elif "registered_model" in entry:
        tracker.register_model(entry["registered_model"], entry["source"], entry["run_id"], entry["tags"])
    elif "status" in entry:
        tracker.end(entry["status"])


def _is_rejection(error: Exception) -> bool:
    """Return whether a call failed because of its arguments, so that it would fail again."""
    return isinstance(error, ValueError | TypeError | ImportError) or getattr(error, "error_code", "") in _REJECTED
