"""The record of an inspection (inspection.json), the verdict on the source, and the table for the terminal."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ray_platform.data import filters
from ray_platform.data.catalog import Catalog
from ray_platform.data.causes import BAD_DATA, is_filtered
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import Histogram, Statistics
from ray_platform.terminal import render_table
from ray_platform.units import duration_text, size_text


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
    bad_share: float  # of the used and the bad samples, as a run counts it
    max_skipped_share: float
    upscaled: int  # used images smaller than training asks for


@dataclass(frozen=True)
class CauseCounts:
    """The samples that one cause rejects."""

    samples: int
    share: float  # of all inspected samples
    shards_of_unknown_count: int  # lost shards whose number of samples is an estimate
    examples: list[str]  # keys
    meaning: str


@dataclass(frozen=True)
class HistogramSummary:
    """A histogram with estimated quantiles."""

    edges: list[float]
    counts: list[int]
    least: float | None
    most: float | None
    p10: float | None
    p50: float | None
    p90: float | None


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
    """Everything that an inspection counts. `asdict` gives the content of inspection.json."""

    sources: list[str]
    shards: ShardCounts
    samples: SampleCounts
    rejects: dict[str, CauseCounts]  # by cause, the most frequent first
    shapes: dict[str, int]  # "<width>x<height>" for training -> used images
    histograms: dict[str, HistogramSummary]
    epoch: EpochEstimate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def verdict(self) -> str:
        """A line if a run would stop at this source; else empty."""
        samples = self.samples
        if not samples.used:
            causes = ", ".join(f"{count.samples:,} × {cause}" for cause, count in self.rejects.items())
            return (
                f"none of the {samples.inspected:,} inspected samples can be used ({causes}); correct the shards or the filters"
            )
        if samples.bad_share <= samples.max_skipped_share:
            return ""
        seen = samples.used + samples.bad
        causes = ", ".join(f"{cause} {c.samples / seen:.1%}" for cause, c in self.rejects.items() if not is_filtered(cause))
        return (
            f"{samples.bad:,} of {seen:,} samples are bad ({causes}), more than data.max_skipped_share = "
            f"{samples.max_skipped_share:.1%}; a run would stop: correct the shards or raise data.max_skipped_share"
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
        for name, filtered in (("used", None), ("filtered", True), ("bad", False)):
            causes = ", ".join(f"{cause} {c.samples:,}" for cause, c in self.rejects.items() if is_filtered(cause) is filtered)
            number = getattr(samples, name)
            counts.append([f"  {name}", f"{number:,}", f"{number / max(1, samples.inspected):.1%}", causes])
        lines = [f"{shards.inspected:,} of {shards.in_source:,} shards inspected, {bytes_read}", "", render_table(counts)]
        if samples.upscaled:
            share = samples.upscaled / samples.used
            lines.append(f"scaled up: {samples.upscaled:,} of the used images ({share:.1%}), smaller than training asks for")
        if shards.unusable:
            lines.append(f"shards without a usable sample: {shards.unusable:,}")
        if len(self.shapes) > 1:
            lines.append("shapes: " + ", ".join(f"{shape} {count:,}" for shape, count in self.shapes.items()))
        quantiles = [["", "least", "10 %", "median", "90 %", "most"]]
        for name, histogram in self.histograms.items():
            if histogram.least is not None:
                values = (histogram.least, histogram.p10, histogram.p50, histogram.p90, histogram.most)
                quantiles.append([title(name), *(value_text(name, value) for value in values)])
        return "\n".join([*lines, "", render_table(quantiles), "", *self.epoch_lines])


def title(name: str) -> str:
    """Return the title of a histogram."""
    return name.replace("_", " ")


def value_text(name: str, value: float | None) -> str:
    """Return a value of the histogram `name` as a short text."""
    if value is None:
        return "-"
    if name == "image_bytes":
        return size_text(value)
    return f"{value:.2f}" if name == "aspect_ratio" else f"{value:,.0f}"


def summarize(catalog: Catalog, config: DataConfig, statistics: Statistics, cpus: int) -> InspectionSummary:
    """Summarize the statistics of some units of `catalog`. The duration of an epoch is estimated for `cpus` CPUs.

    Fractions are those that a run would count: filtered samples are not seen, and a lost shard stands for as many samples as the
    other shards have on average.
    """
    rejects = _count_causes(statistics)
    filtered = sum(count.samples for cause, count in rejects.items() if is_filtered(cause))
    bad = sum(count.samples for cause, count in rejects.items() if not is_filtered(cause))
    inspected = statistics.used + filtered + bad
    return InspectionSummary(
        list(config.sources),
        ShardCounts(
            sum(catalog.num_units), statistics.units, statistics.unusable_units, catalog.num_bytes, statistics.num_bytes
        ),
        SampleCounts(
            inspected, statistics.used, filtered, bad, bad / max(1, statistics.used + bad), config.max_skipped_share,
            statistics.upscaled,
        ),
        rejects,
        {f"{width}x{height}": count for (height, width), count in sorted(statistics.shapes.items())},
        {name: _summarize_histogram(histogram) for name, histogram in statistics.histograms.items()},
        _estimate_epoch(catalog, statistics, inspected, cpus),
    )  # fmt: skip


def _count_causes(statistics: Statistics) -> dict[str, CauseCounts]:
    samples_per_unit = max(1, round(statistics.looked_at / max(1, statistics.readable_units)))
    samples = Counter(statistics.rejected)
    samples.update({cause: units * samples_per_unit for cause, units in statistics.lost_units.items()})
    total = max(1, statistics.used + samples.total())
    meanings = BAD_DATA | filters.meanings()
    return {
        cause: CauseCounts(
            samples[cause], samples[cause] / total, statistics.lost_units[cause], statistics.examples[cause], meanings[cause]
        )
        for cause in sorted(samples, key=lambda cause: (-samples[cause], cause))
    }


def _summarize_histogram(histogram: Histogram) -> HistogramSummary:
    quantiles = [histogram.quantile(fraction) for fraction in (0.1, 0.5, 0.9)]
    return HistogramSummary(list(histogram.edges), histogram.counts, histogram.least, histogram.most, *quantiles)


def _estimate_epoch(catalog: Catalog, statistics: Statistics, inspected: int, cpus: int) -> EpochEstimate:
    """One read per CPU: it waits for storage, then it decodes."""
    scale = catalog.num_bytes / max(1, statistics.num_bytes)
    seconds = scale * (statistics.decode_seconds + statistics.read_seconds) / cpus
    samples = catalog.num_samples or round(scale * inspected)
    return EpochEstimate(
        measured_samples=statistics.looked_at,
        decode_cpu_seconds=statistics.decode_seconds,
        read_seconds=statistics.read_seconds,
        samples_per_cpu_second=statistics.looked_at / max(1e-9, statistics.decode_seconds),
        bytes_per_reader_second=statistics.num_bytes / max(1e-9, statistics.read_seconds),
        cpus=cpus,
        samples=samples,
        used=round(samples * statistics.used / max(1, inspected)),
        seconds=seconds,
        samples_per_second=samples / max(1e-9, seconds),
    )
