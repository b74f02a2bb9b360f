"""The catalog: the shards of a configuration, their sizes, and how many samples they contain."""

import functools
import hashlib
import json
import logging
import operator
import posixpath
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, cast

from ray_platform import storage
from ray_platform.contracts import DataError, one_line
from ray_platform.data.causes import SourceSize
from ray_platform.data.config import DataConfig
from ray_platform.data.precomputed import PrecomputedManifest
from ray_platform.formats import FileFormat
from ray_platform.json_values import JsonObject
from ray_platform.names import is_pattern

logger = logging.getLogger(__name__)

CATALOG_FORMAT = FileFormat("catalog")
PRECOMPUTED_FORMAT = FileFormat("manifest of precomputed shards")
MANIFEST = "manifest.json"  # in a folder of precomputed shards: which encoders wrote them
SUFFIXES = (".tar", ".arrow")
_COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip")
NOMINAL_BYTES = 40_000  # of a sample whose size is not known
_MIN_SAMPLE_BYTES = 1024  # in a tar: a header and a block
_MAX_SIDECAR_BYTES = 2**20


class Shard(NamedTuple):
    """A tar of samples, or an Arrow file of precomputed samples.

    `name` is its URL below the deepest folder that all shards of the source share: the file name, for shards in one
    folder. Order, shuffling and sample keys depend on it alone, so they stay the same when the source is moved.
    """

    url: str
    size: int  # bytes
    name: str
    num_samples: int = -1  # from img2dataset's `_stats.json`; -1: not known


class ShardRange(NamedTuple):
    """A unit of reading: bytes start..stop of a shard. Only very large shards have more than one."""

    shard: Shard
    start: int
    stop: int

    @property
    def is_whole_shard(self) -> bool:
        return self.stop - self.start == self.shard.size

    @property
    def known_samples(self) -> int:
        """The number of samples; -1: not known."""
        return self.shard.num_samples if self.is_whole_shard else -1

    @property
    def nominal_samples(self) -> int:
        """An estimate for shards of which nothing is known: 40 kB per sample."""
        return max(1, round((self.stop - self.start) / NOMINAL_BYTES))


@dataclass(frozen=True)
class Catalog:
    """All shards of a configuration, in pools that are mixed by weight."""

    shards: tuple[Shard, ...]  # of all pools, sorted by name
    pools: tuple[tuple[ShardRange, ...], ...]
    weights: tuple[float, ...]  # per pool, with the sum 1
    manifest: PrecomputedManifest | None = None  # of precomputed shards
    sources: tuple[int, ...] = ()  # per shard: the index in data.sources of the source that names it

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that change when a shard is added, removed, renamed or resized, not when the source is moved."""
        text = json.dumps([[(unit.shard.name, unit.shard.size, unit.start) for unit in pool] for pool in self.pools])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @functools.cached_property
    def num_units(self) -> tuple[int, ...]:
        return tuple(len(pool) for pool in self.pools)

    @property
    def num_bytes(self) -> int:
        return sum(shard.size for shard in self.shards)

    @property
    def num_samples(self) -> int | None:
        """The number of samples, or None if it is not known for every shard."""
        counts = [shard.num_samples for shard in self.shards]
        return sum(counts) if min(counts) >= 0 else None

    @functools.cached_property
    def size(self) -> SourceSize:
        """What is known of the number of samples of an epoch."""
        units = [unit for pool in self.pools for unit in pool]
        counts = [unit.known_samples for unit in units if unit.known_samples >= 0]
        return SourceSize(sum(counts), len(units) - len(counts), sum(map(self.estimated_samples, units)) / len(units))

    @functools.cached_property
    def _bytes_per_sample(self) -> float:
        known = [shard for shard in self.shards if shard.num_samples > 0]
        return sum(s.size for s in known) / sum(s.num_samples for s in known) if known else NOMINAL_BYTES

    def of_source(self, number: int) -> tuple[Shard, ...]:
        """Return the shards of a source, with the names that they have if it is the only source."""
        shards = [shard for shard, source in zip(self.shards, self.sources, strict=True) if source == number]
        shared = _shared_folder(shard.url for shard in shards)
        return tuple(Shard(shard.url, shard.size, _below(shard.url, shared), shard.num_samples) for shard in shards)

    def estimated_samples(self, unit: ShardRange) -> float:
        """Return the number of samples of a unit, from its shard's count if that is known, else from its size."""
        shard, length = unit.shard, unit.stop - unit.start
        return shard.num_samples * length / max(1, shard.size) if shard.num_samples > 0 else length / self._bytes_per_sample


def build_catalog(config: DataConfig, cached: bytes | None = None) -> Catalog:
    """List all shards that `config.sources` name (of a folder, all its *.tar or *.arrow), each of them once.

    `cached` is the result of `to_json` of an earlier catalog, whose counts are not read again. Raises DataError if there are no
    sources, or one of them is missing, or has no shards or only empty files.
    """
    if not config.sources:
        raise DataError("data.sources: empty; name a folder, glob or brace pattern of tars, local or s3://")
    source_of: dict[str, int] = {}  # url -> index of its source
    listed: dict[str, storage.StoredFile] = {}
    sidecars: set[str] = set()
    for number, source in enumerate(config.sources):
        files = storage.list_files(source)
        tars = [file for file in files if file.url.endswith(SUFFIXES)]
        if not any(file.size for file in tars):
            raise DataError(f"{source}: no .tar shards in it; {_describe_files(source, files)}; correct the source")
        for file in tars:
            if config.weights and source_of.get(file.url, number) != number:
                raise DataError(f"{file.url}: is in two of the data.sources; with data.weights, name it in one of them")
            source_of.setdefault(file.url, number)
            listed[file.url] = file
        sidecars |= _sidecars(source, files)
    if lost := [url for url in sorted(listed) if not listed[url].size]:
        logger.warning("%d of %d shards are empty files or links to nothing, such as %s", len(lost), len(listed), lost[0])
    kinds = {posixpath.splitext(url)[1]: url for url in sorted(listed)}
    if len(kinds) > 1:
        raise DataError(
            f"data.sources: contain both .tar shards ({kinds['.tar']}) and precomputed .arrow shards ({kinds['.arrow']}); "
            "name one kind, by a pattern such as *.tar where they share a folder"
        )
    manifest, counts = _read_manifests(list(listed)) if ".arrow" in kinds else (None, _counts(listed, sidecars, cached))
    shared = _shared_folder(listed)
    shards = [Shard(url, file.size, _below(url, shared), counts.get(url, -1)) for url, file in listed.items()]
    shards.sort(key=lambda shard: shard.name)
    pools: list[list[ShardRange]] = [[] for _ in (config.weights or (1.0,))]
    for shard in shards:
        pools[source_of[shard.url] if config.weights else 0].extend(_units(shard, config.max_read_mb * 2**20))
    total = sum(config.weights) or 1.0
    return Catalog(
        tuple(shards),
        tuple(map(tuple, pools)),
        tuple(weight / total for weight in config.weights or (1.0,)),
        manifest,
        tuple(source_of[shard.url] for shard in shards),
    )


def to_json(catalog: Catalog) -> bytes:
    """Return the shards and their counts as JSON, to be stored with a run."""
    values = {"digest": catalog.digest, "shards": [list(shard) for shard in catalog.shards]}
    return json.dumps(CATALOG_FORMAT.stamp(values)).encode()


def _from_json(saved: bytes) -> JsonObject:
    """Return what `to_json` wrote. Raises DataError."""
    try:
        return CATALOG_FORMAT.read(json.loads(saved), ("digest", "shards"), "catalog.json")
    except (ValueError, AttributeError, RecursionError) as error:
        problem = f"is damaged ({one_line(error, 100)}); remove it from output_dir, if the shards are those of before"
        raise DataError(f"catalog.json: {problem}") from None


def difference(saved: bytes, catalog: Catalog) -> str:
    """Return what changed since `saved`, in one line; empty if nothing did."""
    values = _from_json(saved)
    if values["digest"] == catalog.digest:
        return ""
    before = {name: size for _, size, name, *_ in values["shards"]}
    now = {shard.name: shard.size for shard in catalog.shards}
    changes = {
        "added": sorted(now.keys() - before.keys()),
        "removed": sorted(before.keys() - now.keys()),
        "resized": sorted(name for name in now.keys() & before.keys() if now[name] != before[name]),
    }
    described = [
        f"{len(names)} {change} ({names[0]}{', …' if len(names) > 1 else ''})" for change, names in changes.items() if names
    ]
    return ", ".join(described) or "the same shards in other pools or parts (data.weights, data.max_read_mb)"


def _units(shard: Shard, max_bytes: int) -> list[ShardRange]:
    """Split a large tar at multiples of its block size. Arrow files cannot be split."""
    if shard.size <= max_bytes or not shard.url.endswith(".tar"):
        return [ShardRange(shard, 0, shard.size)]
    return [ShardRange(shard, start, min(start + max_bytes, shard.size)) for start in range(0, shard.size, max_bytes)]


def _sidecars(source: str, files: Sequence[storage.StoredFile]) -> set[str]:
    """Return the URLs of the `_stats.json` next to the shards of a source, which a pattern of shards does not name."""
    listed = list(files)
    if source.endswith(".tar") and not source.startswith(("http://", "https://")):  # web servers seldom list folders
        for folder in sorted({file.url.rpartition("/")[0] for file in files}):
            with suppress(storage.StorageError):  # counts are optional
                listed += storage.list_folder(folder, "*_stats.json")
    return {file.url for file in listed if file.url.endswith("_stats.json") and file.size <= _MAX_SIDECAR_BYTES}


def _counts(listed: Mapping[str, storage.StoredFile], sidecars: set[str], cached: bytes | None) -> dict[str, int]:
    """Return URL -> samples from img2dataset's sidecars. Each is a small request, so a run reads them only once."""
    known = {}
    if cached:
        for url, size, _, count in _from_json(cached)["shards"]:
            if url in listed and listed[url].size == size and count >= 0:
                known[url] = count
    wanted = {f"{url[:-4]}_stats.json": url for url in listed if url not in known}
    largest = max(file.size for file in listed.values())
    for sidecar, content in storage.read_many(sorted(wanted.keys() & sidecars)).items():
        with suppress(ValueError, KeyError, TypeError, OverflowError, RecursionError):  # counts are optional
            count = int(json.loads(content)["successes"])
            if 0 <= count * _MIN_SAMPLE_BYTES <= largest:  # a shard that was damaged may be smaller than its samples were
                known[wanted[sidecar]] = count
    return known


def _read_manifests(urls: Sequence[str]) -> tuple[PrecomputedManifest, dict[str, int]]:
    """Return the manifest of precomputed shards, and URL -> samples.

    Raises DataError if a folder has no complete manifest, the folders' manifests differ, or one does not name a shard.
    """
    folders = sorted({url.rpartition("/")[0] for url in urls})
    manifests: list[PrecomputedManifest] = []
    counts: dict[str, int] = {}
    for folder in folders:
        url = storage.join(folder, MANIFEST)
        try:
            manifest: PrecomputedManifest = json.loads(storage.read_small(url, storage.LISTING_BYTES))
            PRECOMPUTED_FORMAT.check_version(cast(JsonObject, manifest), url)
            origin = (manifest["encoders"], manifest["settings"])
            if manifest["complete"]:
                counts |= {storage.join(folder, name): operator.index(count) for name, count in manifest["shards"].items()}
        except storage.StorageError as error:
            if error.kind != "missing":
                raise
            raise DataError(
                f"{url}: is missing, so the encoders of the .arrow shards are not known; "
                "name a folder that jobs/precompute.py wrote"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise DataError(f"{url}: is not a manifest of precomputed shards; run jobs/precompute.py again") from None
        if not manifest["complete"]:
            raise DataError(f"{folder}: precomputing it did not finish ({MANIFEST}); run jobs/precompute.py again to resume it")
        manifests.append(manifest)
        if origin != (manifests[0]["encoders"], manifests[0]["settings"]):
            raise DataError(
                f"data.sources: {folders[0]} and {folder} were precomputed with different encoders or settings; use one of them"
            )
    for url in urls:
        if url not in counts:
            raise DataError(
                f"{url}: is not in the {MANIFEST} of its folder; remove it, or run jobs/precompute.py in a new folder"
            )
    return manifests[0], counts


def _shared_folder(urls: Iterable[str]) -> str:
    """Return the deepest folder above all shards; empty for shards both in S3 and in folders."""
    parents = {url.rpartition("/")[0] for url in urls}
    return posixpath.commonpath(parents) if len({"://" in parent for parent in parents}) == 1 else ""


def _below(url: str, folder: str) -> str:
    if not folder:
        return url
    # posixpath.commonpath returns "s3:/bucket" for "s3://bucket/…".
    path = url.replace("://", ":/")
    name = path.removeprefix(f"{folder}/")
    # `relpath` takes 20 times as long: half a minute for the shards of LAION-5B.
    is_normal = name != path and posixpath.normpath(name) == name
    return name if is_normal else posixpath.relpath(path, folder)


def _describe_files(source: str, files: Sequence[storage.StoredFile]) -> str:
    if not is_pattern(source):
        below = [file.url for file in storage.list_folder(source, "*/*") if file.url.endswith(SUFFIXES)]
        if below:
            pattern = storage.join(source, f"*/*{posixpath.splitext(below[0])[1]}")
            return f"its subfolders have {len(below)}, such as {below[0]}: name them by the pattern {pattern}"
    if not files:
        return "it is empty"
    if compressed := [file.url for file in files if file.url.endswith(_COMPRESSED)]:
        return f"it contains {len(compressed)} compressed files, such as {posixpath.basename(compressed[0])}: decompress them"
    if any(file.url.endswith(SUFFIXES) for file in files):
        return "its shards are empty files (0 bytes)"
    suffixes = Counter(posixpath.splitext(file.url)[1] or "no suffix" for file in files)
    kinds = ", ".join(f"{count} × {suffix}" for suffix, count in sorted(suffixes.items()))
    return f"it contains {kinds}, such as {posixpath.basename(files[0].url)}"
