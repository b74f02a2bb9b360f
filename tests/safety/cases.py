"""Hostile inputs: built for real and passed through an entry point that users have, with the answers in docs/safety.md."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CANARY = "canary"  # code that runs leaves this file in the case's folder


@dataclass(frozen=True)
class Case:
    """A hostile input. `feed` builds it in a folder and returns the error's line or the counts of an inspection."""

    what: str
    door: str
    answer: str  # the counts, or what the error's line names; … stands for anything between
    feed: Callable[[Path], str]

    def check(self, line: str) -> None:
        assert "\n" not in line
        pattern = ".*".join(re.escape(part) for part in self.answer.split("…"))
        matches = (re.search if line.startswith("error: ") else re.fullmatch)(pattern, line)
        assert matches, f"{self.what}: {line!r} is not {self.answer!r}"


def line_of(call: Callable[[], object], *kinds: type[Exception]) -> str:
    """`error: ` and the one line with which a call fails, or `accepted: ` and its result."""
    try:
        result = call()
    except kinds as error:
        return f"error: {error}"
    return f"accepted: {result}"


class Evil:
    """Its pickle runs code when a plain unpickler loads it."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / CANARY

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.canary}",)
