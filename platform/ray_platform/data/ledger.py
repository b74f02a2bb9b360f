"""The ledger: which samples were consumed. It makes every epoch read every sample exactly once.

A *unit* is a `ShardRange` of a *pool* (one source of a weighted mixture; all sources without weights). For every epoch that is
not complete, the ledger stores one bit per complete unit, and ranges for the units that are partly consumed. Ranges count
samples, rejected ones included, in the order in which that epoch reads the unit.
"""

import base64
import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ray_platform.contracts import ConsumedRange

Ranges = list[tuple[int, int]]  # sorted, disjoint, half-open


@dataclass
class _Epoch:
    complete: np.ndarray  # [num_units] bool
    started: dict[int, Ranges] = field(default_factory=dict)  # unit -> what was consumed of it


class Ledger:
    """The consumed samples of pools with `num_units` units each; initially none."""

    def __init__(self, num_units: Sequence[int]):
        self.num_units = tuple(num_units)
        self.first_epoch = [0] * len(self.num_units)  # per pool; all earlier epochs are complete
        self._epochs: dict[tuple[int, int], _Epoch] = {}

    def add(self, ranges: Iterable[ConsumedRange]) -> None:
        """Record consumed samples. Raises ValueError for a sample that was consumed before."""
        for consumed in ranges:
            pool, epoch, unit = consumed[:3]
            if consumed.start >= consumed.stop:
                raise ValueError(f"an empty range: {consumed}")
            if self.is_complete(pool, epoch, unit):
                raise ValueError(f"consumed twice: {consumed} of a complete unit")
            if (state := self._epochs.get((pool, epoch))) is None:
                state = self._epochs[pool, epoch] = _Epoch(np.zeros(self.num_units[pool], dtype=bool))
            state.started[unit] = _insert(state.started.get(unit, []), consumed)
            if state.started[unit] == [(0, consumed.total)]:
                del state.started[unit]
                state.complete[unit] = True
                while (first := self._epochs.get((pool, self.first_epoch[pool]))) and first.complete.all():
                    del self._epochs[pool, self.first_epoch[pool]]
                    self.first_epoch[pool] += 1

    def is_complete(self, pool: int, epoch: int, unit: int) -> bool:
        """Return whether all samples of a unit were consumed."""
        if epoch < self.first_epoch[pool]:
            return True
        state = self._epochs.get((pool, epoch))
        return state is not None and bool(state.complete[unit])

    def ranges(self, pool: int, epoch: int, unit: int) -> Ranges:
        """Return what was consumed of a unit that is not complete."""
        return list(self.started(pool, epoch).get(unit, []))

    def started(self, pool: int, epoch: int) -> Mapping[int, Ranges]:
        """Return unit -> what was consumed of it, for the units that are partly consumed."""
        state = self._epochs.get((pool, epoch))
        return state.started if state else {}

    def remaining(self, pool: int, epoch: int) -> np.ndarray:
        """Return the units of an epoch that are not complete, in ascending order."""
        if epoch < self.first_epoch[pool]:
            return np.empty(0, dtype=np.int64)
        state = self._epochs.get((pool, epoch))
        return np.arange(self.num_units[pool]) if state is None else np.flatnonzero(~state.complete)

    def copy(self) -> "Ledger":
        return copy.deepcopy(self)

    def to_bytes(self) -> bytes:
        """Return the ledger as JSON, with bits in base64 and ranges as flat lists."""
        epochs = [
            {
                "pool": pool,
                "epoch": number,
                "complete": base64.b64encode(np.packbits(epoch.complete).tobytes()).decode(),
                "begun": {str(unit): [bound for pair in ranges for bound in pair] for unit, ranges in epoch.started.items()},
            }
            for (pool, number), epoch in sorted(self._epochs.items())
        ]
        return json.dumps({"num_units": self.num_units, "first_epoch": self.first_epoch, "epochs": epochs}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Ledger":
        """Return the ledger that `to_bytes` wrote. Raises ValueError if the bits do not match `num_units`."""
        values = json.loads(data)
        ledger = cls(values["num_units"])
        ledger.first_epoch = values["first_epoch"]
        for epoch in values["epochs"]:
            bits = np.frombuffer(base64.b64decode(epoch["complete"]), dtype=np.uint8)
            if len(bits) != -(-ledger.num_units[epoch["pool"]] // 8):
                raise ValueError(f"{len(bits)} bytes for {ledger.num_units[epoch['pool']]} units")
            complete = np.unpackbits(bits, count=ledger.num_units[epoch["pool"]]).astype(bool)
            started = {int(unit): list(zip(flat[::2], flat[1::2], strict=True)) for unit, flat in epoch["begun"].items()}
            ledger._epochs[epoch["pool"], epoch["epoch"]] = _Epoch(complete, started)
        return ledger


def _insert(ranges: Ranges, consumed: ConsumedRange) -> Ranges:
    """Return `ranges` with a range added and adjacent ranges merged."""
    merged: Ranges = []
    for start, stop in sorted([*ranges, (consumed.start, consumed.stop)]):
        if merged and start < merged[-1][1]:
            raise ValueError(f"consumed twice: {consumed}, of which {ranges} was consumed before")
        if merged and start == merged[-1][1]:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return merged


def merge_ranges(ranges: Iterable[ConsumedRange]) -> tuple[ConsumedRange, ...]:
    """Return `ranges` sorted by unit and start, with adjacent ranges of a unit merged."""
    merged: list[ConsumedRange] = []
    for consumed in sorted(ranges):
        last = merged[-1] if merged else None
        if last and last[:3] == consumed[:3] and last.stop == consumed.start:
            merged[-1] = ConsumedRange(*last[:4], consumed.stop, consumed.total)
        else:
            merged.append(consumed)
    return tuple(merged)
