"""Tables of plain text for the terminal."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"[+-]?\d")


def render_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells, the first of which is the header, as lines of aligned columns.

    A column is right-aligned if all its cells below the header are numbers (with any unit), empty or `-`.
    """
    columns = list(zip(*rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [all(cell in ("", "-") or _NUMBER.match(cell) for cell in column[1:]) and any(column[1:]) for column in columns]
    lines = (
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width) for cell, width, to_right in zip(row, widths, right, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
