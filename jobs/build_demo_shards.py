"""Build the demo data: emoji drawings with captions as LAION-style tars, and the sets that a model is evaluated on.

    python jobs/build_demo_shards.py [--output data/demo]

train/ holds eight families' drawings. heldout_style/ is a ninth family drawing names that train/ knows, heldout_names/
every family drawing names that train/ does not know; wds_heldout_style and wds_heldout_names are the same two for zero-shot
classification, in CLIP_benchmark's layout, and wds_heldout_pairs is the former for retrieval.
"""

import argparse
import os
import sys
from pathlib import Path

from diffdis_platform.demo.builder import PINS, build
from diffdis_platform.demo.errors import DemoDataError


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/demo"), help="folder to fill (default: %(default)s)")
    parser.add_argument(
        "--icons-package", type=Path, help="@iconify/json as an unpacked folder or .tgz (default: npm fetches it)"
    )
    num_cpus = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=num_cpus, help="processes that draw (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        print(build(options.output, options.icons_package, options.jobs, PINS))
    except DemoDataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
