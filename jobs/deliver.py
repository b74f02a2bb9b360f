"""Deliver a run's metrics after an outage of MLflow: `python jobs/deliver.py --output_dir DIR`; the same as `diffdis deliver`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("deliver", sys.argv[1:]))
