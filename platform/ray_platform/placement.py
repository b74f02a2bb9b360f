"""Which nodes may do what, by the labels that nodes were started with (`ray start --labels pool=cpu`), and the room on them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ray
from ray._private.label_utils import validate_node_label_syntax
from ray.autoscaler.v2.utils import is_autoscaler_v2

from ray_platform.contracts import ConfigError

_NO_LIMIT = 10**6  # for what takes nothing

Labels = Mapping[str, str]  # that a node must have, all of them; none: any node will do


@dataclass(frozen=True)
class ResourceRequest:
    """What something takes of the nodes with these labels."""

    labels: Labels
    amounts: Mapping[str, float]  # CPU, GPU

    def capacity(self) -> int:
        """How often it fits there now."""
        there = room(self.labels)
        shares = {kind: share for kind, share in self.amounts.items() if share}
        return min((int(there.get(kind, 0) / share + 1e-6) for kind, share in shares.items()), default=_NO_LIMIT)


def tightest(needs: Sequence[ResourceRequest]) -> ResourceRequest:
    """The one that fits least often."""
    return min(needs, key=ResourceRequest.capacity)


def check_labels(field: str, labels: Labels) -> None:
    """Raises ConfigError for what no node can be labelled with."""
    try:
        validate_node_label_syntax(dict(labels))
    except ValueError as error:
        raise ConfigError(f"{field}: {error}") from None


def selector(labels: Labels) -> dict[str, str] | None:
    """For Ray's option `label_selector`, for which no labels and an empty dict are not the same."""
    return dict(labels) or None


def room(labels: Labels) -> dict[str, float]:
    """What the nodes with these labels have now: {CPU: 16.0, GPU: 1.0, …}."""
    found: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and labels.items() <= node["Labels"].items():
            for kind, amount in node["Resources"].items():
                found[kind] = found.get(kind, 0.0) + amount
    return found


def is_here(labels: Labels) -> bool:
    """Whether this process's own node has these labels."""
    return labels.items() <= ray.get_runtime_context().get_node_labels().items()


def may_grow() -> bool:
    """Whether an autoscaler (KubeRay's, or that of `ray up`) adds nodes for what waits: then too little room now is no error."""
    return is_autoscaler_v2(fetch_from_server=True)


def named(labels: Labels) -> str:
    """For messages: `the cluster`, `the part of the cluster with pool=cpu`."""
    return " ".join(("the part of the cluster with", *(f"{k}={v}" for k, v in labels.items()))) if labels else "the cluster"
