"""Generate images: `python jobs/generate.py --model … --captions … --output_dir …`; the same as `diffdis generate`."""

import sys

import _bootstrap  # noqa: F401

from diffdis_platform.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("generate", sys.argv[1:]))
