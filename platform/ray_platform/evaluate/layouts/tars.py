"""Sets in tars: CLIP_benchmark's export, `wds_<name>/`, and DataComp's copies, `wds_<name>_test/`."""

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
from ray_platform.evaluate.classes import CLASSES, TEMPLATES, classification, read_lines, template_list
from ray_platform.evaluate.sets import REGISTRY, EvaluationSet, known, make_set
from ray_platform.evaluate.slices import IMAGES_A_SLICE, RawSample, SampleSchema, Slice
from ray_platform.storage import StoredFile

SPLIT = "test"
_TYPE, _NUM_SHARDS = "dataset_type.txt", "nshards.txt"
_LEAST_BYTES = 4 * tarfile.BLOCKSIZE  # of a sample: two members, a header and a block each
_INTEGER = re.compile(rb"\s*[+-]?\d{1,9}\s*")


@dataclass(frozen=True)
class TarSlice(Slice):
    """The samples that begin in bytes start..stop of a tar."""

    url: str
    tar: str  # its name in the set: keys begin with it
    size: int
    start: int
    stop: int

    def read(self) -> list[RawSample | RejectedSample]:
        suffixes = IMAGE_SUFFIXES if self.wanted.task == "images" else (*IMAGE_SUFFIXES, "cls", "txt")
        records = read_tar_slice(self.url, self.tar, self.size, self.start, self.stop, suffixes)
        if records == [RejectedSample(f"{self.tar}/", "shard_empty")]:
            if self.stop - self.start == self.size:
                raise DataError(f"{self.wanted.set_name}: {self.url} holds no samples; fetch the set again")
            return []  # it is within a very large member, or in the zeros that end a tar
        return [record if isinstance(record, RejectedSample) else self._sample(record) for record in records]

    def _sample(self, record: Record) -> RawSample | RejectedSample:
        members = record.members
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)
        if record.repeated:
            return RejectedSample(record.key, "key_repeated")
        if image is None:
            return RejectedSample(record.key, "image_missing")
        if self.wanted.task == "zeroshot_classification":
            if "cls" not in members:
                return RejectedSample(record.key, "label_missing")
            label = bytes(members["cls"])
            return (
                RawSample(record.key, image, int(label))
                if _INTEGER.fullmatch(label)
                else RejectedSample(record.key, "label_invalid")
            )
        if self.wanted.task == "images":
            return RawSample(record.key, image)
        if len(members.get("txt", b"")) > MAX_CAPTION_BYTES:
            return RejectedSample(record.key, "caption_too_long")
        try:
            lines = bytes(members.get("txt", b"")).decode().split("\n")
        except UnicodeDecodeError:
            return RejectedSample(record.key, "caption_not_utf8")
        # The exporter writes a line break within a caption as "\n".
        return RawSample(record.key, image, captions=tuple(line.strip().replace(r"\n", "\n") for line in lines if line.strip()))


def open_export(set_name: str, url: str) -> EvaluationSet | None:
    """A set as CLIP_benchmark exports it; None where there is none.

    Raises DataError where there is one with a shard missing, an unusable class list, or of a task that is not measured here.
    """
    folder = storage.join(url, SPLIT)
    if not storage.exists(folder):
        return None
    inside = storage.list_files(folder)
    tars = [file for file in inside if file.url.endswith(".tar")]
    counted = next((file.url for file in inside if posixpath.basename(file.url) == _NUM_SHARDS), None)
    if not tars and counted is None:
        return None
    beside = {posixpath.basename(file.url): file.url for file in storage.list_files(url)}
    if counted:
        _check_shards(set_name, counted, tars)
    words: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    if _task(set_name, beside.get(_TYPE)) == "retrieval":
        wanted = SampleSchema(set_name, "zeroshot_retrieval")
    else:
        if CLASSES not in beside:
            raise DataError(f"{set_name}: {url} has {SPLIT}/*.tar but no {CLASSES}; write it, a class a line in label order")
        classes = read_lines(beside[CLASSES])
        wanted = classification(set_name, classes, beside[CLASSES])
        words = classes, template_list(set_name, beside.get(TEMPLATES))
    return tar_set(wanted, url, "wds", words, tars)


def tar_set(
    wanted: SampleSchema, url: str, layout: str, words: tuple[Sequence[str], Sequence[str]], tars: Sequence[StoredFile]
) -> EvaluationSet:
    """A set of tars, large ones in parts. Raises DataError for an empty file among them."""
    if empty := [file.url for file in tars if not file.size]:
        raise DataError(f"{wanted.set_name}: {empty[0]} is empty (0 bytes); fetch the set again")
    named = sorted(_named([file.url for file in tars]).items(), key=lambda item: _in_order(item[1]))
    sizes = {file.url: file.size for file in tars}
    info = known(wanted)
    bytes_an_image = max(sum(sizes.values()) / info.num_images, _LEAST_BYTES) if info else NOMINAL_BYTES
    parts = [
        (tar, name, start, stop) for tar, name in named for start, stop in _cuts(sizes[tar], IMAGES_A_SLICE * bytes_an_image)
    ]
    slices: list[Slice] = []
    for place, (tar, name, start, stop) in enumerate(parts):
        label = name if stop - start == sizes[tar] else f"{name}[{start}:{stop}]"
        slices.append(TarSlice(wanted, place, label, (stop - start) / bytes_an_image, tar, name, sizes[tar], start, stop))
    return make_set(wanted, url, layout, words, [(name, sizes[tar]) for tar, name in named], slices, None)


def _cuts(size: int, bytes_a_slice: float) -> list[tuple[int, int]]:
    """Parts of about equal size. They depend on the set alone."""
    count = max(1, round(size / bytes_a_slice))
    step = math.ceil(size / count / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _named(urls: Sequence[str]) -> dict[str, str]:
    """URL -> name below the deepest folder that all share: the file name, for tars in one folder."""
    paths = {url: url.replace("://", ":/") for url in urls}
    shared = posixpath.commonpath([posixpath.dirname(path) for path in paths.values()])
    return {url: posixpath.relpath(path, shared) for url, path in paths.items()}


def _in_order(name: str) -> tuple[str, int, str]:
    """As they were written: 10.tar after 9.tar."""
    folder, base = posixpath.split(name)
    stem = base.removesuffix(".tar")
    return folder, int(stem) if stem.isdecimal() else -1, name


def _check_shards(set_name: str, counted: str, tars: Sequence[StoredFile]) -> None:
    """Whether there are the tars that nshards.txt speaks of, no less and no more."""
    text = storage.read_small(counted).strip()
    if not text.isdigit() or not 0 < int(text[:9]) == int(text[:20]):
        says = text[:40].decode(errors="replace")
        raise DataError(
            f"{set_name}: {counted} must have the number of shards, but says {says!r}; correct it, or fetch the set again"
        )
    wanted = {f"{number}.tar" for number in range(int(text))}
    there = {posixpath.basename(file.url) for file in tars}
    folder = counted.removesuffix(f"/{_NUM_SHARDS}")
    if missing := sorted(wanted - there, key=_in_order):
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise DataError(
            f"{set_name}: of the {len(wanted)} shards that {counted} counts, {folder}/{missing[0]}{more} missing; "
            "fetch the set again"
        )
    if extra := sorted(there - wanted, key=_in_order):
        raise DataError(
            f"{set_name}: {folder}/{extra[0]} is none of the {len(wanted)} shards that {counted} counts (0.tar to "
            f"{len(wanted) - 1}.tar); remove it, or correct the count"
        )


def _task(set_name: str, type_url: str | None) -> str:
    """What CLIP_benchmark calls the type of a set, which must be the registry's."""
    kind = (storage.read_small(type_url).decode(errors="replace").strip().lower() if type_url else "") or "classification"
    if kind not in ("classification", "retrieval"):
        raise DataError(f"{set_name}: {type_url} says {kind!r}; only classification and retrieval sets can be evaluated")
    info = REGISTRY.get(set_name)
    if info and info.task != f"zeroshot_{kind}":
        says = f"{type_url} says {kind!r}" if type_url else f"there is no {_TYPE}, which would say so"
        raise DataError(f"{set_name}: is a set for {info.task}, but {says}; fetch the set again")
    return kind
