"""`diffdis sizing`: predict throughput, memory, storage and cost of a run, without data, weights or a cluster."""

import json
from collections.abc import Sequence
from pathlib import Path

from diffdis_platform.config.parse import ParsedCommand, parse
from diffdis_platform.sizing.config import SizingConfig


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[SizingConfig]:
    return parse(SizingConfig, argv, command="sizing", description="Predict throughput, memory, storage and cost of a run.")


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    from diffdis_platform.sizing.estimate import as_json, estimate, report

    counts, estimates = estimate(config)
    print(report(config, counts, estimates))
    if config.json:
        Path(config.json).write_text(json.dumps(as_json(config, counts, estimates), indent=2) + "\n")
    return 0
