"""What an inspection found, as one HTML page that needs nothing else: no script, no font, no file beside it."""

import base64
import html
from collections.abc import Sequence
from typing import Any

from ray_platform.data.causes import FILTERED
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection_report import epoch_lines, size_text, title, value_text, verdict
from ray_platform.data.statistics import Thumbnail

_UNITS = {"width": ", px", "height": ", px", "aspect_ratio": ", width / height"}  # of the charts
_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1b1f27; --soft: #667085; --line: #e3e6eb;
  --good: #2f9e6e; --meant: #8a94a6; --bad: #d6453d; --bar: #4c7fd0; --low: #e0a13a; }
@media (prefers-color-scheme: dark) { :root { --page: #14171c; --card: #1d2128; --ink: #e6e8ec; --soft: #98a2b3;
  --line: #2e343e; --good: #3fb583; --meant: #7b8596; --bad: #ec6a61; --bar: #6597e6; --low: #e0ab53; } }
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
.share { display: flex; height: 12px; border-radius: 6px; overflow: hidden; margin: 16px 0 6px; background: var(--line); }
.share i { min-width: 2px; }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin: 0 5px 0 14px; }
.key i:first-child { margin-left: 0; }
.used { background: var(--good); } .filtered { background: var(--meant); } .bad { background: var(--bad); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 10px; }
.bins { display: grid; grid-template-columns: auto 1fr auto; gap: 2px 8px; align-items: center; }
.bins { margin-top: 8px; font-size: 12px; }
.bins i { display: block; height: 11px; min-width: 1px; border-radius: 0 3px 3px 0; background: var(--bar); }
.bins i.low { background: var(--low); }
.table { overflow-x: auto; } table { width: 100%; min-width: 640px; border-collapse: collapse; }
td, th { text-align: left; padding: 6px 14px 6px 0; vertical-align: top; }
th { font-size: 12px; font-weight: 500; color: var(--soft); } tr + tr td, thead + tbody td { border-top: 1px solid var(--line); }
th.num { text-align: right; } td:last-child { width: 46%; }
td i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 7px; }
.sheet { display: grid; grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); gap: 14px 12px; }
figure { margin: 0; font-size: 11px; line-height: 1.3; min-width: 0; overflow-wrap: anywhere; }
figure img { display: block; width: 100%; height: 104px; object-fit: contain; object-position: left bottom; margin-bottom: 5px; }
figcaption { display: -webkit-box; -webkit-line-clamp: 3; -webkit-box-orient: vertical; overflow: hidden; }
"""


def page(summary: dict[str, Any], thumbnails: Sequence[Thumbnail], config: DataConfig) -> str:
    """The HTML. Captions and keys come from the web: nothing of them is taken for markup."""
    parts = [_head(summary), _charts(summary, config), _rejects(summary), _sheet(thumbnails, config)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>Inspection of {_text(', '.join(summary['sources']))}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _head(summary: dict[str, Any]) -> str:
    shards, samples = summary["shards"], summary["samples"]
    problem = verdict(summary)
    taken = f"A run would take this data, judging by {shards['inspected']:,} of its {shards['in_source']:,} shards."
    tiles = [
        (f"{samples['inspected']:,}", "samples inspected"),
        (f"{shards['inspected']:,} of {shards['in_source']:,}", "shards"),
        (f"{size_text(shards['bytes_inspected'])}", f"of {size_text(shards['bytes_in_source'])}"),
        (f"{samples['bad_share']:.1%}", f"bad, at most {samples['max_skipped_share']:.1%} allowed"),
        (f"{samples['upscaled'] / max(1, samples['used']):.1%}", "of the used images are scaled up"),
        (f"{shards['unusable']:,}", "shards without a usable sample"),
    ]
    total = max(1, samples["inspected"])
    names = ("used", "filtered", "bad")
    share = "".join(f'<i class="{name}" style="flex:{samples[name] / total:.5f}"></i>' for name in names if samples[name])
    key = "".join(f'<i class="{name}"></i>{name} {samples[name]:,} ({samples[name] / total:.1%})' for name in names)
    lines = [_text(line) for line in epoch_lines(summary)]
    if summary["shapes"]:
        shapes = ", ".join(f"{shape.replace('x', ' × ')}: {count:,}" for shape, count in summary["shapes"].items())
        lines.append(f'<span class="soft">images by the shape (width × height) they are trained in: {shapes}</span>')
    return (
        f'<h1>Data inspection</h1><div class="soft">{_text(", ".join(summary["sources"]))}</div>'
        f'<div class="card verdict{" stop" if problem else ""}">{_text(problem or taken)}</div>'
        f'<div class="tiles">{"".join(_tile(*tile) for tile in tiles)}</div>'
        f'<div class="share">{share}</div><div class="key soft">{key}</div><p>{"<br>".join(lines)}</p>'
    )


def _tile(value: str, label: str) -> str:
    return f'<div class="card tile"><b>{_text(value)}</b><span class="soft">{_text(label)}</span></div>'


def _charts(summary: dict[str, Any], config: DataConfig) -> str:
    charts = [_chart(name, histogram, config) for name, histogram in summary["histograms"].items() if any(histogram["counts"])]
    note = (
        "Images as they are stored, used or not; captions of the used samples. Medians are estimated from the bins. "
        f"Amber: sides below data.image_size = {config.image_size}."
    )
    return f'<h2>Sizes and lengths</h2><div class="charts">{"".join(charts)}</div><p class="soft">{note}</p>' if charts else ""


def _chart(name: str, histogram: dict[str, Any], config: DataConfig) -> str:
    edges, counts = histogram["edges"], histogram["counts"]
    filled = [i for i, count in enumerate(counts) if count]
    rows = []
    for i in range(filled[0], filled[-1] + 1):
        low = name in ("width", "height") and i + 1 < len(edges) and edges[i + 1] <= config.image_size
        bar = f'<i{" class=low" if low else ""} style="width:{100 * counts[i] / max(counts):.2f}%"></i>' if counts[i] else ""
        rows.append(
            f'<span class="num soft">{_text(_bin(name, edges, i))}</span><span>{bar}</span><span class="num">{counts[i]:,}</span>'
        )
    values = " · ".join(
        f"{label} {value_text(name, histogram[of])}" for label, of in (("least", "least"), ("median", "p50"), ("most", "most"))
    )
    unit = _UNITS.get(name, "")
    head = f'<h3>{_text(title(name) + unit)}</h3><span class="soft">{_text(values)}</span>'
    return f'<div class="card">{head}<div class="bins">{"".join(rows)}</div></div>'


def _bin(name: str, edges: Sequence[float], i: int) -> str:
    """A bin's label: 256–319 for integers, 0.95–1.05 for ratios, 2–5 kB for bytes."""
    if i + 1 == len(edges):
        return f"{edges[i] / 1000:,.0f} kB +" if name == "image_bytes" else f"{edges[i]:,g} +"
    if name == "image_bytes":
        return f"{edges[i] / 1000:,.0f}–{edges[i + 1] / 1000:,.0f} kB"
    if name == "aspect_ratio":
        return f"{edges[i]:g}–{edges[i + 1]:g}"
    last = edges[i + 1] - 1
    return f"{edges[i]:,.0f}–{last:,.0f}" if last > edges[i] else f"{edges[i]:,.0f}"


def _rejects(summary: dict[str, Any]) -> str:
    if not summary["rejects"]:
        return "<h2>Rejects</h2><p>None.</p>"
    rows = []
    for cause, reject in summary["rejects"].items():
        kind = "filtered" if cause in FILTERED else "bad"
        lost = reject["shards_of_unknown_count"]
        count = f"{reject['samples']:,}" + (
            f'<br><span class="soft">guessed for {lost:,} shard{"s"[: lost > 1]}</span>' if lost else ""
        )
        examples = ", ".join(f"<code>{_text(key)}</code>" for key in reject["examples"])
        rows.append(
            f'<tr><td><i class="{kind}"></i>{_text(cause)}<br><span class="soft">{_text(reject["meaning"])}</span></td>'
            f'<td class="num">{count}</td><td class="num">{reject["share"]:.2%}</td><td>{examples}</td></tr>'
        )
    head = '<thead><tr><th>cause</th><th class="num">samples</th><th class="num">share</th><th>such as</th></tr></thead>'
    return f'<h2>Rejects</h2><div class="card table"><table>{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _sheet(thumbnails: Sequence[Thumbnail], config: DataConfig) -> str:
    if not thumbnails:
        return ""
    pictures = any(thumbnail.jpeg for thumbnail in thumbnails)
    what = f"as training sees them ({config.crop} crop)" if pictures else "precomputed, so without their images"
    figures = "".join(_figure(thumbnail) for thumbnail in thumbnails)
    return (
        f'<h2>Contact sheet</h2><p class="soft">{len(thumbnails)} used samples at random, {what}. '
        f'A pointer on one shows its caption, key and stored size.</p><div class="sheet">{figures}</div>'
    )


def _figure(thumbnail: Thumbnail) -> str:
    size = f" ({thumbnail.size[0]} × {thumbnail.size[1]})" if thumbnail.size else ""
    about = _text(f"{thumbnail.caption}\n{thumbnail.key}{size}")
    image = ""
    if thumbnail.jpeg:
        data = base64.b64encode(thumbnail.jpeg).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    return f'<figure title="{about}">{image}<figcaption>{_text(thumbnail.caption)}</figcaption></figure>'


def _text(text: str) -> str:
    return html.escape(text, quote=True)
