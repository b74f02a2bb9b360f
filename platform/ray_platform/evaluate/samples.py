"""Slices of an evaluation set and the undecoded samples in them. Plain Python: no Ray."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import LOST, RejectedSample

# About so many, whatever the number of replicas: small enough for 64 replicas to end together on the twelve sets.
IMAGES_PER_SLICE = 128

EvaluationTask = Literal["zeroshot_classification", "zeroshot_retrieval", "images"]


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored; `ray_platform.data.decode.rgb` decodes its image."""

    key: str  # unique in the set and independent of where the set is stored
    image: bytes | memoryview
    label: int = -1  # -1: the set has no labels
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleSchema:
    """What every sample of a set must have."""

    set_name: str
    task: EvaluationTask
    num_classes: int = 0
    classes_source: str = ""  # the file with the class names, for messages


@dataclass(frozen=True)
class DatasetSlice(ABC):
    """What one unit of work reads. The slices of a set, ordered by `place`, contain each of its samples once."""

    schema: SampleSchema
    place: int
    name: str  # unique in the set; part of the key of cached results
    estimated_images: float

    @abstractmethod
    def read(self) -> list[RawSample | RejectedSample]:
        """See `read_slice`. Raises StorageError when nothing of the slice can be read."""
        ...


def read_slice(part: DatasetSlice) -> list[RawSample | RejectedSample]:
    """Return the samples of a slice in order; an empty list for a slice of a tar in which no sample begins.

    A sample that cannot be used becomes a RejectedSample, as does a whole slice that storage does not return.

    Raises:
        DataError: The set cannot be used: a label without a class, an image without captions in a retrieval set, or a shard
            without samples.
    """
    try:
        samples = part.read()
    except storage.StorageError as error:
        return [RejectedSample(f"{part.name}/", LOST[error.kind])]
    for sample in samples:
        if isinstance(sample, RawSample):
            _check(sample, part.schema)
    return samples


def _check(sample: RawSample, schema: SampleSchema) -> None:
    if schema.task == "zeroshot_classification" and not 0 <= sample.label < schema.num_classes:
        raise DataError(
            f"{schema.set_name}: sample {sample.key} has label {sample.label}, but {schema.classes_source} names "
            f"{schema.num_classes} classes (0 to {schema.num_classes - 1}); correct the class list, or download the set again"
        )
    if schema.task == "zeroshot_retrieval" and not sample.captions:
        raise DataError(
            f"{schema.set_name}: sample {sample.key} has no caption, and retrieval needs one for every image; "
            "write its .txt with one caption per line, or download the set again"
        )
