"""Counting the samples that a rank skips, by cause."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ray_platform.contracts import DataError
from ray_platform.data.causes import is_filtered, samples_lost

logger = logging.getLogger(__name__)

SHOWN_REJECTS = 3  # warnings per cause
ENOUGH_SAMPLES = 100  # before the skipped share can stop a run


@dataclass
class SkipCounter:
    """Counts good and rejected samples and stops the run when too many are bad. Filtered samples count as neither."""

    reader: str  # for messages, such as "rank 3"
    max_skipped_share: float
    seen: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unit_samples: dict[tuple[int, ...], int] = field(default_factory=dict)  # unit -> its samples

    @property
    def bad(self) -> Counter[str]:
        return Counter({cause: count for cause, count in self.skipped.items() if not is_filtered(cause)})

    def count_good(self, item: Sequence[int], number: int = 1) -> None:
        """Count `number` good samples of a unit. `item` is the unit's entry in the header of a block."""
        self.unit_samples[tuple(item[:3])] = item[3]
        self.seen += number
        if self.seen - number < ENOUGH_SAMPLES <= self.seen:
            self._check_share()

    def count_reject(self, key: str, cause: str, item: Sequence[int]) -> int:
        """Count a rejection and return how many samples it stands for. Raises DataError when too many samples are bad."""
        lost, before = self._lost(cause, item), self.skipped[cause]
        self.skipped[cause] += lost
        if is_filtered(cause):
            return lost
        if before < SHOWN_REJECTS:
            more = "; further ones are only counted" if self.skipped[cause] >= SHOWN_REJECTS else ""
            logger.warning("%s skips %s: %s%s", self.reader, key, cause, more)
        self.seen += lost
        if self.seen >= ENOUGH_SAMPLES:
            self._check_share()
        return lost

    def _lost(self, cause: str, item: Sequence[int]) -> int:
        """Return how many samples a rejection stands for: one of a whole shard, or of its end, for everything it lost."""
        *unit, total, known, nominal = item
        if not cause.startswith("shard_"):
            self.unit_samples[tuple(unit)] = total
        elif known <= 0:
            return round(fmean(self.unit_samples.values())) if self.unit_samples else nominal
        return samples_lost(cause, known, total)

    def _check_share(self) -> None:
        bad = self.bad
        if bad.total() <= self.max_skipped_share * self.seen:
            return
        causes = ", ".join(f"{cause} {count / self.seen:.1%}" for cause, count in bad.most_common())
        raise DataError(
            f"{self.reader} had to skip {bad.total()} of {self.seen} samples ({causes}), more than "
            f"data.max_skipped_share = {self.max_skipped_share:.1%}; correct the shards (the warnings name samples) "
            "or raise data.max_skipped_share"
        )
