"""The table of docs/operations.md with the line that a user sees in each fault, written by the tests that cause the faults."""

import os
import re
import tempfile
from pathlib import Path

import filelock

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
_TABLE = re.compile(r"(?<=<!-- messages -->\n\n\| fault \| line \|\n\|---\|---\|\n)((?:\|.*\|\n)*)")
_ROW = re.compile(r"^\| (.*?) \| `(.*)` \|$", re.M)


def documented_messages() -> dict[str, str]:
    """Return the line of each fault in the table."""
    return dict(_ROW.findall(_TABLE.search(PAGE.read_text())[0]))


def check_message(fault: str, line: object, **placeholders: object) -> None:
    """Compare the line of a fault with its row in docs/operations.md; with UPDATE_DOCS=1 in the environment, write the row.

    Args:
        fault: the first column, a few words.
        line: the line that the user sees.
        placeholders: values that differ between runs, by the name that the page shows for them: `OUTPUT_DIR=tmp_path`.
    """
    text = str(line)
    for name, value in sorted(placeholders.items(), key=lambda item: -len(str(item[1]))):
        text = text.replace(str(value), name)
    text = text.replace("|", "\\|").replace("`", "'")
    if not os.environ.get("UPDATE_DOCS"):
        assert documented_messages().get(fault) == text, (
            f"docs/operations.md: the row {fault!r} differs; rerun with UPDATE_DOCS=1"
        )
        return
    with filelock.FileLock(Path(tempfile.gettempdir()) / "operations.md.lock"):
        rows = documented_messages() | {fault: text}
        table = "".join(f"| {fault} | `{line}` |\n" for fault, line in sorted(rows.items()))
        PAGE.write_text(_TABLE.sub(lambda _: table, PAGE.read_text()))
