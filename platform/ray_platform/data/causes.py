"""Why samples are not used: each cause with its meaning and what to do about it, and how skipped samples are counted.

Filters add causes of their own, see `filters`.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from ray_platform.contracts import DataError

if TYPE_CHECKING:  # every configuration imports this module, and the clients of object stores take long
    from ray_platform.storage_errors import StorageError

logger = logging.getLogger(__name__)

SHARD_CHANGED = "shard_changed"
SHARD_CRASHES = "shard_crashes"
BAD_DATA: dict[str, str] = {
    "image_missing": "no .jpg, .jpeg, .png or .webp with the caption's name",
    "image_empty": "an image file of 0 bytes: a download that failed",
    "image_undecodable": "broken, or not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF whatever its name says",
    "image_too_large": "would take hundreds of megabytes, or minutes, to decode; scale such images down",
    "caption_missing": "no .txt and no `caption` in a .json, or not the field that data.caption_field names",
    "caption_empty": "nothing but white space (with data.clean_captions: or HTML)",
    "caption_not_utf8": "text in another encoding; convert it to UTF-8",
    "caption_too_long": "more than 65,536 bytes of text, which is not a caption; shorten it",
    "json_invalid": "a .json that is not a JSON object, or whose caption is not a text",
    "json_too_large": "a .json of more than 1 MiB; remove everything but scores and the caption",
    "name_too_long": "a file name of more than 1,024 characters in a tar; rename the file",
    "name_ambiguous": "named like `7.b.jpg` next to a sample `7`, of which it could be a side file; remove the dot",
    "file_not_stored": "a link, a device or a sparse file in a tar; write it with `tar --hard-dereference -h` and without -S",
    "score_missing": "a filter needs a score that the .json lacks; see data.filters",
    "key_repeated": "the same file name twice in a tar: which caption belongs to which image is unknown",
    "label_missing": "a sample of an evaluation set without a label",
    "label_invalid": "a label that is not a whole number",
    "tar_truncated": "the tar ends early or becomes garbage; the samples before that are used. Copy it again",
    "shard_not_a_tar": "another kind of file (HTML, gzip, git-lfs, …) named .tar: download it again, decompress it, `git lfs pull`",
    "shard_empty": "a shard without samples",
    "shard_missing": "listed, but gone when it was read (404)",
    "shard_forbidden": "storage denies access (403); check credentials and the bucket's policy",
    "shard_archived": "in an archive of S3 (Glacier); restore it, or copy it to another storage class",
    "shard_unavailable": "storage did not answer within data.retry_seconds, or only with errors (5xx)",
    "shard_unreadable": "a precomputed shard that is not an Arrow file; run jobs/precompute.py again",
    # These two end a training run; only an inspection counts them.
    SHARD_CHANGED: "its length changed while it was inspected; is it still being written?",
    SHARD_CRASHES: "its reader failed or died (out of memory?), as a run would; see the log",
}
# What is passed over without a loss.
IGNORED: dict[str, str] = {
    "ignored_file": "a file of a tar that belongs to no sample",
    "ignored_part": "a part of a large tar in which no sample begins",
}
# The cause for each kind of `storage.StorageError` that concerns one file.
LOST = {
    "missing": "shard_missing",
    "forbidden": "shard_forbidden",
    "archived": "shard_archived",
    "unavailable": "shard_unavailable",
}
_FILTERED = "filtered_"
_SHOWN_REJECTS = 3  # warnings per cause
_ENOUGH_SAMPLES = 100  # before the skipped fraction can stop a run


@dataclass(frozen=True)
class RejectedSample:
    """A sample, or a part of a shard, that is not used."""

    key: str
    cause: str


class SampleError(Exception):
    """Raised while a sample is decoded; becomes its RejectedSample."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def filter_cause(field: str) -> str:
    """Return the cause of the samples that a field of `FilterConfig` filters out: `filtered_size` for `min_size`."""
    return _FILTERED + field.partition("_")[2]


def is_filtered(cause: str) -> bool:
    """Return whether a sample was filtered out, as the configuration asks, or nothing was lost: it is not bad data."""
    return cause.startswith(_FILTERED) or cause in IGNORED


def lost_cause(error: "StorageError") -> str:
    """Return the cause of a file that storage does not return. Raises the error if it concerns every file: wrong credentials."""
    if error.kind == "configuration":
        raise error
    return LOST[error.kind]


def samples_lost(cause: str, known: int, read: int) -> int:
    """Return how many samples one rejection stands for; 0 if a whole shard is lost whose number of samples is not known.

    `known` is the number of samples that the shard should have (0 or less: not known), `read` that of its samples and rejections.
    """
    if cause.startswith("shard_"):
        return max(0, known)
    return max(1, known - (read - 1)) if cause == "tar_truncated" else 1


class UnitCounts(NamedTuple):
    """A unit that is read in an epoch, and the number of its samples."""

    pool: int
    epoch: int
    unit: int
    total: int  # samples and rejections that were found
    known: int  # by its shard's count; -1: not known
    nominal: int  # an estimate by its size


@dataclass
class SkipCounter:
    """Counts good and rejected samples and stops the run when too many are bad. Filtered samples count as neither."""

    reader: str  # for messages, such as "rank 3"
    max_skipped_share: float
    seen: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    _totals: dict[tuple[int, ...], int] = field(default_factory=dict)  # unit -> its samples

    @property
    def bad(self) -> Counter[str]:
        return Counter({cause: count for cause, count in self.skipped.items() if not is_filtered(cause)})

    def count_good(self, unit: UnitCounts, number: int = 1) -> None:
        """Count `number` good samples of a unit. Raises DataError when too many samples are bad."""
        self._totals[unit[:3]] = unit.total
        self.seen += number
        if self.seen - number < _ENOUGH_SAMPLES:
            self._check_share()

    def count_reject(self, key: str, cause: str, unit: UnitCounts) -> int:
        """Count a rejection and return how many samples it stands for. Raises DataError when too many samples are bad."""
        if not cause.startswith("shard_"):
            self._totals[unit[:3]] = unit.total
        lost = samples_lost(cause, unit.known, unit.total)
        if not lost:
            lost = round(fmean(self._totals.values())) if self._totals else unit.nominal
        before = self.skipped[cause]
        self.skipped[cause] += lost
        if not is_filtered(cause):
            if before < _SHOWN_REJECTS:
                more = "; further ones are only counted" if self.skipped[cause] >= _SHOWN_REJECTS else ""
                logger.warning("%s skips %s: %s%s", self.reader, key, cause, more)
            self.seen += lost
            self._check_share()
        return lost

    def _check_share(self) -> None:
        bad = self.bad
        if self.seen < _ENOUGH_SAMPLES or bad.total() <= self.max_skipped_share * self.seen:
            return
        causes = ", ".join(f"{cause} {count / self.seen:.1%}" for cause, count in bad.most_common())
        raise DataError(
            f"{self.reader} had to skip {bad.total()} of {self.seen} samples ({causes}), more than "
            f"data.max_skipped_share = {self.max_skipped_share:.1%}; correct the shards (the warnings name samples) "
            "or raise data.max_skipped_share"
        )
