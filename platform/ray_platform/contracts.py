"""The types that the rooms of the platform hand to each other, and the shape of the Task that they train.

A Task comes from outside (`diffdis.task`, say) and satisfies `Task` by shape alone: neither library imports the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:  # every read worker imports this file, and torch would double its start and its memory
    import torch


class DataError(Exception):
    """A source, shard or sample that cannot be used. The message names it and says what to do."""


class ConfigError(Exception):
    """A field, or a combination of fields, that cannot work. The message names it and says what to do."""


@dataclass(frozen=True)
class Position:
    """Where one rank stands in its stream: `item` counts (epoch, shard) pairs, `order` samples inside that item.

    Both count what was consumed, so a stream started at a position goes on with the next sample.
    """

    item: int = 0
    order: int = 0


@dataclass(frozen=True)
class Batch:
    """What a rank's stream yields. B = micro_batch_size, always."""

    images: np.ndarray  # [B, H, W, 3] uint8 RGB
    captions: Sequence[str]  # B
    keys: Sequence[str]  # B; "<shard file name>/<key in the tar>", unique in the source
    position: Position  # of the last sample of the batch
    skipped: Mapping[str, int]  # cause -> samples skipped since the stream began, on this rank


class Task(Protocol):
    """What a trainer needs to know of a model.

    `module(inputs, generator)` returns the loss to minimise and the metrics of the batch. A metric is a [2] tensor: a weighted
    sum and its weight; sums and weights add up over ranks and steps and are divided only when they are logged.
    """

    module: torch.nn.Module

    def parameter_groups(self) -> list[dict[str, Any]]:
        """AdamW groups over `module`'s trainable parameters: `params`, `lr`, `weight_decay` and a `name` for the log."""
        ...

    def inputs(self, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
        """Frozen encoders and tokenisation: from uint8 images and captions to what `module` takes."""
        ...

    def preview(self, state_dict: Mapping[str, torch.Tensor]) -> bytes:
        """A PNG that shows what the weights do: always the same captions and noise."""
        ...

    def save_pretrained(self, state_dict: Mapping[str, torch.Tensor], folder: Path) -> None:
        """Write a folder from which the model can be used without this platform."""
        ...
