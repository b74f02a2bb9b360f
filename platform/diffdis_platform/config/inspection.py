"""The command line of jobs/inspect_data.py."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffdis_platform.config.arguments import Parser, resolve
from ray_platform.contracts import ConfigError
from ray_platform.data.config import DataConfig


@dataclass(frozen=True)
class InspectConfig:
    """What is inspected, and where the report goes."""

    output_dir: str = ""  # absolute folder or s3:// URL for inspection.json and inspection.html
    max_shards: int = 32  # to inspect, spread over the whole source; a part of a very large one counts as one; 0: all
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if "://" not in self.output_dir and not os.path.isabs(self.output_dir):
            raise ConfigError(f"output_dir: {self.output_dir or 'empty'}; give an absolute folder or an s3:// URL")
        if self.max_shards < 0:
            raise ConfigError(f"max_shards: {self.max_shards} is below 0, which stands for all")


def parse(arguments: Sequence[str]) -> InspectConfig:
    """Raises ConfigError, in one line, for a field or value that does not exist."""
    parser = Parser(prog="jobs/inspect_data.py", description="Inspect shards: counts, sizes, rejects, time of an epoch.")
    parser.add_class_arguments(InspectConfig)
    values, _ = resolve(parser, arguments)
    return InspectConfig(**{name: getattr(values, name) for name in InspectConfig.__dataclass_fields__})
