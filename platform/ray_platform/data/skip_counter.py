"""What a rank saw and skipped, by cause."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ray_platform.contracts import DataError
from ray_platform.data.causes import is_filtered, samples_lost

logger = logging.getLogger(__name__)

SHOWN_REJECTS = 3  # of each cause, by key, as warnings
ENOUGH_SAMPLES = 100  # to judge the skipped share by


@dataclass
class SkipCounter:
    """Stops the work when it skips too much. What was filtered out is counted, but neither seen nor skipped."""

    who: str  # reads: "rank 3", say
    max_skipped_share: float
    seen: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    unit_samples: dict[tuple[int, ...], int] = field(default_factory=dict)  # of units that could be read

    @property
    def bad(self) -> Counter[str]:
        return Counter({cause: count for cause, count in self.skipped.items() if not is_filtered(cause)})

    def count_good(self, item: Sequence[int], number: int = 1) -> None:
        """`number` good samples of a unit; `item` is what a block's header says of it."""
        self.unit_samples[tuple(item[:3])] = item[3]
        self.seen += number
        if self.seen - number < ENOUGH_SAMPLES <= self.seen:
            self._judge()

    def count_reject(self, key: str, cause: str, item: Sequence[int]) -> int:
        """Returns how many samples it stands for. Raises DataError when too many are bad."""
        lost, before = self._lost(cause, item), self.skipped[cause]
        self.skipped[cause] += lost
        if is_filtered(cause):
            return lost
        if before < SHOWN_REJECTS:
            more = "; further ones are only counted" if self.skipped[cause] >= SHOWN_REJECTS else ""
            logger.warning("%s skips %s: %s%s", self.who, key, cause, more)
        self.seen += lost
        if self.seen >= ENOUGH_SAMPLES:
            self._judge()
        return lost

    def _lost(self, cause: str, item: Sequence[int]) -> int:
        """Return how many samples a rejection stands for: one of a whole shard, or of its end, for everything it lost."""
        *unit, total, known, nominal = item
        if not cause.startswith("shard_"):
            self.unit_samples[tuple(unit)] = total
        elif known <= 0:
            return round(fmean(self.unit_samples.values())) if self.unit_samples else nominal
        return samples_lost(cause, known, total)

    def _judge(self) -> None:
        bad = self.bad
        if bad.total() <= self.max_skipped_share * self.seen:
            return
        shares = ", ".join(f"{cause} {count / self.seen:.1%}" for cause, count in bad.most_common())
        raise DataError(
            f"{self.who} had to skip {bad.total()} of {self.seen} samples ({shares}), more than "
            f"data.max_skipped_share = {self.max_skipped_share:.1%}; correct the shards (the warnings name samples) "
            "or raise data.max_skipped_share"
        )
