"""Write the model of a checkpoint: `python jobs/export.py --checkpoint … --output_dir …`; the same as `diffdis export`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("export", sys.argv[1:]))
