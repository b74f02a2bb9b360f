"""The sets that models are compared on, what was published about them, and what a set is once it was found."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ray_platform.contracts import DataError
from ray_platform.evaluate.slices import SampleSchema, Slice, Task

_DATA = json.loads(Path(__file__).with_name("sets.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class SetInfo:
    """What is known of a published set before it is found."""

    name: str  # CLIP_benchmark's
    task: Task
    num_images: int
    main_metric: str
    num_classes: int = 0
    classes: tuple[str, ...] = ()  # in label order; empty where the data bring their own
    templates: tuple[str, ...] = ()  # "{c}" stands for the class
    class_folders: tuple[str, ...] = ()  # names of the classes' folders, in label order, where they are fixed
    folders: tuple[str, ...] = ()  # where to look for it below a root, besides `wds_<name>`


@dataclass(frozen=True)
class EvaluationSet:
    """A set that was found: what to ask of a model, and the slices that hold its samples."""

    name: str
    task: Task
    url: str
    layout: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    info: SetInfo | None  # None: not one of `REGISTRY`
    slices: tuple[Slice, ...]
    num_files: int
    num_bytes: int
    known_images: int | None  # None: only reading the tars tells
    digest: str  # 16 hex digits over classes, templates and the names and sizes of the files; the same wherever the set lies


def _info(name: str, entry: Mapping[str, Any]) -> SetInfo:
    fields: dict[str, Any] = {field: tuple(value) if isinstance(value, list) else value for field, value in entry.items()}
    return SetInfo(name, **fields)


REGISTRY: Mapping[str, SetInfo] = MappingProxyType({name: _info(name, fields) for name, fields in _DATA["sets"].items()})

# The twelve whose mean is reported, in this order.
PAPER: tuple[str, ...] = tuple(name for name, info in REGISTRY.items() if info.task == "zeroshot_classification")

# Model -> set -> main metric, a fraction, and their "mean" over PAPER.
PUBLISHED: Mapping[str, Mapping[str, float]] = _DATA["published"]
# Model -> set -> metric -> fraction.
PUBLISHED_RETRIEVAL: Mapping[str, Mapping[str, Mapping[str, float]]] = _DATA["published_retrieval"]


def known(wanted: SampleSchema) -> SetInfo | None:
    """What the registry has on a set of that name and task."""
    info = REGISTRY.get(wanted.set_name)
    return info if info and info.task == wanted.task else None


def make_set(
    wanted: SampleSchema,
    url: str,
    layout: str,
    words: tuple[Sequence[str], Sequence[str]],
    files: Sequence[tuple[str, int]],
    slices: Sequence[Slice],
    known_images: int | None,
) -> EvaluationSet:
    """A set of slices. `words` are its classes and its templates, `files` the names in the set and the sizes of all files.

    Raises DataError for a set without slices.
    """
    if not slices:
        raise DataError(f"{wanted.set_name}: {url} holds no images; fetch the set again")
    classes, templates = tuple(words[0]), tuple(words[1])
    listing = json.dumps([wanted.task, classes, templates, sorted(files)])
    return EvaluationSet(
        name=wanted.set_name, task=wanted.task, url=url, layout=layout, classes=classes, templates=templates,
        info=known(wanted), slices=tuple(slices), num_files=len(files),
        num_bytes=sum(max(0, size) for _, size in files), known_images=known_images,
        digest=hashlib.sha256(listing.encode()).hexdigest()[:16],
    )  # fmt: skip


def check_counts(found: EvaluationSet, num_read: int, num_rejected: int, allow_short: bool) -> None:
    """Whether as many images were read as the set has. Nothing is known of the count of a set that is not in REGISTRY.

    Raises DataError for less, unless `allow_short`, and for more: then it is another split, or has images twice.
    """
    if found.info is None or num_read == found.info.num_images:
        return
    expected = found.info.num_images
    rejected = f" and {num_rejected:,} could not be used" if num_rejected else ""
    if num_read + num_rejected > expected:
        raise DataError(
            f"{found.name}: {num_read:,} images were read{rejected}, but the set has {expected:,}: {found.url} holds another "
            "split, or images twice; fetch the set again"
        )
    if not allow_short:
        raise DataError(
            f"{found.name}: {num_read:,} images were read{rejected}, but the set has {expected:,}: {found.url} is incomplete; "
            "fetch it again, or allow a short set"
        )
