"""Build of the demo data, which is skipped if the data exist."""

import collections
import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from diffdis_platform.demo.icons import FAMILIES, SIZE, draw_all, read_icons, read_json, read_sets
from diffdis_platform.demo.naming import Names, captions_of, groups_of
from diffdis_platform.demo.package import NAME, VERSION, find_package
from diffdis_platform.demo.shards import MIN_TRAIN_SHARDS, write_pairs, write_retrieval, write_zero_shot
from diffdis_platform.demo.splits import HELDOUT_FAMILY, SPLITS, Pair, split_pairs
from ray_platform.contracts import DataError

# Increase this number when a build writes other data: older data are then built again instead of being reused.
BUILDER_VERSION = 2
CACHE = ".cache"
RETRIEVAL = "wds_heldout_pairs"


@dataclass(frozen=True)
class Pins:
    """Expected counts and digest of keys and captions.

    Pixels are recorded in the manifest but not pinned: another version of the renderer may round an edge differently,
    which does not matter. If it makes two images equal, one held-out image is dropped and the counts differ.
    """

    num_pairs: dict[str, int]
    num_names: dict[str, int]
    entries_sha256: str
    resvg: str


PINS = Pins(
    num_pairs={"train": 10500, "heldout_style": 1732, "heldout_names": 1235},
    num_names={"train": 2254, "heldout_style": 1732, "heldout_names": 233},
    entries_sha256="951ef7cf97d35c5792e15732f8e3b1d6e15c99771d5bebd1e3ce167f3c26e330",
    resvg="0.5.0",
)


def build(output: Path, source: Path | None, num_processes: int, pins: Pins | None) -> str:
    """Build the demo data in `output` unless they exist, and return one line for the user.

    Args:
        output: folder of the data.
        source: unpacked package or its .tgz; None: npm downloads it.
        num_processes: processes that draw icons.
        pins: expected content; None for a package that is not the published one.

    Raises:
        DataError: the package or `output` cannot be used, or the content differs from `pins`.
    """
    output = output.absolute()
    manifest = _manifest_of_complete(output, pins)
    if manifest is not None:
        return f"{output} is complete; nothing to do: {_summary(manifest)}"
    _check_replaceable(output)
    package = find_package(source, output / CACHE)
    splits = split_pairs(_read_pairs(package, num_processes))
    manifest = _describe(splits)
    if pins is not None:
        _check(manifest, pins)
    with _staged(output) as stage:
        _write(stage, splits, manifest, package)
    return f"built {output}: {_summary(manifest)}"


def _read_pairs(package: Path, num_processes: int) -> list[Pair]:
    sets = read_sets(package)
    names = Names(sets)
    concepts = {icon: name for icon in read_icons(sets) if (name := names.concept(icon))}
    captions = captions_of(set(concepts.values()))
    groups = groups_of(concepts)
    images = draw_all(list(concepts), num_processes)
    return [
        Pair(icon, name, captions[name], groups[name], image)
        for (icon, name), image in zip(concepts.items(), images, strict=True)
    ]


def _describe(splits: dict[str, list[Pair]]) -> dict[str, Any]:
    entries, pixels = hashlib.sha256(), hashlib.sha256()
    for split in SPLITS:
        for pair in splits[split]:
            fields = (split, pair.icon.family, pair.icon.icon, pair.name, pair.caption, pair.group, pair.icon.licence)
            entries.update("\t".join(fields).encode() + b"\n")
            pixels.update(pair.image.pixels_sha256.encode())
    by_family = {split: collections.Counter(pair.icon.family for pair in splits[split]) for split in SPLITS}
    return {
        "builder": BUILDER_VERSION,
        "package": f"{NAME}@{VERSION}",
        "resvg": metadata.version("resvg-py"),
        "size": SIZE,
        "heldout_family": HELDOUT_FAMILY,
        "num_pairs": {split: len(splits[split]) for split in SPLITS},
        "num_names": {split: len({pair.name for pair in splits[split]}) for split in SPLITS},
        "num_pairs_by_family": {split: dict(sorted(by_family[split].items())) for split in SPLITS},
        "entries_sha256": entries.hexdigest(),
        "pixels_sha256": pixels.hexdigest(),
    }


def _check(manifest: dict[str, Any], pins: Pins) -> None:
    for field in ("num_pairs", "num_names", "entries_sha256"):
        if manifest[field] != getattr(pins, field):
            raise DataError(
                f"{field}: {manifest[field]} instead of {getattr(pins, field)} from {NAME} {VERSION} and resvg-py {pins.resvg}; "
                f"the files of the package were changed, or resvg-py is {manifest['resvg']}"
            )


def _write(stage: Path, splits: dict[str, list[Pair]], manifest: dict[str, Any], package: Path) -> None:
    for split in SPLITS:
        write_pairs(stage / split, splits[split], MIN_TRAIN_SHARDS if split == "train" else 1)
        if split != "train":
            write_zero_shot(stage / f"wds_{split}", splits[split])
    write_retrieval(stage / RETRIEVAL, splits["heldout_style"])  # in which every caption has one image
    (stage / "NOTICE").write_text(_notice(package), encoding="utf-8")
    manifest["files"] = _digests(stage)
    (stage / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _notice(package: Path) -> str:
    collections_of = read_json(package / "collections.json")
    lines = [
        f"The images are emoji drawings from the npm package {NAME} {VERSION}, each family under its own licence.",
        f"They were changed: drawn as {SIZE}x{SIZE} pixel PNGs on white, without skin-tone variants, and captioned",
        "with names that are the same for all families. The .json next to each image names its family and licence.",
    ]
    for family in FAMILIES:
        if family not in collections_of:
            raise DataError(f"{package}/collections.json lacks {family!r}; unpack the package again")
        info = collections_of[family]
        author, licence = info["author"], info["license"]
        lines += [
            "",
            f"{family}: {info['name']}",
            f"  by {author['name']} ({author.get('url', '')})",
            f"  licence: {licence['title']} ({licence.get('url', '')})",
        ]
    return "\n".join(lines) + "\n"


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "manifest.json" and CACHE not in path.relative_to(folder).parts
    }


def _manifest_of_complete(output: Path, pins: Pins | None) -> dict[str, Any] | None:
    """Return the manifest in `output` if this version of the builder wrote it and no file changed, or None."""
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_current = isinstance(manifest, dict) and manifest.get("builder") == BUILDER_VERSION
    if not is_current or manifest.get("package") != f"{NAME}@{VERSION}":
        return None
    if pins is not None and manifest.get("entries_sha256") != pins.entries_sha256:
        return None
    return manifest if manifest.get("files") == _digests(output) else None


def _check_replaceable(output: Path) -> None:
    """Raise DataError if `output` holds other files, because a build replaces the folder."""
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is not a folder; choose another --output")
    known = {*SPLITS, "wds_heldout_style", "wds_heldout_names", RETRIEVAL, "NOTICE", "manifest.json", CACHE}
    foreign = sorted(path.name for path in output.iterdir() if path.name not in known) if output.exists() else []
    if foreign:
        raise DataError(f"{output}: holds {foreign[0]!r}, which is not demo data; choose an empty or new folder as --output")


@contextlib.contextmanager
def _staged(output: Path) -> Iterator[Path]:
    """Yield a folder that replaces `output` at the end, and is removed after an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    stage = output.with_name(f".{output.name}.building-{os.getpid()}")
    former = output.with_name(f".{output.name}.former-{os.getpid()}")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir()
    try:
        yield stage
        if (output / CACHE).exists():
            (output / CACHE).rename(stage / CACHE)
        if output.exists():
            output.rename(former)
        stage.rename(output)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


def _summary(manifest: dict[str, Any]) -> str:
    parts = [f"{manifest['num_pairs'][split]} {split} ({manifest['num_names'][split]} names)" for split in SPLITS]
    return ", ".join(parts)
