"""The controlled comparison: `ray job submit --working-dir . -- python jobs/compare.py --recipe demo_compare --output_dir …`.

Where no cluster is named (RAY_ADDRESS), this machine's CPUs do it.
"""

import shlex
import sys

import _bootstrap  # noqa: F401

from diffdis_platform.comparison.plan import SUMMARY, plan
from diffdis_platform.comparison.run import REPORT, compare, table
from diffdis_platform.config.compare import parse
from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError, TrainingError
from ray_platform.local_head import HeadError, ensure_cluster
from ray_platform.redaction import redacted


def main() -> None:
    command = parse(sys.argv[1:])
    config = command.config
    made = plan(config)
    ensure_cluster()
    connect()
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), command.yaml.encode())
    summary = compare(config, made, command.recipe, redacted(shlex.join(["python", *sys.argv])))
    print(f"\n{table(summary)}\n")
    print(f"done: {storage.join(config.output_dir, REPORT)}, with {SUMMARY} and samples/ beside it", flush=True)
    if summary["failures"]:
        raise DataError("not all was measured: " + "; ".join(summary["failures"]))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError, TrainingError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
