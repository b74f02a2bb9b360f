"""A quick score on held-out samples while training: all ranks compute it together, on the weights as they are."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ray_platform.contracts import Batch, DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig, FilterConfig
from ray_platform.data.plan import Item
from ray_platform.data.source import Sample, open_samples
from ray_platform.train.engine import Engine


@dataclass(frozen=True)
class Heldout:
    """Samples of one shape, always the same ones."""

    tensors: dict[str, np.ndarray]  # [N, ...]
    captions: tuple[str, ...]
    keys: tuple[str, ...]

    def batch(self, places: Sequence[int]) -> Batch:
        tensors = {name: tensor[list(places)] for name, tensor in self.tensors.items()}
        return Batch(tensors, [self.captions[i] for i in places], [self.keys[i] for i in places], (), {})


def read_heldout(config: DataConfig, sources: tuple[str, ...], limit: int) -> Heldout:
    """The first `limit` usable samples of `sources`, here, read as `config` says but square and unfiltered. Raises DataError."""
    config = replace(config, sources=sources, weights=(), aspect_ratios=(), filters=FilterConfig(), crop="centre")
    samples: list[Sample] = []
    for number, unit in enumerate(build_catalog(config).pools[0]):
        opened = open_samples(Item(0, 0, number, unit, []), config, seed=0)
        found = (opened.sample(place) for place in range(len(opened)))
        samples += [sample for sample in found if isinstance(sample, Sample)][: limit - len(samples)]
        if len(samples) == limit:
            break
    if not samples:
        raise DataError(f"train.heldout_sources: no sample of {', '.join(sources)} can be used; see jobs/inspect_data.py")
    names = samples[0].tensors.keys()
    return Heldout(
        {name: np.stack([sample.tensors[name] for sample in samples]) for name in names},
        tuple(sample.caption for sample in samples),
        tuple(sample.key for sample in samples),
    )


def score(engine: Engine, heldout: Heldout, micro_batch_size: int, moved: Callable[[], None]) -> dict[str, float]:
    """The Task's metrics over all of `heldout`. Every rank must call it; each represents its share of the samples, and calls
    `moved` after every micro-batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    size = len(heldout.captions)
    places = list(range(rank, size, world_size))
    # All ranks run the module equally often (under ZeRO 3 it is a collective), on rows that may be there only for that.
    padded = places + [0] * (-(-size // world_size) - len(places))
    parts = []
    with engine.inference():
        for start in range(0, len(padded), micro_batch_size):
            batch = heldout.batch(padded[start : start + micro_batch_size])
            rows = engine.task.embed_heldout(engine.task.inputs(batch, engine.device))
            parts.append({name: (v.float() if v.is_floating_point() else v).cpu() for name, v in rows.items()})
            moved()
    mine = {name: torch.cat([part[name] for part in parts])[: len(places)] for name in parts[0]}
    gathered: list[Any] = [None] * world_size
    dist.all_gather_object(gathered, mine)
    return engine.task.score({name: torch.cat([part[name] for part in gathered]) for name in mine})
