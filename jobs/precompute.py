"""Encode a source once: `ray job submit --working-dir . -- python jobs/precompute.py --recipe … --data.sources … --output_dir …`.

What it writes is a source for jobs/pretrain.py with the same model. Where no cluster is named (RAY_ADDRESS), this machine's CPUs
do it.
"""

import sys
import time

import _bootstrap  # noqa: F401

from diffdis_platform.config.precompute import PrecomputeConfig, parse
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.precompute import PrecomputeProgress, check, precompute
from ray_platform.local_head import HeadError, ensure_cluster

SECONDS_A_LINE = 10.0  # of progress


def main() -> None:
    config: PrecomputeConfig = parse(sys.argv[1:])
    catalog = build_catalog(config.data)
    check(catalog, config.data)
    encoders = config.encoders()
    ensure_cluster()
    connect()
    last_line, progress = time.monotonic(), None
    for progress in precompute(catalog, config.data, encoders, config.output_dir):
        if time.monotonic() - last_line > SECONDS_A_LINE:
            last_line = time.monotonic()
            print(line(progress), flush=True)
    print(f"{line(progress)}\ndone: precomputed shards are in {config.output_dir}" if progress else "nothing was left to do")


def line(progress: PrecomputeProgress) -> str:
    done, total = progress.shards_done, progress.shards
    return f"{done:,} of {total:,} shards, {progress.samples:,} samples, {progress.samples_per_second:.0f} samples/s"


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
