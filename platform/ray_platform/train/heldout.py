"""Scores of validation (held-out) samples and preview images while training, by all ranks and with `train.eval_weights`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from ray_platform.contracts import Batch, DataError, describe_error, one_line
from ray_platform.data.catalog import Catalog
from ray_platform.data.config import DataConfig, FilterConfig
from ray_platform.data.plan import Item
from ray_platform.data.source import Sample, open_samples
from ray_platform.train.collective import collective, gather_objects
from ray_platform.train.engine import Engine

logger = logging.getLogger(__name__)


def select_samples(batch: Batch, indices: Sequence[int]) -> Batch:
    """Return the samples of a batch at `indices`; at a range, its tensors are views."""
    rows = slice(indices.start, indices.stop, indices.step) if isinstance(indices, range) else list(indices)
    tensors = {name: tensor[rows] for name, tensor in batch.tensors.items()}
    return replace(batch, tensors=tensors, captions=[batch.captions[i] for i in indices], keys=[batch.keys[i] for i in indices])


def read_heldout(catalog: Catalog, config: DataConfig, limit: int) -> Batch:
    """Read the first `limit` usable samples of a catalog, square and unfiltered. Raises DataError if there are none."""
    config = replace(config, weights=(), aspect_ratios=(), filters=FilterConfig(), crop="centre")
    samples: list[Sample] = []
    for number, unit in enumerate(catalog.pools[0]):
        opened = open_samples(Item(0, 0, number, unit, []), config, seed=0)
        read = (opened.sample(index) for index in range(len(opened)))
        samples += [sample for sample in read if isinstance(sample, Sample)][: limit - len(samples)]
        if len(samples) == limit:
            break
    if not samples:
        raise DataError("train.heldout_sources: no sample of them can be used; see jobs/inspect_data.py")
    tensors = {name: np.stack([sample.tensors[name] for sample in samples]) for name in samples[0].tensors}
    return Batch(tensors, [sample.caption for sample in samples], [sample.key for sample in samples], (), {})


@collective
def score(engine: Engine, heldout: Batch, micro_batch_size: int, on_progress: Callable[[], None]) -> dict[str, float]:
    """Return the Task's metrics over all of `heldout`. Every rank embeds a part, and calls `on_progress` per micro-batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    indices = list(range(rank, len(heldout.captions), world_size))
    # All ranks must run the module equally often, as it is collective under ZeRO 3: some embed a sample again and drop it.
    padded = indices + [0] * (-(-len(heldout.captions) // world_size) - len(indices))
    parts = []
    with engine.inference():
        for start in range(0, len(padded), micro_batch_size):
            batch = select_samples(heldout, padded[start : start + micro_batch_size])
            rows = engine.task.embed_heldout(engine.task.inputs(batch, engine.device))
            parts.append({name: (v.float() if v.is_floating_point() else v).cpu() for name, v in rows.items()})
            on_progress()
    local = {name: torch.cat([part[name] for part in parts])[: len(indices)] for name in parts[0]}
    gathered = gather_objects(local)
    return engine.task.score({name: torch.cat([part[name] for part in gathered]) for name in local})


@collective
def generate_previews(engine: Engine, step: int) -> bytes | None:
    """Generate the Task's preview images on all ranks. Return one PNG of all images on rank 0; None on the others and on failure.

    An error costs a warning and the images of its rank, not the run. Under ZeRO 3, however, a rank that fails inside of the
    module leaves the others waiting until the hang detector ends them.
    """
    rank, images, failure, page = dist.get_rank(), {}, "", None
    try:
        with engine.inference():
            images = engine.task.preview(rank, dist.get_world_size())
    except Exception as error:
        failure = f"rank {rank}: {describe_error(error)}"
        logger.debug("the preview failed", exc_info=True)
    parts = gather_objects((images, failure))
    if rank != 0:
        return None
    failure = next((failure for _, failure in parts if failure), "")
    all_images = {place: image for images, _ in parts for place, image in images.items()}
    try:
        page = engine.task.preview_page(all_images) if all_images else None
    except Exception as error:
        failure = failure or describe_error(error)
    if failure:
        logger.warning("the preview at step %d failed, or a part of it; training continues: %s", step, one_line(failure))
    return page
