"""What a rank saw and skipped, by cause."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from ray_platform.contracts import DataError
from ray_platform.data.causes import FILTERED

logger = logging.getLogger(__name__)

SHOWN_REJECTS = 3  # of each cause, by key, as warnings
ENOUGH_SAMPLES = 100  # to judge the skipped share by


@dataclass
class Tally:
    """Stops the run when it skips too much. What was filtered out is counted, but neither seen nor skipped."""

    rank: int
    max_skipped_share: float
    seen: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def count(self, key: str, cause: str, weight: int = 1) -> None:
        """One sample, or `weight` lost ones; a good one when `cause` is empty. Raises DataError when too many are bad."""
        if cause:
            before = self.skipped[cause]
            self.skipped[cause] += weight
            if cause not in FILTERED and before < SHOWN_REJECTS:
                more = "; further ones are only counted" if self.skipped[cause] >= SHOWN_REJECTS else ""
                logger.warning("rank %d skips %s: %s%s", self.rank, key, cause, more)
        if cause not in FILTERED:
            self.seen += weight
        if self.seen >= ENOUGH_SAMPLES:
            self._judge()

    def _judge(self) -> None:
        bad = Counter({cause: count for cause, count in self.skipped.items() if cause not in FILTERED})
        if bad.total() <= self.max_skipped_share * self.seen:
            return
        shares = ", ".join(f"{cause} {count / self.seen:.1%}" for cause, count in bad.most_common())
        raise DataError(
            f"rank {self.rank} had to skip {bad.total()} of {self.seen} samples ({shares}), more than "
            f"data.max_skipped_share = {self.max_skipped_share:.1%}; correct the shards (the warnings name samples) "
            "or raise data.max_skipped_share"
        )
