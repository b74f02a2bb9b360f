"""Run the controlled comparison: `ray job submit --working-dir . -- python jobs/compare.py --output_dir …`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("compare", sys.argv[1:]))
