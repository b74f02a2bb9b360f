"""What an inspection found, in numbers (`summarise`), in a line where a run would not take it (`verdict`) and as a table."""

from collections import Counter
from typing import Any

from ray_platform.data.catalog import Catalog
from ray_platform.data.causes import FILTERED
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import SHARD_CHANGED, SHARD_CRASHES
from ray_platform.data.statistics import Histogram, Statistics
from ray_platform.terminal import render_table
from ray_platform.units import duration_text, size_text

# What each cause means, and what can be done about it.
MEANINGS = {
    "image_missing": "no .jpg, .jpeg, .png or .webp beside the caption",
    "image_empty": "an image file of 0 bytes: a download that failed",
    "image_undecodable": "broken, or no JPEG, PNG or WebP whatever its name says",
    "image_too_large": "would take hundreds of megabytes, or minutes, to decode; scale such images down",
    "caption_missing": "no .txt and no `caption` in a .json, or not the field that data.caption_field names",
    "caption_empty": "nothing but white space (with data.clean_captions: or but HTML)",
    "caption_not_utf8": "text in another encoding; convert it to UTF-8",
    "caption_too_long": "more than 65,536 bytes of text, which is no caption; shorten it",
    "json_too_large": "a .json of more than 1 MiB; leave out what is no score and no caption",
    "name_too_long": "a file name of more than 1,024 characters in a tar; rename it",
    "json_invalid": "a .json that is no JSON object, or whose caption is no text",
    "score_missing": "a filter asks for a score that the .json lacks; see data.filters",
    "key_repeated": "the same file name twice in a tar: which caption belongs to which image cannot be told",
    "tar_truncated": "the tar ends early or turns to garbage; what precedes that is used. Copy it again",
    "shard_empty": "a shard without samples",
    "shard_missing": "listed, but gone when it was read (404)",
    "shard_forbidden": "storage refuses it (403); check credentials and the bucket's policy",
    "shard_unavailable": "storage did not answer within data.retry_seconds, or only with errors",
    "shard_unreadable": "a precomputed shard that is no Arrow file; run jobs/precompute.py again",
    SHARD_CHANGED: "its length changed while this inspection ran; is it still being written?",
    SHARD_CRASHES: "its reader failed or died (out of memory?); the log has its error. It would end a run",
    "filtered_size": "shorter side below data.filters.min_size",
    "filtered_similarity": "CLIP similarity below data.filters.min_similarity",
    "filtered_unsafe": "probably unsafe, above data.filters.max_unsafe",
    "filtered_watermark": "probably watermarked, above data.filters.max_watermark",
    "filtered_aesthetic": "aesthetic score below data.filters.min_aesthetic",
}


def summarise(catalog: Catalog, config: DataConfig, found: Statistics, cpus: int) -> dict[str, Any]:
    """Everything countable, as inspection.json holds it.

    Shares go by what a run counts: what was filtered out is not seen; a lost shard stands for as many samples as the other
    shards hold on average. `cpus`: how many the time of an epoch is estimated for.
    """
    rejects = _rejects(found)
    filtered = sum(reject["samples"] for cause, reject in rejects.items() if cause in FILTERED)
    bad = sum(reject["samples"] for cause, reject in rejects.items() if cause not in FILTERED)
    return {
        "sources": list(config.sources),
        "shards": {
            "in_source": sum(catalog.num_units),
            "inspected": found.units,
            "unusable": found.unusable_units,
            "bytes_in_source": catalog.num_bytes,
            "bytes_inspected": found.num_bytes,
        },
        "samples": {
            "inspected": found.used + filtered + bad,
            "used": found.used,
            "filtered": filtered,
            "bad": bad,
            "bad_share": bad / max(1, found.used + bad),
            "max_skipped_share": config.max_skipped_share,
            "upscaled": found.upscaled,
        },
        "rejects": rejects,
        "shapes": {f"{width}x{height}": count for (height, width), count in sorted(found.shapes.items())},
        "histograms": {name: _histogram(histogram) for name, histogram in found.histograms.items()},
        "epoch": _epoch(catalog, found, found.used + filtered + bad, cpus),
    }


def verdict(summary: dict[str, Any]) -> str:
    """A line where a run would stop at such data; else empty."""
    samples, rejects = summary["samples"], summary["rejects"]
    counted = [(cause, reject["samples"]) for cause, reject in rejects.items()]
    if not samples["used"]:
        causes = ", ".join(f"{count:,} × {cause}" for cause, count in counted)
        return f"none of the {samples['inspected']:,} samples inspected can be used ({causes}); correct the shards or the filters"
    if samples["bad_share"] <= samples["max_skipped_share"]:
        return ""
    seen = samples["used"] + samples["bad"]
    causes = ", ".join(f"{cause} {count / seen:.1%}" for cause, count in counted if cause not in FILTERED)
    return (
        f"{samples['bad']:,} of {seen:,} samples are bad ({causes}), more than data.max_skipped_share = "
        f"{samples['max_skipped_share']:.1%}; a run would stop: correct the shards or raise data.max_skipped_share"
    )


def table(summary: dict[str, Any]) -> str:
    """For the terminal."""
    shards, samples, rejects = summary["shards"], summary["samples"], summary["rejects"]
    bytes_read = f"{size_text(shards['bytes_inspected'])} of {size_text(shards['bytes_in_source'])}"
    lines = [f"{shards['inspected']:,} of {shards['in_source']:,} shards inspected, {bytes_read}", ""]
    counts = [["samples", f"{samples['inspected']:,}", "", ""]]
    for name, is_meant in (("used", None), ("filtered", True), ("bad", False)):
        causes = ", ".join(
            f"{cause} {reject['samples']:,}" for cause, reject in rejects.items() if (cause in FILTERED) is is_meant
        )
        share = samples[name] / max(1, samples["inspected"])
        counts.append([f"  {name}", f"{samples[name]:,}", f"{share:.1%}", causes])
    lines.append(render_table(counts))
    if samples["upscaled"]:
        share = samples["upscaled"] / samples["used"]
        lines.append(f"scaled up: {samples['upscaled']:,} of the used images ({share:.1%}), smaller than what training asks for")
    if shards["unusable"]:
        lines.append(f"shards without a usable sample: {shards['unusable']:,}")
    if len(summary["shapes"]) > 1:
        lines.append("shapes: " + ", ".join(f"{shape} {count:,}" for shape, count in summary["shapes"].items()))
    quantiles = [["", "least", "10 %", "median", "90 %", "most"]]
    for name, histogram in summary["histograms"].items():
        if histogram["least"] is not None:
            values = [value_text(name, histogram[of]) for of in ("least", "p10", "p50", "p90", "most")]
            quantiles.append([title(name), *values])
    lines += ["", render_table(quantiles)]
    lines += ["", *epoch_lines(summary)]
    return "\n".join(lines)


def epoch_lines(summary: dict[str, Any]) -> list[str]:
    """What was measured, and what follows from it."""
    epoch = summary["epoch"]
    return [
        f"measured on {epoch['measured_samples']:,} samples: decoding {epoch['samples_per_cpu_second']:,.0f} samples/s a CPU, "
        f"opening shards {size_text(epoch['bytes_per_reader_second'])}/s a reader (storage, and finding the samples)",
        f"estimate of an epoch: {epoch['samples']:,} samples, {epoch['used']:,} of them used, in "
        f"{duration_text(epoch['seconds'])} on {epoch['cpus']} reading CPUs ({epoch['samples_per_second']:,.0f} samples/s)",
    ]


def title(name: str) -> str:
    """Of a histogram."""
    return name.replace("_", " ")


def value_text(name: str, value: float | None) -> str:
    """One of a histogram's values, short."""
    if value is None:
        return "-"
    if name == "image_bytes":
        return size_text(value)
    return f"{value:.2f}" if name == "aspect_ratio" else f"{value:,.0f}"


def _rejects(found: Statistics) -> dict[str, dict[str, Any]]:
    """cause -> samples, of which of shards that were lost whole, and examples; the most frequent first."""
    a_unit = max(1, round(found.looked_at / max(1, found.readable_units)))
    samples = Counter(found.rejected)
    samples.update({cause: units * a_unit for cause, units in found.lost_units.items()})
    return {
        cause: {
            "samples": samples[cause],
            "share": samples[cause] / max(1, found.used + samples.total()),
            "shards_of_unknown_count": found.lost_units[cause],
            "examples": found.examples[cause],
            "meaning": MEANINGS[cause],
        }
        for cause in sorted(samples, key=lambda cause: (-samples[cause], cause))
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    return {
        "edges": list(histogram.edges),
        "counts": histogram.counts,
        "least": histogram.least,
        "most": histogram.most,
        **{f"p{round(100 * share)}": histogram.quantile(share) for share in (0.1, 0.5, 0.9)},
    }


def _epoch(catalog: Catalog, found: Statistics, samples: int, cpus: int) -> dict[str, Any]:
    """What was measured, scaled by bytes to the whole source. One read a CPU: it waits for storage, then it decodes."""
    scale = catalog.num_bytes / max(1, found.num_bytes)
    seconds = scale * (found.decode_seconds + found.read_seconds) / cpus
    expected = catalog.num_samples or round(scale * samples)
    return {
        "measured_samples": found.looked_at,
        "decode_cpu_seconds": found.decode_seconds,
        "read_seconds": found.read_seconds,
        "samples_per_cpu_second": found.looked_at / max(1e-9, found.decode_seconds),
        "bytes_per_reader_second": found.num_bytes / max(1e-9, found.read_seconds),
        "cpus": cpus,
        "samples": expected,
        "used": round(expected * found.used / max(1, samples)),
        "seconds": seconds,
        "samples_per_second": expected / max(1e-9, seconds),
    }
