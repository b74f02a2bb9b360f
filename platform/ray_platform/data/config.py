"""The configuration of the data, `data.*`."""

from dataclasses import dataclass, field
from typing import Literal

from ray_platform.contracts import ConfigError
from ray_platform.data.filters import FilterConfig
from ray_platform.placement import check_labels


@dataclass(frozen=True)
class DataConfig:
    """Where the samples are and how they are read. Raises ConfigError for an invalid value."""

    sources: tuple[str, ...] = ()
    """Shards to train on: folders, globs or brace patterns; local, s3:// or https://."""
    weights: tuple[float, ...] = ()
    """Relative number of samples per source, one value for each. Empty: all sources form one pool."""
    image_size: int = 256
    """Side of square images in pixels, as in model.image_size. With aspect_ratios: the side of a square with the same area."""
    aspect_ratios: tuple[float, ...] = ()
    """Width / height of the buckets, such as 0.75 1 1.33. Empty: all images are square."""
    size_step: int = 64
    """The sides of the buckets' images are multiples of this, in pixels."""
    crop: Literal["centre", "random"] = "centre"
    """Which part of an image of another shape is used."""
    decoder: Literal["exact", "fast"] = "exact"
    """JPEG decoder. `fast` scales while decoding if the image is at least twice the target's size; its pixels differ from `exact`
    by 1.5 to 6 gray levels (13 in fine print)."""
    caption_field: str = ""
    """Field of the .json that contains the caption. Empty: the .txt, or else `caption` of the .json."""
    clean_captions: bool = False
    """Clean captions: undo HTML, drop tags and control characters, collapse white space."""
    filters: FilterConfig = field(default_factory=FilterConfig)
    max_skipped_fraction: float = 0.05
    """Maximum fraction of bad samples. A run that has to skip more stops."""
    reads_per_rank: int = 2
    """Concurrent read tasks per rank; at least one for each of data.weights. They need CPUs in addition to the workers'."""
    interleave: int = 2
    """Shards that a read task has in memory at a time; their samples are shuffled together."""
    cpus_per_read: float = 0.25
    """CPUs that a read task requests from Ray."""
    placement: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes that read, such as '{"pool": "cpu"}'. Empty: any node."""
    max_read_mb: int = 256
    """Larger shards are read in parts of this size, in MB."""
    retry_seconds: float = 120.0
    """How long reading a shard is retried while storage does not answer, in seconds."""
    deterministic: bool = True
    """Batches depend on the seed alone. With false, the samples of faster reads come first."""

    def __post_init__(self) -> None:
        for name in ("sources", "weights", "aspect_ratios"):
            if isinstance(getattr(self, name), str | float | int):
                raise ConfigError(f"data.{name}: {getattr(self, name)!r} is a single value; give a list")
        # The @ of abfs:// is between a container and an account.
        with_login = [source for source in self.sources if source.startswith(("s3://", "http://", "https://"))]
        if any("@" in source.rpartition("://")[2].partition("/")[0] for source in with_login):
            raise ConfigError(
                "data.sources: a URL contains credentials (before an @); leave them out, "
                "and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if self.weights and len(self.weights) != len(self.sources):
            raise ConfigError(
                f"data.weights: {len(self.weights)} weights for {len(self.sources)} data.sources; give one for each, or none"
            )
        if any(weight <= 0 for weight in self.weights):
            raise ConfigError(f"data.weights: {min(self.weights)} is not positive; leave the source out instead")
        for name in ("image_size", "size_step", "reads_per_rank", "interleave", "max_read_mb"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}: {getattr(self, name)} is below 1; give a positive number")
        if any(not 0.1 <= ratio <= 10 for ratio in self.aspect_ratios):
            raise ConfigError("data.aspect_ratios: a ratio is width / height, from 0.1 to 10")
        if not 0 <= self.max_skipped_fraction < 1:
            raise ConfigError(
                f"data.max_skipped_fraction: {self.max_skipped_fraction} is not from 0 to below 1; give a fraction such as 0.05"
            )
        if self.cpus_per_read < 0 or self.retry_seconds < 0:
            raise ConfigError("data.cpus_per_read, data.retry_seconds: a value is negative; give 0 or more")
        check_labels("data.placement", self.placement)

    @property
    def reads_per_pool(self) -> list[int]:
        """The concurrent reads of each rank by pool: `reads_per_rank` divided by weight, but at least one for each."""
        total = sum(self.weights)
        return [max(1, round(self.reads_per_rank * weight / total)) for weight in self.weights] or [self.reads_per_rank]

    @property
    def target_sizes(self) -> tuple[tuple[int, int], ...]:
        """The shapes (height, width) of training images."""
        if not self.aspect_ratios:
            return ((self.image_size, self.image_size),)

        def side(length: float) -> int:
            return max(1, round(length / self.size_step)) * self.size_step

        size = self.image_size
        return tuple(dict.fromkeys((side(size / ratio**0.5), side(size * ratio**0.5)) for ratio in self.aspect_ratios))
