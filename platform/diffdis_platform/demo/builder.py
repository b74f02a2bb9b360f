"""Build of the demo data, which is skipped if the data exist: pairs in three splits, as shards and as evaluation sets."""

import collections
import hashlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import webdataset

from diffdis_platform.demo.icons import FAMILIES, NAME, SIZE, VERSION, Pair, find_package, read_json, read_pairs
from ray_platform.contracts import DataError

# Increase this number when a build writes other data: older data are then built again instead of being reused.
BUILDER_VERSION = 3
CACHE = ".cache"
SPLITS = ("train", "heldout_style", "heldout_names")
RETRIEVAL = "wds_heldout_pairs"
HELDOUT_FAMILY = "twemoji"
HELDOUT_ONE_IN = 10
MAX_PAIRS_PER_SHARD = 512
MIN_TRAIN_SHARDS = 8

T = TypeVar("T")
TarSample = dict[str, object]  # content by suffix
DemoManifest = dict[str, Any]  # manifest.json: versions, counts and digests


# Of the splits, names, captions, groups and licences that the published package gives. Pixels are not pinned: another version of
# the renderer may round an edge differently, which does not matter.
ENTRIES_SHA256 = "951ef7cf97d35c5792e15732f8e3b1d6e15c99771d5bebd1e3ce167f3c26e330"


def build(output: Path, source: Path | None, num_processes: int, entries_sha256: str | None) -> str:
    """Build the demo data in `output` unless they exist, and return one line for the user.

    Args:
        output: folder of the data.
        source: unpacked package or its .tgz; None: npm downloads it.
        num_processes: processes that draw icons.
        entries_sha256: expected digest of the content; None for a package that is not the published one.

    Raises:
        DataError: the package or `output` cannot be used, or the content is not the expected one.
    """
    output = output.absolute()
    manifest = _manifest_of_complete(output, entries_sha256)
    if manifest is not None:
        return f"{output} is complete; nothing to do: {_summary(manifest)}"
    _check_replaceable(output)
    package = find_package(source, output / CACHE)
    splits = split_pairs(read_pairs(package, num_processes))
    manifest = _describe(splits)
    if entries_sha256 not in (None, manifest["entries_sha256"]):
        raise DataError(
            f"entries_sha256: {manifest['entries_sha256'][:16]} instead of {ENTRIES_SHA256[:16]}, with {_summary(manifest)}; "
            f"the files of {NAME} {VERSION} were changed, or resvg-py is {manifest['resvg']} instead of 0.5.0"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        stage = Path(folder) / output.name
        for split, pairs in splits.items():
            _write_pairs(stage / split, pairs, MIN_TRAIN_SHARDS if split == "train" else 1)
            if split != "train":
                _write_zero_shot(stage / f"wds_{split}", pairs)
        _write_retrieval(stage / RETRIEVAL, splits["heldout_style"])  # in which every caption has one image
        (stage / "NOTICE").write_text(_notice(package), encoding="utf-8")
        manifest["files"] = _digests(stage)
        (stage / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if (output / CACHE).exists():
            (output / CACHE).rename(stage / CACHE)
        if output.exists():
            output.rename(Path(folder) / "former")
        stage.rename(output)
    return f"built {output}: {_summary(manifest)}"


# --- Splits ---------------------------------------------------------------------------------------------------------------------


def split_pairs(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Return the pairs of each split, shuffled.

    train: all families but the held-out one, without the held-out names; equal images of one name are kept once.
    heldout_style: the held-out family's images of names that occur in train.
    heldout_names: every family's images of the held-out names.
    The held-out family's images of names that are neither in train nor held out are in no split, and neither are held-out
    images with the same pixels as one in train.
    """
    train: dict[tuple[str, str], Pair] = {}
    style, unseen = [], []
    for pair in pairs:
        if is_heldout_name(pair.name):
            unseen.append(pair)
        elif pair.icon.family == HELDOUT_FAMILY:
            style.append(pair)
        else:
            train.setdefault((pair.name, pair.pixels_sha256), pair)
    train_names, train_images = {name for name, _ in train}, {pixels for _, pixels in train}
    known_style = [pair for pair in style if pair.name in train_names]
    return {
        "train": _shuffled(train.values()),
        "heldout_style": _shuffled(_without_copies(known_style, train_images)),
        "heldout_names": _shuffled(_without_copies(unseen, train_images)),
    }


def is_heldout_name(name: str) -> bool:
    """Return whether a name is held out, which depends on the name alone, so that it holds for every family."""
    return int(_digest(f"heldout:{name}"), 16) % HELDOUT_ONE_IN == 0


def _shuffled(pairs: Iterable[Pair]) -> list[Pair]:
    # A digest as sort key shuffles independently of the version of a random generator.
    return sorted(pairs, key=lambda pair: _digest(f"order:{pair.icon.family}:{pair.icon.icon}"))


def _without_copies(pairs: Sequence[Pair], taken: set[str]) -> list[Pair]:
    """Return the pairs without images in `taken`, and with one pair per image: an image of two classes has no right answer.

    The name with the fewest words stays: "flag of spain", not "flag of ceuta and melilla", whose flag is the same.
    """
    first: dict[str, Pair] = {}
    for pair in sorted(pairs, key=lambda pair: (pair.name.count("-"), pair.name, pair.icon.family, pair.icon.icon)):
        first.setdefault(pair.pixels_sha256, pair)
    return [pair for pixels, pair in first.items() if pixels not in taken]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- Shards as img2dataset writes them, and evaluation sets in CLIP_benchmark's layout ------------------------------------------


def _write_pairs(folder: Path, pairs: Sequence[Pair], min_shards: int) -> None:
    """Write `folder/00000.tar ...` with key.json, key.png and key.txt, keyed by shard and index, and their numbers of samples."""
    folder.mkdir(parents=True)
    for shard, part in enumerate(_shards(pairs, min_shards)):
        samples: list[TarSample] = []
        for index, pair in enumerate(part):
            key, icon = f"{shard:05d}{index:04d}", pair.icon
            info = {
                "key": key, "caption": pair.caption, "name": pair.name, "group": pair.group, "family": icon.family,
                "icon": icon.icon, "licence": icon.licence, "width": SIZE, "height": SIZE,
            }  # fmt: skip
            samples.append({"__key__": key, "json": info, "png": pair.png, "txt": pair.caption})
        _write_tar(folder / f"{shard:05d}.tar", samples)
        (folder / f"{shard:05d}_stats.json").write_text(json.dumps({"successes": len(samples)}), encoding="utf-8")


def _write_zero_shot(folder: Path, pairs: Sequence[Pair]) -> None:
    """Write a zero-shot classification set; the labels are the places of the captions in alphabetical order."""
    classes = sorted({pair.caption for pair in pairs})
    _write_test_split(folder, [{"cls": classes.index(pair.caption), "png": pair.png} for pair in pairs])
    (folder / "classnames.txt").write_text("\n".join(classes), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text("{c}", encoding="utf-8")


def _write_retrieval(folder: Path, pairs: Sequence[Pair]) -> None:
    """Write a retrieval set with one caption per image."""
    _write_test_split(folder, [{"png": pair.png, "txt": pair.caption} for pair in pairs])
    (folder / "dataset_type.txt").write_text("retrieval", encoding="utf-8")


def _write_test_split(folder: Path, samples: Sequence[TarSample]) -> None:
    """Write `folder/test/0.tar ...` and the number of shards."""
    (folder / "test").mkdir(parents=True)
    shards = _shards([{"__key__": f"s{index:07d}"} | sample for index, sample in enumerate(samples)], 1)
    for number, shard in enumerate(shards):
        _write_tar(folder / "test" / f"{number}.tar", shard)
    (folder / "test" / "nshards.txt").write_text(str(len(shards)), encoding="utf-8")


def _write_tar(path: Path, samples: Sequence[TarSample]) -> None:
    # The same bytes on every machine and at any time: no name of a user, and no time.
    with webdataset.TarWriter(str(path), user="", group="", mtime=0) as tar:
        for sample in samples:
            tar.write(sample)


def _shards(samples: Sequence[T], min_shards: int) -> list[Sequence[T]]:
    """Return slices whose lengths differ by at most one, so that no reader is idle while another reads a longer shard."""
    num_shards = min(len(samples), max(min_shards, -(-len(samples) // MAX_PAIRS_PER_SHARD)))
    bounds = [len(samples) * shard // max(1, num_shards) for shard in range(num_shards + 1)]
    return [samples[start:stop] for start, stop in itertools.pairwise(bounds)]


# --- What was built -------------------------------------------------------------------------------------------------------------


def _describe(splits: Mapping[str, Sequence[Pair]]) -> DemoManifest:
    entries, pixels = hashlib.sha256(), hashlib.sha256()
    for split, pairs in splits.items():
        for pair in pairs:
            fields = (split, pair.icon.family, pair.icon.icon, pair.name, pair.caption, pair.group, pair.icon.licence)
            entries.update("\t".join(fields).encode() + b"\n")
            pixels.update(pair.pixels_sha256.encode())
    return {
        "builder": BUILDER_VERSION,
        "package": f"{NAME}@{VERSION}",
        "resvg": metadata.version("resvg-py"),
        "size": SIZE,
        "heldout_family": HELDOUT_FAMILY,
        "num_pairs": {split: len(pairs) for split, pairs in splits.items()},
        "num_names": {split: len({pair.name for pair in pairs}) for split, pairs in splits.items()},
        "num_pairs_by_family": {
            split: collections.Counter(pair.icon.family for pair in pairs) for split, pairs in splits.items()
        },
        "entries_sha256": entries.hexdigest(),
        "pixels_sha256": pixels.hexdigest(),
    }


def _summary(manifest: DemoManifest) -> str:
    return ", ".join(f"{manifest['num_pairs'][split]} {split} ({manifest['num_names'][split]} names)" for split in SPLITS)


def _notice(package: Path) -> str:
    families = read_json(package / "collections.json")
    lines = [
        f"The images are emoji drawings from the npm package {NAME} {VERSION}, each family under its own licence.",
        f"They were changed: drawn as {SIZE}x{SIZE} pixel PNGs on white, without skin-tone variants, and captioned",
        "with names that are the same for all families. The .json next to each image names its family and licence.",
    ]
    for family in FAMILIES:
        if family not in families:
            raise DataError(f"{package}/collections.json lacks {family!r}; unpack the package again")
        author, licence = families[family]["author"], families[family]["license"]
        lines += [
            "",
            f"{family}: {families[family]['name']}",
            f"  by {author['name']} ({author.get('url', '')})",
            f"  licence: {licence['title']} ({licence.get('url', '')})",
        ]
    return "\n".join(lines) + "\n"


# --- The folder -----------------------------------------------------------------------------------------------------------------


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "manifest.json")
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if CACHE not in path.relative_to(folder).parts
    }


def _manifest_of_complete(output: Path, entries_sha256: str | None) -> DemoManifest | None:
    """Return the manifest in `output` if this version of the builder wrote it and no file changed, or None."""
    try:
        manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    expected = {"builder": BUILDER_VERSION, "package": f"{NAME}@{VERSION}"}
    expected |= {"entries_sha256": entries_sha256} if entries_sha256 else {}
    is_current = isinstance(manifest, dict) and expected.items() <= manifest.items()
    return manifest if is_current and manifest.get("files") == _digests(output) else None


def _check_replaceable(output: Path) -> None:
    """Raise DataError if `output` holds other files, because a build replaces the folder."""
    if output.exists() and not output.is_dir():
        raise DataError(f"{output}: is not a folder; choose another --output")
    known = {*SPLITS, "wds_heldout_style", "wds_heldout_names", RETRIEVAL, "NOTICE", "manifest.json", CACHE}
    foreign = sorted({path.name for path in output.iterdir()} - known) if output.exists() else []
    if foreign:
        raise DataError(f"{output}: holds {foreign[0]!r}, which is not demo data; choose an empty or new folder as --output")
