"""`diffdis inspect`: inspect shards before training. Without RAY_ADDRESS, this machine's CPUs inspect them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffdis_platform.commands import connect_cluster, list_sources
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, check_output_dir, parse
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.config import DataConfig
from ray_platform.storage_config import StorageConfig

if TYPE_CHECKING:
    from ray_platform.report.inspection import InspectionSummary

HELP = CommandHelp(
    "inspect",
    "Inspect shards: counts, sizes, rejected samples, time of an epoch.",
    examples=("--data.sources /data/demo/train --output_dir /reports/demo",),
    fields=(
        *("output_dir", "max_shards", "data.sources", "data.image_size", "data.caption_field", "data.clean_captions"),
        *("data.filters.min_size", "data.filters.min_similarity", "data.filters.max_unsafe", "data.filters.max_watermark"),
        *("data.filters.min_aesthetic", "data.filters.ranges"),
    ),
)


@dataclass(frozen=True)
class InspectConfig:
    """The data to inspect, and the folder of the report."""

    output_dir: str = ""
    """Absolute folder or s3:// URL for inspection.json and inspection.html."""
    max_shards: int = 32
    """Number of shards to inspect, spread over the source. A part of a very large shard counts as one. 0: all."""
    data: DataConfig = field(default_factory=DataConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def check(self) -> None:
        """Raise ConfigError for a field that is missing or invalid."""
        check_output_dir(self.output_dir)
        if self.max_shards < 0:
            raise ConfigError(f"max_shards: {self.max_shards} is negative; use 0 for all shards")


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[InspectConfig]:
    return parse(InspectConfig, argv, HELP)


def inspect(config: InspectConfig) -> "InspectionSummary":
    """Write inspection.json and inspection.html, print a table, and return the summary. Needs a running Ray."""
    from ray_platform import storage
    from ray_platform.data.catalog import build_catalog
    from ray_platform.data.inspection import Statistics, cluster_cpus, inspect_units, spread_units
    from ray_platform.report.inspection import inspection_page, summarize
    from ray_platform.terminal import ProgressBar

    catalog = build_catalog(config.data)
    units, total, bar = spread_units(catalog, config.max_shards), Statistics(), ProgressBar()
    for statistics in inspect_units(units, config.data):
        total.merge(statistics)
        bar.update("shards", total.units, len(units), f"{total.num_samples:,} samples")
    summary = summarize(catalog, config.data, total, cluster_cpus(config.data))
    html = storage.join(config.output_dir, "inspection.html")
    storage.write_bytes(storage.join(config.output_dir, "inspection.json"), json.dumps(summary.as_dict(), indent=2).encode())
    storage.write_bytes(html, inspection_page(summary, total.thumbnails, config.data).encode())
    print(f"{summary.table}\n\nreport with a contact sheet: {html}", flush=True)
    return summary


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    list_sources("data.sources", config.data)
    connect_cluster(config.output_dir)
    if problem := inspect(config).verdict:
        raise DataError(problem)
    return 0
