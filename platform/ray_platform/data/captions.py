"""The text of a sample: which caption, how it is cleaned, and what its scores say."""

import html
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.data.causes import Filtered, SampleError
from ray_platform.data.config import DataConfig, FilterConfig

# The names under which LAION's sets and img2dataset's columns hold each score.
SCORES: dict[str, tuple[str, ...]] = {
    "similarity": ("similarity", "clip_similarity_vitb32", "SIMILARITY"),
    "unsafe": ("punsafe", "unsafe", "NSFW", "nsfw"),
    "watermark": ("pwatermark", "watermark"),
    "aesthetic": ("AESTHETIC_SCORE", "aesthetic_score", "aesthetic", "aesthetic_score_laion_v2"),
}
_NSFW_WORDS = {"unlikely": 0.0, "unsure": 0.5, "nsfw": 1.0}  # LAION-400M has words, not numbers
_TAG = re.compile(r"</?[A-Za-z!][^<>]{0,200}>")  # "1 < 2 > 0" is none
LONGEST_CAPTION = 2**16  # bytes; LAION's longest have some thousand
_LARGEST_JSON = 2**20  # bytes; img2dataset's have some thousand, with all that cameras note down
_JOINERS = "\u200c\u200d"  # invisible, but Persian, Indic scripts and emoji need them


def caption(members: Mapping[str, memoryview], config: DataConfig) -> str:
    """A sample's caption. Raises SampleError."""
    if config.caption_field:
        text = json_fields(members).get(config.caption_field)
    elif "txt" in members:
        if len(members["txt"]) > LONGEST_CAPTION:
            raise SampleError("caption_too_long")
        text = _decoded(members["txt"])
    elif "json" in members:
        text = json_fields(members).get("caption")
    else:
        raise SampleError("caption_missing")
    if text is None:
        raise SampleError("caption_missing")
    if not isinstance(text, str):
        raise SampleError("json_invalid")
    try:
        if len(text.encode()) > LONGEST_CAPTION:
            raise SampleError("caption_too_long")
    except UnicodeError:  # "\ud800" is valid JSON, but no text: neither Arrow nor a tokenizer takes it
        raise SampleError("caption_not_utf8") from None
    text = clean(text) if config.clean_captions else text.strip()
    if not text:
        raise SampleError("caption_empty")
    return text


def clean(text: str) -> str:
    """Alternative texts of web pages as plain text: no HTML, no control characters, single spaces, composed letters."""
    text = html.unescape(html.unescape(text))  # twice: many pages escape "&amp;amp;"
    text = _TAG.sub(" ", text)
    text = "".join(_visible(char) for char in text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def _visible(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf":  # soft hyphens, byte order marks and the like stand within words
        return char if char in _JOINERS else ""
    return " " if category[0] == "C" else char


def filtered(members: Mapping[str, memoryview], config: FilterConfig) -> Filtered | None:
    """Which filter on scores refuses the sample, None where it passes. Raises SampleError when a score is missing."""
    limits = (
        ("similarity", config.min_similarity, 1),
        ("unsafe", config.max_unsafe, -1),
        ("watermark", config.max_watermark, -1),
        ("aesthetic", config.min_aesthetic, 1),
    )
    if all(limit is None for _, limit, _ in limits):
        return None
    fields = json_fields(members)
    for name, limit, sign in limits:
        if limit is not None and sign * _score(fields, SCORES[name]) < sign * limit:
            return f"filtered_{name}"  # type: ignore[return-value]
    return None


def json_fields(members: Mapping[str, memoryview]) -> dict[str, Any]:
    """The .json of a sample, empty where there is none. Raises SampleError."""
    if "json" not in members:
        return {}
    if len(members["json"]) > _LARGEST_JSON:
        raise SampleError("json_too_large")
    try:
        fields = json.loads(_decoded(members["json"]))
    except (ValueError, RecursionError):
        raise SampleError("json_invalid") from None
    if not isinstance(fields, dict):
        raise SampleError("json_invalid")
    return fields


def _decoded(content: memoryview) -> str:
    try:
        return bytes(content).decode("utf-8-sig")
    except UnicodeError:
        raise SampleError("caption_not_utf8") from None


def _score(fields: Mapping[str, Any], names: Sequence[str]) -> float:
    value = next((fields[name] for name in names if fields.get(name) is not None), None)
    if isinstance(value, str):
        value = _NSFW_WORDS.get(value.lower(), value)
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise SampleError("score_missing") from None
    if score != score:
        raise SampleError("score_missing")
    return score
