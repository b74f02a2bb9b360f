"""Which shards there are."""

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ray_platform import storage
from ray_platform.contracts import DataError


@dataclass(frozen=True)
class Shard:
    """A tar of samples.

    `name` is its URL below the deepest folder that all shards of the source share: the file name, for shards in one
    folder. Order, shuffling and sample keys go by it, so they stay the same when the whole source is moved.
    """

    url: str
    size: int  # bytes
    name: str


def list_shards(sources: Sequence[str]) -> tuple[Shard, ...]:
    """All tars that `sources` name (see `storage.list_files`; of a folder, all its *.tar), once each, sorted by name.

    Raises DataError for no sources, a missing one, or one that holds no tars or only empty files.
    """
    if not sources:
        raise DataError("data.sources is empty; name a folder, glob or brace pattern of tars, local or s3://")
    tars: dict[str, int] = {}
    for source in sources:
        files = storage.list_files(source)
        found = {file.url: file.size for file in files if file.url.endswith(".tar")}
        if not any(found.values()):
            raise DataError(f"{source}: no .tar shards in it; {_what_is_there(files)}; correct the source")
        tars.update(found)
    parents = {url.rpartition("/")[0] for url in tars}
    shared = posixpath.commonpath(parents) if len({"://" in url for url in tars}) == 1 else ""
    return tuple(
        sorted(
            (Shard(url, size, _below(url, shared)) for url, size in tars.items()),
            key=lambda shard: shard.name,
        )
    )


def digest(shards: Sequence[Shard]) -> str:
    """16 hex digits that change when a shard is added, removed, renamed or resized, not when the source is moved."""
    text = json.dumps(sorted((shard.name, shard.size) for shard in shards))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _below(url: str, folder: str) -> str:
    # posixpath.commonpath gives "s3:/bucket" for "s3://bucket/…".
    return posixpath.relpath(url.replace("://", ":/"), folder) if folder else url


def _what_is_there(files: Sequence[storage.StoredFile]) -> str:
    if not files:
        return "it is empty"
    if any(file.url.endswith(".tar") for file in files):
        return "its tars are empty files (0 bytes)"
    suffixes = Counter(posixpath.splitext(file.url)[1] or "no suffix" for file in files)
    kinds = ", ".join(f"{count} × {suffix}" for suffix, count in sorted(suffixes.items()))
    return f"there are {kinds} instead, such as {posixpath.basename(files[0].url)}"
