"""Draws SVG icons as 64x64 RGB PNGs on white, on several processes."""

import hashlib
import io
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import resvg_py
from PIL import Image

from diffdis_platform.demo.errors import DemoDataError
from diffdis_platform.demo.families import Icon

SIZE = 64


@dataclass(frozen=True)
class Picture:
    """A drawn icon: its PNG file, and a digest of its pixels that no PNG encoder's settings change."""

    png: bytes
    pixels_sha256: str


def svg_of(icon: Icon) -> str:
    """A square SVG document around the icon's body; the nested element centres it and clips it to its own box."""
    left, top, width, height = icon.box
    side = max(width, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {side:g} {side:g}">'
        f'<svg x="{(side - width) / 2:g}" y="{(side - height) / 2:g}" width="{width:g}" height="{height:g}" '
        f'viewBox="{left:g} {top:g} {width:g} {height:g}">{icon.body}</svg></svg>'
    )


def draw(icon: Icon) -> Picture:
    """One icon's picture; raises DemoDataError naming the icon when it is no valid SVG."""
    try:
        # Fonts of this machine would make the same build differ between machines.
        drawn = resvg_py.svg_to_bytes(
            svg_string=svg_of(icon), width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
        )
    except ValueError as error:
        raise DemoDataError(f"cannot draw {icon.family}:{icon.icon} ({error}): unpack the package again") from None
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=9)
    return Picture(file.getvalue(), hashlib.sha256(image.tobytes()).hexdigest())


def draw_all(icons: Sequence[Icon], num_processes: int) -> list[Picture]:
    """Every icon's picture, in order."""
    if num_processes <= 1:
        return [draw(icon) for icon in icons]
    # Spawned, not forked: the caller may hold threads (torch, Ray), which a fork would leave locked.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(draw, icons, chunksize=64))
