"""Load of the nodes of a run: CPUs, memory, disks, network and GPUs, measured by MLflow's monitors.

MLflow's own `SystemMetricsMonitor` writes to the store from every node, which the default SQLite file allows on one node only.
"""

import logging
import math
import socket
import time
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform.contracts import one_line
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
        """Return the host name and {`cpu_utilization_percentage`: 71.5, …} since the last call; only metrics with a value."""
        metrics: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            metrics |= {name: value for name, value in monitor.aggregate_metrics().items() if math.isfinite(value)}
            monitor.clear_metrics()
        return socket.gethostname(), metrics


@dataclass
class MeasuredNode:
    """A node of a run with the actor that measures it."""

    name: str  # node_0, node_1, …
    actor: Any = None
    sample: Any = None  # a call without an answer yet
    has_tag: bool = False


class NodeMetrics:
    """Logs the load of a run's nodes from the driver, each measured by an actor on the node.

    The nodes are called node_0, node_1, … in the order in which they join, so that runs on different hosts can be compared; the
    tag of that name contains the host. After `_MAX_NODES`, a node that joins gets the name of one that has left.
    """

    def __init__(self, tracker: Tracker, seconds: float) -> None:
        """`seconds`: interval between two samples of a node; 0: take none."""
        self._tracker, self._seconds = tracker, seconds
        self._nodes: dict[str, MeasuredNode] = {}  # by Ray's node id
        self._last_request = time.monotonic()  # rates need an interval
        self._warned_of_limit = False

    def poll(self, nodes: Set[str]) -> None:
        """Log the samples that have arrived, and request new ones of `nodes` if it is time. Returns at once and never raises."""
        if not self._seconds:
            return
        try:
            for node in self._nodes.values():
                if node.sample is not None and ray.wait([node.sample], timeout=0)[0]:
                    self._log_sample(node)
            if time.monotonic() - self._last_request >= self._seconds:
                self._last_request = time.monotonic()
                for node_id in sorted(nodes):
                    if name := self._name_of(node_id, nodes):
                        self._request_sample(node_id, name)
        except Exception as error:
            logger.warning("tracking: system metrics stopped; the run continues: %s", one_line(error))
            self._seconds = 0.0

    def _log_sample(self, node: MeasuredNode) -> None:
        call, node.sample = node.sample, None
        try:
            host, metrics = ray.get(call)
        except ray.exceptions.RayError:  # the node or the actor is gone; if the node is seen again, it gets a new actor
            node.actor = None
            return
        self._tracker.log_system({f"{node.name}/{metric}": value for metric, value in metrics.items()})
        if not node.has_tag:
            node.has_tag = True
            self._tracker.describe("", {node.name: host})

    def _name_of(self, node_id: str, nodes: Set[str]) -> str:
        """Return the name of one of `nodes`; empty if all names are those of other ones."""
        if node_id in self._nodes:
            return self._nodes[node_id].name
        if len(self._nodes) < _MAX_NODES:
            return f"node_{len(self._nodes)}"
        if left := next((known for known in self._nodes if known not in nodes), ""):
            return self._nodes.pop(left).name
        if not self._warned_of_limit:
            self._warned_of_limit = True
            logger.warning("tracking: the load of %d nodes is measured, and not that of the other ones (logged once)", _MAX_NODES)
        return ""

    def _request_sample(self, node_id: str, name: str) -> None:
        node = self._nodes.setdefault(node_id, MeasuredNode(name))
        if node.actor is None:
            on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
            node.actor = ray.remote(num_cpus=0)(NodeMonitor).options(scheduling_strategy=on_node).remote()
        elif node.sample is None:
            node.sample = node.actor.sample.remote()
