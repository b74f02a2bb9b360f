"""`rgb` equals Pillow's conversion, pixel by pixel."""

import io
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_platform.data.causes import SampleError
from ray_platform.data.decode import rgb
from tests.support.evaluation_sets import encoded, picture

REAL = sorted((Path(find_spec("foolbox").origin).parent / "data").glob("*.*g"))
ORIENTATION = 0x0112


def photo(height: int = 120, width: int = 97) -> Image.Image:
    small = Image.fromarray(picture(3, 12, 17))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(photo(), "JPEG", exif=exif)


def with_alpha(mode: str) -> Image.Image:
    image = photo().convert(mode)
    image.putalpha(photo(120, 97).convert("L").transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return image


IMAGES = {
    "JPEG": encoded(photo(), "JPEG"),
    "JPEG of odd size": encoded(photo(61, 33), "JPEG"),
    "JPEG 4:4:4": encoded(photo(), "JPEG", subsampling=0, quality=97),
    "JPEG 4:2:2": encoded(photo(), "JPEG", subsampling=1),
    "coarse JPEG": encoded(photo(), "JPEG", quality=5),
    "progressive JPEG": encoded(photo(), "JPEG", progressive=True),
    "coarse progressive JPEG": encoded(photo(), "JPEG", progressive=True, quality=5),
    "gray JPEG": encoded(photo().convert("L"), "JPEG"),
    "CMYK JPEG": encoded(photo().convert("CMYK"), "JPEG"),
    "turned JPEG": turned(6),
    "mirrored JPEG": turned(2),
    "PNG": encoded(photo(), "PNG"),
    "gray PNG": encoded(photo().convert("L"), "PNG"),
    "black and white PNG": encoded(photo().convert("1"), "PNG"),
    "16 bit PNG": encoded(Image.fromarray((np.arange(2000).reshape(40, 50) * 30).astype(np.uint16)), "PNG"),
    "PNG with alpha": encoded(with_alpha("RGB"), "PNG"),
    "gray PNG with alpha": encoded(with_alpha("L"), "PNG"),
    "palette PNG": encoded(photo().quantize(40), "PNG", optimize=True),
    "transparent palette PNG": encoded(photo().quantize(40), "PNG", transparency=bytes(range(40))),
    "WebP": encoded(photo(), "WEBP", quality=80),
    "lossless WebP": encoded(photo(), "WEBP", lossless=True),
    "WebP with alpha": encoded(with_alpha("RGB"), "WEBP", lossless=True),
    "animated WebP": encoded(photo(), "WEBP", save_all=True, append_images=[photo().rotate(90)]),
    "GIF": encoded(photo(), "GIF"),
    "BMP": encoded(photo(), "BMP"),
    "one pixel": encoded(photo(1, 1), "PNG"),
}


def by_pillow(content: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as opened:
        return np.array(opened.convert("RGB"))


@pytest.mark.parametrize("kind", IMAGES)
def test_pixels_are_pillows(kind):
    for content in (IMAGES[kind], memoryview(IMAGES[kind])):
        pixels = rgb(content)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, by_pillow(IMAGES[kind]))


def test_the_kinds_that_need_care_are_among_them():
    modes = {kind: Image.open(io.BytesIO(content)).mode for kind, content in IMAGES.items()}
    assert (modes["CMYK JPEG"], modes["gray PNG with alpha"], modes["16 bit PNG"]) == ("CMYK", "LA", "I;16")
    assert "transparency" in Image.open(io.BytesIO(IMAGES["transparent palette PNG"])).info
    upright = rgb(encoded(photo(), "JPEG"))
    assert np.array_equal(rgb(IMAGES["turned JPEG"]), upright)  # the EXIF orientation is ignored


def test_real_images():
    assert len(REAL) == 100
    for path in REAL:
        assert np.array_equal(rgb(path.read_bytes()), by_pillow(path.read_bytes()))


def test_a_corrupt_jpeg_is_what_pillow_makes_of_it():
    """Pillow fills corrupt parts, and such images count in published scores; images that Pillow rejects are rejected."""
    content = bytearray(IMAGES["JPEG of odd size"])
    same = refused = 0
    for at in range(200, len(content), 9):
        broken = bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            expected = by_pillow(broken)
        except Exception:
            refused += 1
            with pytest.raises(SampleError):
                rgb(broken)
        else:
            same += 1
            assert np.array_equal(rgb(broken), expected)
    assert same > 30


def claimed(width: int, height: int) -> bytes:
    """Return a PNG whose header claims a size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return start + IMAGES["PNG"][33:]


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "image_empty"),
        (b"text", "image_undecodable"),
        (IMAGES["JPEG"][:900], "image_undecodable"),
        (IMAGES["PNG"][:900], "image_undecodable"),
        (IMAGES["WebP"][:300], "image_undecodable"),
        (b"\xff\xd8\xff" + b"\0" * 100, "image_undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "image_undecodable"),  # Pillow would start Ghostscript
        (claimed(60_000, 60_000), "image_too_large"),
    ],
)
def test_what_cannot_be_decoded(content, cause):
    with pytest.raises(SampleError, match=cause):
        rgb(content)
