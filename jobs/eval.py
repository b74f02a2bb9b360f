"""Evaluate a model: `ray job submit --working-dir . -- python jobs/eval.py --checkpoint … --data_roots … --output_dir …`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("eval", sys.argv[1:]))
