"""The controlled comparison: `ray job submit --working-dir . -- python jobs/compare.py --recipe demo_compare --output_dir …`.

Without RAY_ADDRESS, it runs on this machine's CPUs.
"""

import shlex
import sys

import _bootstrap  # noqa: F401

from diffdis_platform.comparison.run import REPORT, compare
from diffdis_platform.comparison.runs import SUMMARY, plan_comparison
from diffdis_platform.comparison.summary import format_summary
from diffdis_platform.config.compare import parse
from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError, TrainingError
from ray_platform.local_head import HeadError, ensure_cluster
from ray_platform.redaction import redacted


def main() -> None:
    command = parse(sys.argv[1:])
    config = command.config
    plan = plan_comparison(config)
    ensure_cluster()
    connect()
    storage.write_bytes(storage.join(config.output_dir, "config.yaml"), command.yaml.encode())
    summary = compare(config, plan, command.recipe, redacted(shlex.join(["python", *sys.argv])))
    print(f"\n{format_summary(summary)}\n")
    print(f"done: {storage.join(config.output_dir, REPORT)}, next to {SUMMARY} and samples/", flush=True)
    if summary["failures"]:
        raise DataError("not everything was measured: " + "; ".join(summary["failures"]))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError, TrainingError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes the comparison")
