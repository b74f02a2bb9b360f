"""Preview images while training: all ranks draw their share. What fails costs a warning, never the run."""

import logging
from typing import Any

import torch.distributed as dist

from ray_platform.contracts import one_line
from ray_platform.train.engine import Engine

logger = logging.getLogger(__name__)


def draw_page(engine: Engine, step: int) -> bytes | None:
    """All ranks' images as one PNG, on rank 0; None elsewhere, and where there are none. Every rank must call it.

    A rank that fails says so where the others hand over their images, and nobody waits for those that it lacks. Under ZeRO 3,
    though, the others need it while they draw: if only one rank fails there, in the midst of the model, they wait until the
    watch ends them all.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    images: dict[int, Any] = {}
    failure = ""
    try:
        with engine.inference():
            images = engine.task.preview(rank, world_size)
    except Exception as error:
        failure = f"rank {rank}: {type(error).__name__}: {error}"
        logger.debug("the preview failed", exc_info=True)
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, (images, failure))
    if rank != 0:
        return None
    failure = next(filter(None, (failed for _, failed in parts)), "")
    whole = {place: image for part, _ in parts for place, image in part.items()}
    page = None
    try:
        page = engine.task.preview_page(whole) if whole else None
    except Exception as error:
        failure = failure or f"{type(error).__name__}: {error}"
    if failure:
        logger.warning("the preview at step %d failed, or a part of it; training goes on: %s", step, one_line(failure))
    return page
