"""Search hyperparameters of a recipe: `python jobs/sweep.py --recipe demo_sweep --output_dir …`; as a job: docs/sweeps.md.

Without RAY_ADDRESS, it runs on this machine's CPUs.
"""

import shlex
import sys

import _bootstrap  # noqa: F401

from diffdis_platform.config.sweep import parse
from diffdis_platform.sweeping.run import REPORT, format_trials, plan_sweep, rebuild_report, run_sweep
from ray_platform import storage
from ray_platform.connect import connect
from ray_platform.contracts import ConfigError, DataError
from ray_platform.local_head import HeadError, ensure_cluster
from ray_platform.redaction import redacted


def main() -> None:
    command = parse(sys.argv[1:])
    output_dir = command.config.output_dir
    details = rebuild_report(output_dir)
    if details is None:
        plan = plan_sweep(command.config, command.recipe)
        ensure_cluster()
        connect()
        details = run_sweep(plan, command.yaml, redacted(shlex.join(("python", "jobs/sweep.py", *sys.argv[1:]))))
    print(f"\n{format_trials(details)}\n\ndone: {storage.join(output_dir, REPORT)}, next to details.json", flush=True)
    if failed := [f"{trial['name']}: {trial['error']}" for trial in details["trials"] if trial["state"] == "failed"]:
        raise DataError(f"{len(failed)} trials failed; run the same command again to retry them: " + "; ".join(failed))


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, DataError, HeadError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes the sweep")
