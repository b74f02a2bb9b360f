"""Published sets of image-text pairs, as img2dataset writes them."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Dataset:
    """A set's pairs, and how many bytes of a shard one takes at a size of its pictures."""

    pairs: float
    pair_bytes: float  # with caption, .json and the tar's headers
    shard_px: int

    def changed(self, pairs: float, pair_bytes: float, shard_px: int) -> "Dataset":
        """0 keeps what is there. Bytes grow as pixels do (assumed: pictures smaller than that would not grow)."""
        px = shard_px or self.shard_px
        return replace(
            self,
            pairs=pairs or self.pairs,
            pair_bytes=pair_bytes or self.pair_bytes * (px / self.shard_px) ** 2,
            shard_px=px,
        )


# img2dataset's own pages, dataset_examples/laion400m.md and laion5B.md: 400 million samples at 256 px are 10 TB, 5.86 billion at
# 384 px are 220 TB.
DATASETS = {
    "laion_400m": Dataset(400e6, 10e12 / 400e6, 256),
    "laion_5b": Dataset(5.86e9, 220e12 / 5.86e9, 384),
}
