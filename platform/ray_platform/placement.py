"""Placement of work on nodes by their labels (`ray start --labels pool=cpu`), and the resources of the nodes that have them.

Ray is imported where it is called: every configuration imports this module, and `--help` must not wait for Ray.
"""

import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray_platform.contracts import ConfigError
from ray_platform.units import plural

logger = logging.getLogger(__name__)

NOTICE_SECONDS = 60.0  # more than a worker needs to start
_UNLIMITED = 10**6  # capacity for a request of no resources
_LABEL = re.compile(r"[a-zA-Z0-9]([-\w.]{0,61}[a-zA-Z0-9])?", re.ASCII)  # Ray's syntax of keys and values

# Dense 16-bit peak in FLOP/s of accelerators, from the vendor's data sheets. `known_accelerator` takes the first that matches.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A100": 312e12,
    "V100": 125e12,
    "L4": 121e12,
}


def known_accelerator(name: str) -> str:
    """Return the key of `PEAK_FLOPS` that is a word of `name`, also in variants such as GH200 and V100S; empty for others."""
    return next((key for key in PEAK_FLOPS if re.search(rf"\bG?{key}[SX]?\b", name)), "")


Labels = Mapping[str, str]  # a node must have all of them; empty: any node


@dataclass(frozen=True)
class ResourceRequest:
    """Resources (`CPU`, `GPU`) that one worker or trial needs on nodes with `labels`."""

    labels: Labels
    amounts: Mapping[str, float]

    def capacity(self) -> int:
        """Return how many such requests the nodes that are alive hold in total."""
        available = total_resources(self.labels)
        needed = {kind: amount for kind, amount in self.amounts.items() if amount}
        return min((int(available.get(kind, 0) / amount + 1e-6) for kind, amount in needed.items()), default=_UNLIMITED)

    def times(self, number: int) -> "ResourceRequest":
        """Return the request of so many workers at once."""
        return ResourceRequest(self.labels, {kind: number * amount for kind, amount in self.amounts.items()})

    def check_fits(self, num_workers: int, prefix: str = "") -> None:
        """Raise ConfigError if so many workers do not fit: they would wait without a message. `prefix` is that of the fields."""
        if self.capacity() < num_workers and not can_autoscale():
            each = " and ".join(f"{amount:g} {kind}s" for kind, amount in self.amounts.items() if amount)
            available = total_resources(self.labels)
            total = ", ".join(f"{available.get(kind, 0):g} {kind}s" for kind in self.amounts)
            raise ConfigError(
                f"{prefix}num_workers: {plural(num_workers, 'worker')} of {each} do not fit on "
                f"{describe_nodes(self.labels)} ({total}); lower {prefix}num_workers, cpus_per_worker or gpus_per_worker"
            )


class StartNotice:
    """Warns once that workers wait for resources, because other work uses them; Ray itself waits without a message."""

    def __init__(self, request: ResourceRequest):
        """`request`: what must be free for the first workers to start."""
        self.request, self._requested_at, self._is_logged = request, time.monotonic(), False

    def check(self) -> None:
        """Call this again and again while no worker has started."""
        if self._is_logged or time.monotonic() - self._requested_at < NOTICE_SECONDS:
            return
        import ray

        free, total = ray.available_resources(), ray.cluster_resources()
        needed = {kind: amount for kind, amount in self.request.amounts.items() if amount}
        # How much is free on the nodes with the labels is not known.
        if self.request.labels or any(free.get(kind, 0.0) < amount for kind, amount in needed.items()):
            self._is_logged = True
            logger.warning(
                "no worker has started for %.0f s: %s are needed, and %s are free; waiting until other work "
                "of the cluster ends or nodes are added (`ray status` shows what is used)",
                NOTICE_SECONDS,
                " and ".join(f"{amount:g} {kind}s" for kind, amount in needed.items()),
                ", ".join(f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}s" for kind in needed),
            )


def check_labels(field: str, labels: Labels) -> None:
    """Raise ConfigError for keys or values that `ray start --labels` does not accept."""
    for key, value in labels.items():
        prefix, slash, name = key.rpartition("/")
        if not _LABEL.fullmatch(name) or (slash and not all(map(_LABEL.fullmatch, prefix.split(".")))):
            raise ConfigError(f"{field}: Invalid label key {key!r}; use letters, digits and -_. as in {{pool: gpu}}")
        if value and not _LABEL.fullmatch(value):
            raise ConfigError(f"{field}: Invalid label key value {value!r}; use letters, digits and -_. as in {{pool: gpu}}")


def label_selector(labels: Labels) -> dict[str, str] | None:
    """Return the value of Ray's option `label_selector`, which distinguishes None from an empty dict."""
    return dict(labels) or None


def is_connected() -> bool:
    """Return whether this process is connected to a cluster."""
    ray = sys.modules.get("ray")  # to import it only for this question would take most of a second
    return bool(ray and ray.is_initialized())


def total_resources(labels: Labels) -> dict[str, float]:
    """Return the summed resources of the nodes alive that have these labels: {CPU: 16.0, GPU: 1.0, …}.

    If no cluster is connected, that is this machine, on which the commands start a temporary Ray head; it has no labels.
    """
    if not is_connected():
        import torch

        gpus = torch.cuda.device_count()
        names = {f"accelerator_type:{torch.cuda.get_device_name(number)}": 1.0 for number in range(gpus)}
        return {} if labels else {"CPU": float(os.cpu_count() or 1), "GPU": float(gpus), **names}
    import ray

    total: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and labels.items() <= node["Labels"].items():
            for kind, amount in node["Resources"].items():
                total[kind] = total.get(kind, 0.0) + amount
    return total


def start_on_this_node(actor_class: type, *arguments: Any) -> Any:
    """Start an actor on the driver's node, where it is not lost with a node of the workers, and return its handle.

    Ray restarts its process when that dies (for lack of memory, for example) and sends it the calls that had no answer. The new
    process starts with the same arguments and without the state of the old one.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options: Any = {"num_cpus": 0, "scheduling_strategy": this_node, "max_restarts": -1, "max_task_retries": -1}
    return ray.remote(**options)(actor_class).remote(*arguments)


def log_restart(message: str) -> None:
    """In the constructor of an actor: log `message` if Ray has restarted its process."""
    import ray

    is_actor = ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the property itself calls a deprecated one
        is_restarted = is_actor and ray.get_runtime_context().was_current_actor_reconstructed
    if is_restarted:
        logger.warning(message)


def can_autoscale() -> bool:
    """Return whether the cluster adds nodes for pending requests: then too few resources now are not an error."""
    from ray_platform.ray_internals import autoscaler_is_running

    return is_connected() and autoscaler_is_running()


def describe_nodes(labels: Labels) -> str:
    """Return words for error messages: `the cluster`, `this machine`, `the part of the cluster with pool=cpu`."""
    if labels:
        return " ".join(("the part of the cluster with", *(f"{k}={v}" for k, v in labels.items())))
    return "the cluster" if is_connected() else "this machine"
