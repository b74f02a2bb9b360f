"""Build the demo's data: `python jobs/build_demo_shards.py`; the same as `diffdis build-demo-shards`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("build-demo-shards", sys.argv[1:]))
