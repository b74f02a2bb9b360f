"""Why samples are not used: each cause with its meaning and what to do about it. Filters add theirs, see `filters`."""

from dataclasses import dataclass

SHARD_CHANGED = "shard_changed"
SHARD_CRASHES = "shard_crashes"
BAD_DATA: dict[str, str] = {
    "image_missing": "no .jpg, .jpeg, .png or .webp with the caption's name",
    "image_empty": "an image file of 0 bytes: a download that failed",
    "image_undecodable": "broken, or not a JPEG, PNG or WebP whatever its name says",
    "image_too_large": "would take hundreds of megabytes, or minutes, to decode; scale such images down",
    "caption_missing": "no .txt and no `caption` in a .json, or not the field that data.caption_field names",
    "caption_empty": "nothing but white space (with data.clean_captions: or HTML)",
    "caption_not_utf8": "text in another encoding; convert it to UTF-8",
    "caption_too_long": "more than 65,536 bytes of text, which is not a caption; shorten it",
    "json_invalid": "a .json that is not a JSON object, or whose caption is not a text",
    "json_too_large": "a .json of more than 1 MiB; remove everything but scores and the caption",
    "name_too_long": "a file name of more than 1,024 characters in a tar; rename the file",
    "score_missing": "a filter needs a score that the .json lacks; see data.filters",
    "key_repeated": "the same file name twice in a tar: which caption belongs to which image is unknown",
    "label_missing": "a sample of an evaluation set without a label",
    "label_invalid": "a label that is not a whole number",
    "tar_truncated": "the tar ends early or becomes garbage; the samples before that are used. Copy it again",
    "shard_empty": "a shard without samples",
    "shard_missing": "listed, but gone when it was read (404)",
    "shard_forbidden": "storage denies access (403); check credentials and the bucket's policy",
    "shard_unavailable": "storage did not answer within data.retry_seconds, or only with errors (5xx)",
    "shard_unreadable": "a precomputed shard that is not an Arrow file; run jobs/precompute.py again",
    # These two end a training run; only an inspection counts them.
    SHARD_CHANGED: "its length changed while it was inspected; is it still being written?",
    SHARD_CRASHES: "its reader failed or died (out of memory?), as a run would; see the log",
}
# The cause for each kind of `storage.StorageError`.
LOST = {"missing": "shard_missing", "forbidden": "shard_forbidden", "unavailable": "shard_unavailable"}
_FILTERED = "filtered_"


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
    """Return whether a sample was filtered out, as the configuration asks: it is not bad data."""
    return cause.startswith(_FILTERED)


def samples_lost(cause: str, known: int, read: int) -> int:
    """Return how many samples one rejection stands for; 0 if a whole shard is lost whose number of samples is not known.

    Args:
        cause: of the rejection.
        known: samples that the shard should have; 0 or less: not known.
        read: samples and rejections of the shard, this one included.
    """
    if cause.startswith("shard_"):
        return max(0, known)
    return max(1, known - (read - 1)) if cause == "tar_truncated" else 1
