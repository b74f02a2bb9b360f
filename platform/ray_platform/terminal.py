"""Output in the terminal: tables of plain text, and the output of a job without the lines of the libraries below it."""

import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from tqdm import tqdm

_NUMBER = re.compile(r"[+-]?\d")
_PROGRESS = re.compile(r"step (?P<step>\d+)/(?P<total>\d+)  (?P<rest>.*)")  # `progress_line` of the training
_SECONDS_BETWEEN_LINES = 30.0  # of progress, without a terminal
_BAR = "{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}  {postfix}"
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_PROCESS = re.compile(r"\((?P<name>[\w:]+) pid=\d+(, ip=[^)]*)?\) ")  # before the lines that Ray forwards
_FOREIGN = re.compile(
    r"""\d{4}-\d\d-\d\d\ [\d:]+,\d+\s+[A-Z]+\s|\((raylet|gcs_server)  # Ray
    |Job\ submission\ server|Running\ entrypoint\ for|Job\ 'diffdis-|-{3,}$|Next\ steps$|Tailing\ logs  # `ray job submit`
    |\s+(Query|Request|Follow)\ .*job|\s+ray\ job\ |(Job|Status)\ .*succeeded
    |\[\d{4}-\d\d-\d\d\ |\*{4}|\[(transformers|diffusers)\]\ |\[rank\d+\]:\[W|\[W\d|WARNING:\   # DeepSpeed, torch
    |\S+\.py:\d+:\ \w*Warning:|.*accelerate`?\ was\ not\ found|.*4x\ the\ maximum  # warnings of Python, diffusers""",
    re.VERBOSE,
)


def show_output(lines: Iterable[str], log: TextIO) -> None:
    """Show the output of a training job, and write all of it to `log`.

    The lines of the libraries below it are only in the log. Its progress is a bar in a terminal, and otherwise a line from time
    to time.
    """
    bar: tqdm | None = None
    shown = 0.0
    after_warning = False  # Python prints the line of code below a warning
    for line in lines:
        log.write(line)
        log.flush()
        text = _PROCESS.sub("", _COLOR.sub("", line), count=1).rstrip()
        if _FOREIGN.match(text) or (after_warning and text.startswith("  ")) or not text:
            after_warning = "Warning:" in text
            continue
        after_warning = False
        progress = _PROGRESS.fullmatch(text)
        if progress is None:
            tqdm.write(text)
            sys.stdout.flush()
        elif sys.stdout.isatty():
            bar = bar or tqdm(total=int(progress["total"]), bar_format=_BAR, dynamic_ncols=True, file=sys.stdout)
            bar.n = int(progress["step"])
            bar.set_postfix_str(progress["rest"])
        elif time.monotonic() - shown >= _SECONDS_BETWEEN_LINES or progress["step"] == progress["total"]:
            shown = time.monotonic()
            print(text, flush=True)
    if bar is not None:
        bar.close()


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
