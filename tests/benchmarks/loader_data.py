"""Generate LAION-like shards for the loader benchmark: photo-like JPEGs of about 40 kB, 384 to 512 px, with captions."""

import io
import json
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

NUM_SHARDS, SHARD_SAMPLES = 8, 1000


def photo_like(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return uint8 noise [H, W, 3] at all scales, with a frequency spectrum similar to that of a photograph."""
    image, size = np.zeros((height, width, 3), np.float32), 2
    while size < 1.01 * max(height, width):
        noise = rng.standard_normal((size, size, 1)) + 0.35 * rng.standard_normal((size, size, 3))
        octave = [
            np.asarray(Image.fromarray(noise[..., c].astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR))
            for c in range(3)
        ]
        image += np.stack(octave, axis=-1) / size**0.62
        size *= 2
    image = (image - image.mean()) / image.std()
    return np.clip(127 + 60 * image, 0, 255).astype(np.uint8)


def jpeg(rng: np.random.Generator) -> bytes:
    height, width = rng.integers(384, 513, 2)
    buffer = io.BytesIO()
    Image.fromarray(photo_like(rng, height, width)).save(buffer, "JPEG", quality=int(rng.integers(84, 95)))
    return buffer.getvalue()


def build(folder: Path) -> dict[str, float]:
    """Write missing shards. Returns {images, mean_bytes}."""
    marker = folder / "built.json"
    if not marker.exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, total = np.random.default_rng(0), 0
        for shard in range(NUM_SHARDS):
            with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
                for number in range(SHARD_SAMPLES):
                    content = jpeg(rng)
                    total += len(content)
                    caption = f"a photograph of nothing, number {number}"
                    tar.write({"__key__": f"{shard:05d}{number:04d}", "jpg": content, "txt": caption.encode()})
        images = NUM_SHARDS * SHARD_SAMPLES
        marker.write_text(json.dumps({"images": images, "mean_bytes": total / images}))
    return json.loads(marker.read_text())
