"""Units of work as measurements need them, and what the measurements of a dataset have in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdis_platform.evaluation.models import EvaluationModel
from ray_platform.contracts import DataError, Rows
from ray_platform.evaluate.result_cache import cache_key
from ray_platform.evaluate.samples import DatasetSlice
from ray_platform.evaluate.sets import EvaluationSet
from ray_platform.evaluate.unit_work import EmbedImages
from ray_platform.replicas import UnitWork, WorkUnit, join_rows
from ray_platform.report.records import DatasetResult, UnreadableSample

_MAX_UNREADABLE = 20  # unreadable samples that are listed in a result
_CACHED_AS = {"GenerateImages": "GenerateImages"}  # class -> the name under which earlier releases stored its rows


def build_unit(
    group: str, name: str, cost: float, work: UnitWork, identity: Mapping[str, Any], *, runs_first: bool = False
) -> WorkUnit:
    """Return a unit; `identity` is everything that its rows depend on, besides the kind of work and the code."""
    kind = type(work).__name__
    return WorkUnit(name, group, cache_key({"work": _CACHED_AS.get(kind, kind), **identity}), cost, work, runs_first)


class SetMeasurement(ABC):
    """A model measured on one dataset. It receives the rows of its units in any order."""

    def __init__(self, model: EvaluationModel, data: EvaluationSet, allow_short: bool = False):
        """`allow_short` accepts a known set that lacks images."""
        self.model, self.data, self.allow_short = model, data, allow_short
        settings = "".join(f" {name}={value}" for name, value in model.settings.items())
        self.group = f"{model.name}/{data.name}{settings}"
        self._slices: dict[str, DatasetSlice] = {}  # key of the unit that embeds it -> slice
        self._rows: dict[int, Rows] = {}  # place of a slice -> rows
        self.units = [self._image_unit(part) for part in data.slices]
        self.seconds = 0.0  # of replicas

    def _image_unit(self, part: DatasetSlice) -> WorkUnit:
        model, data = self.model, self.data
        identity = {
            "model": model.digest, "settings": dict(model.settings), "set": data.name, "data": data.digest, "slice": part.name,
        }  # fmt: skip
        work = EmbedImages(model.name, data.name, part, model.settings)
        unit = build_unit(self.group, f"{data.name} {part.name}", part.estimated_images, work, identity)
        self._slices[unit.key] = part
        return unit

    def add(self, unit: WorkUnit, rows: Rows) -> None:
        """Receive the rows of one unit."""
        self.seconds += float(rows["seconds"].sum())
        self._rows[self._slices[unit.key].place] = rows

    @abstractmethod
    def result(self) -> DatasetResult:
        """Return the dataset's entry in the report. Raises DataError if the dataset cannot be scored."""
        ...

    def slices_with(self, keys: set[str]) -> Mapping[DatasetSlice, tuple[str, ...]]:
        """Return the slices that contain samples of `keys`, with those samples' keys."""
        slices = {part.place: part for part in self._slices.values()}
        keys_by_place = {place: tuple(str(key) for key in rows["keys"] if str(key) in keys) for place, rows in self._rows.items()}
        return {slices[place]: inside for place, inside in keys_by_place.items() if inside}

    def _joined_rows(self) -> Rows:
        """Return the rows of all slices in order. Raises DataError if a sample was read twice."""
        rows = join_rows(self._rows)
        keys, counts = np.unique(rows["keys"], return_counts=True)
        if len(keys) < len(rows["keys"]):
            raise DataError(f"{self.data.name}: {self.data.url} has sample {keys[counts > 1][0]} twice; download the set again")
        return rows

    def _common_result(self, rows: Rows, metrics: dict[str, float]) -> DatasetResult:
        """Return the fields that the results of all tasks have."""
        causes = zip(rows["keys"], rows["causes"], strict=True)
        unreadable: list[UnreadableSample] = [{"key": str(key), "cause": str(cause)} for key, cause in causes if cause]
        return {
            "set": self.data.name,
            "model": self.model.name,
            "url": self.data.url,
            "settings": dict(self.model.settings),
            "metrics": metrics,
            "num_unreadable": len(unreadable),
            "unreadable": unreadable[:_MAX_UNREADABLE],
            "seconds": round(self.seconds, 1),
        }
