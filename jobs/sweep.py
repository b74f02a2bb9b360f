"""Search hyperparameters: `ray job submit --working-dir . -- python jobs/sweep.py --recipe demo_sweep --output_dir …`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("sweep", sys.argv[1:]))
