"""Data filters: which samples training uses. A new filter is one new field of `FilterConfig`, or an entry of its `ranges`.

Its name is `min_<quantity>` or `max_<quantity>`, and its metadata says what is measured. The flag `--data.filters.<name>`, the
check, and the count of the filtered samples under `filtered_<quantity>` follow from that.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, field, fields
from typing import Any

from ray_platform.contracts import ConfigError
from ray_platform.data.causes import SampleError, filter_cause
from ray_platform.json_values import JsonObject

_MAX_JSON_BYTES = 2**20  # img2dataset writes some thousand, including the EXIF data
_SHOWN_NAMES = 30
_NSFW_WORDS = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0}  # LAION-400M has words instead of numbers


@dataclass(frozen=True)
class Candidate:
    """What a filter can look at."""

    caption: str = ""
    members: Mapping[str, memoryview] = field(default_factory=dict)  # suffix -> content of the file in the tar
    width: int = 0  # pixels, upright; 0 while the image's header has not been read
    height: int = 0

    @functools.cached_property
    def fields(self) -> JsonObject:
        """The sample's .json."""
        return json_fields(self.members)


def measures(
    value: Callable[[Candidate], float], meaning: str, default: float | None = None, *, reads_image: bool = False
) -> Any:
    """Declare a filter on a value of the sample. `reads_image`: the value needs `width` and `height`."""
    return field(default=default, metadata={"value": value, "meaning": meaning, "reads_image": reads_image})


def score(*names: str) -> Callable[[Candidate], float]:
    """Return a function that reads a score from the .json, under the first of `names` that it contains."""

    def value(candidate: Candidate) -> float:
        stored = next((candidate.fields[name] for name in names if candidate.fields.get(name) is not None), None)
        if isinstance(stored, str):
            stored = _NSFW_WORDS.get(stored.lower(), stored)
        try:
            number = float(stored)  # type: ignore[arg-type]
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isnan(number):
            names_known = ", ".join(sorted(candidate.fields)[:_SHOWN_NAMES]) or "none"
            raise SampleError("score_missing", f"a filter needs a number `{names[0]}`; the fields of the .json: {names_known}")
        return number

    return value


@dataclass(frozen=True)
class FilterConfig:
    """Limits for the samples to use; None: no limit. Filtered samples are counted, but they are not bad data.

    The scores are fields of a sample's .json, under the names of LAION, COYO, DataComp or img2dataset. A sample without a score
    that a filter needs is bad data.
    """

    min_size: int = measures(lambda sample: min(sample.width, sample.height), "shorter side", 0, reads_image=True)
    """Minimum shorter side of an image in pixels, before resizing."""
    min_similarity: float | None = measures(
        score("similarity", "clip_similarity_vitb32", "SIMILARITY", "clip_b32_similarity_score", "clip_similarity_vitl14"),
        "CLIP similarity",
    )
    """Minimum CLIP similarity of image and caption."""
    max_unsafe: float | None = measures(
        score("punsafe", "unsafe", "NSFW", "nsfw", "nsfw_score_opennsfw2", "nsfw_score_gantman"), "probability of unsafe content"
    )
    """Maximum probability of unsafe content."""
    max_watermark: float | None = measures(score("pwatermark", "watermark", "watermark_score"), "probability of a watermark")
    """Maximum probability of a watermark."""
    min_aesthetic: float | None = measures(
        score("AESTHETIC_SCORE", "aesthetic_score", "aesthetic", "aesthetic_score_laion_v2"), "aesthetic score"
    )
    """Minimum aesthetic score, which is about 1 to 10."""
    ranges: dict[str, tuple[float | None, float | None]] = field(default_factory=dict, hash=False)
    """Allowed ranges of numbers in the .json, as '{"num_faces": [0, 2], "word_count": [5, null]}'. Both ends are allowed; null:
    no limit."""

    def __post_init__(self) -> None:
        for name, limits in self.ranges.items():
            low, high = (-math.inf if limits[0] is None else limits[0]), (math.inf if limits[1] is None else limits[1])
            if not low <= high:
                raise ConfigError(f"data.filters.ranges: {name}: the least value {low} is above {high}; give [least, most]")


@functools.lru_cache(maxsize=16)
def _limits(config: FilterConfig, reads_image: bool) -> list[tuple[Field, float]]:
    limits = [(filter_, getattr(config, filter_.name)) for filter_ in fields(config) if filter_.metadata]
    return [(f, limit) for f, limit in limits if limit is not None and f.metadata["reads_image"] == reads_image]


def check(candidate: Candidate, config: FilterConfig, *, reads_image: bool) -> None:
    """Raise SampleError if a filter rejects the sample.

    Only the filters that do or do not read the image are applied: those that do not come first, because they cost nothing.
    """
    for filter_, limit in _limits(config, reads_image):
        measured = filter_.metadata["value"](candidate)
        if measured < limit if filter_.name.startswith("min_") else measured > limit:
            raise SampleError(filter_cause(filter_.name))
    if not reads_image:
        for name, (low, high) in config.ranges.items():
            measured = score(name)(candidate)
            if (low is not None and measured < low) or (high is not None and measured > high):
                raise SampleError(filter_cause(f"range_{name}"))


def meanings(config: FilterConfig | type[FilterConfig]) -> dict[str, str]:
    """Return cause -> meaning of all filters."""
    ranges = {filter_cause(f"range_{name}"): f"{name} outside data.filters.ranges" for name in getattr(config, "ranges", ())}
    return ranges | {
        filter_cause(f.name): f"{f.metadata['meaning']} {'below' if f.name.startswith('min_') else 'above'} data.filters.{f.name}"
        for f in fields(config)
        if f.metadata
    }


def json_fields(members: Mapping[str, memoryview]) -> JsonObject:
    """Return the .json of a sample, or {} if it has none. Raises SampleError."""
    if "json" not in members:
        return {}
    if len(members["json"]) > _MAX_JSON_BYTES:
        raise SampleError("json_too_large")
    value = None
    with suppress(ValueError, RecursionError):
        value = json.loads(text(members["json"]))
    if not isinstance(value, dict):
        raise SampleError("json_invalid")
    return value


def text(content: memoryview) -> str:
    """Return a member as text. Raises SampleError."""
    try:
        return bytes(content).decode("utf-8-sig")
    except UnicodeError:
        raise SampleError("caption_not_utf8") from None
