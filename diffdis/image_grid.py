"""Grids of images with their captions."""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def image_grid(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8, cell: int = 96) -> Image.Image:
    """Return one page with a cell for each image, `cell` pixels wide, and its caption in up to three lines below."""
    font = ImageFont.load_default(size=11)
    text_height = 3 * 13 + 4
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * (cell + 8) + 8, rows * (cell + text_height + 4) + 8), "white")
    canvas = ImageDraw.Draw(page)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = 8 + (i % columns) * (cell + 8), 8 + (i // columns) * (cell + text_height + 4)
        resample = Image.Resampling.NEAREST if image.width <= cell // 2 else Image.Resampling.LANCZOS
        page.paste(image.resize((cell, cell), resample), (left, top))
        lines = textwrap.wrap(caption, width=max(8, cell // 6))[:3]
        canvas.multiline_text((left, top + cell + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page
