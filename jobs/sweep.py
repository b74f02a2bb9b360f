"""Search a recipe's open choices: `python jobs/sweep.py --recipe demo_sweep --output_dir …`; as a job: docs/sweeps.md.

Where no cluster is named (RAY_ADDRESS), this machine's CPUs do it.
"""

import shlex
import sys

import _bootstrap  # noqa: F401

from diffdis_platform.config.sweep import parse
from diffdis_platform.sweeping.run import REPORT, plan, run, table
from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError
from ray_platform.local_head import HeadError, ensure_cluster
from ray_platform.redaction import redacted


def main() -> None:
    command = parse(sys.argv[1:])
    made = plan(command.config, command.recipe)
    ensure_cluster()
    connect()
    details = run(made, command.yaml, redacted(shlex.join(("python", "jobs/sweep.py", *sys.argv[1:]))))
    report = storage.join(command.config.output_dir, REPORT)
    print(f"\n{table(details)}\n\ndone: {report}, with details.json beside it", flush=True)
    if failed := [f"{trial['name']}: {trial['error']}" for trial in details["trials"] if trial["state"] == "failed"]:
        raise DataError(f"{len(failed)} trials failed, and the same command tries them again: " + "; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
