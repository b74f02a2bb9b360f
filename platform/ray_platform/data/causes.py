"""Why a sample is not used."""

from dataclasses import dataclass
from typing import Literal, get_args

ErrorReason = Literal[
    "image_missing",
    "image_empty",
    "image_undecodable",
    "image_too_large",  # would take hundreds of megabytes, or minutes; Pillow calls it a decompression bomb
    "caption_missing",
    "caption_empty",
    "caption_not_utf8",
    "caption_too_long",  # a whole page, or garbage; encoders read some hundred characters
    "json_invalid",
    "json_too_large",
    "name_too_long",  # more than 1,024 characters in a tar
    "score_missing",  # a filter asks for a field that the .json lacks
    "key_repeated",  # the same file name twice in a tar: which caption belongs to which image cannot be told
    "tar_truncated",  # the tar ends early or turns to garbage; what precedes that is used
    "shard_empty",  # a tar in which there are no samples
    "shard_missing",  # storage says that it is not there (404)
    "shard_forbidden",  # storage refuses it (403)
    "shard_unavailable",  # storage did not answer, or with errors (5xx, stalls)
    "shard_unreadable",  # a precomputed shard that is no Arrow file
]
Filtered = Literal["filtered_size", "filtered_similarity", "filtered_unsafe", "filtered_watermark", "filtered_aesthetic"]
Unlabelled = Literal["label_missing", "label_invalid"]  # of a set to evaluate on; invalid: not a whole number
Cause = ErrorReason | Filtered | Unlabelled
BAD: tuple[str, ...] = get_args(ErrorReason)
FILTERED: tuple[str, ...] = get_args(Filtered)
# By what storage said, see `storage.StorageError`.
LOST: dict[str, ErrorReason] = {"missing": "shard_missing", "forbidden": "shard_forbidden", "unavailable": "shard_unavailable"}


@dataclass(frozen=True)
class RejectedSample:
    """A sample, or a part of a shard, that is not used."""

    key: str
    cause: Cause


class SampleError(Exception):
    """Raised while a sample is decoded; becomes its RejectedSample."""

    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause: Cause = cause
