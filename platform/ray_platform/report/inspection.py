"""The page of a data inspection."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

from ray_platform.data.causes import is_filtered
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import Thumbnail
from ray_platform.data.inspection_summary import HistogramSummary, InspectionSummary, title, value_text
from ray_platform.report.render import render
from ray_platform.units import size_text

_UNITS = {"width": ", px", "height": ", px", "aspect_ratio": ", width / height"}


class HistogramBar(NamedTuple):
    """A bin of a histogram."""

    label: str
    fraction: float  # of the longest bar
    num_images: int
    is_low: bool  # sides that are shorter than training asks for


def inspection_page(summary: InspectionSummary, thumbnails: Sequence[Thumbnail], config: DataConfig) -> str:
    """Return the HTML page of an inspection."""
    images = [base64.b64encode(thumbnail.jpeg).decode() if thumbnail.jpeg else "" for thumbnail in thumbnails]
    return render(
        "inspection.html.j2",
        title=f"Inspection of {', '.join(summary.sources)}",
        summary=summary,
        problem=summary.verdict,
        tiles=_tiles(summary),
        epoch_lines=summary.epoch_lines,
        histograms=[
            _histogram(name, histogram, config.image_size)
            for name, histogram in summary.histograms.items()
            if any(histogram.counts)
        ],
        is_filtered=is_filtered,
        thumbnails=list(zip(thumbnails, images, strict=True)),
        config=config,
    )


def _tiles(summary: InspectionSummary) -> list[tuple[str, str]]:
    shards, samples = summary.shards, summary.samples
    return [
        (f"{samples.inspected:,}", "samples inspected"),
        (f"{shards.inspected:,} of {shards.in_source:,}", "shards"),
        (size_text(shards.bytes_inspected), f"of {size_text(shards.bytes_in_source)}"),
        (f"{samples.bad_share:.1%}", f"bad, at most {samples.max_skipped_share:.1%} allowed"),
        (f"{samples.upscaled / max(1, samples.used):.1%}", "of the used images are scaled up"),
        (f"{shards.unusable:,}", "shards without a usable sample"),
    ]


def _histogram(name: str, histogram: HistogramSummary, image_size: int) -> dict[str, Any]:
    edges, counts = histogram.edges, histogram.counts
    filled = [i for i, count in enumerate(counts) if count]
    bars = []
    for i in range(filled[0], filled[-1] + 1):
        is_low = name in ("width", "height") and i + 1 < len(edges) and edges[i + 1] <= image_size
        bars.append(HistogramBar(_bin_label(name, edges, i), counts[i] / max(counts), counts[i], is_low))
    values = {"least": histogram.least, "median": histogram.p50, "most": histogram.most}
    text = " · ".join(f"{label} {value_text(name, value)}" for label, value in values.items())
    return {"title": title(name) + _UNITS.get(name, ""), "values": text, "bars": bars}


def _bin_label(name: str, edges: Sequence[float], i: int) -> str:
    """Return the label of a bin: 256–319 for integers, 0.95–1.05 for ratios, 2–5 kB for bytes."""
    if i + 1 == len(edges):
        return f"{edges[i] / 1000:,.0f} kB +" if name == "image_bytes" else f"{edges[i]:,g} +"
    if name == "image_bytes":
        return f"{edges[i] / 1000:,.0f}–{edges[i + 1] / 1000:,.0f} kB"
    if name == "aspect_ratio":
        return f"{edges[i]:g}–{edges[i + 1]:g}"
    last = edges[i + 1] - 1
    return f"{edges[i]:,.0f}–{last:,.0f}" if last > edges[i] else f"{edges[i]:,.0f}"
