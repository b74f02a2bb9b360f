"""What is in a source: `ray job submit --working-dir . -- python jobs/inspect_data.py --data.sources … --output_dir …`.

Where no cluster is named (RAY_ADDRESS), this machine's CPUs do it.
"""

import json
import sys
import time

import _bootstrap  # noqa: F401

from diffdis_platform.config.inspection import InspectConfig, parse
from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.inspection import Statistics, cluster_cpus, inspect_units, spread_units
from ray_platform.data.inspection_summary import InspectionSummary, summarize
from ray_platform.local_head import HeadError, ensure_cluster
from ray_platform.report.inspection import page

SECONDS_A_LINE = 10.0  # of progress


def inspect(config: InspectConfig) -> InspectionSummary:
    """Write inspection.json and inspection.html, print the table, and return the summary. Needs a running Ray."""
    catalog = build_catalog(config.data)
    units, statistics, last_line = spread_units(catalog, config.max_shards), Statistics(), time.monotonic()
    for part in inspect_units(units, config.data):
        statistics.merge(part)
        if time.monotonic() - last_line > SECONDS_A_LINE:
            last_line = time.monotonic()
            print(f"{statistics.units} of {len(units)} shards, {statistics.looked_at:,} samples", file=sys.stderr, flush=True)
    summary = summarize(catalog, config.data, statistics, cluster_cpus(config.data))
    html = storage.join(config.output_dir, "inspection.html")
    storage.write_bytes(storage.join(config.output_dir, "inspection.json"), json.dumps(summary.as_dict(), indent=2).encode())
    storage.write_bytes(html, page(summary, statistics.thumbnails, config.data).encode())
    print(f"{summary.table}\n\nwith a contact sheet: {html}", flush=True)
    return summary


def main() -> None:
    config = parse(sys.argv[1:])
    ensure_cluster()
    connect()
    if problem := inspect(config).verdict:
        raise DataError(problem)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
