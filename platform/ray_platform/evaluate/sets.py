"""The published evaluation sets (`KNOWN_SETS`, from sets.json), their published results, and a set whose data was found.

Add a zero-shot dataset by adding one entry below "sets" in sets.json.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ray_platform.contracts import DataError
from ray_platform.evaluate.samples import DatasetSlice, EvaluationTask, SampleSchema

_DATA = json.loads(Path(__file__).with_name("sets.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class KnownSet:
    """A published set, before its data was found."""

    name: str  # CLIP_benchmark's name
    task: EvaluationTask
    num_images: int
    main_metric: str  # see ray_platform/metric_registry.py
    num_classes: int = 0
    classes: tuple[str, ...] = ()  # in label order; empty: the class names come with the data
    templates: tuple[str, ...] = ()  # "{c}" stands for the class
    class_folders: tuple[str, ...] = ()  # names of the classes' folders in label order, where they are fixed
    folders: tuple[str, ...] = ()  # where to look for the data below a root, in addition to `wds_<name>`


class ClassTexts(NamedTuple):
    """The class names of a set, in label order, and its templates."""

    classes: Sequence[str] = ()
    templates: Sequence[str] = ()


@dataclass(frozen=True)
class EvaluationSet:
    """A set whose data was found."""

    name: str
    task: EvaluationTask
    url: str
    layout: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    known: KnownSet | None  # None: the set is not in KNOWN_SETS
    slices: tuple[DatasetSlice, ...]
    num_files: int
    num_bytes: int
    known_images: int | None  # None: unknown until the tars are read
    digest: str  # 16 hex digits over classes, templates, names and sizes of the files; independent of the place of the set


def _known_set(name: str, entry: Mapping[str, Any]) -> KnownSet:
    fields: dict[str, Any] = {field: tuple(value) if isinstance(value, list) else value for field, value in entry.items()}
    return KnownSet(name, **fields)


KNOWN_SETS: Mapping[str, KnownSet] = MappingProxyType({name: _known_set(name, fields) for name, fields in _DATA["sets"].items()})

# The twelve sets whose mean is reported, in this order.
PAPER_SETS: tuple[str, ...] = tuple(_DATA["paper"])

# Model -> set -> main metric as a fraction, and the "mean" over PAPER_SETS.
PUBLISHED: Mapping[str, Mapping[str, float]] = _DATA["published"]
# Model -> set -> metric -> fraction.
PUBLISHED_RETRIEVAL: Mapping[str, Mapping[str, Mapping[str, float]]] = _DATA["published_retrieval"]


def build_set(
    schema: SampleSchema,
    url: str,
    layout: str,
    texts: ClassTexts,
    files: Sequence[tuple[str, int]],
    slices: Sequence[DatasetSlice],
    known_images: int | None,
) -> EvaluationSet:
    """Return the set of `slices`.

    Args:
        schema: What the samples must have; it names the set.
        url: The folder of the set.
        layout: The name of its layout, for people.
        texts: Its class names and templates; empty unless it is for classification.
        files: Names in the set and sizes in bytes of all files; a negative size stands for a missing file.
        slices: The slices, in order.
        known_images: The number of images, if it is known before reading.

    Raises:
        DataError: The set has no slices.
    """
    if not slices:
        raise DataError(f"{schema.set_name}: {url} has no images; download the set again")
    classes, templates = tuple(texts.classes), tuple(texts.templates)
    listing = json.dumps([schema.task, classes, templates, sorted(files)])
    known = KNOWN_SETS.get(schema.set_name)
    return EvaluationSet(
        name=schema.set_name, task=schema.task, url=url, layout=layout, classes=classes, templates=templates,
        known=known if known and known.task == schema.task else None, slices=tuple(slices), num_files=len(files),
        num_bytes=sum(max(0, size) for _, size in files), known_images=known_images,
        digest=hashlib.sha256(listing.encode()).hexdigest()[:16],
    )  # fmt: skip


def check_counts(data: EvaluationSet, num_read: int, num_rejected: int, allow_short: bool) -> None:
    """Check that as many images were read as a known set has.

    Raises:
        DataError: There are fewer, unless `allow_short`; or more: then it is another split, or has images twice.
    """
    if data.known is None or num_read == data.known.num_images:
        return
    expected = data.known.num_images
    rejected = f" and {num_rejected:,} could not be used" if num_rejected else ""
    if num_read + num_rejected > expected:
        raise DataError(
            f"{data.name}: {num_read:,} images were read{rejected}, but the set has {expected:,}: {data.url} is another "
            "split, or has images twice; download the set again"
        )
    if not allow_short:
        raise DataError(
            f"{data.name}: {num_read:,} images were read{rejected}, but the set has {expected:,}: {data.url} is incomplete; "
            "download it again, or set allow_short"
        )
