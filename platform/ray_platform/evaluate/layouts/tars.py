"""Webdataset-style sets: CLIP_benchmark's exports, `wds_<name>/`, and DataComp's copies, `wds_<name>_test/`.

They are written with `webdataset` (the demo's sets and those of the tests), but read by `ray_platform.data.tar`. Webdataset reads
no byte ranges, so that several replicas could not share one tar; it groups adjacent members only; and a damaged or truncated tar
raises an exception or silently ends, while an evaluation must count every image that could not be read.
"""

import math
import posixpath
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.captions import MAX_CAPTION_BYTES
from ray_platform.data.catalog import NOMINAL_BYTES
from ray_platform.data.causes import RejectedSample
from ray_platform.data.tar import IMAGE_SUFFIXES, Record, read_tar_slice
from ray_platform.evaluate.classes import CLASSES_FILE, classification_schema, list_sidecars, load_templates, read_lines
from ray_platform.evaluate.samples import IMAGES_PER_SLICE, DatasetSlice, RawSample, SampleSchema
from ray_platform.evaluate.sets import KNOWN_SETS, ClassTexts, EvaluationSet, build_set
from ray_platform.storage import StoredFile

SPLIT = "test"
_TYPE_FILE, _NUM_SHARDS_FILE = "dataset_type.txt", "nshards.txt"
_MIN_SAMPLE_BYTES = 4 * tarfile.BLOCKSIZE  # two members, each with a header and at least one block
_INTEGER = re.compile(rb"\s*[+-]?\d{1,9}\s*")


@dataclass(frozen=True)
class TarSlice(DatasetSlice):
    """The samples that begin in bytes start..stop of a tar."""

    url: str
    tar: str  # the name of the tar in the set; keys begin with it
    size: int
    start: int
    stop: int

    def read(self) -> list[RawSample | RejectedSample]:
        suffixes = IMAGE_SUFFIXES if self.schema.task == "images" else (*IMAGE_SUFFIXES, "cls", "txt")
        records = read_tar_slice(self.url, self.tar, self.size, self.start, self.stop, suffixes)
        if records == [RejectedSample(f"{self.tar}/", "shard_empty")]:
            if self.stop - self.start == self.size:
                raise DataError(f"{self.schema.set_name}: {self.url} has no samples; download the set again")
            return []  # the slice is inside a very large member, or in the zeros at the end of the tar
        return [record if isinstance(record, RejectedSample) else self._sample(record) for record in records]

    def _sample(self, record: Record) -> RawSample | RejectedSample:
        members = record.members
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if record.repeated:
            return RejectedSample(record.key, "key_repeated")
        if image is None:
            return RejectedSample(record.key, "image_missing")
        if self.schema.task == "images":
            return RawSample(record.key, image)
        if self.schema.task == "zeroshot_classification":
            if "cls" not in members:
                return RejectedSample(record.key, "label_missing")
            label = bytes(members["cls"])
            if not _INTEGER.fullmatch(label):
                return RejectedSample(record.key, "label_invalid")
            return RawSample(record.key, image, int(label))
        text = bytes(members.get("txt", b""))
        if len(text) > MAX_CAPTION_BYTES:
            return RejectedSample(record.key, "caption_too_long")
        try:
            lines = text.decode().split("\n")
        except UnicodeDecodeError:
            return RejectedSample(record.key, "caption_not_utf8")
        # The exporter writes a line break within a caption as "\n".
        return RawSample(record.key, image, captions=tuple(line.strip().replace(r"\n", "\n") for line in lines if line.strip()))


def open_wds(set_name: str, url: str) -> EvaluationSet | None:
    """Return the set that CLIP_benchmark exported to a folder; None when the folder has another layout.

    Raises:
        DataError: A shard is missing, the class list cannot be used, or the set is for a task that is not evaluated.
    """
    folder = storage.join(url, SPLIT)
    if not storage.exists(folder):
        return None
    split_files = storage.list_files(folder)
    tars = [file for file in split_files if file.url.endswith(".tar")]
    num_shards_url = next((file.url for file in split_files if posixpath.basename(file.url) == _NUM_SHARDS_FILE), None)
    if not tars and num_shards_url is None:
        return None
    if num_shards_url is not None:
        _check_shards(set_name, num_shards_url, tars)
    sidecars = list_sidecars(url)
    if _read_task(set_name, sidecars.get(_TYPE_FILE)) == "zeroshot_retrieval":
        return build_tar_set(SampleSchema(set_name, "zeroshot_retrieval"), url, "wds", ClassTexts(), tars)
    if CLASSES_FILE not in sidecars:
        raise DataError(f"{set_name}: {url} has {SPLIT}/*.tar but no {CLASSES_FILE}; write one class per line, in label order")
    classes = read_lines(sidecars[CLASSES_FILE])
    schema = classification_schema(set_name, classes, sidecars[CLASSES_FILE])
    return build_tar_set(schema, url, "wds", ClassTexts(classes, load_templates(set_name, sidecars)), tars)


def build_tar_set(schema: SampleSchema, url: str, layout: str, texts: ClassTexts, tars: Sequence[StoredFile]) -> EvaluationSet:
    """Return the set of these tars; large ones have several slices. Raises DataError for an empty file."""
    if empty := [file.url for file in tars if not file.size]:
        raise DataError(f"{schema.set_name}: {empty[0]} is empty (0 bytes); download the set again")
    names, sizes = _names_below_common_folder([file.url for file in tars]), {file.url: file.size for file in tars}
    ordered = sorted(names.items(), key=lambda item: _sort_key(item[1]))
    known = KNOWN_SETS.get(schema.set_name)
    if known and known.task == schema.task:
        bytes_per_image = max(sum(sizes.values()) / known.num_images, _MIN_SAMPLE_BYTES)
    else:
        bytes_per_image = NOMINAL_BYTES
    slices: list[DatasetSlice] = []
    for tar, name in ordered:
        for start, stop in _cut(sizes[tar], IMAGES_PER_SLICE * bytes_per_image):
            label = name if stop - start == sizes[tar] else f"{name}[{start}:{stop}]"
            estimate = (stop - start) / bytes_per_image
            slices.append(TarSlice(schema, len(slices), label, estimate, tar, name, sizes[tar], start, stop))
    return build_set(schema, url, layout, texts, [(name, sizes[tar]) for tar, name in ordered], slices, None)


def _cut(size: int, bytes_per_slice: float) -> list[tuple[int, int]]:
    """Return the borders of slices of about equal size, in whole blocks. They depend on the set alone."""
    count = max(1, round(size / bytes_per_slice))
    step = math.ceil(size / count / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _names_below_common_folder(urls: Sequence[str]) -> dict[str, str]:
    """Return URL -> name below the deepest folder that all URLs share: the file name, for tars in one folder."""
    paths = {url: url.replace("://", ":/") for url in urls}
    shared = posixpath.commonpath([posixpath.dirname(path) for path in paths.values()])
    return {url: posixpath.relpath(path, shared) for url, path in paths.items()}


def _sort_key(name: str) -> tuple[str, int, str]:
    """Sort tars as they were written: 10.tar after 9.tar."""
    folder, base = posixpath.split(name)
    stem = base.removesuffix(".tar")
    return folder, int(stem) if stem.isdecimal() else -1, name


def _check_shards(set_name: str, num_shards_url: str, tars: Sequence[StoredFile]) -> None:
    """Check that the tars are those that nshards.txt counts, no fewer and no more."""
    text = storage.read_small(num_shards_url).strip()
    if not text.isdigit() or not 0 < int(text[:9]) == int(text[:20]):
        content = text[:40].decode(errors="replace")
        raise DataError(
            f"{set_name}: {num_shards_url} is {content!r} instead of the number of shards; correct it, or download the set again"
        )
    expected = {f"{number}.tar" for number in range(int(text))}
    existing = {posixpath.basename(file.url) for file in tars}
    folder = num_shards_url.removesuffix(f"/{_NUM_SHARDS_FILE}")
    if missing := sorted(expected - existing, key=_sort_key):
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise DataError(
            f"{set_name}: {num_shards_url} counts {len(expected)} shards, but {folder}/{missing[0]}{more} missing; "
            "download the set again"
        )
    if extra := sorted(existing - expected, key=_sort_key):
        raise DataError(
            f"{set_name}: {num_shards_url} counts {len(expected)} shards (0.tar to {len(expected) - 1}.tar), but there is also "
            f"{folder}/{extra[0]}; remove it, or correct the count"
        )


def _read_task(set_name: str, type_url: str | None) -> str:
    """Return the task that dataset_type.txt names in CLIP_benchmark's words, which must be the known set's task."""
    kind = (storage.read_small(type_url).decode(errors="replace").strip().lower() if type_url else "") or "classification"
    if kind not in ("classification", "retrieval"):
        raise DataError(f"{set_name}: {type_url} is {kind!r}; only classification and retrieval sets can be evaluated")
    known = KNOWN_SETS.get(set_name)
    if known and known.task != f"zeroshot_{kind}":
        reason = f"{type_url} is {kind!r}" if type_url else f"there is no {_TYPE_FILE} that names the type"
        raise DataError(f"{set_name}: is a set for {known.task}, but {reason}; download the set again")
    return f"zeroshot_{kind}"
