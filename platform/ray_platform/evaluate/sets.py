"""Evaluation sets: the published ones (`KNOWN_SETS`, from sets.json), and sets whose data was found, with slices and samples.

Add a zero-shot dataset by adding one entry below "sets" in sets.json. Plain Python: no Ray.
"""

import hashlib
import json
import posixpath
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import RejectedSample, lost_cause
from ray_platform.storage import StoredFile

# About so many, whatever the number of replicas: small enough for 64 replicas to end together on the twelve sets.
IMAGES_PER_SLICE = 128
CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
NO_OVERRIDES: Mapping[str, str] = MappingProxyType({})
_MIN_SIMILAR = 0.6  # the fraction of classes that must share a word with the published name which takes their place
# Classes are in another order if names of other classes are more similar by this much, on average over the classes that trade
# places. Two classes of one list that are swapped reach 0.2 or more; other spellings of all names (ImageNet's, as torchvision and
# Hugging Face have them) 0.03.
_MAX_GAIN = 0.1

EvaluationTask = Literal["zeroshot_classification", "zeroshot_retrieval", "images"]

# --- Published sets -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownSet:
    """A published set, before its data was found."""

    name: str  # CLIP_benchmark's name
    task: EvaluationTask
    num_images: int
    main_metric: str  # see ray_platform/metric_registry.py
    num_classes: int = 0
    classes: tuple[str, ...] = ()  # in label order, as in CLIP_benchmark's copies
    either_order: tuple[str, ...] = ()  # two classes that copies of the set have in one order or the other
    templates: tuple[str, ...] = ()  # "{c}" stands for the class
    class_folders: tuple[str, ...] = ()  # names of the classes' folders in label order, where they are fixed
    folders: tuple[str, ...] = ()  # where to look for the data below a root, in addition to `wds_<name>`


def _known_set(name: str, **fields: Any) -> KnownSet:
    lists: Any = {field: tuple(value) for field, value in fields.items() if isinstance(value, list)}
    return KnownSet(name, **fields | lists)


_DATA = json.loads(Path(__file__).with_name("sets.json").read_text(encoding="utf-8"))
KNOWN_SETS: Mapping[str, KnownSet] = MappingProxyType({name: _known_set(name, **entry) for name, entry in _DATA["sets"].items()})
# Of a set that brings no templates and has no published ones: those of ImageNet, as in CLIP_benchmark.
DEFAULT_TEMPLATES = KNOWN_SETS["imagenet1k"].templates
# The twelve sets whose mean is reported, in this order.
PAPER_SETS: tuple[str, ...] = tuple(_DATA["paper"])
_PUBLISHED = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
# Model -> set -> main metric as a fraction, and the "mean" over PAPER_SETS. Reports compare with the first two set by set.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    name: model["zero_shot"] | {"mean": sum(model["zero_shot"].values()) / len(PAPER_SETS)}
    for name, model in _PUBLISHED["models"].items()
}
# Model -> set -> metric -> fraction.
PUBLISHED_RETRIEVAL: Mapping[str, Mapping[str, Mapping[str, float]]] = {
    name: model["retrieval"] for name, model in _PUBLISHED["models"].items()
}
# Where the figures were published -> model -> its name there.
PUBLISHED_SOURCES: Mapping[str, Mapping[str, str]] = {
    source: {name: model["name"] for name, model in _PUBLISHED["models"].items() if model["source"] == short}
    for short, source in _PUBLISHED["sources"].items()
}
PUBLISHED_NOTES: tuple[str, ...] = tuple(_PUBLISHED["notes"])  # what else was published


# --- Samples and slices ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored; `ray_platform.data.decode.rgb` decodes its image."""

    key: str  # unique in the set and independent of where the set is stored
    image: bytes | memoryview
    label: int = -1  # -1: the set has no labels
    captions: tuple[str, ...] = ()


Samples = list[RawSample | RejectedSample]


@dataclass(frozen=True)
class SampleSchema:
    """What every sample of a set must have."""

    set_name: str
    task: EvaluationTask
    num_classes: int
    classes_source: str  # the file with the class names, for messages

    def check(self, sample: RawSample) -> None:
        """Raise DataError for a label without a class, and for an image without captions in a retrieval set."""
        if self.task == "zeroshot_classification" and not 0 <= sample.label < self.num_classes:
            raise DataError(
                f"{self.set_name}: sample {sample.key} has label {sample.label}, but {self.classes_source} names "
                f"{self.num_classes} classes (0 to {self.num_classes - 1}); correct the class list, or download the set again"
            )
        if self.task == "zeroshot_retrieval" and not sample.captions:
            raise DataError(
                f"{self.set_name}: sample {sample.key} has no caption, and retrieval needs one for every image; "
                "write its .txt with one caption per line, or download the set again"
            )


class SlicePart(NamedTuple):
    """A slice before it belongs to a set."""

    name: str
    estimated_images: float
    read: Callable[["DatasetSlice"], Samples]  # a partial of a module's function, so that it can be sent to a replica


@dataclass(frozen=True)
class DatasetSlice:
    """What one unit of work reads. The slices of a set, ordered by `place`, contain each of its samples once."""

    schema: SampleSchema
    place: int
    name: str  # unique in the set; part of the key of cached results
    estimated_images: float
    read: Callable[["DatasetSlice"], Samples]  # see `read_slice`; raises StorageError when nothing of the slice can be read


def read_slice(part: DatasetSlice) -> Samples:
    """Return the samples of a slice in order; an empty list for a slice of a tar in which no sample begins.

    A sample that cannot be used becomes a RejectedSample, as does a whole slice that storage does not return.

    Raises:
        DataError: The set cannot be used: see `SampleSchema.check`, or a shard has no samples.
    """
    try:
        samples = part.read(part)
    except storage.StorageError as error:
        return [RejectedSample(f"{part.name}/", lost_cause(error))]
    for sample in samples:
        if isinstance(sample, RawSample):
            part.schema.check(sample)
    return samples


# --- Class names and templates: from the text files next to the data, or the published ones -------------------------------------


class ClassTexts(NamedTuple):
    """The class names of a set, in label order, and its templates; empty unless the set is for classification."""

    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    source: str = ""  # the file with the class names
    templates_source: str = ""  # the file with the templates
    warnings: tuple[str, ...] = ()  # one line each, about classes that cannot be told apart or have no images


def list_sidecars(url: str, overrides: Mapping[str, str] = NO_OVERRIDES) -> dict[str, str]:
    """Return the URLs of the files directly in a folder, by their names, with those of `overrides` in their place."""
    return {**{posixpath.basename(file.url): file.url for file in storage.list_files(url)}, **overrides}


def read_lines(url: str) -> tuple[str, ...]:
    """Return the lines of a text file, stripped, without empty ones at the end. Raises DataError if it is not UTF-8."""
    try:
        lines = [line.strip() for line in storage.read_small(url).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise DataError(f"{url}: is not UTF-8; convert it to UTF-8") from None
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def class_texts(set_name: str, classes: Sequence[str], source: str, sidecars: Mapping[str, str]) -> ClassTexts:
    """Return the classes, which come from the file `source`, with the templates.

    Templates are those of the file next to the data, else of the known set, else DEFAULT_TEMPLATES.

    Raises DataError if the list is empty, lacks a name, or has another length or order than the known set, or if a template is
    wrong.
    """
    known = KNOWN_SETS.get(set_name)
    if not classes:
        raise DataError(f"{set_name}: {source} has no class names; write one class per line, in label order")
    if "" in classes:
        raise DataError(f"{set_name}: {source} has an empty name for class {classes.index('')}; write its name")
    if known and len(classes) != known.num_classes:
        raise DataError(
            f"{set_name}: {source} names {len(classes)} classes, but the set has {known.num_classes}; "
            "correct the list, or download the set again"
        )
    if known:
        _check_order(known, classes, source)
    if url := sidecars.get(TEMPLATES_FILE, ""):
        templates = read_lines(url)
        if not templates:
            raise DataError(f'{set_name}: {url} has no templates; write one per line, such as "a photo of a {{c}}."')
        if incomplete := [template for template in templates if "{c}" not in template]:
            raise DataError(f'{set_name}: {url} has a template without "{{c}}", the class ({incomplete[0]!r}); add it')
    else:
        templates = known.templates if known else DEFAULT_TEMPLATES
    repeated = Counter(classes) - Counter(known.classes if known else set(classes))
    warnings = [
        f"{set_name}: {source} names the class {name!r} more than once; no model can tell the two apart" for name in repeated
    ]
    return ClassTexts(tuple(classes), templates, source, url, tuple(warnings))


def to_published_names(set_name: str, classes: Sequence[str], source: str) -> tuple[str, ...]:
    """Return the class names with which published scores were measured, for data whose `classes` are in label order.

    Raises DataError if they are in another order, so that labels would stand for other classes, or if most have other names.
    """
    known = KNOWN_SETS.get(set_name)
    if known is None or len(classes) != known.num_classes:
        return tuple(classes)
    published = _check_order(known, classes, source)
    differing = [pair for pair in zip(classes, published, strict=True) if not _words(pair[0]) & _words(pair[1])]
    if len(differing) > (1 - _MIN_SIMILAR) * len(classes):
        name, other = differing[0]
        raise DataError(
            f"{set_name}: {source} has other names than the published set, such as {name!r} for {other!r}, and "
            f"{len(differing)} in all; write a {CLASSES_FILE}, or use CLIP_benchmark's copy of the set"
        )
    return published


def in_published_order(set_name: str, folders: Sequence[str]) -> list[str]:
    """Return the folders of the classes in the order of the published classes that their names fit best."""
    known = KNOWN_SETS.get(set_name)
    if known is None or len(folders) != known.num_classes:
        return list(folders)
    _, best = linear_sum_assignment(_similarity(known.classes, folders), maximize=True)
    return [folders[column] for column in best]


def _check_order(known: KnownSet, classes: Sequence[str], source: str) -> tuple[str, ...]:
    """Return the published class names in label order. Raises DataError if another order of them fits `classes` better.

    Names are compared by their words, so that another spelling, such as HerbaceousVegetation, is not another order.
    """
    published = list(known.classes)
    if known.either_order:
        first, second = map(published.index, known.either_order)
        if _words(classes[first]) == _words(published[second]) and _words(classes[second]) == _words(published[first]):
            published[first], published[second] = published[second], published[first]
    if list(classes) == published:
        return tuple(published)
    similarity = _similarity(classes, published)
    rows, best = linear_sum_assignment(similarity, maximize=True)
    gain = similarity[rows, best] - similarity.diagonal()
    _, cycle = connected_components(coo_array((np.ones(len(best)), (rows, best))))  # classes that trade places, by numbers
    moved = np.flatnonzero((np.bincount(cycle, gain) / np.bincount(cycle))[cycle] > _MAX_GAIN)
    if len(moved):
        first = moved[0]
        raise DataError(
            f"{known.name}: {source} has its classes in another order than the published set: class {first} is "
            f"{classes[first]!r} instead of {published[first]!r}, and {len(moved)} are elsewhere in all; correct the list, or "
            "use CLIP_benchmark's copy of the set"
        )
    return tuple(published)


def _similarity(names: Sequence[str], others: Sequence[str]) -> np.ndarray:
    """Return the fraction of words that each name shares with each other one, [len(names), len(others)] in 0 to 1."""
    vocabulary = {word: column for column, word in enumerate(sorted({w for name in (*names, *others) for w in _words(name)}))}
    has_word = np.zeros((2, len(names), len(vocabulary)), dtype=np.float32)
    for side, list_of_names in enumerate((names, others)):
        for row, name in enumerate(list_of_names):
            has_word[side, row, [vocabulary[word] for word in _words(name)]] = 1
    shared, (lengths, other_lengths) = has_word[0] @ has_word[1].T, has_word.sum(axis=2)
    return shared / np.maximum(lengths[:, None] + other_lengths[None] - shared, 1)


def _words(name: str) -> set[str]:
    return set(re.findall(r"[^\W_]+", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()))


# --- A set whose data was found -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationSet:
    """A set whose data was found."""

    name: str
    task: EvaluationTask
    url: str
    layout: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    classes_source: str  # the file or folder with the class names
    templates_source: str  # the file with the templates; "": those that were published, or DEFAULT_TEMPLATES
    known: KnownSet | None  # None: the set is not in KNOWN_SETS
    slices: tuple[DatasetSlice, ...]
    num_files: int
    num_bytes: int
    known_images: int | None  # None: unknown until the tars are read, as in object stores
    warnings: tuple[str, ...]  # one line each
    # 16 hex digits over classes, templates, labels, and names, sizes and versions of the files; independent of the place of the
    # set, but not of the time of a copy, unless the copy keeps the files' times or ETags.
    digest: str
    names_digest: str  # likewise, without the files' versions and the labels: the digest of earlier releases


def build_set(
    set_name: str,
    task: EvaluationTask,
    url: str,
    layout: str,
    files: Mapping[str, StoredFile | None],
    parts: Iterable[SlicePart],
    texts: ClassTexts = ClassTexts(),  # noqa: B008  (immutable)
    known_images: int | None = None,
    labels: Sequence[int] = (),
) -> EvaluationSet:
    """Return the set of these slices, in order. Raises DataError if there are none.

    `files` are all files by their names in the set; None stands for a missing file. `known_images` is the number of images, if it
    is known before reading. `labels` are those that are not in `files`.
    """
    schema = SampleSchema(set_name, task, len(texts.classes), texts.source)
    slices = tuple(DatasetSlice(schema, place, *part) for place, part in enumerate(parts))
    if not slices:
        raise DataError(f"{set_name}: {url} has no images; download the set again")
    versions = [(name, file.size, file.version) if file else (name, -1, "") for name, file in sorted(files.items())]
    sizes = [(name, size) for name, size, _ in versions]
    known = KNOWN_SETS.get(set_name)
    return EvaluationSet(
        set_name, task, url, layout, texts.classes, texts.templates, texts.source, texts.templates_source,
        known=known if known and known.task == task else None, slices=slices, num_files=len(files),
        num_bytes=sum(file.size for file in files.values() if file), known_images=known_images, warnings=texts.warnings,
        digest=_digest_of(task, texts, versions, *([labels] if labels else [])), names_digest=_digest_of(task, texts, sizes),
    )  # fmt: skip


def _digest_of(task: EvaluationTask, texts: ClassTexts, *content: object) -> str:
    return hashlib.sha256(json.dumps([task, texts.classes, texts.templates, *content]).encode()).hexdigest()[:16]


def check_counts(data: EvaluationSet, num_read: int, num_rejected: int, allow_short: bool) -> None:
    """Raise DataError if more images were read than a known set has, or fewer, unless `allow_short`."""
    if data.known is None or num_read == data.known.num_images:
        return
    expected = data.known.num_images
    rejected = f" and {num_rejected:,} could not be used" if num_rejected else ""
    counts = f"{data.name}: {num_read:,} images were read{rejected}, but the set has {expected:,}: {data.url} is"
    if num_read + num_rejected > expected:
        raise DataError(f"{counts} another split, or has images twice; download the set again")
    if not allow_short:
        raise DataError(f"{counts} incomplete; download it again, or set allow_short")
