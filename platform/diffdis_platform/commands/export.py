"""`diffdis export`: write the model of a checkpoint as a pipeline folder."""

from collections.abc import Sequence

from diffdis_platform.commands import check_exists
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.config.help import CommandHelp
from diffdis_platform.config.parse import ParsedCommand, parse

HELP = CommandHelp(
    "export",
    "Write the model of a checkpoint as a pipeline folder.",
    examples=("--checkpoint /runs/first --output_dir /models/first",),
)


def parse_arguments(argv: Sequence[str]) -> ParsedCommand[ExportConfig]:
    return parse(ExportConfig, argv, HELP)


def main(argv: Sequence[str]) -> int:
    command = parse_arguments(argv)
    check_exists("checkpoint", command.config.checkpoint)
    from diffdis_platform.exporting import export

    print(export(command.config))
    return 0
