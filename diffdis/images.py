"""Images as users have them, to the pixels that a model takes: upright, on white, 8 bits, cropped to a square and resized.

Training decodes the same way (`ray_platform.data.decode`), which a test holds together: a model must see at inference what it saw
in training. PNGs with transparency, rotated photographs and 16-bit files are where implementations differ.
"""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP")  # some of Pillow's other readers start programs

# A PIL image of any mode, a file, an array [H, W] or [H, W, 3 or 4] (uint8, uint16 or float in [0, 1]), or a tensor [3, H, W]
# (uint8 or float in [0, 1]).
ImageInput = Image.Image | str | Path | np.ndarray | torch.Tensor
ImagesInput = ImageInput | Sequence[ImageInput]  # also arrays [B, H, W, 3] and tensors [B, 3, H, W]


def as_image_list(images: ImagesInput) -> Sequence[ImageInput]:
    """Return one or many images as a sequence. Raises ValueError if there is none."""
    if isinstance(images, Image.Image | str | Path):
        return [images]
    if isinstance(images, np.ndarray | torch.Tensor):
        images = list(images) if images.ndim == 4 else [images]
    if not len(images):
        raise ValueError("images: empty; give at least one image")
    return images


def preprocess(images: Sequence[ImageInput], size: int) -> np.ndarray:
    """Crop images to a square from the center and resize them (bicubic), to [B, size, size, 3] uint8 RGB.

    An array that has this shape and type already stays as it is. Raises ValueError for what is not an image.
    """
    return np.stack([_pixels(image, size) for image in images])


def _pixels(image: ImageInput, size: int) -> np.ndarray:
    if isinstance(image, np.ndarray) and image.shape == (size, size, 3) and image.dtype == np.uint8:
        return image
    return np.asarray(ImageOps.fit(upright_rgb(_as_pil(image)), (size, size), Image.Resampling.BICUBIC))


def open_image(file: str | Path | bytes) -> Image.Image:
    """Open a file, or the content of a file, of a format that is safe to read. Raises ValueError if it is not such an image."""
    name = "the given bytes" if isinstance(file, bytes) else str(file)
    try:
        image = Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS)
        image.load()
    except FileNotFoundError:
        raise ValueError(f"images: {name}: no such file") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError):
        raise ValueError(f"images: {name}: not a readable JPEG, PNG or WebP") from None
    return image


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an image in RGB, rotated as its EXIF data says, transparency on white, 16 bits scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255, which gives a white image
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _as_pil(image: ImageInput) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, str | Path):
        return open_image(image)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu().permute(1, 2, 0).numpy() if image.ndim == 3 else image.detach().cpu().numpy()
    is_float = np.issubdtype(image.dtype, np.floating) and image.size > 0 and image.min() >= 0 and image.max() <= 1
    if is_float:
        image = (image * 255).round().astype(np.uint8)
    has_shape = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4) and image.dtype == np.uint8)
    if not has_shape or image.dtype not in (np.uint8, np.uint16) or not image.size:
        raise ValueError(
            f"images: {image.dtype} {image.shape} is not an image; give uint8 or floats in [0, 1], as an array [H, W, 3] or a "
            "tensor [3, H, W]"
        )
    return Image.fromarray(image.squeeze(axis=2) if image.ndim == 3 and image.shape[2] == 1 else image)
