import functools
import io
import random
import struct
import warnings

import numpy as np
import pytest
import simplejpeg
from PIL import ExifTags, Image, ImageOps

from ray_platform.data.causes import SampleError
from ray_platform.data.config import DataConfig, FilterConfig
from ray_platform.data.decode import crop_box, image, nearest_size, resized, rgb
from tests.support.evaluation_sets import encoded

DAMAGED = {"image_empty", "image_undecodable", "image_too_large"}


@functools.cache
def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return noise at all scales, [H, W, 3], which is as hard for JPEG and resizing as a detailed photograph."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(128, 3, (height, width, 3))
    for cells in (4, 8, 16, 32, 64):
        shape = (max(2, height * cells // 256), max(2, width * cells // 256))
        for channel in range(3):
            layer = Image.fromarray(rng.normal(0, 70 / cells**0.6, shape).astype(np.float32))
            pixels[..., channel] += np.asarray(layer.resize((width, height), Image.Resampling.BICUBIC))
    return pixels.clip(0, 255).astype(np.uint8)


def decoded(content: bytes, size: int = 8, suffix: str = "jpg", seed: str = "", **fields) -> np.ndarray:
    return image({suffix: memoryview(content)}, DataConfig(image_size=size, **fields), seed)


def cause_of(content: bytes, **fields) -> str:
    with pytest.raises(SampleError) as raised:
        decoded(content, **fields)
    return raised.value.cause


def by_pillow(content: bytes, size: int, reduce: int = 1) -> np.ndarray:
    """Return the reference in the docstring of data/decode.py: a full decode, a crop and a bicubic resize."""
    whole = ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB").reduce(reduce)
    top, left, height, width = crop_box(whole.height, whole.width, (size, size), None)
    part = whole.crop((left, top, left + width, top + height))
    return np.asarray(part.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=None))


def difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    assert one.shape == other.shape
    assert one.dtype == other.dtype == np.uint8
    return np.abs(one.astype(int) - other)


def with_header_size(content: bytes, height: int, width: int) -> bytes:
    """Return a baseline JPEG whose header claims another size."""
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def jpeg_441(size: int = 64) -> bytes:
    """Return a JPEG with 4:4:1 sampling: a 4:2:0 one, which has as many blocks, with the other factors in its header."""
    content = bytearray(encoded(photo(size, size), "JPEG", subsampling=2))
    content[content.index(b"\xff\xc0") + 11] = 0x14
    return bytes(content)


def colors(height: int, width: int, cell: int) -> np.ndarray:
    """Return random colors of equal lightness, [H, W, 3], which change every `cell` pixels."""
    cells = np.random.default_rng(0).integers(64, 192, (height // cell + 1, width // cell + 1, 3), dtype=np.uint8)
    cells[..., 0] = 128
    smooth = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(Image.frombytes("YCbCr", (width, height), smooth.tobytes()).convert("RGB"))


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


# ------------------------------------------------------------------------------------------------------------ exactness

JPEGS = {
    "4:2:0": {"quality": 90, "subsampling": 2},
    "4:2:2": {"quality": 90, "subsampling": 1},
    "4:4:4": {"quality": 90, "subsampling": 0},
    "progressive": {"quality": 80, "progressive": True},
    "restarts": {"quality": 80, "restart_marker_rows": 2},
    "low": {"quality": 20},
}


SHAPES = ((300, 401), (257, 255), (97, 61))
OTHER_FORMATS = {
    "gray JPEG": encoded(photo(150, 200)[..., 0], "JPEG"),
    "CMYK JPEG": encoded(Image.fromarray(photo(150, 200)).convert("CMYK"), "JPEG"),
    "PNG": encoded(photo(150, 200), "PNG"),
    "gray PNG": encoded(photo(150, 200)[..., 1], "PNG"),
    "black and white PNG": encoded(Image.fromarray(photo(150, 200)).convert("1"), "PNG"),
    "palette PNG": encoded(Image.fromarray(photo(150, 200)).quantize(), "PNG"),
    "WEBP": encoded(photo(150, 200), "WEBP", quality=80),
    "lossless WEBP": encoded(photo(150, 200), "WEBP", lossless=True),
    "GIF": encoded(photo(150, 200), "GIF"),
    "BMP": encoded(photo(150, 200), "BMP"),
    "TIFF": encoded(photo(150, 200), "TIFF", compression="tiff_lzw"),
    "AVIF": encoded(photo(150, 200), "AVIF"),
}


@pytest.mark.parametrize(
    "content",
    [
        *(
            encoded(photo(*shape), "JPEG", **options)
            for options in JPEGS.values()
            for shape in ((300, 401), (257, 255), (97, 61))
        ),
        *OTHER_FORMATS.values(),
    ],
    ids=[*(f"{kind} {size}" for kind in JPEGS for size in ("large", "odd", "small")), *OTHER_FORMATS],
)
def test_exact_is_what_pillow_gives(content):
    for size in (40, 64, 96, 200, 260):  # 200 is larger than the smallest image
        error = difference(decoded(content, size), by_pillow(content, size))
        assert error.mean() <= 0.1
        assert error.max() <= 3


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "progressive"])
@pytest.mark.parametrize(
    ("shape", "factor"), [((200, 190), 1), ((257, 301), 2), ((399, 385), 2), ((515, 640), 4), ((777, 601), 4), ((1031, 1025), 8)]
)
def test_fast_takes_the_means_of_blocks_first(kind, shape, factor):
    content = encoded(photo(*shape), "JPEG", **JPEGS[kind])
    fast = decoded(content, 128, decoder="fast")
    assert difference(fast, by_pillow(content, 128, reduce=factor)).mean() < 2


@pytest.mark.parametrize("shape", [(200, 190), (257, 301), (399, 385), (515, 640), (1031, 1025)])
def test_fast_is_near_exact_where_there_is_little_detail(shape):
    blurred = Image.fromarray(photo(32, 40)).resize(shape[::-1], Image.Resampling.BICUBIC)
    content = encoded(blurred, "JPEG", quality=90)
    assert difference(decoded(content, 128, decoder="fast"), decoded(content, 128)).mean() < 1


@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_fast_keeps_color_at_the_resolution_of_the_target(subsampling, factor):
    pixels = np.ascontiguousarray(colors(140 * factor, 150 * factor, 8 * factor))
    content = simplejpeg.encode_jpeg(pixels, quality=95, colorsubsampling=subsampling)
    assert difference(decoded(content, 128, decoder="fast"), decoded(content, 128)).mean() < 1


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_a_subsampling_that_the_fast_library_lacks_is_left_to_pillow(decoder):
    content = jpeg_441()
    with pytest.raises(KeyError):  # else this test is void
        simplejpeg.decode_jpeg_header(content)
    assert difference(decoded(content, 24, decoder=decoder), by_pillow(content, 24)).mean() <= 0.1
    np.testing.assert_array_equal(rgb(content), np.asarray(Image.open(io.BytesIO(content)).convert("RGB")))  # in an evaluation
    with_orientation = encoded(photo(64, 64), "JPEG", exif=exif_of(6))
    turned = content[:2] + with_orientation[2 : with_orientation.index(b"\xff\xdb")] + content[2:]
    assert difference(decoded(turned, 24, decoder=decoder), by_pillow(turned, 24)).mean() <= 0.1


@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_the_size_filter_goes_by_the_file_not_by_what_was_decoded_of_it(decoder):
    content = encoded(photo(257, 301), "JPEG")  # decoded at half size, 129 x 151; doubling that would give 258
    assert decoded(content, 64, decoder=decoder, filters=FilterConfig(min_size=257)).shape == (64, 64, 3)
    assert cause_of(content, size=64, decoder=decoder, filters=FilterConfig(min_size=258)) == "filtered_size"


def test_which_member_is_the_image():
    good = memoryview(encoded(photo(9, 9), "PNG"))
    with pytest.raises(SampleError, match="image_missing"):
        image({"txt": good, "gif": good}, DataConfig(), "")
    assert image({"png": good}, DataConfig(image_size=4), "").shape == (4, 4, 3)
    # The format follows from the content, not the suffix. The first of IMAGE_SUFFIXES is used, regardless of the order in a tar.
    assert image({"webp": good}, DataConfig(image_size=4), "").shape == (4, 4, 3)
    with pytest.raises(SampleError, match="image_undecodable"):
        image({"png": good, "jpg": memoryview(b"broken")}, DataConfig(image_size=4), "")


# -------------------------------------------------------------------------------------------------------------- cropping


def test_the_centre_is_cropped():
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200
    assert (resized(stripes, (10, 10)) == 200).all()
    assert (resized(stripes.swapaxes(0, 1).copy(), (10, 10)) == 200).all()


def test_cropping_first_equals_resizing_the_whole_and_cropping():
    noise = photo(64, 96)
    whole = Image.fromarray(noise).resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    # Except at the border of the crop, where the neighboring pixels of the full image are missing.
    assert difference(resized(noise, (32, 32))[:, 2:-2], np.asarray(whole)[:, 2:-2]).max() <= 1


def test_a_random_crop_depends_on_its_seed_alone():
    content = encoded(photo(40, 160), "PNG")
    crops = [decoded(content, 40, crop="random", seed=f"0/0/s.tar/{number}") for number in range(12)]
    assert len({crop.tobytes() for crop in crops}) > 8
    again = [decoded(content, 40, crop="random", seed=f"0/0/s.tar/{number}") for number in reversed(range(12))]
    assert [crop.tobytes() for crop in crops] == [crop.tobytes() for crop in reversed(again)]
    pixels = np.asarray(Image.open(io.BytesIO(content)))
    columns = np.lib.stride_tricks.sliding_window_view(pixels, (40, 40, 3))[0, :, 0]
    assert all((columns == crop).all(axis=(1, 2, 3)).any() for crop in crops)  # each crop is a part of the image


def test_a_crop_is_inside_and_the_largest_of_its_shape():
    rng = random.Random(0)
    for _ in range(2000):
        height, width = rng.randint(1, 400), rng.randint(1, 400)
        target = rng.choice(((64, 64), (48, 80), (80, 48), (1, 10)))
        for chance in (None, rng):
            top, left, h, w = crop_box(height, width, target, chance)
            assert 0 <= top <= top + h <= height
            assert 0 <= left <= left + w <= width
            assert h >= 1 <= w
            assert h == height or w == width


def test_each_image_comes_in_the_bucket_of_its_shape():
    config = DataConfig(image_size=128, size_step=32, aspect_ratios=(0.5, 1.0, 2.0))
    assert config.target_sizes == ((192, 96), (128, 128), (96, 192))
    for shape, target in (((50, 50), (128, 128)), ((50, 60), (128, 128)), ((50, 90), (96, 192)), ((500, 30), (192, 96))):
        content = memoryview(encoded(photo(*shape), "JPEG"))
        assert image({"jpg": content}, config, "").shape == (*target, 3)
    # Distances are ratios: sqrt(2) = 1.414 is as far from 1 as from 2.
    assert [nearest_size(ratio, config.target_sizes) for ratio in (1.40, 1.43)] == [(128, 128), (96, 192)]
    assert nearest_size(1 / 1.43, config.target_sizes) == (192, 96)


# ------------------------------------------------------------------------------------------- orientation, modes, shapes


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))  # 0 and 9 are invalid
def test_images_are_turned_upright(file_format, orientation):
    content = encoded(photo(40, 64), file_format, exif=exif_of(orientation))
    assert difference(decoded(content, 32), by_pillow(content, 32)).mean() <= 0.1
    wide = DataConfig(image_size=32, size_step=8, aspect_ratios=(0.5, 2.0))
    upright = image({"jpg": memoryview(content)}, wide, "")
    assert (upright.shape[0] > upright.shape[1]) == (orientation in (5, 6, 7, 8))


def test_the_fast_decoder_turns_too_and_finds_exif_behind_other_segments():
    plain = encoded(photo(200, 300), "JPEG", exif=exif_of(6), icc_profile=b"x" * 100_000, comment=b"y" * 60_000)
    filled = plain[:2] + b"\xff\xff" + plain[2:]  # fill bytes are allowed before any marker
    for content in (plain, filled):
        assert difference(decoded(content, 64, decoder="fast"), by_pillow(content, 64)).mean() < 2


@pytest.mark.filterwarnings("error")
def test_garbage_for_exif_leaves_the_image_as_it_is():
    content = encoded(photo(40, 64), "JPEG", exif=exif_of(6))
    at = content.index(b"Exif\0\0") + 6
    for garbage in (b"ZZ", b"MM\0*\xff\xff\xff\xff"):
        broken = content[:at] + garbage + content[at + len(garbage) :]
        assert difference(decoded(broken, 32), by_pillow(encoded(photo(40, 64), "JPEG"), 32)).mean() <= 0.1


def test_transparency_is_put_on_white():
    clear = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    assert (decoded(encoded(clear, "PNG")) == 255).all()
    assert (decoded(encoded(clear, "WEBP", lossless=True)) == 255).all()
    assert (decoded(encoded(Image.new("LA", (9, 9), (0, 128)), "PNG")) == 127).all()
    for mode in ("P", "L", "RGB", "1"):
        key = (0, 0, 0) if mode == "RGB" else 0
        assert (decoded(encoded(Image.new(mode, (9, 9), 0), "PNG", transparency=key)) == 255).all()


def test_16_bits_are_not_clipped_to_white():
    assert (decoded(encoded(Image.fromarray(np.full((9, 9), 0x8000, np.uint16)), "PNG")) == 0x80).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 100_000), (100_000, 1), (2, 3)])
def test_extreme_shapes_stay_cheap(shape):
    for file_format in ("PNG", "JPEG") if max(shape) < 65_000 else ("PNG",):
        assert decoded(encoded(np.full((*shape, 3), 200, np.uint8), file_format), 256).shape == (256, 256, 3)


# --------------------------------------------------------------------------------------------------------------- damage

JPEG = encoded(photo(200, 260), "JPEG", quality=85)
PROGRESSIVE = encoded(photo(200, 260), "JPEG", quality=85, progressive=True)
PNG = encoded(photo(40, 50), "PNG")
WEBP = encoded(photo(40, 50), "WEBP")
EXIF_JPEG = encoded(photo(200, 260), "JPEG", quality=85, exif=exif_of(6))
JPEG_FILES = {"JPEG": JPEG, "progressive": PROGRESSIVE, "EXIF": EXIF_JPEG}


@pytest.mark.parametrize("decoder", ["exact", "fast"])
@pytest.mark.parametrize("kind", [*JPEG_FILES, "PNG", "WEBP"])
def test_truncated_images_are_rejected(kind, decoder):
    # libjpeg would fill the rest with gray and only warn.
    content = (JPEG_FILES | {"PNG": PNG, "WEBP": WEBP})[kind]
    lengths = [3, 100, *(round(len(content) * fraction) for fraction in (0.3, 0.5, 0.95))]
    if kind in JPEG_FILES:
        lengths += [len(content) - 13, len(content) - 2, len(content) - 1]
        # Pillow accepts half a JPEG followed by an end marker: the upper half of the image, and gray.
        half = content[: len(content) // 2] + b"\xff\xd9"
        assert by_pillow(half, 8).shape == (8, 8, 3)
        assert cause_of(half, decoder=decoder) == "image_undecodable"
    for length in lengths:
        assert cause_of(content[:length], decoder=decoder) == "image_undecodable"


def test_bytes_after_a_jpeg_do_not_matter():
    for behind in (b"\0" * 100, b"\xab" * 3000, b"\r\n"):
        np.testing.assert_array_equal(decoded(JPEG + behind, 32), decoded(JPEG, 32))
    padded = JPEG[:-2] + b"\0" * 7 + JPEG[-2:]
    assert difference(decoded(padded, 32), decoded(JPEG, 32)).mean() <= 0.1


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"", "image_empty"),
        (b"\0", "image_undecodable"),
        (b"\xff\xd8\xff", "image_undecodable"),
        (b"<html>404</html>", "image_undecodable"),
        ("Größe".encode(), "image_undecodable"),
        (encoded(Image.new("RGB", (9, 9)), "EPS"), "image_undecodable"),  # Pillow would start Ghostscript
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image_undecodable"),
        (PNG[:60] + b"\xff" * 8 + PNG[68:], "image_undecodable"),
        (with_header_size(JPEG, 12_000, 12_000), "image_too_large"),
        (with_header_size(JPEG, 60_000, 60_000), "image_too_large"),
        (with_header_size(EXIF_JPEG, 60_000, 60_000), "image_too_large"),
    ],
)
@pytest.mark.parametrize("decoder", ["exact", "fast"])
def test_files_that_are_not_images(content, cause, decoder):
    assert cause_of(content, decoder=decoder) == cause


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(8))
def test_any_damage_gives_an_image_that_pillow_decodes_too_or_a_cause(seed):
    rng = random.Random(seed)
    small = photo(30, 40)
    transparent = Image.fromarray(np.dstack([small, small[..., 0]]))
    whole = [
        encoded(small, "JPEG", exif=exif_of(6)),
        encoded(small, "JPEG", progressive=True),
        encoded(small, "JPEG", subsampling=0, optimize=True),
        encoded(Image.fromarray(small).convert("CMYK"), "JPEG"),
        encoded(small, "PNG"),
        encoded(Image.fromarray(small).quantize(), "PNG", transparency=0),
        encoded(small, "WEBP"),
        encoded(transparent, "WEBP", lossless=True),
    ]
    seen = set()
    for _ in range(400):
        content = bytearray(rng.choice(whole))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(min(len(content), rng.choice((64, 700, 10**6))))  # damage in headers matters most
            match rng.choice(("flip", "cut", "drop", "insert", "fill")):
                case "flip":
                    content[at] = rng.randrange(256)
                case "cut" if at > 3:
                    del content[at:]
                case "drop" if len(content) > 60:
                    del content[at : at + rng.randint(1, 50)]
                case "insert":
                    content[at:at] = rng.randbytes(rng.randint(1, 20))
                case _:
                    content[at : at + 8] = b"\xff" * 8
        try:
            pixels = decoded(bytes(content), 16, decoder=rng.choice(("exact", "fast")), crop="random", seed="s")
        except SampleError as unusable:
            seen.add(unusable.cause)
        else:
            assert (pixels.shape, pixels.dtype) == ((16, 16, 3), np.uint8)
            seen.add("good")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.open(io.BytesIO(content)).load()  # many flipped bytes give a valid stream of other pixels
    assert {"good", "image_undecodable"} <= seen <= {"good"} | DAMAGED
