"""How busy the machines of a run are: every node's CPUs, memory, disks, network and GPUs, by MLflow's own monitors."""

import logging
import socket
import time
from collections.abc import Iterable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_platform.tracking.handle import TrackerHandle

logger = logging.getLogger(__name__)

_MAX_NODES = 16  # of which there are metrics; more would be a page that nobody reads


class Machine:
    """The one that this process runs on."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        try:
            self._monitors.append(GPUMonitor())
        except Exception:  # no driver of NVIDIA's here, or not the package that asks it
            logger.debug("no GPU is watched on %s", socket.gethostname())

    def sample(self) -> tuple[str, dict[str, float]]:
        """(this host's name, {`cpu_utilization_percentage`: 71.5, …} since the last call)."""
        found: dict[str, float] = {}
        for monitor in self._monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return socket.gethostname(), found


_MachineActor: Any = ray.remote(num_cpus=0)(Machine)


class NodeMetrics:
    """Those of a run, each watched by an actor there once it is seen. Of the driver's; `look` returns at once and never raises.

    They are called node_0, node_1, … in the order in which they come, so that runs on different hosts can be compared; the
    tags of that name tell the host.
    """

    def __init__(self, tracker: TrackerHandle, seconds: float) -> None:
        """`seconds`: between two samples of a machine; 0: none are taken."""
        self._tracker, self._seconds = tracker, seconds
        self._numbers: dict[str, int] = {}  # by Ray's id of the node, for good
        self._actors: dict[str, Any] = {}
        self._calls: dict[str, Any] = {}  # that have not been answered
        self._told: set[str] = set()  # nodes whose host is a tag
        self._asked = time.monotonic()  # rates need a while to be rates of

    def poll(self, nodes: Iterable[str]) -> None:
        """Hand on what came in since, and ask the machines of `nodes` again where it is time."""
        if not self._seconds:
            return
        try:
            for node in list(self._calls):
                self._hand_on(node)
            if time.monotonic() - self._asked >= self._seconds:
                self._asked = time.monotonic()
                self._ask(sorted(nodes))
        except Exception as error:
            logger.warning("tracking: the machines are not watched any more; the run goes on: %s", error)
            self._seconds = 0.0

    def _hand_on(self, node: str) -> None:
        if not ray.wait([self._calls[node]], timeout=0)[0]:
            return
        name = f"node_{self._numbers[node]}"
        try:
            host, metrics = ray.get(self._calls.pop(node))
        except ray.exceptions.RayError:  # its machine is gone, or the actor was killed: where the node is seen, another comes
            del self._actors[node]
            return
        self._tracker.log_system({f"{name}/{metric}": value for metric, value in metrics.items()})
        if node not in self._told:
            self._told.add(node)
            self._tracker.describe("", {name: host})

    def _ask(self, nodes: list[str]) -> None:
        for node in nodes:
            number = self._numbers.setdefault(node, len(self._numbers))
            if node in self._actors and node not in self._calls:
                self._calls[node] = self._actors[node].sample.remote()
            elif node not in self._actors and number < _MAX_NODES:
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                self._actors[node] = _MachineActor.options(scheduling_strategy=there).remote()
