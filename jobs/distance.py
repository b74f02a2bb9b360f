"""Compare two existing sets of images: `python jobs/distance.py --generated DIR --reference DIR …`; as `diffdis distance`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("distance", sys.argv[1:]))
