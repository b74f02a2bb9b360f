"""Removing secrets from everything that is printed, logged or saved. Only this module knows what a secret looks like.

The project's own errors are redacted automatically (`contracts`); configurations, commands and tracked values are redacted where
they leave the process. Nothing of a secret is shown, not even its length.
"""

import os
import re
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

HIDDEN = "***"

_NAME = r"(?:secret|token|password|passwd|api[_-]?key|access[_-]?key(?:[_-]?id)?|secret[_-]?key|private[_-]?key|credentials?)"
_VALUE = r"(?:'[^']*'|\"[^\"]*\"|[^\s\"'<>]+)"  # of a command's argument, in quotes or without spaces
_IS_SECRET = re.compile(rf"(?:^|.*[_.-]){_NAME}$", re.IGNORECASE)
_SHORTEST = 8  # characters; a shorter value of an environment variable may occur in a text by chance
_PATTERNS = (
    # https://user:password@host, s3://key:secret@bucket; a password may contain a slash, but a port is not a password.
    (re.compile(r"(\w://)(?:[^\s/:@\"'<>]*:(?!\d+/)[^\s\"'<>]*|[^\s/\"'<>]+)@"), rf"\1{HIDDEN}@"),
    # Signatures of presigned and other URLs.
    (
        re.compile(
            r"([?&](?:X-Amz-(?:Signature|Credential|Security-Token)|Signature|AWSAccessKeyId|sig|" + _NAME + r")=)[^\s&#\"'<>]+",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # NAME_TOKEN=value and --name.token value, as in a command.
    (re.compile(rf"((?<![?&\w.-])[\w.-]*{_NAME}=){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(--[\w.-]*{_NAME}[ =]){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    # The same in JSON or YAML.
    (re.compile(rf"([\"'][\w.-]*{_NAME}[\"']\s*:\s*[\"'])[^\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\b(?:Bearer|Basic) )[\w.~+/=-]{8,}"), rf"\1{HIDDEN}"),
    # Keys with a known form: AWS, Hugging Face, GitHub, OpenAI.
    (re.compile(r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|hf_\w{30,}|gh[pousr]_\w{30,}|sk-[\w-]{30,})"), HIDDEN),
)


def redacted(text: str) -> str:
    """Replace every secret in `text` by ***: in URLs, after a name, of a known form, or from the environment."""
    for secret in _environment_secrets():
        text = text.replace(secret, HIDDEN)
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted_traceback(error: BaseException) -> str:
    """Return the traceback of an error, as Python prints it."""
    return redacted("".join(traceback.format_exception(error)))


def redacted_values(value: Any, name: str = "") -> Any:
    """Redact all texts in nested mappings and lists. A text whose `name` says that it is a secret is replaced as a whole, as are
    those in a mapping or list of such a name."""
    if isinstance(value, Mapping):
        return {
            redacted(key) if isinstance(key, str) else key: redacted_values(inner, name if _IS_SECRET.match(name) else str(key))
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(redacted_values(inner, name) for inner in value)
    if not isinstance(value, str):
        return value
    return HIDDEN if value and _IS_SECRET.match(name) else redacted(value)


def restored(text: str, whole: str) -> str:
    """Return `whole` if `text` is its redacted form, else `text`."""
    return whole if HIDDEN in text and redacted(whole) == text else text


def is_redacted(text: str) -> bool:
    """Return whether a secret was removed from `text`."""
    return text == HIDDEN or f"{HIDDEN}@" in text or f"={HIDDEN}" in text


def _environment_secrets() -> list[str]:
    """Return the secrets of the environment, also quoted as in URLs. The longest is first: it may contain others."""
    values = {
        value
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST
        and _IS_SECRET.match(name)
        and not value.startswith(("/", "."))  # the path of a file with a token
    }
    return sorted(values | {quote(value, safe="") for value in values}, key=len, reverse=True)
