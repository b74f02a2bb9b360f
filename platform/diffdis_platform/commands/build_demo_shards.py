"""`diffdis build-demo-shards`: build the demo data, emoji drawings with captions as LAION-style tars, and its evaluation sets.

train/ holds the drawings of eight families. heldout_style/ is a ninth family's drawings of names that train/ knows;
heldout_names/ is every family's drawings of names that train/ does not know. wds_heldout_style and wds_heldout_names are the same
two for zero-shot classification, in CLIP_benchmark's layout; wds_heldout_pairs is the former for retrieval.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

INTERRUPTED = "stopped; the same command starts again"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="diffdis build-demo-shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("data/demo"), help="folder to fill (default: %(default)s)")
    parser.add_argument("--icons-package", type=Path, help="@iconify/json as a folder or .tgz (default: npm downloads it)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="drawing processes (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    from diffdis_platform.demo.builder import ENTRIES_SHA256, build

    print(build(options.output, options.icons_package, options.jobs, ENTRIES_SHA256))
    return 0
