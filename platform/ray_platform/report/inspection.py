"""What an inspection found, as one HTML page that needs nothing else: no script, no font, no file beside it."""

import base64
from collections.abc import Sequence

from ray_platform.data.causes import is_filtered
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import Thumbnail
from ray_platform.data.inspection_summary import HistogramSummary, InspectionSummary, title, value_text
from ray_platform.report.page import Bar, bars, document, figure, table, text, tile
from ray_platform.units import size_text

_UNITS = {"width": ", px", "height": ", px", "aspect_ratio": ", width / height"}  # of the charts
_STYLE = """
:root { --meant: #8a94a6; } @media (prefers-color-scheme: dark) { :root { --meant: #7b8596; } }
.share { display: flex; height: 12px; border-radius: 6px; overflow: hidden; margin: 16px 0 6px; background: var(--line); }
.share i { min-width: 2px; }
.key i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin: 0 5px 0 14px; }
.key i:first-child { margin-left: 0; }
.used { background: var(--good); } .filtered { background: var(--meant); } .bad { background: var(--bad); }
td:last-child { width: 46%; }
td i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 7px; }
"""


def page(summary: InspectionSummary, thumbnails: Sequence[Thumbnail], config: DataConfig) -> str:
    """The HTML. Captions and keys come from the web: nothing of them is taken for markup."""
    parts = [_head(summary), _charts(summary, config), _rejects(summary), _sheet(thumbnails, config)]
    return document(f"Inspection of {', '.join(summary.sources)}", _STYLE, parts)


def _head(summary: InspectionSummary) -> str:
    shards, samples = summary.shards, summary.samples
    problem = summary.verdict
    taken = f"A run would take this data, judging by {shards.inspected:,} of its {shards.in_source:,} shards."
    tiles = [
        (f"{samples.inspected:,}", "samples inspected"),
        (f"{shards.inspected:,} of {shards.in_source:,}", "shards"),
        (f"{size_text(shards.bytes_inspected)}", f"of {size_text(shards.bytes_in_source)}"),
        (f"{samples.bad_share:.1%}", f"bad, at most {samples.max_skipped_share:.1%} allowed"),
        (f"{samples.upscaled / max(1, samples.used):.1%}", "of the used images are scaled up"),
        (f"{shards.unusable:,}", "shards without a usable sample"),
    ]
    total = max(1, samples.inspected)
    counts = {"used": samples.used, "filtered": samples.filtered, "bad": samples.bad}
    share = "".join(f'<i class="{name}" style="flex:{n / total:.5f}"></i>' for name, n in counts.items() if n)
    key = "".join(f'<i class="{name}"></i>{name} {n:,} ({n / total:.1%})' for name, n in counts.items())
    lines = [text(line) for line in summary.epoch_lines]
    if summary.shapes:
        shapes = ", ".join(f"{shape.replace('x', ' × ')}: {count:,}" for shape, count in summary.shapes.items())
        lines.append(f'<span class="soft">images by the shape (width × height) they are trained in: {shapes}</span>')
    return (
        f'<h1>Data inspection</h1><div class="soft">{text(", ".join(summary.sources))}</div>'
        f'<div class="card verdict{" stop" if problem else ""}">{text(problem or taken)}</div>'
        f'<div class="tiles">{"".join(tile(*each) for each in tiles)}</div>'
        f'<div class="share">{share}</div><div class="key soft">{key}</div><p>{"<br>".join(lines)}</p>'
    )


def _charts(summary: InspectionSummary, config: DataConfig) -> str:
    charts = [_chart(name, histogram, config) for name, histogram in summary.histograms.items() if any(histogram.counts)]
    note = (
        "Images as they are stored, used or not; captions of the used samples. Medians are estimated from the bins. "
        f"Amber: sides below data.image_size = {config.image_size}."
    )
    return f'<h2>Sizes and lengths</h2><div class="charts">{"".join(charts)}</div><p class="soft">{note}</p>' if charts else ""


def _chart(name: str, histogram: HistogramSummary, config: DataConfig) -> str:
    edges, counts = histogram.edges, histogram.counts
    filled = [i for i, count in enumerate(counts) if count]
    rows = []
    for i in range(filled[0], filled[-1] + 1):
        low = name in ("width", "height") and i + 1 < len(edges) and edges[i + 1] <= config.image_size
        share = counts[i] / max(counts)
        rows.append(Bar(_bin(name, edges, i), share, f"{counts[i]:,}", "low" if low else ""))
    values = " · ".join(
        f"{label} {value_text(name, getattr(histogram, of))}"
        for label, of in (("least", "least"), ("median", "p50"), ("most", "most"))
    )
    unit = _UNITS.get(name, "")
    head = f'<h3>{text(title(name) + unit)}</h3><span class="soft">{text(values)}</span>'
    return f'<div class="card">{head}{bars(rows)}</div>'


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


def _rejects(summary: InspectionSummary) -> str:
    if not summary.rejects:
        return "<h2>Rejects</h2><p>None.</p>"
    rows = []
    for cause, reject in summary.rejects.items():
        kind = "filtered" if is_filtered(cause) else "bad"
        lost = reject.shards_of_unknown_count
        count = f"{reject.samples:,}" + (
            f'<br><span class="soft">guessed for {lost:,} shard{"s"[: lost > 1]}</span>' if lost else ""
        )
        examples = ", ".join(f"<code>{text(key)}</code>" for key in reject.examples)
        rows.append(
            f'<tr><td><i class="{kind}"></i>{text(cause)}<br><span class="soft">{text(reject.meaning)}</span></td>'
            f'<td class="num">{count}</td><td class="num">{reject.share:.2%}</td><td>{examples}</td></tr>'
        )
    head = '<th>cause</th><th class="num">samples</th><th class="num">share</th><th>such as</th>'
    return f'<h2>Rejects</h2><div class="card">{table(head, rows)}</div>'


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
    picture = base64.b64encode(thumbnail.jpeg).decode() if thumbnail.jpeg else ""
    return figure(thumbnail.caption, f"{thumbnail.caption}\n{thumbnail.key}{size}", picture)
