"""A horizontal axis with a row for each of several things: dots, their mean, and an interval around it. HTML, so that its text
keeps its size where there is little room."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from ray_platform.report.charts import tick_text, ticks
from ray_platform.report.page import text

STYLE = """
.rows { display: grid; grid-template-columns: auto minmax(90px, 1fr) auto; gap: 0 12px; align-items: center; font-size: 13px; }
.rows > h4 { grid-column: 1 / -1; margin: 10px 0 2px; font-size: 12px; font-weight: 500; color: var(--soft); }
.rows > span { min-width: 0; overflow-wrap: anywhere; } .rows .lane { position: relative; align-self: stretch; min-height: 30px; }
.lane i, .lane b { position: absolute; } .lane .grid { top: 0; bottom: 0; width: 1px; background: var(--line); }
.lane .zero { top: 0; bottom: 0; width: 2px; margin-left: -1px; background: var(--soft); }
.lane .whisker { top: calc(50% - 1px); height: 2px; background: var(--c); } .lane .whisker::before, .lane .whisker::after {
  content: ""; position: absolute; top: -5px; height: 12px; width: 2px; background: var(--c); }
.lane .whisker::after { right: 0; }
.lane .dot { top: calc(50% - 4px); width: 8px; height: 8px; margin-left: -4px; border-radius: 50%; background: var(--c); }
.lane .dot { opacity: .5; }
.lane b { top: calc(50% - 6px); width: 12px; height: 12px; margin-left: -6px; background: var(--c); border: 2px solid var(--card);
  transform: rotate(45deg); }
.rows .foot { position: relative; height: 18px; font-size: 11px; color: var(--soft); } .rows .ends { display: flex; }
.foot span { position: absolute; transform: translateX(-50%); white-space: nowrap; font-variant-numeric: tabular-nums; }
.rows .ends { justify-content: space-between; gap: 10px; font-size: 11px; color: var(--soft); }
.shown { --c: var(--good); } .against { --c: var(--bad); } .open { --c: var(--meant); }
@media (max-width: 560px) { .rows { grid-template-columns: minmax(70px, 30%) 1fr auto; gap: 0 8px; font-size: 12px; } }
"""


class Row(NamedTuple):
    """`name` and `value` are HTML, left and right of the lane; `kind` is a CSS class that sets its colour, `--c`."""

    name: str
    value: str
    kind: str
    dots: Sequence[tuple[float, str]]  # with what a pointer shows
    mean: float | None
    interval: tuple[float, float] | None
    group: str = ""  # HTML, over the first of the rows that follow each other and have it


def row_chart(rows: Sequence[Row], zero: bool = False, ends: tuple[str, str] = ("", "")) -> str:
    """At least one row with a value. zero: the axis holds 0, as a line; `ends` says what is left and right of it."""
    values = [value for row in rows for value in (*(dot for dot, _ in row.dots), *(row.interval or ()))]
    values += [row.mean for row in rows if row.mean is not None] + [0.0] * zero
    marks = ticks(values)
    low, high = marks[0], marks[-1]

    def place(value: float) -> str:
        return f"left:{3 + 94 * (value - low) / (high - low):.2f}%"  # what is at an end stays inside

    grid = "".join(f'<i class="grid" style="{place(mark)}"></i>' for mark in marks)
    grid += f'<i class="zero" style="{place(0.0)}"></i>' * zero
    lines = []
    if any(ends):
        lines.append(
            f'<span></span><span class="ends"><span>{text(ends[0])}</span><span>{text(ends[1])}</span></span><span></span>'
        )
    group = ""
    for row in rows:
        parts = [grid]
        if row.group != group:
            group = row.group
            lines.append(f"<h4>{group}</h4>")
        if row.interval:
            width = 94 * (row.interval[1] - row.interval[0]) / (high - low)
            parts.append(f'<i class="whisker" style="{place(row.interval[0])};width:{width:.2f}%"></i>')
        parts += [f'<i class="dot" style="{place(value)}" title="{text(about)}"></i>' for value, about in row.dots]
        if row.mean is not None:
            parts.append(f'<b style="{place(row.mean)}"></b>')
        lines.append(f'<span>{row.name}</span><span class="lane {row.kind}">{"".join(parts)}</span><span>{row.value}</span>')
    most = 3 if max(len(tick_text(mark)) for mark in marks) > 4 else 5  # that find room on a telephone
    stride = math.ceil(len(marks) / most)
    first = marks.index(min(marks, key=abs)) % stride  # so that zero is among them
    shown = marks[first::stride]
    foot = "".join(f'<span style="{place(mark)}">{tick_text(mark)}</span>' for mark in shown)
    return f'<div class="rows">{"".join(lines)}<span></span><span class="foot">{foot}</span><span></span></div>'
