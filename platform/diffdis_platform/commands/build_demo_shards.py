"""`diffdis build-demo-shards`: build the demo data, emoji drawings with captions as LAION-style tars, and its evaluation sets.

train/ holds the drawings of eight families. heldout_style/ is a ninth family's drawings of names that train/ knows;
heldout_names/ is every family's drawings of names that train/ does not know. wds_heldout_style and wds_heldout_names are the same
two for zero-shot classification, in CLIP_benchmark's layout; wds_heldout_pairs is the former for retrieval.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse
from ray_platform.contracts import ConfigError

INTERRUPTED = "stopped; the same command starts again"

HELP = CommandHelp("build-demo-shards", "Build the demo's shards and evaluation sets.", examples=("", "--output /data/demo"))


@dataclass(frozen=True)
class BuildDemoConfig:
    """The folder of the demo data, and what it is built from."""

    output: str = "data/demo"
    """Folder to write the data to."""
    icons_package: str = ""
    """Package @iconify/json as a folder or .tgz. Empty: npm downloads it."""
    jobs: int = 0
    """Number of processes that draw. 0: one per CPU."""

    def __post_init__(self) -> None:
        if self.jobs < 0 or not self.output:
            raise ConfigError("jobs and output: give 0 or more processes, and a folder")


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[BuildDemoConfig]:
    return parse(BuildDemoConfig, argv, HELP, aliases={"--icons-package": "--icons_package"})  # the name until 0.3


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    from diffdis_platform.demo.builder import ENTRIES_SHA256, build

    package = Path(config.icons_package) if config.icons_package else None
    print(build(Path(config.output), package, config.jobs or os.cpu_count() or 1, ENTRIES_SHA256))
    return 0
