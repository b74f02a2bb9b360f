"""`diffdis deliver OUTPUT_DIR`: deliver what MLflow (or another tracker) has not received of the run in an output folder."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ray_platform.contracts import ConfigError

INTERRUPTED = "stopped; the same command continues"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog="diffdis deliver", description=__doc__)
    parser.add_argument(
        "output_dir", metavar="OUTPUT_DIR", help="folder or s3:// URL of a training, evaluation, sweep or comparison"
    )
    parser.add_argument("--uri", default="", help="the tracking URI, if the run's own contains a secret, which was not saved")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    options = parse_arguments(argv)
    from ray_platform.tracking.runs import deliver_journal

    problems = deliver_journal(options.output_dir, options.uri)
    print("\n".join(problems) or "everything is delivered")
    return bool(problems)
