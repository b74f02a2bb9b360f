"""All uses of Ray's non-public API, each with the test that fails when a new Ray version changes it (test_ray_internals.py)."""

from typing import Any

import ray
import ray.data
from ray._private.state import state as cluster_state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.train.v2._internal.execution.callback import ControllerCallback

__all__ = ["ControllerCallback", "autoscaler_is_running", "draining_nodes", "set_generator_buffer", "spilled_bytes"]
_GENERATOR_BUFFER = "_max_num_blocks_in_streaming_gen_buffer"  # of ray.data.DataContext


def draining_nodes() -> set[str]:
    """Return the hex ids of the nodes that are being drained, by the cluster's cloud or by `ray drain-node`."""
    return set(cluster_state.get_draining_nodes())


def autoscaler_is_running() -> bool:
    """Return whether an autoscaler (KubeRay's, or that of `ray up`) adds nodes for pending requests."""
    return is_autoscaler_v2(fetch_from_server=True)


def set_generator_buffer(context: ray.data.DataContext, num_blocks: int) -> None:
    """Set how many blocks a read task holds ready before it waits for Ray Data's scheduling loop. There is no public option.

    With the default, precomputed shards are read 0.7 times as fast (LOG.md).
    """
    setattr(context, _GENERATOR_BUFFER, num_blocks)


def spilled_bytes() -> float:
    """Return how many bytes the cluster's object store wrote to disk because memory was short; NaN if that is not known."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    try:
        reply: Any = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
        return float(reply.store_stats.spilled_bytes_total)
    except Exception:  # only a metric: training continues without it
        return float("nan")
