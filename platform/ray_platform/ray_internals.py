"""All uses of Ray's non-public API, each with the test that fails when a new Ray version changes it (test_ray_internals.py)."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import ray.data
from ray._private.internal_api import get_memory_info_reply
from ray._private.state import state as cluster_state
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.train.v2._internal.execution.callback import ControllerCallback

__all__ = ["ControllerCallback", "SpilledBytes", "autoscaler_is_running", "draining_nodes", "set_generator_buffer"]
_GENERATOR_BUFFER = "_max_num_blocks_in_streaming_gen_buffer"  # of ray.data.DataContext
_ANSWER_TIMEOUT_S = 10.0


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


class SpilledBytes:
    """Reads how many bytes the cluster's object store wrote to disk because memory was short.

    Every node is asked, in a thread: the caller never waits for them.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="spilled_bytes")
        self._call: Future[float] | None = None
        self._value = float("nan")

    def newest(self) -> float:
        """Return the answer to an earlier call, and ask again; NaN before the first answer."""
        if self._call and self._call.done():
            self._value, self._call = self._call.result(), None
        self._call = self._call or self._thread.submit(_read_spilled_bytes)
        return self._value


def _read_spilled_bytes() -> float:
    """Return NaN if the nodes do not answer: training continues without this metric."""
    try:
        reply: Any = get_memory_info_reply(cluster_state, timeout_seconds=_ANSWER_TIMEOUT_S)
        return float(reply.store_stats.spilled_bytes_total)
    except Exception:
        return float("nan")
