"""Shards of pairs as img2dataset writes them, and evaluation sets in CLIP_benchmark's layout."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import webdataset

from diffdis_platform.demo.icons import SIZE
from diffdis_platform.demo.splits import Pair

MAX_PAIRS_PER_SHARD = 512
MIN_TRAIN_SHARDS = 8
TEMPLATE = "{c}"

T = TypeVar("T")


def write_pairs(folder: Path, pairs: Sequence[Pair], min_shards: int = 1) -> None:
    """Write `folder/00000.tar ...` with key.json, key.png and key.txt, keyed by shard and index."""
    folder.mkdir(parents=True)
    for shard, chunk in enumerate(_chunks(pairs, min_shards)):
        keys = [f"{shard:05d}{index:04d}" for index in range(len(chunk))]
        samples = [
            {"__key__": key, "json": _metadata(pair, key), "png": pair.image.png, "txt": pair.caption}
            for key, pair in zip(keys, chunk, strict=True)
        ]
        _write_tar(folder / f"{shard:05d}.tar", samples)


def write_zero_shot(folder: Path, pairs: Sequence[Pair]) -> None:
    """Write a zero-shot classification set; the labels are the places of the captions in alphabetical order."""
    classes = sorted({pair.caption for pair in pairs})
    label_of = {caption: label for label, caption in enumerate(classes)}
    _write_test_split(folder, [{"cls": label_of[pair.caption], "png": pair.image.png} for pair in pairs])
    (folder / "classnames.txt").write_text("\n".join(classes), encoding="utf-8")
    (folder / "zeroshot_classification_templates.txt").write_text(TEMPLATE, encoding="utf-8")


def write_retrieval(folder: Path, pairs: Sequence[Pair]) -> None:
    """Write a retrieval set with one caption per image."""
    _write_test_split(folder, [{"png": pair.image.png, "txt": pair.caption} for pair in pairs])
    (folder / "dataset_type.txt").write_text("retrieval", encoding="utf-8")


def _write_test_split(folder: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Write `folder/test/0.tar ...` and the number of shards."""
    (folder / "test").mkdir(parents=True)
    keyed = [{"__key__": f"s{index:07d}"} | dict(sample) for index, sample in enumerate(samples)]
    chunks = list(_chunks(keyed, 1))
    for shard, chunk in enumerate(chunks):
        _write_tar(folder / "test" / f"{shard}.tar", chunk)
    (folder / "test" / "nshards.txt").write_text(str(len(chunks)), encoding="utf-8")


def _write_tar(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    # The same bytes on every machine and at any time: no name of a user, and no time.
    with webdataset.TarWriter(str(path), user="", group="", mtime=0) as tar:
        for sample in samples:
            tar.write(dict(sample))


def _chunks(samples: Sequence[T], min_shards: int) -> Iterator[Sequence[T]]:
    """Yield slices whose lengths differ by at most one, so that no reader is idle while another reads a longer shard."""
    num_shards = min(len(samples), max(min_shards, -(-len(samples) // MAX_PAIRS_PER_SHARD)))
    bounds = [len(samples) * shard // num_shards for shard in range(num_shards + 1)] if num_shards else []
    for start, stop in itertools.pairwise(bounds):
        yield samples[start:stop]


def _metadata(pair: Pair, key: str) -> dict[str, object]:
    return {
        "key": key, "caption": pair.caption, "name": pair.name, "group": pair.group, "family": pair.icon.family,
        "icon": pair.icon.icon, "licence": pair.icon.licence, "width": SIZE, "height": SIZE,
    }  # fmt: skip
