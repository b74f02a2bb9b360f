"""What can be said about the data, each with its one default."""

from dataclasses import dataclass

from ray_platform.contracts import ConfigError


@dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read. Raises ConfigError for a value that cannot work."""

    sources: tuple[str, ...] = ()  # folders, globs or brace patterns of tars; local or s3://
    image_size: int = 256  # pixels; images come out square
    max_skipped_share: float = 0.05  # of the samples seen; a run that has to skip more stops
    # Shards that a rank reads at the same time. Each is held in memory; all ranks' reads need CPUs beside the workers'.
    reads_per_rank: int = 2
    cpus_per_read: float = 0.25  # CPUs that one such read asks of Ray

    def __post_init__(self) -> None:
        if isinstance(self.sources, str):
            raise ConfigError(f"data.sources: {self.sources!r} is one text; give a list, even of one source")
        if self.image_size < 1:
            raise ConfigError(f"data.image_size: {self.image_size} is not a size; give a number of pixels, such as 256")
        if not 0 <= self.max_skipped_share < 1:
            raise ConfigError(f"data.max_skipped_share: {self.max_skipped_share} is not a share from 0 to below 1")
        if self.reads_per_rank < 1:
            raise ConfigError(f"data.reads_per_rank: {self.reads_per_rank} reads nothing; give at least 1")
        if self.cpus_per_read < 0:
            raise ConfigError(f"data.cpus_per_read: {self.cpus_per_read} is negative; give 0 or more")
