"""Secrets out of whatever is printed, logged or saved: the one place that knows what a secret looks like.

Errors of ours pass through here by themselves (`contracts`); configurations, commands and what MLflow is told do so where they
leave the process. Nothing of a secret is shown, not even its length.
"""

import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "***"

_NAME = r"(?:secret|token|password|passwd|api[_-]?key|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key|credentials?)"
_IS_SECRET = re.compile(rf"(?:^|.*[_.-]){_NAME}$", re.IGNORECASE)
_SHORTEST = 8  # characters of an environment variable's value that cannot stand in a text by chance
_PATTERNS = (
    # https://user:password@host, s3://key:secret@bucket; a password may hold a slash, but a port is none.
    (re.compile(r"(\w://)(?:[^\s/:@\"'<>]*:(?!\d+/)[^\s\"'<>]*|[^\s/\"'<>]+)@"), rf"\1{HIDDEN}@"),
    # What presigned and other URLs are signed with.
    (
        re.compile(
            r"([?&](?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|sig|" + _NAME + r")=)[^\s&#\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # NAME_TOKEN=value and --name.token value, as they stand in a command.
    (re.compile(rf"((?<![?&\w.-])[\w.-]*{_NAME}=)[^\s\"'<>]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(--[\w.-]*{_NAME}[ =]['\"]?)[^\s\"'<>]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # The same within JSON or YAML that is one text.
    (re.compile(rf"([\"'][\w.-]*{_NAME}[\"']\s*:\s*[\"'])[^\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\b(?:Bearer|Basic) )[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    # Keys that show by their form: AWS, Hugging Face, GitHub, OpenAI.
    (re.compile(r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_\w{30,}|gh[pousr]_\w{30,}|sk-[\w-]{30,})"), HIDDEN),
)


def redacted(text: str) -> str:
    """`text` with *** for every secret: in URLs, behind its name, by its form, or as this process's environment has it."""
    for secret in _of_the_environment():
        text = text.replace(secret, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted_values(value: Any, name: str = "") -> Any:
    """The same for all texts in nested mappings and lists; a text whose `name` says that it is a secret goes as a whole."""
    if isinstance(value, Mapping):
        return {key: redacted_values(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(redacted_values(inner, name) for inner in value)
    if not isinstance(value, str):
        return value
    return HIDDEN if value and _IS_SECRET.match(name) else redacted(value)


def restored(text: str, whole: str) -> str:
    """`whole` where `text` is what `redacted` left of it, else `text`."""
    return whole if HIDDEN in text and redacted(whole) == text else text


def is_redacted(text: str) -> bool:
    return text == HIDDEN or f"{HIDDEN}@" in text or f"={HIDDEN}" in text


def _of_the_environment() -> list[str]:
    """As they are, and as they stand in a URL; the longest first, of which another may be a part."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST and _IS_SECRET.match(name) and not value.startswith(("/", "."))  # the path of a token's file
    }
    return sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)
