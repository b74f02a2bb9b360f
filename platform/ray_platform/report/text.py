"""How the reports' parts write figures, names and models; what the reports look like beyond what all pages share."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.report.page import image, text
from ray_platform.units import duration_text

NOTHING = "–"
_LONGEST_TEXT = 600  # characters of a caption that are shown
NUM_COLOURS = 6  # --bar, --m1, --m2, …

STYLE = """
:root { --m1: #d9822b; --m2: #8a63c9; --m3: #1f9c93; --m4: #c2477f; --m5: #7a8b2e; --meant: #8a94a6; --hollow: #eef0f4; }
@media (prefers-color-scheme: dark) { :root { --m1: #f0a050; --m2: #ad8be8; --m3: #45c0b6; --m4: #e277a8; --m5: #b5c45a;
  --meant: #7b8596; --hollow: #262b34; } }
.m0 { --c: var(--bar); } .m1 { --c: var(--m1); } .m2 { --c: var(--m2); } .m3 { --c: var(--m3); } .m4 { --c: var(--m4); }
.m5 { --c: var(--m5); }
main { max-width: 1240px; } h1 { overflow-wrap: anywhere; }
a { color: inherit; text-decoration-color: var(--soft); text-underline-offset: 3px; }
.patch { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 7px; background: var(--c); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; } .lead-in { margin-top: 16px; }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 10px; align-items: start; }
.split table, .facts { min-width: 0; } .facts { width: auto; } .split h3 { margin-bottom: 8px; }
.facts td { padding: 3px 14px 3px 0; overflow-wrap: anywhere; } .facts td:first-child { color: var(--soft); white-space: nowrap; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: 12px/1.5 ui-monospace, monospace; }
.verdict.null { border-left-color: var(--low); } .verdict p { margin: 6px 0 0; }
.verdict ul { margin: 6px 0 0; padding-left: 20px; } .verdict li { overflow-wrap: anywhere; }
@media (max-width: 560px) { main { padding: 18px 12px 36px; } .card { padding: 12px; } }
"""


class Models:
    """The evaluated models in the report's order: the first one is what the report is about, the others are baselines."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self.all: Sequence[Mapping[str, Any]] = details["models"]
        self.names: list[str] = [model["name"] for model in self.all]
        self.own = self.names[0]
        self.baselines = self.names[1:]

    def colour(self, name: str) -> str:
        """The CSS class that sets a model's colour, `--c`."""
        return f"m{self.names.index(name) % NUM_COLOURS}"

    def named(self, name: str) -> str:
        """A model's name behind a patch of its colour, as HTML."""
        bold = ("<b>", "</b>") if name == self.own else ("", "")
        return f'<i class="patch {self.colour(name)}"></i>{bold[0]}{isolated(name)}{bold[1]}'


def head(details: Mapping[str, Any]) -> str:
    """What this is, when it was made, how long that took, by which code."""
    when = details["created"].replace("T", " ")
    line = f"{text(when)} · {text(duration_text(details['seconds']))} · code <code>{text(details['code_version'])}</code>"
    return f'<h1 dir="auto">{text(details["title"])}</h1><div class="soft">{line}</div>'


def percent(share: float | None) -> str:
    """87.3 for 0.873, without the sign: tables say it once."""
    return NOTHING if share is None or not math.isfinite(share) else f"{100 * share:.1f}"


def number(value: float | None) -> str:
    """A figure of unknown size, with three or four digits that mean something."""
    if value is None or not math.isfinite(value):
        return NOTHING
    decimals = 1 if abs(value) >= 100 else 2 if abs(value) >= 1 else 4
    return f"{value:,.{decimals}f}".replace("-", "−")


def signed(difference: float) -> str:
    """+1.2 or −1.2, in points, for a difference of shares."""
    points = round(100 * difference, 1) + 0.0
    return f"{points:+.1f}".replace("-", "−")


def clipped(value: str) -> str:
    """A text from the web, not longer than a reader would read."""
    return value if len(value) <= _LONGEST_TEXT else f"{value[:_LONGEST_TEXT]}…"


def isolated(name: str) -> str:
    """A name from the web inside other text, as HTML: whatever its direction of writing, it turns nothing around it."""
    return f"<bdi>{text(clipped(name))}</bdi>"


def thumbnail(example: Mapping[str, Any]) -> str:
    """An image of a set, which a pointer names; an empty place where it could not be fetched."""
    return f'<span class="thumb" title="{text(clipped(example["key"]))}">{image(example.get("jpeg", ""))}</span>'


def is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def section(anchor: str, title: str, *parts: str) -> str:
    return f'<section id="{anchor}"><h2>{text(title)}</h2>{"".join(parts)}</section>'


def facts(values: Mapping[str, Any]) -> str:
    """Nested fields and their values, one a row, by their dotted names."""
    rows = "".join(
        f'<tr><td>{text(field)}</td><td><code dir="auto">{text(clipped(value))}</code></td></tr>'
        for field, value in _flat(values)
    )
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def _flat(value: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows = []
    for field, inner in value.items():
        if isinstance(inner, Mapping):
            rows += _flat(inner, f"{above}{field}.")
        else:
            rows.append((f"{above}{field}", inner if isinstance(inner, str) else json.dumps(inner, ensure_ascii=False)))
    return rows


def unreadable(results: Sequence[Mapping[str, Any]], models: Models) -> str:
    """Which images of one set could not be read, and why; nothing where all could be. Models that lost the same share a list."""
    by_list: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        if result["num_unreadable"]:
            by_list.setdefault(json.dumps([result["num_unreadable"], result["unreadable"]]), []).append(result)
    return "".join(_unreadable(same, models) for same in by_list.values())


def _unreadable(results: Sequence[Mapping[str, Any]], models: Models) -> str:
    named, count = results[0]["unreadable"], results[0]["num_unreadable"]
    items = "".join(f"<li><code>{text(clipped(one['key']))}</code> {text(clipped(one['cause']))}</li>" for one in named)
    more = f"<li>and {count - len(named):,} more</li>" if count > len(named) else ""
    who = ", ".join(models.named(result["model"]) for result in results)
    title = f"{isolated(results[0]['set'])}: {count:,} image{'s'[: count != 1]} could not be read by {who}"
    return f"<details><summary>{title}</summary><ul>{items}{more}</ul></details>"
