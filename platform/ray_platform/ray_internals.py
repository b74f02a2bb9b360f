"""All uses of Ray's non-public API, each with the test that fails when a new Ray version changes it (test_ray_internals.py)."""

import ray
import ray._private.state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.train.v2._internal.execution.callback import ControllerCallback

__all__ = ["ControllerCallback", "autoscaler_is_running", "draining_nodes"]


def draining_nodes() -> set[str]:
    """Return the hex ids of the nodes that are being drained, by the cluster's cloud or by `ray drain-node`."""
    return set(ray._private.state.state.get_draining_nodes())


def autoscaler_is_running() -> bool:
    """Return whether an autoscaler (KubeRay's, or that of `ray up`) adds nodes for pending requests."""
    return is_autoscaler_v2(fetch_from_server=True)
