"""Writes pairs as LAION-style tars and as CLIP_benchmark evaluation folders, byte for byte the same each time."""

import io
import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from diffdis_platform.demo.drawing import SIZE
from diffdis_platform.demo.splits import Pair

MAX_PAIRS_A_SHARD = 512
MIN_TRAIN_SHARDS = 8
TEMPLATE = "{c}"

T = TypeVar("T")


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            # TarInfo's own defaults are mtime 0, uid 0, gid 0 and no user name: nothing of this machine gets in.
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _chunks(samples: Sequence[T], min_shards: int) -> Iterator[Sequence[T]]:
    """Slices of equal length, give or take one: no shard is a small remainder that idles a reader."""
    num_shards = min(len(samples), max(min_shards, -(-len(samples) // MAX_PAIRS_A_SHARD)))
    bounds = [len(samples) * shard // num_shards for shard in range(num_shards + 1)] if num_shards else []
    for start, stop in itertools.pairwise(bounds):
        yield samples[start:stop]


def _metadata(pair: Pair, key: str) -> bytes:
    fields = {
        "key": key,
        "caption": pair.caption,
        "name": pair.name,
        "group": pair.group,
        "family": pair.icon.family,
        "icon": pair.icon.icon,
        "licence": pair.icon.licence,
        "width": SIZE,
        "height": SIZE,
    }
    return json.dumps(fields, ensure_ascii=False).encode()


def write_pairs(folder: Path, pairs: Sequence[Pair], min_shards: int = 1) -> None:
    """Write `folder/00000.tar ...` as img2dataset does: key.json, key.png and key.txt, keyed by shard and place."""
    folder.mkdir(parents=True)
    for shard, chunk in enumerate(_chunks(pairs, min_shards)):
        members = []
        for index, pair in enumerate(chunk):
            key = f"{shard:05d}{index:04d}"
            members += [
                (f"{key}.json", _metadata(pair, key)),
                (f"{key}.png", pair.picture.png),
                (f"{key}.txt", pair.caption.encode()),
            ]
        _write_tar(folder / f"{shard:05d}.tar", members)


def write_zero_shot(folder: Path, pairs: Sequence[Pair]) -> list[str]:
    """Write a zero-shot classification set in CLIP_benchmark's layout and return its class names in label order."""
    classes = sorted({pair.caption for pair in pairs})
    label_of = {caption: label for label, caption in enumerate(classes)}
    _write_test_split(folder, [{"cls": str(label_of[pair.caption]).encode(), "png": pair.picture.png} for pair in pairs])
    (folder / "classnames.txt").write_text("\n".join(classes), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text(TEMPLATE, encoding="utf-8")
    return classes


def write_retrieval(folder: Path, pairs: Sequence[Pair]) -> None:
    """Write a retrieval set in CLIP_benchmark's layout, with one caption an image."""
    _write_test_split(folder, [{"png": pair.picture.png, "txt": pair.caption.encode()} for pair in pairs])
    (folder / "dataset_type.txt").write_text("retrieval", encoding="utf-8")


def _write_test_split(folder: Path, samples: Sequence[dict[str, bytes]]) -> None:
    """Write `folder/test/0.tar ...`, each sample's members by their suffix."""
    (folder / "test").mkdir(parents=True)
    sample, num_shards = 0, 0
    for chunk in _chunks(samples, 1):
        members = []
        for content in chunk:
            members += [(f"s{sample:07d}.{suffix}", data) for suffix, data in content.items()]
            sample += 1
        _write_tar(folder / "test" / f"{num_shards}.tar", members)
        num_shards += 1
    (folder / "test" / "nshards.txt").write_text(str(num_shards), encoding="utf-8")
