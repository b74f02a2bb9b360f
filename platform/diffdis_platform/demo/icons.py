"""Emoji families of an unpacked @iconify/json folder: which icons are used, and their images."""

import hashlib
import io
import json
import multiprocessing
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import resvg_py
from PIL import Image

from ray_platform.contracts import DataError

SIZE = 64  # pixels of an image
FAMILIES = (
    "noto",
    "noto-v1",
    "fxemoji",
    "twemoji",
    "emojione",
    "streamline-emojis",
    "fluent-emoji",
    "fluent-emoji-flat",
    "openmoji",
)

TONE_SUFFIX = re.compile(r"-(?:(?:medium-)?(?:dark|light)|medium|tone[1-5])$")
NUMBER_SUFFIX = re.compile(r"-(\d+)$")

# Trademarks, software and persons among OpenMoji's extras: the drawing does not show what the caption names.
OPENMOJI_BRANDS = """
    adilette android apple arduino artstation bluesky c chrome chrome-canary chromium cplusplus crocs csharp discord
    dotnet ecosia-browser edge element facebook facetime firefox firefox-developer firefox-nightly github gitlab
    golang greta-thunberg hfg-hochschule-fur-gestaltung-schwabisch-gmund ibeacon inaturalist instagram
    internet-explorer javascript jellyfin kotlin linkedin markdown mastodon musicbrainz netscape-navigator
    openfoodfact openstreetmap opera peertube pinterest pixelfed raspberry-pi reddit ruby safari signal svg trump
    twitter typescript ubuntu webassembly wikidata windows winrar youtube
"""
# User-interface glyphs whose names are verbs or settings.
OPENMOJI_INTERFACE = """
    add-button add-contact archive arrow-turn-right authority chats close code-editor comment compose copy cursor
    delete details double-tap download duplicate edit exit filter forward hamburger-menu hold inbox intricate
    locomotion mark more-information move overview page-move return save scroll-horizontal share simple sort swipe
    swipe-down swipe-left swipe-right swipe-up switch tap three-finger-operation timer toggle-button
    toggle-button-state-b upload wireframes
"""
# Noto v1's digits contain <text>, which a renderer without its font draws as a blank image.
NOTO_V1_BLANK = """asterisk pound-symbol digit-zero digit-one digit-two digit-three digit-four digit-five digit-six
    digit-seven digit-eight digit-nine"""
DROPPED = {
    "openmoji": frozenset([*OPENMOJI_BRANDS.split(), *OPENMOJI_INTERFACE.split()]),
    "noto-v1": frozenset(NOTO_V1_BLANK.split()),
}


@dataclass(frozen=True)
class Icon:
    """An icon of the package."""

    family: str
    icon: str
    category: str
    licence: str
    body: str
    box: tuple[float, float, float, float]  # left, top, width, height in units of the icon


def read_json(path: Path) -> Any:
    """Return the content of a file of the package. Raises DataError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give the folder of an unpacked @iconify/json") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); unpack the package again") from None


def read_sets(package: Path) -> dict[str, dict[str, Any]]:
    """Return the nine icon sets by family, as parsed JSON. Raises DataError."""
    sets = {family: read_json(package / "json" / f"{family}.json") for family in FAMILIES}
    for family, icon_set in sets.items():
        if not icon_set.get("icons"):
            raise DataError(f"{package}/json/{family}.json holds no icons; unpack the package again")
    return sets


def _kept_names(family: str, icon_set: dict[str, Any]) -> list[str]:
    # The authors of a set hide icons that they renamed or withdrew: most are second copies under an old name.
    every = set(icon_set["icons"])
    shown = sorted(name for name in every if not icon_set["icons"][name].get("hidden"))
    return [
        name
        for name in shown
        if "skin-tone" not in name
        and not (TONE_SUFFIX.search(name) and TONE_SUFFIX.sub("", name) in every)
        and name not in DROPPED.get(family, ())
    ]


def _without_numbered_skins(names: list[str], category_of: dict[str, str]) -> list[str]:
    """Return the names without the numbered people of Streamline: their `-2` and `-3` are other skin colors.

    Numbered animals, things and faces are different drawings, and stay.
    """
    kept, seen = [], set()
    for name in names:
        number = NUMBER_SUFFIX.search(name)
        stem = NUMBER_SUFFIX.sub("", name)
        is_person = category_of.get(name) == "Smiley People" and not stem.endswith("-face")
        if number and is_person and (stem in seen):
            continue
        seen.add(stem)
        kept.append(name)
    return kept


def read_icons(sets: dict[str, dict[str, Any]]) -> Iterator[Icon]:
    """Yield the icons to use, by family and then by name."""
    for family, icon_set in sets.items():
        category_of = {name: group for group, names in icon_set.get("categories", {}).items() for name in names}
        names = _kept_names(family, icon_set)
        if family == "streamline-emojis":
            names = _without_numbered_skins(names, category_of)
        licence = icon_set["info"]["license"]
        for name in names:
            entry = icon_set["icons"][name]
            left, top, width, height = (
                float(entry.get(key, icon_set.get(key, default)))
                for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
            )
            category = category_of.get(name, "")
            spdx = licence.get("spdx", licence["title"])
            yield Icon(family, name, category, spdx, entry["body"], (left, top, width, height))


@dataclass(frozen=True)
class IconImage:
    """Image of an icon: its PNG file, and a digest of its pixels, which does not depend on the PNG encoder."""

    png: bytes
    pixels_sha256: str


def svg_of(icon: Icon) -> str:
    """Return a square SVG document around the icon, in which a nested element centers it and clips it to its box."""
    left, top, width, height = icon.box
    side = max(width, height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {side:g} {side:g}">'
        f'<svg x="{(side - width) / 2:g}" y="{(side - height) / 2:g}" width="{width:g}" height="{height:g}" '
        f'viewBox="{left:g} {top:g} {width:g} {height:g}">{icon.body}</svg></svg>'
    )


def draw(icon: Icon) -> IconImage:
    """Return the image of an icon. Raises DataError if it is not valid SVG."""
    try:
        # With the fonts of this machine, the same build would differ between machines.
        drawn = resvg_py.svg_to_bytes(
            svg_string=svg_of(icon), width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True
        )
    except ValueError as error:
        raise DataError(f"{icon.family}:{icon.icon}: cannot be drawn ({error}); unpack the package again") from None
    image = Image.open(io.BytesIO(bytes(drawn))).convert("RGB")
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=9)
    return IconImage(file.getvalue(), hashlib.sha256(image.tobytes()).hexdigest())


def draw_all(icons: Sequence[Icon], num_processes: int) -> list[IconImage]:
    """Return the images of the icons, in order."""
    if num_processes <= 1:
        return [draw(icon) for icon in icons]
    # Spawned, not forked: a fork would leave the locks of the caller's threads (torch, Ray) locked.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(draw, icons, chunksize=64))
