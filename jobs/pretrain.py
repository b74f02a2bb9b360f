"""Pretrain DiffDis: `ray job submit --working-dir . -- python jobs/pretrain.py --recipe demo --output_dir … --data.sources …`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("pretrain", sys.argv[1:]))
