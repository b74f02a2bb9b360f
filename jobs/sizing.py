"""Predict the size of a run: `python jobs/sizing.py --recipe sd_v1_laion --num_gpus 64`; the same as `diffdis sizing`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("sizing", sys.argv[1:]))
