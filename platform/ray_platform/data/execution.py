"""How Ray Data runs our sources. With `stream` and `precompute`, all of `data/` that knows Ray Data's options."""

import logging
from typing import Any

import ray
import ray.data


def data_context() -> ray.data.DataContext:
    """A copy of the current context for a dataset of blocks as `source` packs them: a row each, which cannot be cut."""
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = 1  # blocks go on as they are
    # Lines about every dataset's start and end, and a warning that bars are off, are no news; other warnings still show.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    return context


def spilled_bytes() -> float:
    """What this cluster's object store wrote to disk since it started, because memory was short; 0 is as it should be."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    try:
        reply: Any = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address))
        return float(reply.store_stats.spilled_bytes_total)
    except Exception:  # Ray's own internals, and a number that nothing depends on
        return float("nan")
