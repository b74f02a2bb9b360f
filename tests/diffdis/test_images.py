"""User images are decoded to the same pixels at inference as in training."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffdis.images import as_image_list, open_image, preprocess, upright_rgb
from ray_platform.data import decode
from ray_platform.data.config import DataConfig

COLORS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **settings)
    return buffer.getvalue()


def rotated(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(Image.fromarray(COLORS), exif=exif)


def transparent(mode: str) -> Image.Image:
    alpha = np.linspace(0, 255, 256).reshape(16, 16, 1).astype(np.uint8)
    image = Image.fromarray(np.concatenate([COLORS, alpha], axis=2))
    return image.quantize(16) if mode == "P" else image.convert(mode)


FILES = {
    "plain": encoded(Image.fromarray(COLORS)),
    "gray": encoded(Image.fromarray(COLORS[:, :, 0])),
    "gray with transparency": encoded(transparent("LA")),
    "transparent": encoded(transparent("RGBA")),
    "transparent palette": encoded(transparent("P")),
    "16 bit": encoded(Image.fromarray(COLORS[:, :, 0].astype(np.uint16) * 257)),
    "webp": encoded(transparent("RGBA"), "WEBP", lossless=True),
    **{f"orientation {number}": rotated(number) for number in range(1, 9)},
}


@pytest.mark.parametrize("name", FILES)
def test_inference_and_training_see_the_same_pixels(name):
    suffix = "webp" if name == "webp" else "png"
    trained = decode.image({suffix: memoryview(FILES[name])}, DataConfig(image_size=16), "seed")
    assert np.array_equal(upright_rgb(open_image(FILES[name])), trained)


def test_transparent_is_white_and_16_bits_keep_their_levels():
    nothing = Image.new("RGBA", (4, 4), (9, 9, 9, 0))
    assert preprocess([nothing, Image.new("RGB", (4, 4), "white")], 4).min() == 255
    deep = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    assert preprocess([deep], 4).max() == 128


def test_any_form_of_an_image_gives_the_same_pixels(tmp_path):
    square = COLORS[:12, :12]
    (tmp_path / "image.png").write_bytes(encoded(Image.fromarray(square)))
    tensor = torch.from_numpy(square).permute(2, 0, 1)
    forms = [Image.fromarray(square), tmp_path / "image.png", str(tmp_path / "image.png"), square, square / 255, tensor]
    forms.append(tensor / 255)
    for form in forms:
        assert np.array_equal(preprocess(as_image_list(form), 12)[0], square)
    for many in (np.stack([square] * 2), torch.stack([tensor] * 2), [square, tmp_path / "image.png"]):
        assert preprocess(as_image_list(many), 8).shape == (2, 8, 8, 3)


@pytest.mark.parametrize("bad", [b"", b"not an image", encoded(Image.new("RGB", (4, 4)), "BMP"), FILES["plain"][:100]])
def test_what_is_not_a_safe_image_is_one_line(bad):
    with pytest.raises(ValueError, match="not a readable JPEG, PNG or WebP"):
        open_image(bad)
