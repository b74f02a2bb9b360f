"""Why samples are not used: each cause with its meaning and what to do about it, and how skipped samples are counted.

Filters add causes of their own, see `filters`.
"""

import logging
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ray_platform.contracts import DataError

if TYPE_CHECKING:  # every configuration imports this module, and the clients of object stores take long
    from ray_platform.storage_errors import StorageError

logger = logging.getLogger(__name__)

SHARD_CHANGED = "shard_changed"
SHARD_CRASHES = "shard_crashes"
BAD_DATA: dict[str, str] = {
    "image_missing": "no .jpg, .jpeg, .png or .webp (in evaluations also .bmp, .gif, .tif, .avif) named as the text or label",
    "image_empty": "an image file of 0 bytes: a download that failed",
    "image_undecodable": "broken, or not a JPEG, PNG, WebP, GIF, BMP, TIFF or AVIF whatever its name says",
    "image_too_large": "would take hundreds of megabytes, or minutes, to decode; scale such images down",
    "caption_missing": "no .txt and no `caption` or `text` in a .json, or not the field that data.caption_field names",
    "caption_empty": "nothing but white space (with data.clean_captions: or HTML)",
    "caption_not_utf8": "text in another encoding; convert it to UTF-8",
    "caption_too_long": "more than 65,536 bytes of text, which is not a caption; shorten it",
    "json_invalid": "a .json that is not a JSON object, or whose caption is not a text",
    "json_too_large": "a .json of more than 1 MiB; remove everything but scores and the caption",
    "name_too_long": "a file name of more than 1,024 characters in a tar; rename the file",
    "name_ambiguous": "named like `7.b.jpg` next to a sample `7`, of which it could be a side file; remove the dot",
    "files_apart": "image or caption missing in a part of a large tar; sort the tar, or raise data.max_read_mb above its size",
    "file_not_stored": "a link, a device or a sparse file in a tar; write it with `tar --hard-dereference -h` and without -S",
    "score_missing": "a filter needs a score that the .json lacks; see data.filters",
    "key_repeated": "the same file name twice in a tar: which caption belongs to which image is unknown",
    "label_missing": "a sample of an evaluation set without a label: write it as a .cls next to the image; a .json is not read",
    "label_invalid": "a label that is not a whole number but a text; write the number of the class in classnames.txt, from 0",
    "tar_truncated": "the tar ends early or becomes garbage; the samples before that are used. Copy it again",
    "shard_not_a_tar": "HTML, gzip, a git-lfs pointer or another kind of file: download it again, decompress it, `git lfs pull`",
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
_NO_METRIC_NAME = re.compile(r"[^\w.-]")
_SHOWN_REJECTS = 3  # warnings per cause
_ENOUGH_SAMPLES = 100  # the skipped fraction of fewer samples stops no run


@dataclass(frozen=True)
class RejectedSample:
    """A sample, or a part of a shard, that is not used."""

    key: str
    cause: str
    detail: str = field(default="", compare=False)  # the error of storage for a lost shard, or the fields of the .json


class SampleError(Exception):
    """Raised while a sample is decoded; becomes its RejectedSample."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.cause, self.detail = cause, detail


def filter_cause(field: str) -> str:
    """Return the cause of the samples that a field of `FilterConfig` filters out: `filtered_size` for `min_size`."""
    return _FILTERED + _NO_METRIC_NAME.sub("_", field.partition("_")[2])


def is_filtered(cause: str) -> bool:
    """Return whether a sample was filtered out, as the configuration asks, or nothing was lost: it is not bad data."""
    return cause.startswith(_FILTERED) or cause in IGNORED


def lost_cause(error: "StorageError") -> str:
    """Return the cause of a file that storage does not return. Raises the error if it concerns every file: wrong credentials."""
    if error.kind == "configuration":
        raise error
    return LOST[error.kind]


def samples_lost(cause: str, known: int, read: int) -> int | None:
    """Return how many samples one rejection stands for; None if that depends on how many samples other shards have.

    `known` is the number of samples that the shard should have (-1: not known), `read` that of its samples and rejections.
    """
    if cause.startswith("shard_"):
        return known if known >= 0 else None
    if cause == "tar_truncated":
        return max(1, known - (read - 1)) if known >= 0 else None
    return 1


class UnitCounts(NamedTuple):
    """A unit that is read in an epoch, and the number of its samples."""

    pool: int
    epoch: int
    unit: int
    total: int  # samples and rejections that were found
    known: int  # by its shard's count; -1: not known


class SourceSize(NamedTuple):
    """What is known of the number of samples of a source before it is read."""

    known_samples: int  # of the units with a count
    uncounted_units: int
    samples_per_unit: float  # estimate for those


@dataclass
class SkipCounter:
    """Counts the good and rejected samples of one reader. Filtered samples count as neither.

    A lost shard counts for the samples that it should have, or else for as many as the other shards have on average.
    """

    reader: str  # for messages, such as "rank 3"
    size: SourceSize
    max_skipped_fraction: float
    num_good: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # cause -> samples
    details: dict[str, str] = field(default_factory=dict)  # cause -> the latest detail
    _num_rejects: Counter[str] = field(default_factory=Counter)
    _totals: dict[tuple[int, ...], int] = field(default_factory=dict)  # unit -> its samples; 0 if it is truncated
    _num_samples: int = 0  # in these units
    _num_units: int = 0  # of these, those that are not truncated
    _lost_units: set[tuple[int, ...]] = field(default_factory=set)
    _bad_in_a_row: set[tuple[int, ...]] = field(default_factory=set)  # units with bad samples since the last good one

    @property
    def epoch_samples(self) -> float:
        """The number of samples of an epoch of the whole source, as far as it is known so far."""
        return self.size.known_samples + self.size.uncounted_units * self._samples_per_unit

    @property
    def _samples_per_unit(self) -> float:
        return self._num_samples / self._num_units if self._num_units else self.size.samples_per_unit

    def count_good(self, unit: UnitCounts, number: int = 1) -> None:
        """Count `number` good samples of a unit."""
        self._add_unit(unit)
        self.num_good += number
        self._bad_in_a_row.clear()

    def count_reject(self, key: str, cause: str, unit: UnitCounts, detail: str = "") -> int:
        """Count a rejection and return how many samples it stands for. Further rejections of a lost shard stand for none.

        Raises DataError after so many shards in a row without a good sample that this is not a coincidence.
        """
        if unit[:3] in self._lost_units:
            return 0
        if cause.startswith("shard_"):
            self._lost_units.add(unit[:3])
        lost = samples_lost(cause, unit.known, unit.total)
        if lost is None:
            lost = self._estimate_lost(cause, unit)
        elif not cause.startswith("shard_"):
            self._add_unit(unit)
        self.skipped[cause] += lost
        if is_filtered(cause):
            self._bad_in_a_row.clear()
            return lost
        if detail:
            self.details[cause] = detail
        self._num_rejects[cause] += 1
        if self._num_rejects[cause] <= _SHOWN_REJECTS:
            more = f" ({detail})" if detail else ""
            more += "; further ones are only counted" if self._num_rejects[cause] == _SHOWN_REJECTS else ""
            logger.warning("%s skips %s: %s%s", self.reader, key, cause, more)
        self._bad_in_a_row.add(unit[:3])
        if len(self._bad_in_a_row) > _max_in_a_row(self.max_skipped_fraction):
            raise DataError(
                f"{self.reader} found no good sample in {len(self._bad_in_a_row)} shards in a row, up to {key}: {cause}, "
                f"{detail or BAD_DATA[cause]}; check storage and these shards, then resume with --resume auto"
            )
        return lost

    def _add_unit(self, unit: UnitCounts) -> None:
        if unit[:3] not in self._totals:
            self._totals[unit[:3]] = unit.total
            self._num_samples += unit.total
            self._num_units += 1

    def _estimate_lost(self, cause: str, unit: UnitCounts) -> int:
        if cause != "tar_truncated":
            return max(1, round(self._samples_per_unit))
        if total := self._totals.get(unit[:3], 0):
            self._num_samples -= total
            self._num_units -= 1
        self._totals[unit[:3]] = 0
        # If all shards end like this one, it is their writer that does not end them, and nothing is missing.
        return max(1, round(self._samples_per_unit) - (unit.total - 1)) if self._num_units else 1


def _max_in_a_row(max_skipped_fraction: float) -> int:
    """Return how many shards in a row may have no good sample. At the allowed fraction, more are rarer than 1 in a million."""
    return max(10, math.ceil(6 / -math.log10(max_skipped_fraction))) if max_skipped_fraction else 10


def num_bad(skipped: Mapping[str, int]) -> int:
    return sum(count for cause, count in skipped.items() if not is_filtered(cause))


def is_too_bad(bad: float, good: float, epoch_samples: float, max_skipped_fraction: float) -> bool:
    """Return whether too many samples are bad: of those that were read so far, or of an epoch if that is more.

    So a shard that is lost early weighs as much as one that is lost late.
    """
    return bad > max_skipped_fraction * max(bad + good, epoch_samples, _ENOUGH_SAMPLES)


def check_skipped(
    reader: str,
    skipped: Mapping[str, int],
    good: int,
    epoch_samples: float,
    max_skipped_fraction: float,
    details: Mapping[str, str],
) -> None:
    """Raise DataError if too many samples are bad, with the causes, and the detail or the remedy for the most frequent one."""
    bad = num_bad(skipped)
    if not is_too_bad(bad, good, epoch_samples, max_skipped_fraction):
        return
    total = max(bad + good, round(epoch_samples))
    counts = Counter({cause: count for cause, count in skipped.items() if not is_filtered(cause)}).most_common()
    causes = ", ".join(f"{cause} {count / total:.1%}" for cause, count in counts)
    worst = counts[0][0]
    remedy = details.get(worst) or f"{BAD_DATA[worst]}; correct the shards (the warnings name some)"
    raise DataError(
        f"{reader} had to skip {bad} of {total} samples ({causes}), more than data.max_skipped_fraction = "
        f"{max_skipped_fraction:.1%}; {worst}: {remedy} or raise data.max_skipped_fraction"
    )
