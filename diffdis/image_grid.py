"""Grids of images with their captions."""

import math
import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def image_grid(images: Sequence[Image.Image], captions: Sequence[str], *, columns: int = 8, cell: int = 96) -> Image.Image:
    """Return one page with a cell for each image, `cell` pixels high, and its caption below.

    A caption of one line is wrapped to up to three lines; each line of a longer one is cut to the width. `…` marks what is cut.
    """
    width = round(max(cell * image.width / image.height for image in images))  # of a cell
    characters = max(8, width // 6)
    texts = [
        [line if len(line) <= characters else f"{line[: characters - 1]}…" for line in c.split("\n")]
        if "\n" in c
        else textwrap.wrap(c, characters, max_lines=3, placeholder="…")
        for c in captions
    ]
    font, text_height = ImageFont.load_default(size=11), max(3, *map(len, texts)) * 13 + 4
    rows = math.ceil(len(images) / columns)
    page = Image.new("RGB", (columns * (width + 8) + 8, rows * (cell + text_height + 4) + 8), "white")
    canvas = ImageDraw.Draw(page)
    for i, (image, lines) in enumerate(zip(images, texts, strict=True)):
        left, top = 8 + (i % columns) * (width + 8), 8 + (i // columns) * (cell + text_height + 4)
        resample = Image.Resampling.NEAREST if image.height <= cell // 2 else Image.Resampling.LANCZOS
        page.paste(image.resize((round(cell * image.width / image.height), cell), resample), (left, top))
        canvas.multiline_text((left, top + cell + 2), "\n".join(lines), fill="black", font=font, spacing=2)
    return page


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two images of one height as one, with a white line between them."""
    page = Image.new("RGB", (left.width + right.width + 2, left.height), "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + 2, 0))
    return page
