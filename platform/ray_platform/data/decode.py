"""Decoding images to [H, W, 3] uint8 RGB.

`exact` gives the pixels of Pillow's full decode, crop and bicubic resize, with libjpeg-turbo and torch's vectorized resize: at
most a tenth of a gray level apart on average (tests/ray_platform/test_decode.py), at 1.5 (small) to 2.7 times the speed.
`fast` lets libjpeg scale while it decodes if the image is at least twice as large as needed, as far as color keeps the target's
resolution. It is up to 1.9 times as fast again, and sharper, because it averages blocks first: on photographs 1.5 to 6 gray
levels from `exact` on average, less than 1 with little detail, 13 in fine print, and 0 with nothing to scale.
`rgb` is for evaluation: all pixels, equal to Pillow's.
"""

import io
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image

from ray_platform.data import filters
from ray_platform.data.causes import SampleError
from ray_platform.data.config import DataConfig
from ray_platform.data.tar import IMAGE_SUFFIXES

THUMBNAIL_SIZE = 96
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that swap width and height
_JPEG = b"\xff\xd8\xff"
_JPEG_PIXELS = 0xDA  # the marker before them
_MAX_PIXELS = Image.MAX_IMAGE_PIXELS or 0  # Pillow's limit for an image that is not a decompression bomb
_MAX_SCANNED = 20 * _MAX_PIXELS  # over all scans of a progressive JPEG, of which each costs a few bytes; up to 10 are usual
# Whatever the name says: the web has many a GIF named .jpg. Some of Pillow's other readers start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# libjpeg doubles the scale of color only if it is subsampled in both directions (4:2:0). This is how much coarser color is else.
_COLOR_FACTORS = {"422": 2, "440": 2, "411": 4}


def image(members: Mapping[str, memoryview], config: DataConfig, seed: str) -> np.ndarray:
    """Return a sample's image in one of `config.target_sizes`, upright and on white. `seed` determines a random crop.

    Raises SampleError, and no other error, if the image cannot be decoded or a filter rejects it.
    """
    content = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
    if content is None:
        raise SampleError("image_missing")
    if not content:
        raise SampleError("image_empty")
    pixels, (height, width) = (_jpeg(content, config) if content[:3] == _JPEG else None) or _by_pillow(content)
    filters.check(filters.Candidate(members=members, width=width, height=height), config.filters, reads_image=True)
    target = nearest_size(width / height, config.target_sizes)
    return resized(pixels, target, random.Random(seed) if config.crop == "random" else None)


def nearest_size(aspect_ratio: float, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the (height, width) whose width / height differs least, as a factor."""
    return min(sizes, key=lambda size: max(aspect_ratio * size[0] / size[1], size[1] / size[0] / aspect_ratio))


def crop_box(height: int, width: int, target: tuple[int, int], rng: random.Random | None) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of the largest part with the target's shape: in the center, or at random with `rng`."""
    scale = min(height / target[0], width / target[1])
    h, w = min(height, max(1, round(target[0] * scale))), min(width, max(1, round(target[1] * scale)))
    if rng is None:
        return (height - h) // 2, (width - w) // 2, h, w
    return rng.randint(0, height - h), rng.randint(0, width - w), h, w


def resized(pixels: np.ndarray, target: tuple[int, int], rng: random.Random | None = None) -> np.ndarray:
    """[H, W, 3] uint8 -> [h, w, 3]: crop, then resize (bicubic with antialiasing)."""
    top, left, height, width = crop_box(pixels.shape[0], pixels.shape[1], target, rng)
    # Cropping first gives the same result as resizing first, and a 1 x 1,000,000 image stays cheap.
    part = torch.from_numpy(pixels)[None, top : top + height, left : left + width]
    if (height, width) == target:
        return part[0].numpy()
    # First a batch of one, then permuted: torch treats that as channels-last, and returns it as such.
    return F.interpolate(part.permute(0, 3, 1, 2), target, mode="bicubic", antialias=True).permute(0, 2, 3, 1)[0].numpy()


def rgb(content: bytes | memoryview) -> np.ndarray:
    """Return an encoded image as [H, W, 3], equal to Pillow's `Image.open(…).convert("RGB")`.

    Published scores were measured on such pixels: without EXIF's rotation, transparency dropped, 16 bits clipped at 255.
    Thread-safe. Raises SampleError, and no other error, if the image cannot be decoded.
    """
    view = memoryview(content)
    if not view:
        raise SampleError("image_empty")
    if view[:3] == _JPEG:
        with suppress(Exception):  # also SampleError: Pillow reports the same
            height, width, _ = _jpeg_header(view)
            if height * width <= _MAX_PIXELS:
                return np.asarray(simplejpeg.decode_jpeg(view))
    try:
        # Without `_opened`, because catching warnings is not thread-safe.
        with Image.open(io.BytesIO(view), formats=FORMATS) as opened:
            _check_scans(opened, view)
            return np.array(opened.convert("RGB"))
    except (Image.DecompressionBombError, MemoryError):
        raise SampleError("image_too_large") from None
    except Exception:
        raise SampleError("image_undecodable") from None


def _jpeg(content: memoryview, config: DataConfig) -> tuple[np.ndarray, tuple[int, int]] | None:
    """Return the pixels, possibly downscaled, and the true (height, width); None if Pillow should decode the file."""
    try:
        height, width, subsampling = _jpeg_header(content)
        if height * width > _MAX_PIXELS:
            raise SampleError("image_too_large")
        orientation = _orientation(content)
        scaling: dict[str, int] = {}
        if config.decoder == "fast":
            # Only powers of 1/2: libjpeg-turbo's other scales are slower than its full decode.
            needed = max(max(size) for size in config.target_sizes)
            factor = next((factor for factor in (8, 4, 2) if min(height, width) >= factor * needed), 1)
            factor //= _COLOR_FACTORS.get(subsampling, 1)
            if factor > 1:
                scaling = {"min_height": -(-height // factor), "min_width": -(-width // factor), "min_factor": factor}
                scaling["fastupsample"] = 1
        pixels = np.asarray(simplejpeg.decode_jpeg(content, **scaling))
    except SampleError:
        raise
    except Exception as error:  # KeyError for 4:4:1, ValueError for damage: Pillow decides
        # But libjpeg would fill missing data with gray, as Pillow does.
        if any(what in str(error) for what in ("remature end", "bad Huffman code")):
            raise SampleError("image_undecodable") from None
        return None
    return turned(pixels, orientation), (width, height) if orientation in SIDEWAYS else (height, width)


def _jpeg_header(content: memoryview) -> tuple[int, int, str]:
    """Return the height, the width and the color subsampling of a JPEG, such as "420".

    Raises SampleError for a JPEG with too many scans, and nearly any other exception for one that Pillow should decode: a damaged
    one, and CMYK, which libjpeg converts to RGB with another rounding than Pillow.
    """
    height, width, colors, subsampling = simplejpeg.decode_jpeg_header(content)
    if _num_scans(content) * height * width > _MAX_SCANNED:
        raise SampleError("image_too_large")
    if colors in ("CMYK", "YCCK"):
        raise ValueError(colors)
    return height, width, subsampling


def _num_scans(content: bytes | memoryview) -> int:
    return bytes(content).count(bytes((0xFF, _JPEG_PIXELS)))  # no other bytes look like that marker


def _check_scans(opened: Image.Image, content: bytes | memoryview) -> None:
    """Raise DecompressionBombError for a JPEG with too many scans, before Pillow decodes it."""
    if opened.format in ("JPEG", "MPO") and _num_scans(content) * opened.width * opened.height > _MAX_SCANNED:
        raise Image.DecompressionBombError


def _orientation(content: memoryview) -> int:
    """Return the EXIF orientation of a JPEG. Raises ValueError if Pillow rejects the data before the pixels."""
    end = 2
    while end + 4 <= len(content) and content[end] == 0xFF and content[end + 1] != _JPEG_PIXELS:
        end += 1 if content[end + 1] == 0xFF else 2 + int.from_bytes(content[end + 2 : end + 4], "big")
    head = bytes(content[:end])
    if b"Exif\0" not in head and b"tiff:Orientation" not in head:
        return 1
    try:
        with _opened(head, ("JPEG",)) as opened:
            return exif_orientation(opened)
    except Exception as error:
        raise ValueError("a broken header") from error


def exif_orientation(opened: Image.Image) -> int:
    """Return the EXIF orientation. 1 is upright and 1 to 8 are valid, but a file may contain anything."""
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1  # garbage in the EXIF data; the image may be good


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return [H, W, 3] rotated upright from one of EXIF's orientations."""
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    if orientation in SIDEWAYS:
        pixels = pixels.swapaxes(0, 1)
    return np.ascontiguousarray(pixels)


def _by_pillow(content: memoryview) -> tuple[np.ndarray, tuple[int, int]]:
    """Return the pixels, rotated as the EXIF data says and with transparency on white, and their (height, width)."""
    try:
        with _opened(content, FORMATS) as opened:
            opened.load()
            orientation, image = exif_orientation(opened), opened
            if image.mode.startswith("I;16"):
                # Pillow's own conversion would clip 16 bits at 255, which gives a white image.
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            pixels = turned(np.array(image.convert("RGB")), orientation)
            return pixels, pixels.shape[:2]
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError):
        raise SampleError("image_too_large") from None
    except Exception:
        # Pillow's plugins raise nearly anything on broken files (OSError, SyntaxError, struct.error, EOFError, …).
        raise SampleError("image_undecodable") from None


@contextmanager
def _opened(content: memoryview | bytes, formats: tuple[str, ...]) -> Iterator[Image.Image]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken EXIF data
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=formats) as opened:
            _check_scans(opened, content)
            yield opened


def thumbnail_jpeg(pixels: np.ndarray) -> bytes:
    """[H, W, 3] uint8 -> a JPEG whose longer side has at most THUMBNAIL_SIZE pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85, subsampling=0)
    return buffer.getvalue()
