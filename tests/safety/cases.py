"""What a hostile input is: made for real, fed through a door that users have, with the answer that docs/safety.md shows."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CANARY = "canary"  # a file in the folder that a case is given: what runs code leaves it


@dataclass(frozen=True)
class Case:
    """`feed` makes the input below a folder, and returns what it got: an error's line, or what was counted."""

    what: str
    door: str
    answer: str  # … stands for anything
    feed: Callable[[Path], str]

    def check(self, got: str) -> None:
        pattern = ".*".join(re.escape(part) for part in self.answer.split("…"))
        assert "\n" not in got
        assert re.fullmatch(pattern, got), f"{self.what}: got {got!r}"


def line_of(call: Callable[[], object], *kinds: type[Exception]) -> str:
    """The one line in which a call is refused."""
    try:
        found = call()
    except kinds as error:
        return str(error)
    return f"taken: {found}"


class Evil:
    """Its pickle runs code where it is loaded by a plain unpickler."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / CANARY

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.canary}",)
