"""Which checkpoints of a run are kept."""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from ray_platform import storage
from ray_platform.train.checkpoint_format import (
    COMPLETE,
    CheckpointListing,
    CorruptCheckpoint,
    Lineage,
    checkpoint_step,
    read_manifest,
    split_url,
)


@dataclass(frozen=True)
class RetentionPolicy:
    """Checkpoints of a run that are kept: the newest ones, the best one by a metric, and one every `keep_every` steps."""

    output_dir: str
    num_newest: int
    best_metric: str = ""  # empty: none
    best_mode: Literal["max", "min"] = "max"
    keep_every: int = 0  # steps; 0: none

    def prune(self, newest: str, lineage: Lineage) -> None:
        """Delete the other checkpoints of a lineage, after `newest` was finalized and before the next one starts.

        Those of launches that are not ancestors stay: they are another branch, or a launch that took this run over wrote them.
        Incomplete ones are deleted if they are in a launch that ended before this one, or older than `newest`.
        """
        launches = {*lineage.ancestors, lineage.launch}
        existing, manifests, folders = CheckpointListing.read(self.output_dir)
        ordered = [url for url in existing if split_url(url)[0] in launches]
        passed = [url for url in ordered if lineage.includes(url)]
        best = *self._best(ordered, manifests), *self._best(passed, manifests)  # also when the best of all was abandoned
        kept = {newest, *ordered[: self.num_newest], *passed[: self.num_newest], *best}
        for url in folders:
            launch, name = split_url(url)
            is_permanent = self.keep_every and url in existing and checkpoint_step(name) % self.keep_every == 0
            is_past = launch in lineage.ancestors or (launch == lineage.launch and name < split_url(newest)[1])
            is_unfinished = launch in lineage.earlier and url not in existing
            if url not in kept and not is_permanent and (is_past or is_unfinished):
                storage.delete(storage.join(url, COMPLETE))  # first, so that it is not listed
                storage.delete(url)

    def _best(self, ordered: list[str], manifests: Mapping[str, bytes]) -> list[str]:
        """Return the checkpoint with the best value, the oldest of equal ones; empty when none has a value."""
        scores: dict[str, float] = {}
        for url in reversed(ordered) if self.best_metric else ():
            with contextlib.suppress(CorruptCheckpoint):
                scores[url] = read_manifest(url, manifests.get(url, b"")).metrics.get(self.best_metric, math.nan)
        scores = {url: value for url, value in scores.items() if not math.isnan(value)}
        return [(max if self.best_mode == "max" else min)(scores, key=lambda url: scores[url])] if scores else []
