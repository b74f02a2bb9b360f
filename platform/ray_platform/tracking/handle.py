"""The tracker in a process of its own, and what a run's driver and rank 0 hold of it."""

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform.redaction import redacted
from ray_platform.tracking.records import DataSet, ModelPackage
from ray_platform.tracking.store import TrackingConfig
from ray_platform.tracking.tracker import RunStatus, Tracker

logger = logging.getLogger(__name__)

# A server that hangs must not fill the memory with calls that wait: those beyond are dropped.
_MAX_WAITING_CALLS = 1000
_LATEST_TIMEOUT_S = 2.0
_ANSWER_TIMEOUT_S = 120.0
_UPLOAD_TIMEOUT_S = 3600.0  # of a whole model; a server that answers nothing is given up sooner

# In a process of its own, so that a slow store delays no step.
TrackerActor: Any = ray.remote(num_cpus=0)(Tracker)


class TrackerHandle:
    """What the driver and rank 0 hold of a `TrackerActor`; it can be sent to workers. No method raises.

    The `log_` methods do not wait for the store, but `log_model` does.
    """

    def __init__(self, actor: Any) -> None:
        """`actor`: the `TrackerActor`, or None for a tracker that does nothing."""
        self._actor = actor
        self._last_call: Any = None
        self._warned: set[str] = set()
        self._latest: tuple[int, dict[str, float]] = (-1, {})

    def run_id(self) -> str:
        """See `Tracker.run_id`. Waits until the run is started."""
        return self._ask("run_id") or ""

    def describe(self, description: str, tags: Mapping[str, str]) -> None:
        """See `Tracker.describe`."""
        self._send("describe", description, tags)

    def log_data_sets(self, data_sets: Sequence[DataSet]) -> None:
        """See `Tracker.log_data_sets`."""
        self._send("log_data_sets", data_sets)

    def log_params(self, config: Mapping[str, Any]) -> None:
        """See `Tracker.log_params`."""
        self._send("log_params", config)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker.log_metrics`."""
        self._send("log_metrics", metrics, step)

    def log_system(self, metrics: Mapping[str, float]) -> None:
        """See `Tracker.log_system`."""
        self._send("log_system", metrics)

    def log_bytes(self, data: bytes, path: str) -> None:
        """See `Tracker.log_bytes`."""
        self._send("log_bytes", data, path)

    def log_folder(self, folder: str, path: str) -> None:
        """See `Tracker.log_folder`: the folder is one of the driver's machine, and stays until `end`."""
        self._send("log_folder", folder, path)

    def log_model(self, folder: str, package: ModelPackage) -> None:
        """See `Tracker.log_model`. Waits until it is stored."""
        self._ask("log_model", folder, package, timeout=_UPLOAD_TIMEOUT_S)

    def latest(self) -> tuple[int, dict[str, float]]:
        """See `Tracker.latest`. While the store is slow, what was known before."""
        with self._tolerated():
            if self._actor is not None:
                call = self._actor.latest.remote()
                if ray.wait([call], timeout=_LATEST_TIMEOUT_S)[0]:
                    self._latest = ray.get(call)
        return self._latest

    def end(self, status: RunStatus) -> None:
        """Mark the run as over, once everything that this process sent is written."""
        self._ask("end", status)

    def _send(self, method: str, *arguments: Any) -> None:
        # The call before is looked at, not waited for: that is how a dead actor is noticed.
        with self._tolerated():
            if self._last_call is not None and ray.wait([self._last_call], timeout=0)[0]:
                ray.get(self._last_call)
        with self._tolerated():
            if self._actor is not None:
                self._last_call = getattr(self._actor, method).remote(*arguments)

    def _ask(self, method: str, *arguments: Any, timeout: float = _ANSWER_TIMEOUT_S) -> Any:
        with self._tolerated():
            if self._actor is not None:
                return ray.get(getattr(self._actor, method).remote(*arguments), timeout=timeout)
        return None

    @contextlib.contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kind = type(error).__name__
            if kind not in self._warned:
                self._warned.add(kind)
                logger.warning("tracking: the tracker takes no calls, said once; the run goes on: %s", redacted(str(error)))

    def __getstate__(self) -> dict[str, Any]:
        """A reference to a call belongs to the process that made it."""
        return self.__dict__ | {"_last_call": None}


def start_tracker(config: TrackingConfig, output: str, run_id: str = "") -> TrackerHandle:
    """Start the run's one writer beside the driver, whose files it writes; to be called by the driver.

    Args:
        config: where to.
        output: the run's output folder.
        run_id: the MLflow run to go on with, after a resume.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    try:
        options = TrackerActor.options(scheduling_strategy=here, max_pending_calls=_MAX_WAITING_CALLS)
        return TrackerHandle(options.remote(config, output, run_id))
    except Exception as error:
        logger.warning("tracking: no tracker could be started; the run goes on without: %s", redacted(str(error)))
        return TrackerHandle(None)
