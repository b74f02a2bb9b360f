"""Helpers that build hostile inputs and pass them to a command's function; docs/safety.md lists inputs and expected answers."""

import re
from collections.abc import Callable
from pathlib import Path

CANARY = "canary"  # file that injected code would write to the case's folder
DOCS = Path(__file__).parents[2] / "docs" / "safety.md"
Feed = Callable[[Path], str]  # builds an input in a folder; returns the error line or the counts


def documented_answers() -> dict[str, str]:
    """Return the lists of hostile inputs (`- input (where): answer`): input -> answer, in which … matches any text."""
    section = DOCS.read_text().partition("## Hostile inputs")[2].replace("\n  ", " ")
    return dict(re.findall(r"^- (.+?) \([^()]+\): (.+)$", section, re.MULTILINE))


def check_answer(documented: str, line: str) -> None:
    """Check that an error contains the documented text, or that counts are exactly the documented ones."""
    assert "\n" not in line
    is_error = documented.startswith("an error with ")
    pattern = ".*".join(re.escape(part) for part in documented.removeprefix("an error with ").strip("`").split("…"))
    assert line.startswith("error: ") == is_error, line
    assert re.search(pattern, line) if is_error else re.fullmatch(pattern, line), f"{line!r} is not {documented}"


def line_of(call: Callable[[], object], *kinds: type[Exception]) -> str:
    """Return `error: ` and the one-line message with which a call fails, or `accepted: ` and its result."""
    try:
        result = call()
    except kinds as error:
        return f"error: {error}"
    return f"accepted: {result}"


class Evil:
    """Object whose pickle runs code when a plain unpickler loads it."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / CANARY

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.canary}",)
