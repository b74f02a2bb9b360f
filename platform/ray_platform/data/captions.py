"""The caption of a sample: which text it is, and how it is cleaned."""

import html
import re
import unicodedata
from collections.abc import Mapping

from ray_platform.data.causes import SampleError
from ray_platform.data.config import DataConfig
from ray_platform.data.filters import json_fields, text

MAX_CAPTION_BYTES = 2**16  # the longest captions of LAION have some thousand
_JSON_NAMES = ("caption", "text", "TEXT")  # img2dataset's, COYO's and LAION's
_TAG = re.compile(r"</?[A-Za-z!][^<>]{0,200}>")  # does not match "1 < 2 > 0"
_JOINERS = "\u200c\u200d"  # invisible, but Persian, Indic scripts and emoji need them


def caption(members: Mapping[str, memoryview], config: DataConfig) -> str:
    """Return a sample's caption. Raises SampleError."""
    if config.caption_field:
        value = json_fields(members).get(config.caption_field)
    elif "txt" in members:
        if len(members["txt"]) > MAX_CAPTION_BYTES:
            raise SampleError("caption_too_long")
        value = text(members["txt"])
    elif "json" in members:
        stored = json_fields(members)
        value = next((stored[name] for name in _JSON_NAMES if stored.get(name) is not None), None)
    else:
        raise SampleError("caption_missing")
    if value is None:
        raise SampleError("caption_missing")
    if not isinstance(value, str):
        raise SampleError("json_invalid")
    try:
        if len(value.encode()) > MAX_CAPTION_BYTES:
            raise SampleError("caption_too_long")
    except UnicodeError:  # "\ud800" is valid JSON, but not a text: neither Arrow nor a tokenizer accepts it
        raise SampleError("caption_not_utf8") from None
    value = clean(value) if config.clean_captions else value.strip()
    if not value:
        raise SampleError("caption_empty")
    return value


def clean(text: str) -> str:
    """Turn an alternative text of a web page into plain text: no HTML, no control characters, single spaces, composed letters."""
    text = html.unescape(html.unescape(text))  # twice: many pages escape "&amp;amp;"
    text = _TAG.sub(" ", text)
    text = "".join(_visible(char) for char in text)
    return " ".join(unicodedata.normalize("NFC", text).split())


def _visible(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cf":  # soft hyphens, byte order marks and the like occur within words
        return char if char in _JOINERS else ""
    return " " if category[0] == "C" else char
