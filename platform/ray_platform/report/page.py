"""What the platform's HTML pages share. A page is one file that needs nothing else: no script, no font, no file beside it.

Captions, keys and class names come from the web: whatever enters a page as text goes through `text`.
"""

import html
from collections.abc import Iterable
from typing import NamedTuple

STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f27; --soft: #667085; --line: #e3e6eb;
  --good: #2f9e6e; --bad: #d6453d; --bar: #4c7fd0; --low: #e0a13a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e6e8ec; --soft: #98a2b3;
  --line: #2e343e; --good: #3fb583; --bad: #ec6a61; --bar: #6597e6; --low: #e0ab53; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 24px 48px; }
h1 { font-size: 22px; margin: 0; } h2 { font-size: 15px; margin: 30px 0 10px; } h3 { font-size: 13px; margin: 0; }
.soft { color: var(--soft); } .num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: 12px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; }
.verdict { margin: 16px 0 0; border-left: 4px solid var(--good); } .verdict.stop { border-left-color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; margin-top: 16px; }
.tile b { display: block; font-size: 22px; font-weight: 600; line-height: 1.25; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 10px; }
.bins { display: grid; grid-template-columns: auto 1fr auto; gap: 2px 8px; align-items: center; }
.bins { margin-top: 8px; font-size: 12px; }
.bins i { display: block; height: 11px; min-width: 1px; border-radius: 0 3px 3px 0; background: var(--bar); }
.bins i.low { background: var(--low); }
.bins span { position: relative; } .bins b { position: absolute; top: -1px; bottom: -1px; width: 2px; background: var(--ink); }
.table { overflow-x: auto; } table { width: 100%; min-width: 640px; border-collapse: collapse; }
td, th { text-align: left; padding: 6px 14px 6px 0; vertical-align: top; }
th { font-size: 12px; font-weight: 500; color: var(--soft); } tr + tr td, thead + tbody td { border-top: 1px solid var(--line); }
th.num { text-align: right; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px 12px; }
figure { margin: 0; font-size: 11px; line-height: 1.3; min-width: 0; overflow-wrap: anywhere; }
figure img { display: block; width: 100%; height: 104px; object-fit: contain; object-position: left bottom; margin-bottom: 5px; }
figcaption { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
"""


class Bar(NamedTuple):
    """A row of `bars`."""

    label: str
    share: float  # 0 to 1 of the full width; no bar where it is 0
    value: str
    kind: str = ""  # of the bar: a CSS class
    mark: float | None = None  # another share, as a line across
    about: str = ""  # what a pointer shows


def document(title: str, style: str, parts: Iterable[str]) -> str:
    """The page: `style` is CSS beyond what pages share, `parts` are HTML."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def text(value: str) -> str:
    """As HTML, inside an element or a quoted attribute. Half a surrogate pair, which no file can hold, becomes `?`."""
    return html.escape(value.encode("utf-8", "replace").decode(), quote=True)


def tile(value: str, label: str) -> str:
    """A number that the reader sees first."""
    return f'<div class="card tile"><b>{text(value)}</b><span class="soft">{text(label)}</span></div>'


def bars(rows: Iterable[Bar]) -> str:
    """Labels, horizontal bars and values, one a line."""
    return f'<div class="bins">{"".join(map(_bar, rows))}</div>'


def table(head: str, rows: Iterable[str], kind: str = "") -> str:
    """`head` and `rows` are HTML: header cells, or rows of them, and whole rows. A table too wide for its place is scrolled."""
    head = head if head.startswith("<tr") else f"<tr>{head}</tr>"
    name = f' class="{kind}"' if kind else ""
    return f'<div class="table"><table{name}><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def figure(caption: str, about: str, picture: str = "", kind: str = "jpeg") -> str:
    """An image with its caption. `about` is what a pointer shows, `picture` base64 of a JPEG or PNG (`kind`), if there is one."""
    return f'<figure title="{text(about)}">{image(picture, kind)}<figcaption dir="auto">{text(caption)}</figcaption></figure>'


def image(picture: str, kind: str = "jpeg") -> str:
    """`picture` is base64; nothing where it is empty."""
    return f'<img alt="" src="data:image/{kind};base64,{text(picture)}">' if picture else ""


def _bar(row: Bar) -> str:
    kind, about = f' class="{row.kind}"' if row.kind else "", f' title="{text(row.about)}"' if row.about else ""
    bar = f'<i{kind} style="width:{100 * row.share:.2f}%"></i>' if row.share else ""
    mark = "" if row.mark is None else f'<b style="left:{100 * row.mark:.2f}%"></b>'
    return (
        f'<span class="num soft" dir="auto"{about}>{text(row.label)}</span><span{about}>{bar}{mark}</span>'
        f'<span class="num">{text(row.value)}</span>'
    )
