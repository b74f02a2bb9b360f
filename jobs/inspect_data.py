"""What is in a source: `ray job submit --working-dir . -- python jobs/inspect_data.py --data.sources … --output_dir …`.

Where no cluster is named (RAY_ADDRESS), this machine's CPUs do it.
"""

import json
import sys
import time
from typing import Any

import _bootstrap  # noqa: F401

from diffdis_platform.config.inspection import InspectConfig, parse
from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.inspection import cluster_cpus, inspect_units, spread_units
from ray_platform.data.inspection_report import summarise, table, verdict
from ray_platform.data.statistics import Statistics
from ray_platform.local_head import HeadError, ensure_cluster
from ray_platform.report.inspection import inspection_page

SECONDS_A_LINE = 10.0  # of progress


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Write inspection.json and inspection.html, print the table, and return what the JSON holds. Needs a running Ray."""
    catalog = build_catalog(config.data)
    units, found, said = spread_units(catalog, config.max_shards), Statistics(), time.monotonic()
    for statistics in inspect_units(units, config.data):
        found.merge(statistics)
        if time.monotonic() - said > SECONDS_A_LINE:
            said = time.monotonic()
            print(f"{found.units} of {len(units)} shards, {found.looked_at:,} samples", file=sys.stderr, flush=True)
    summary = summarise(catalog, config.data, found, cluster_cpus(config.data))
    html = storage.join(config.output_dir, "inspection.html")
    storage.write_bytes(storage.join(config.output_dir, "inspection.json"), json.dumps(summary, indent=2).encode())
    storage.write_bytes(html, inspection_page(summary, found.thumbnails, config.data).encode())
    print(f"{table(summary)}\n\nwith a contact sheet: {html}", flush=True)
    return summary


def main() -> None:
    config = parse(sys.argv[1:])
    ensure_cluster()
    connect()
    if problem := verdict(inspect(config)):
        raise DataError(problem)


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
