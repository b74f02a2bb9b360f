"""`diffdis deliver`: deliver what MLflow (or another tracker) has not received of the run in an output folder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from diffdis_platform.commands import check_exists
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, check_output_dir, parse
from ray_platform.storage_config import StorageConfig

INTERRUPTED = "stopped; the same command continues"

HELP = CommandHelp(
    "deliver",
    "Deliver what MLflow, or another tracker, has not received of a run.",
    examples=("--output_dir /runs/first",),
)


@dataclass(frozen=True)
class DeliverConfig:
    """The run to deliver."""

    output_dir: str = ""
    """Absolute folder or s3:// URL of a training, evaluation, sweep or comparison that has ended."""
    uri: str = ""
    """Tracking URI, if the run's own contains a secret, which was not saved. Empty: the run's own."""
    storage: StorageConfig = field(default_factory=StorageConfig)

    def check(self) -> None:
        """Raise ConfigError if the output folder is missing."""
        check_output_dir(self.output_dir)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[DeliverConfig]:
    return parse(DeliverConfig, argv, HELP)


def main(argv: Sequence[str]) -> int:
    config = parse_arguments(argv).config
    check_exists("output_dir", config.output_dir)
    from ray_platform.lease import Lease
    from ray_platform.tracking.runs import deliver_journal

    with Lease(config.output_dir, "deliver"):  # a run that is active delivers by itself
        problems = deliver_journal(config.output_dir, config.uri)
    print("\n".join(problems) or "everything is delivered")
    return bool(problems)
