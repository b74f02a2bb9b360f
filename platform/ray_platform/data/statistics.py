"""What an inspection counts of samples. All of it but the two times merges exactly, however the shards were shared out."""

import hashlib
import io
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from PIL import Image

EXAMPLES = 5  # keys of each cause
THUMBNAILS = 48
THUMBNAIL_SIZE = 96  # pixels of the longer side

_PIXELS = (0, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 1024, 1536, 2048, 4096)
# Where each bin begins; the last one has no end.
EDGES: dict[str, tuple[float, ...]] = {
    "width": _PIXELS,
    "height": _PIXELS,
    "aspect_ratio": (0, 0.33, 0.5, 0.6, 0.7, 0.8, 0.95, 1.05, 1.25, 1.43, 1.67, 2, 3),  # width / height
    "image_bytes": tuple(1000 * kilobytes for kilobytes in (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)),
    "caption_words": (1, 2, 3, 4, 6, 8, 11, 16, 21, 31, 51, 76, 101, 201),
    "caption_characters": (1, 6, 11, 21, 41, 61, 81, 121, 161, 241, 321, 501, 1001),
}


@dataclass
class Histogram:
    """Counts in fixed bins, and the extremes."""

    edges: tuple[float, ...]
    counts: list[int]
    least: float | None = None
    most: float | None = None

    def add(self, value: float) -> None:
        self.counts[max(0, bisect_right(self.edges, value) - 1)] += 1
        self._extend(value, value)

    def merge(self, other: "Histogram") -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        if other.least is not None and other.most is not None:
            self._extend(other.least, other.most)

    def quantile(self, share: float) -> float | None:
        """As if values were spread evenly within their bin, so about right; None where nothing was counted."""
        if self.least is None or self.most is None:
            return None
        wanted, below = share * sum(self.counts), 0
        for begin, end, count in zip(self.edges, [*self.edges[1:], self.most], self.counts, strict=True):
            if count and below + count >= wanted:
                low, high = max(begin, self.least), min(max(end, begin), self.most)
                return low + (high - low) * (wanted - below) / count
            below += count
        return self.most

    def _extend(self, least: float, most: float) -> None:
        self.least = least if self.least is None else min(self.least, least)
        self.most = most if self.most is None else max(self.most, most)


class Thumbnail(NamedTuple):
    """A sample of the contact sheet."""

    rank: str  # a hash of the key: the sheet shows the samples of lowest rank, which no split of the work changes
    key: str
    caption: str
    size: tuple[int, int] | None  # (width, height) of the original, pixels
    jpeg: bytes  # of what training sees; empty for a precomputed sample


@dataclass
class Statistics:
    """Of some units. What belongs to images comes from all whose header can be read, captions are those of used samples."""

    units: int = 0
    unusable_units: int = 0  # in which no sample can be used
    num_bytes: int = 0  # of the units
    readable_units: int = 0
    looked_at: int = 0  # samples that these hold, used or not
    used: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # cause -> samples, not those of lost_units
    lost_units: Counter[str] = field(default_factory=Counter)  # cause -> units of which nobody knows how many samples they hold
    examples: dict[str, list[str]] = field(default_factory=dict)  # cause -> its first keys, sorted
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (height, width) that used images came out in -> images
    upscaled: int = 0  # used images that are smaller than that
    histograms: dict[str, Histogram] = field(
        default_factory=lambda: {name: Histogram(edges, [0] * len(edges)) for name, edges in EDGES.items()}
    )
    thumbnails: list[Thumbnail] = field(default_factory=list)  # sorted
    read_seconds: float = 0.0  # until storage had given the units and their samples were found
    decode_seconds: float = 0.0  # of one CPU's time

    def count_reject(self, key: str, cause: str, weight: int) -> None:
        """`weight`: the samples that are lost by it; 0 where that is not known of a whole unit."""
        (self.rejected if weight else self.lost_units)[cause] += weight or 1
        self._keep_examples(cause, [key])

    def offer_thumbnail(self, key: str, caption: str, size: tuple[int, int] | None, jpeg: Callable[[], bytes]) -> None:
        """Draw and keep it if it is among those of lowest rank."""
        rank = hashlib.sha256(key.encode()).hexdigest()[:16]
        if len(self.thumbnails) < THUMBNAILS or rank < self.thumbnails[-1].rank:
            insort(self.thumbnails, Thumbnail(rank, key, caption, size, jpeg()))
            del self.thumbnails[THUMBNAILS:]

    def merge(self, other: "Statistics") -> None:
        """Add what `other` counted in other units."""
        for name, own in vars(self).items():
            if isinstance(own, int | float):
                setattr(self, name, own + getattr(other, name))
        for counter in ("rejected", "lost_units", "shapes"):
            getattr(self, counter).update(getattr(other, counter))
        for cause, keys in other.examples.items():
            self._keep_examples(cause, keys)
        for name, histogram in other.histograms.items():
            self.histograms[name].merge(histogram)
        self.thumbnails = sorted([*self.thumbnails, *other.thumbnails])[:THUMBNAILS]

    def _keep_examples(self, cause: str, keys: list[str]) -> None:
        self.examples[cause] = sorted([*self.examples.get(cause, []), *keys])[:EXAMPLES]


def thumbnail_jpeg(pixels: np.ndarray) -> bytes:
    """[H, W, 3] uint8 -> a JPEG, its longer side at most THUMBNAIL_SIZE."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()
