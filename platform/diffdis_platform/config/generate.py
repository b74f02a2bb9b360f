"""The command line of jobs/generate.py."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from diffdis_platform.config.arguments import Parser, resolve
from ray_platform import storage
from ray_platform.contracts import ConfigError


@dataclass(frozen=True)
class GenerateConfig:
    """What is drawn, by which model, and where it goes."""

    model: str = ""  # a folder that a run or jobs/export.py wrote; local or s3://
    output_dir: str = ""  # absolute folder or s3:// URL
    captions: tuple[str, ...] = ()
    captions_file: str = ""  # a text of one caption a line; local or s3://
    num_steps: int = 50  # of DDIM
    guidance_scale: float = 7.5
    seed: int = 0
    batch_size: int = 16
    device: str = ""  # empty: an accelerator where there is one

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model: give the folder of an exported model")
        if "://" not in self.output_dir and not os.path.isabs(self.output_dir):
            raise ConfigError(f"output_dir: {self.output_dir or 'empty'}; give an absolute folder or an s3:// URL")
        if bool(self.captions) == bool(self.captions_file):
            raise ConfigError("captions: give some, or a captions_file, and not both")
        if self.num_steps < 1 or self.batch_size < 1:
            raise ConfigError("num_steps and batch_size: at least 1")

    def all_captions(self) -> list[str]:
        """Raises ConfigError for a file without one."""
        if self.captions:
            return list(self.captions)
        lines = storage.read_small(self.captions_file).decode(errors="replace").splitlines()
        if not (found := [line.strip() for line in lines if line.strip()]):
            raise ConfigError(f"captions_file: {self.captions_file} holds no caption; write one a line")
        return found


def parse(arguments: Sequence[str]) -> GenerateConfig:
    """Raises ConfigError, in one line, for a field or value that does not exist."""
    parser = Parser(prog="jobs/generate.py", description="Draw images from captions with an exported model.")
    parser.add_class_arguments(GenerateConfig)
    values, _ = resolve(parser, arguments)
    return GenerateConfig(**{name: getattr(values, name) for name in GenerateConfig.__dataclass_fields__})
