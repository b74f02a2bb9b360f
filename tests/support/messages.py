"""The list in docs/operations.md of the line that a user sees in each fault, written by the tests that cause the faults."""

import os
import re
import tempfile
import textwrap
from pathlib import Path

import filelock

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
_LIST = re.compile(r"(?<=<!-- messages -->\n```text\n)(.*?)(?=^```$)", re.M | re.S)
_INDENT = " " * 4  # of the line, which continues on further lines, below the fault
_WIDTH = 116


def documented_messages() -> dict[str, str]:
    """Return the line of each fault in the list."""
    entries = _LIST.search(PAGE.read_text())[0].split("\n\n")
    lines = [[line.strip() for line in entry.strip().splitlines()] for entry in entries]
    return {fault: " ".join(line) for fault, *line in lines}


def check_message(fault: str, line: object, **placeholders: object) -> None:
    """Compare the line of a fault with its entry in docs/operations.md; with UPDATE_DOCS=1 in the environment, write the entry.

    Args:
        fault: a few words.
        line: the line that the user sees.
        placeholders: values that differ between runs, by the name that the page shows for them: `OUTPUT_DIR=tmp_path`.
    """
    text = str(line)
    for name, value in sorted(placeholders.items(), key=lambda item: -len(str(item[1]))):
        text = text.replace(str(value), name)
    text = text.replace("`", "'")
    if not os.environ.get("UPDATE_DOCS"):
        assert documented_messages().get(fault) == text, (
            f"docs/operations.md: the entry {fault!r} differs; rerun with UPDATE_DOCS=1"
        )
        return
    with filelock.FileLock(Path(tempfile.gettempdir()) / "operations.md.lock"):
        rows = documented_messages() | {fault: text}
        entries = [f"{fault}\n{_wrapped(line)}\n" for fault, line in sorted(rows.items())]
        PAGE.write_text(_LIST.sub(lambda _: "\n".join(entries), PAGE.read_text()))


def _wrapped(line: str) -> str:
    indent = {"initial_indent": _INDENT, "subsequent_indent": _INDENT}
    return textwrap.fill(line, _WIDTH, break_long_words=False, break_on_hyphens=False, **indent)
