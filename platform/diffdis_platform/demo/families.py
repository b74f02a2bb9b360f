"""Reads the emoji families of an unpacked @iconify/json folder and drops what is no picture of a concept."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdis_platform.demo.errors import DemoDataError

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

# Trade marks, software and persons among OpenMoji's extras: a caption names them, a drawing does not explain them.
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
# Noto v1's bare digits hold <text>, which no renderer without its font can draw: they come out blank.
NOTO_V1_BLANK = """asterisk pound-symbol digit-zero digit-one digit-two digit-three digit-four digit-five digit-six
    digit-seven digit-eight digit-nine"""
DROPPED = {
    "openmoji": frozenset([*OPENMOJI_BRANDS.split(), *OPENMOJI_INTERFACE.split()]),
    "noto-v1": frozenset(NOTO_V1_BLANK.split()),
}


@dataclass(frozen=True)
class Icon:
    """One drawing as the package holds it."""

    family: str
    icon: str
    category: str
    licence: str
    body: str
    box: tuple[float, float, float, float]  # left, top, width, height in the drawing's own units


def read_json(path: Path) -> Any:
    """Parse one file of the package; raises DemoDataError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DemoDataError(f"{path} is missing: is its folder an unpacked @iconify/json?") from None
    except ValueError as error:
        raise DemoDataError(f"{path} is not valid JSON ({error}): unpack the package again") from None


def read_sets(package: Path) -> dict[str, dict[str, Any]]:
    """The nine icon sets by family name, as parsed JSON."""
    sets = {family: read_json(package / "json" / f"{family}.json") for family in FAMILIES}
    for family, icon_set in sets.items():
        if not icon_set.get("icons"):
            raise DemoDataError(f"{package}/json/{family}.json holds no icons: unpack the package again")
    return sets


def _kept_names(family: str, icon_set: dict[str, Any]) -> list[str]:
    # "hidden" marks what the set's authors renamed or withdrew: most are second copies under an old name.
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
    """Streamline numbers its drawings of one concept: of people, `-2` and `-3` are other skin colours, so drop them.

    Of animals, things and faces they are drawings of their own, and stay.
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
    """The drawings to use, by family and then by name."""
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
