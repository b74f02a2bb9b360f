"""Load of the nodes of a run: CPUs, memory, disks, network and GPUs, measured by MLflow's monitors.

MLflow's own `SystemMetricsMonitor` does not fit: it writes to the store from every node, which the default SQLite file allows on
one node only, and it reads the run back before every sample. Here only the run's one tracker writes.
"""

import logging
import socket
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

_MAX_NODES = 16  # that are measured; the metrics of more would be a page that no one can read


class NodeMonitor:
    """Measures the node on which it runs."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
        from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        for kind in (GPUMonitor, ROCMMonitor):
            try:
                self._monitors.append(kind())
                break
            except Exception:  # no driver of this vendor, or the package that reads it is not installed
                logger.debug("%s finds no GPU on %s", kind.__name__, socket.gethostname())

    def sample(self) -> tuple[str, dict[str, float]]:
        """Return the host name and {`cpu_utilization_percentage`: 71.5, …} since the last call."""
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return socket.gethostname(), metrics


_NodeMonitorActor: Any = ray.remote(num_cpus=0)(NodeMonitor)


class NodeMetrics:
    """Logs the load of a run's nodes from the driver, each measured by an actor on the node.

    The nodes are called node_0, node_1, … in the order in which they join, so that runs on different hosts can be compared; the
    tag of that name contains the host.
    """

    def __init__(self, tracker: Tracker, seconds: float) -> None:
        """`seconds`: interval between two samples of a node; 0: take none."""
        self._tracker, self._seconds = tracker, seconds
        self._numbers: dict[str, int] = {}  # by Ray's node id; a number is never reused
        self._actors: dict[str, Any] = {}
        self._pending: dict[str, Any] = {}  # calls without an answer yet
        self._tagged: set[str] = set()  # nodes whose host is a tag
        self._last_request = time.monotonic()  # rates need an interval

    def poll(self, nodes: Iterable[str]) -> None:
        """Log the samples that have arrived, and request new ones of `nodes` if it is time. Returns at once and never raises."""
        if not self._seconds:
            return
        try:
            for node in list(self._pending):
                self._log_sample(node)
            if time.monotonic() - self._last_request >= self._seconds:
                self._last_request = time.monotonic()
                self._request_samples(sorted(nodes))
        except Exception as error:
            logger.warning("tracking: system metrics stopped; the run continues: %s", error)
            self._seconds = 0.0

    def _log_sample(self, node: str) -> None:
        if not ray.wait([self._pending[node]], timeout=0)[0]:
            return
        name = f"node_{self._numbers[node]}"
        try:
            host, metrics = ray.get(self._pending.pop(node))
        except ray.exceptions.RayError:  # the node or the actor is gone; if the node is seen again, it gets a new actor
            del self._actors[node]
            return
        self._tracker.log_system({f"{name}/{metric}": value for metric, value in metrics.items()})
        if node not in self._tagged:
            self._tagged.add(node)
            self._tracker.describe("", {name: host})

    def _request_samples(self, nodes: list[str]) -> None:
        for node in nodes:
            number = self._numbers.setdefault(node, len(self._numbers))
            if node in self._actors and node not in self._pending:
                self._pending[node] = self._actors[node].sample.remote()
            elif node not in self._actors and number < _MAX_NODES:
                on_node = NodeAffinitySchedulingStrategy(node, soft=False)
                self._actors[node] = _NodeMonitorActor.options(scheduling_strategy=on_node).remote()
