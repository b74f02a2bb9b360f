"""What a unit of work reads of a set: a slice, and the samples in it, not yet decoded. Plain Python: no Ray."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import LOST, RejectedSample
from ray_platform.data.decode import rgb

__all__ = ["IMAGES_A_SLICE", "RawSample", "SampleSchema", "Slice", "Task", "read_slice", "rgb"]

IMAGES_A_SLICE = 128  # about, and whatever the number of workers: so that 64 of them end together on the twelve sets

Task = Literal["zeroshot_classification", "zeroshot_retrieval", "images"]


@dataclass(frozen=True)
class RawSample:
    """A sample as it is stored. `rgb(image)` decodes it."""

    key: str  # unique in the set, and the same wherever that lies
    image: bytes | memoryview
    label: int = -1  # -1: there are none
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class SampleSchema:
    """What every sample of a set must come with."""

    set_name: str
    task: Task
    num_classes: int = 0
    classes_from: str = ""  # the file that names the classes


@dataclass(frozen=True)
class Slice(ABC):
    """What one unit of work reads. A set's slices, by their `place`, have each of its samples once."""

    wanted: SampleSchema
    place: int
    name: str  # unique in the set, for people and for what is kept
    estimated_images: float

    @abstractmethod
    def read(self) -> list[RawSample | RejectedSample]:
        """See `read_slice`. Raises StorageError where nothing of the slice can be read."""
        ...


def read_slice(part: Slice) -> list[RawSample | RejectedSample]:
    """The samples of a slice, in order; of a part of a tar in which no sample begins, none.

    A sample that cannot be used is a RejectedSample, and so is a whole slice that storage does not return. Raises DataError for
    what makes the set unusable: a label that no class has, an image without captions in a retrieval set, a shard without samples.
    """
    try:
        samples = part.read()
    except storage.StorageError as error:
        return [RejectedSample(f"{part.name}/", LOST[error.kind])]
    for sample in samples:
        if isinstance(sample, RawSample):
            _check(sample, part.wanted)
    return samples


def _check(sample: RawSample, wanted: SampleSchema) -> None:
    if wanted.task == "zeroshot_classification" and not 0 <= sample.label < wanted.num_classes:
        raise DataError(
            f"{wanted.set_name}: sample {sample.key} has label {sample.label}, but {wanted.classes_from} names "
            f"{wanted.num_classes} classes (0 to {wanted.num_classes - 1}); correct the class list, or fetch the set again"
        )
    if wanted.task == "zeroshot_retrieval" and not sample.captions:
        raise DataError(
            f"{wanted.set_name}: sample {sample.key} has no caption, and retrieval needs one for every image; "
            "write its .txt with a caption a line, or fetch the set again"
        )
