"""Units of work as the measurements name them. A unit's group is its measurement's."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffdis_platform.evaluation.models import Model
from ray_platform.contracts import DataError
from ray_platform.evaluate.result_cache import cache_key
from ray_platform.evaluate.sets import EvaluationSet
from ray_platform.replicas import UnitWork, WorkUnit


def unit(group: str, name: str, cost: float, work: UnitWork, identity: Mapping[str, Any], *, first: bool = False) -> WorkUnit:
    """`identity` is all that the rows depend on besides the kind of work and the code."""
    return WorkUnit(name, group, cache_key({"work": type(work).__name__, **identity}), cost, work, first)


def set_identity(model: Model, data: EvaluationSet) -> dict[str, Any]:
    return {"model": model.digest, "settings": dict(model.settings), "set": data.name, "data": data.digest}


def check_distinct(data: EvaluationSet, keys: np.ndarray) -> None:
    """Raises DataError for a sample that was read twice: every unit has its own."""
    found, counts = np.unique(keys, return_counts=True)
    if len(found) < len(keys):
        double = found[counts > 1][0]
        raise DataError(f"{data.name}: {data.url} holds the sample {double} twice; fetch the set again")
