"""Output in the terminal: progress, tables of plain text, and the output of a command without the lines of libraries."""

import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TextIO

from tqdm import tqdm

from ray_platform.units import duration_text

_NUMBER = re.compile(r"[+-]?\d")
_PROGRESS = re.compile(r"(?P<stage>[a-z]+) (?P<done>\d+)/(?P<total>\d+)(  (?P<text>.*))?")  # a line of ProgressBar
_SECONDS_BETWEEN_LINES = 30.0  # of progress that `show_output` shows, without a terminal
_BAR = "{percentage:3.0f}% |{bar}| {unit} {n_fmt}/{total_fmt}  {desc}"
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_PROCESS = re.compile(r"\((?P<name>[\w:]+) pid=\d+(, ip=[^)]*)?\) ")  # before the lines that Ray forwards
_FOREIGN = re.compile(
    r"""\d{4}-\d\d-\d\d\ [\d:]+,\d+\s+[A-Z]+\s|\((raylet|gcs_server)  # Ray
    |Job\ submission\ server|Running\ entrypoint\ for|Job\ 'diffdis-|-{3,}$|Next\ steps$|Tailing\ logs  # `ray job submit`
    |\s+(Query|Request|Follow)\ .*job|\s+ray\ job\ |(Job|Status)\ .*succeeded
    |\[\d{4}-\d\d-\d\d\ |\*{4}|\[(transformers|diffusers)\]\ |\[rank\d+\]:\[W|\[W\d|WARNING:\   # DeepSpeed, torch
    |Failed\ to\ load\ CPU\ gemm  # bitsandbytes
    |wandb:\ |Done\.\ [\d.]+s$  # W&B
    |\S+\.py:\d+:\ \w*Warning:|.*accelerate`?\ was\ not\ found|.*4x\ the\ maximum  # warnings of Python, diffusers""",
    re.VERBOSE,
)


class ProgressBar:
    """Progress of a command: a bar in a terminal, and otherwise a line from time to time and at the end of a stage.

    When another process of this project shows the output of this one (`show_output`), it turns these lines into a bar.
    """

    def __init__(self, seconds_between_lines: float = 5.0) -> None:
        self._seconds, self._printed = seconds_between_lines, -math.inf
        self._bar: tqdm | None = None
        self._stage = ""

    def update(self, stage: str, done: int, total: int, text: str = "") -> None:
        """Show that `done` of `total` steps of a stage are done; the stage is what is counted, such as "shards"."""
        now, is_complete = time.monotonic(), done >= total
        if not sys.stdout.isatty():
            if is_complete or now - self._printed >= self._seconds:
                self._printed = now
                print(f"{stage} {done}/{total}  {text}".rstrip(), flush=True)
            return
        if self._bar is None or stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = tqdm(unit=stage, total=total, bar_format=_BAR, dynamic_ncols=True, file=sys.stdout)
        self._bar.total = total
        self._bar.set_description_str(text, refresh=False)
        self._bar.update(done - self._bar.n)
        if is_complete:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is; the next output follows below it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def write_line(text: str) -> None:
    """Print a line above the bars in the terminal."""
    tqdm.write(text, file=sys.stderr if text.startswith("error: ") else sys.stdout)
    sys.stdout.flush()


def left_text(seconds: float) -> str:
    """Return the time that something will still take: `left 3.2 min`."""
    return f"left {duration_text(seconds)}"


def show_output(lines: Iterable[str], log: TextIO) -> None:
    """Show the output of a command of this project, and write all of it to `log`.

    The lines of the libraries below it are only in the log. Its progress is shown by a `ProgressBar`.
    """
    bar = ProgressBar(_SECONDS_BETWEEN_LINES)
    after_warning = after_own_line = False  # Python prints the line of code below a warning
    for line in lines:
        log.write(line)
        log.flush()
        uncolored = _COLOR.sub("", line)
        text = _PROCESS.sub("", uncolored, count=1).rstrip()
        if not text and after_own_line:
            write_line("")
        if not text or _FOREIGN.match(text) or (after_warning and text.startswith("  ")):
            after_warning, after_own_line = "Warning:" in text, False
            continue
        after_warning = False
        progress = _PROGRESS.fullmatch(text)
        after_own_line = progress is None
        if progress is None:
            write_line(text)
        elif not _PROCESS.match(uncolored):  # one bar for the command, not for each trial of a sweep
            bar.update(progress["stage"], int(progress["done"]), int(progress["total"]), progress["text"] or "")
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
