"""The result of a data inspection: the record (inspection.json), the verdict on the source, the table and the page."""

import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray_platform.data import filters
from ray_platform.data.catalog import Catalog
from ray_platform.data.causes import BAD_DATA, IGNORED, is_filtered
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import Histogram, Statistics, Thumbnail
from ray_platform.formats import FileFormat
from ray_platform.report.render import render
from ray_platform.terminal import render_table
from ray_platform.units import duration_text, plural, size_text

INSPECTION_FORMAT = FileFormat("inspection result")


@dataclass(frozen=True)
class ShardCounts:
    """Shards, or parts of very large ones, of a source."""

    in_source: int
    inspected: int
    unusable: int  # without a sample that can be used
    bytes_in_source: int
    bytes_inspected: int


@dataclass(frozen=True)
class SampleCounts:
    """Samples of the inspected shards. A lost shard counts with as many samples as the others have on average."""

    inspected: int
    used: int
    filtered: int
    bad: int
    bad_fraction: float  # of the used and the bad samples, as a run counts it
    max_skipped_fraction: float
    upscaled: int  # used images smaller than training asks for


@dataclass(frozen=True)
class CauseCounts:
    """The samples that one cause rejects."""

    samples: int
    fraction: float  # of all inspected samples
    shards_of_unknown_count: int  # lost shards whose number of samples is an estimate
    examples: list[str]  # keys
    meaning: str


@dataclass(frozen=True)
class EpochEstimate:
    """What was measured, scaled by bytes to the whole source."""

    measured_samples: int
    decode_cpu_seconds: float
    read_seconds: float
    samples_per_cpu_second: float
    bytes_per_reader_second: float
    cpus: int
    samples: int
    used: int
    seconds: float
    samples_per_second: float


@dataclass(frozen=True)
class InspectionSummary:
    """Everything that an inspection counts; the content of inspection.json."""

    sources: list[str]
    shards: ShardCounts
    samples: SampleCounts
    rejects: dict[str, CauseCounts]  # by cause, the most frequent first
    shapes: dict[str, int]  # "<width>x<height>" for training -> used images
    histograms: dict[str, Histogram]
    epoch: EpochEstimate

    def as_dict(self) -> dict[str, Any]:
        """Return the content of inspection.json."""
        return INSPECTION_FORMAT.stamp(asdict(self))

    @property
    def verdict(self) -> str:
        """A line if a run would stop at this source; else empty."""
        samples = self.samples
        if not samples.used:
            causes = ", ".join(f"{count.samples:,} × {cause}" for cause, count in self.rejects.items())
            return (
                f"none of the {samples.inspected:,} inspected samples can be used ({causes}); correct the shards or the filters"
            )
        if samples.bad_fraction <= samples.max_skipped_fraction:
            return ""
        seen = samples.used + samples.bad
        causes = ", ".join(f"{cause} {c.samples / seen:.1%}" for cause, c in self.rejects.items() if not is_filtered(cause))
        return (
            f"{samples.bad:,} of {seen:,} samples are bad ({causes}), more than data.max_skipped_fraction = "
            f"{samples.max_skipped_fraction:.1%}; a run would stop: correct the shards or raise data.max_skipped_fraction"
        )

    @property
    def epoch_lines(self) -> list[str]:
        """What was measured, and the estimate of an epoch, a line each."""
        epoch = self.epoch
        return [
            f"measured on {epoch.measured_samples:,} samples: decoding {epoch.samples_per_cpu_second:,.0f} samples/s per CPU, "
            f"opening shards {size_text(epoch.bytes_per_reader_second)}/s per reader (storage, and finding the samples)",
            f"estimate of an epoch: {epoch.samples:,} samples, {epoch.used:,} of them used, in "
            f"{duration_text(epoch.seconds)} on {epoch.cpus} reading CPUs ({epoch.samples_per_second:,.0f} samples/s)",
        ]

    @property
    def table(self) -> str:
        """The summary as text for the terminal."""
        shards, samples = self.shards, self.samples
        bytes_read = f"{size_text(shards.bytes_inspected)} of {size_text(shards.bytes_in_source)}"
        counts = [["samples", f"{samples.inspected:,}", "", ""]]
        for name, number in (("used", samples.used), ("filtered", samples.filtered), ("bad", samples.bad)):
            causes = [f"{cause} {c.samples:,}" for cause, c in self.rejects.items() if is_filtered(cause) == (name == "filtered")]
            row = [f"  {name}", f"{number:,}", f"{number / max(1, samples.inspected):.1%}"]
            counts.append([*row, ", ".join(causes) if name != "used" else ""])
        lines = [f"{shards.inspected:,} of {plural(shards.in_source, 'shard')} inspected, {bytes_read}", "", render_table(counts)]
        if samples.upscaled:
            fraction = samples.upscaled / samples.used
            lines.append(f"scaled up: {samples.upscaled:,} of the used images ({fraction:.1%}), smaller than training asks for")
        if shards.unusable:
            lines.append(f"shards without a usable sample: {shards.unusable:,}")
        if len(self.shapes) > 1:
            lines.append("shapes: " + ", ".join(f"{shape} {count:,}" for shape, count in self.shapes.items()))
        quantiles = [["", "minimum", "10 %", "median", "90 %", "maximum"]]
        for name, histogram in self.histograms.items():
            if histogram.minimum is not None:
                values = (histogram.minimum, histogram.p10, histogram.p50, histogram.p90, histogram.maximum)
                quantiles.append([name.replace("_", " "), *(_value_text(value, name) for value in values)])
        return "\n".join([*lines, "", render_table(quantiles), "", *self.epoch_lines])


def summarize(catalog: Catalog, config: DataConfig, statistics: Statistics, cpus: int) -> InspectionSummary:
    """Summarize the statistics of some units of `catalog`. The duration of an epoch is estimated for `cpus` CPUs.

    Fractions are those that a run would count: filtered samples are not seen, and a lost shard stands for as many samples as the
    other shards have on average.
    """
    rejects = _count_causes(statistics, config)
    filtered = sum(count.samples for cause, count in rejects.items() if is_filtered(cause))
    bad = sum(count.samples for cause, count in rejects.items() if not is_filtered(cause))
    inspected = statistics.used + filtered + bad
    # One read per CPU: it waits for storage, then it decodes.
    scale = catalog.num_bytes / max(1, statistics.num_bytes)
    seconds = scale * (statistics.decode_seconds + statistics.read_seconds) / cpus
    samples = catalog.num_samples or round(scale * inspected)
    epoch = EpochEstimate(
        measured_samples=statistics.num_samples,
        decode_cpu_seconds=statistics.decode_seconds,
        read_seconds=statistics.read_seconds,
        samples_per_cpu_second=statistics.num_samples / max(1e-9, statistics.decode_seconds),
        bytes_per_reader_second=statistics.num_bytes / max(1e-9, statistics.read_seconds),
        cpus=cpus,
        samples=samples,
        used=round(samples * statistics.used / max(1, inspected)),
        seconds=seconds,
        samples_per_second=samples / max(1e-9, seconds),
    )
    bad_fraction = bad / max(1, statistics.used + bad)
    return InspectionSummary(
        list(config.sources),
        ShardCounts(sum(catalog.num_units), statistics.units, statistics.unusable_units, catalog.num_bytes, statistics.num_bytes),
        SampleCounts(inspected, statistics.used, filtered, bad, bad_fraction, config.max_skipped_fraction, statistics.upscaled),
        rejects,
        {f"{width}x{height}": count for (height, width), count in sorted(statistics.shapes.items())},
        {n: replace(h, p10=h.quantile(0.1), p50=h.quantile(0.5), p90=h.quantile(0.9)) for n, h in statistics.histograms.items()},
        epoch,
    )


def _count_causes(statistics: Statistics, config: DataConfig) -> dict[str, CauseCounts]:
    truncated = statistics.lost_units["tar_truncated"]
    read, units = statistics.num_samples - statistics.truncated_samples - truncated, statistics.readable_units - truncated
    if not units:  # If all shards end early, it is their writer that does not end them, and nothing is missing.
        read, units = statistics.num_samples, statistics.readable_units
    samples_per_unit = max(1, round(read / max(1, units)))
    samples = Counter(statistics.rejected)
    samples.update({cause: units * samples_per_unit for cause, units in statistics.lost_units.items()})
    if truncated:
        samples["tar_truncated"] = max(truncated, samples["tar_truncated"] - statistics.truncated_samples)
    total, meanings = max(1, statistics.used + samples.total()), BAD_DATA | IGNORED | filters.meanings(config.filters)
    return {
        cause: CauseCounts(count, count / total, statistics.lost_units[cause], statistics.examples[cause], meanings[cause])
        for cause, count in sorted(samples.items(), key=lambda item: (-item[1], item[0]))
    }


def inspection_page(summary: InspectionSummary, thumbnails: Sequence[Thumbnail], config: DataConfig) -> str:
    """Return the HTML page of an inspection."""
    return render(
        "inspection.html.j2",
        summary=summary,
        thumbnails=[(thumbnail, base64.b64encode(thumbnail.jpeg).decode()) for thumbnail in thumbnails],
        config=config,
        is_filtered=is_filtered,
        value_text=_value_text,
        bins=_bins,
        bin_label=_bin_label,
    )


def _value_text(value: float | None, name: str) -> str:
    """Return a value of the histogram `name` as a short text."""
    if value is None:
        return "-"
    if name == "image_bytes":
        return size_text(value)
    return f"{value:.2f}" if name == "aspect_ratio" else f"{value:,.0f}"


def _bins(histogram: Histogram) -> range:
    """Return the bins from the first to the last one that has a value."""
    filled = [i for i, count in enumerate(histogram.counts) if count]
    return range(filled[0], filled[-1] + 1)


def _bin_label(edges: Sequence[float], i: int, name: str) -> str:
    """Return the label of a bin: 256–319 for integers, 0.95–1.05 for ratios, 2–5 kB for bytes."""
    scale, unit = (1000, " kB") if name == "image_bytes" else (1, "")
    first = f"{edges[i] / scale:,g}"
    if i + 1 == len(edges):
        return f"{first}{unit} +"
    stop = edges[i + 1]
    if name in ("image_bytes", "aspect_ratio"):
        return f"{first}–{stop / scale:,g}{unit}"
    return f"{first}–{stop - 1:,g}" if stop - 1 > edges[i] else first
