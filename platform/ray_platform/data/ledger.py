"""What of the source has been consumed: the memory that makes every epoch read every sample exactly once.

A *unit* is a shard or a part of one, in a *pool* (one source of a weighted mixture; all sources where there are no weights).
Of each epoch that is not over, the ledger keeps a bit for every complete unit and ranges for those begun. The ranges
count samples, unusable ones included, in the order in which that epoch reads the unit.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ray_platform.contracts import ConsumedRange

Ranges = list[tuple[int, int]]  # sorted, disjoint, half-open


@dataclass
class _Epoch:
    complete: np.ndarray  # [num_units] bool
    begun: dict[int, Ranges] = field(default_factory=dict)


class Ledger:
    """What was consumed of pools with `num_units` units each; nothing at first."""

    def __init__(self, num_units: Sequence[int]):
        self.num_units = tuple(num_units)
        self.first_epoch = [0] * len(self.num_units)  # of each pool; all before it are complete
        self._epochs: dict[tuple[int, int], _Epoch] = {}

    def add(self, marks: Iterable[ConsumedRange]) -> None:
        """Raises ValueError for a sample that was consumed before: reading it twice is what the ledger is there to prevent."""
        for mark in marks:
            self._add(mark)

    def is_complete(self, pool: int, epoch: int, unit: int) -> bool:
        if epoch < self.first_epoch[pool]:
            return True
        known = self._epochs.get((pool, epoch))
        return known is not None and bool(known.complete[unit])

    def ranges(self, pool: int, epoch: int, unit: int) -> Ranges:
        """What was consumed of a unit that is not complete."""
        known = self._epochs.get((pool, epoch))
        return list(known.begun.get(unit, [])) if known else []

    def remaining(self, pool: int, epoch: int) -> np.ndarray:
        """The units of an epoch that are not complete, ascending."""
        if epoch < self.first_epoch[pool]:
            return np.empty(0, dtype=np.int64)
        known = self._epochs.get((pool, epoch))
        return np.arange(self.num_units[pool]) if known is None else np.flatnonzero(~known.complete)

    def copy(self) -> "Ledger":
        other = Ledger(self.num_units)
        other.first_epoch = list(self.first_epoch)
        other._epochs = {
            key: _Epoch(epoch.complete.copy(), {unit: list(ranges) for unit, ranges in epoch.begun.items()})
            for key, epoch in self._epochs.items()
        }
        return other

    def _add(self, mark: ConsumedRange) -> None:
        pool, epoch, unit = mark.pool, mark.epoch, mark.unit
        if mark.start >= mark.stop:
            raise ValueError(f"an empty range: {mark}")
        if self.is_complete(pool, epoch, unit):
            raise ValueError(f"consumed twice: {mark} of a complete unit")
        known = self._epochs.setdefault((pool, epoch), _Epoch(np.zeros(self.num_units[pool], dtype=bool)))
        ranges = _merged(known.begun.get(unit, []), mark)
        if ranges == [(0, mark.total)]:
            known.begun.pop(unit, None)
            known.complete[unit] = True
            self._close_epochs(pool)
        else:
            known.begun[unit] = ranges

    def _close_epochs(self, pool: int) -> None:
        while (known := self._epochs.get((pool, self.first_epoch[pool]))) and known.complete.all():
            del self._epochs[pool, self.first_epoch[pool]]
            self.first_epoch[pool] += 1

    def to_bytes(self) -> bytes:
        """JSON: bits in base64, ranges as flat lists."""
        epochs = [
            {
                "pool": pool,
                "epoch": number,
                "complete": base64.b64encode(np.packbits(epoch.complete).tobytes()).decode(),
                "begun": {str(unit): [bound for pair in ranges for bound in pair] for unit, ranges in epoch.begun.items()},
            }
            for (pool, number), epoch in sorted(self._epochs.items())
        ]
        return json.dumps({"num_units": self.num_units, "first_epoch": self.first_epoch, "epochs": epochs}).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Ledger":
        """The inverse of `to_bytes`. Raises ValueError for bits that are not those of `num_units`."""
        values = json.loads(data)
        ledger = cls(values["num_units"])
        ledger.first_epoch = values["first_epoch"]
        for epoch in values["epochs"]:
            bits = np.frombuffer(base64.b64decode(epoch["complete"]), dtype=np.uint8)
            if len(bits) != -(-ledger.num_units[epoch["pool"]] // 8):
                raise ValueError(f"{len(bits)} bytes for {ledger.num_units[epoch['pool']]} units")
            complete = np.unpackbits(bits, count=ledger.num_units[epoch["pool"]]).astype(bool)
            begun = {int(unit): list(zip(flat[::2], flat[1::2], strict=True)) for unit, flat in epoch["begun"].items()}
            ledger._epochs[epoch["pool"], epoch["epoch"]] = _Epoch(complete, begun)
        return ledger


def _merged(ranges: Ranges, mark: ConsumedRange) -> Ranges:
    """`ranges` with the mark's, neighbours joined."""
    merged: Ranges = []
    for start, stop in sorted([*ranges, (mark.start, mark.stop)]):
        if merged and start < merged[-1][1]:
            raise ValueError(f"consumed twice: {mark}, of which {ranges} was consumed before")
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
            merged[-1] = last._replace(stop=consumed.stop)
        else:
            merged.append(consumed)
    return tuple(merged)
