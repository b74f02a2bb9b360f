"""The distance between two existing sets of images: FID, KID, precision and recall, and the Inception Score."""

import functools
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

from diffdis.feature_networks import PooledFeatures
from diffdis.metrics.image_quality import SPLITS, inception_score
from diffdis_platform.config.distance import DistanceConfig
from diffdis_platform.evaluation.quality import network_builders, open_networks
from diffdis_platform.evaluation.reference import Reference, feature_metrics, few_images_warning, read_reference
from diffdis_platform.evaluation.units import build_unit
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, Rows
from ray_platform.evaluate.discovery import open_image_set
from ray_platform.evaluate.result_cache import ResultCache
from ray_platform.evaluate.sets import EvaluationSet
from ray_platform.evaluate.unit_work import MeasureImages, WorkerModels
from ray_platform.formats import FileFormat
from ray_platform.json_values import JsonObject, to_json
from ray_platform.metric_registry import check_declared, describe_metric
from ray_platform.replicas import ReplicaPool, ReplicaSpec, WorkUnit, join_rows
from ray_platform.terminal import render_table
from ray_platform.tracking.run_metadata import code_version

DISTANCE, DISTANCE_FORMAT = "distance.json", FileFormat("distance")


@dataclass
class ImageFeatures:
    """The features of a set of images. It receives the rows of its units in any order."""

    name: str  # "generated" or "reference"
    data: EvaluationSet
    rows: dict[int, Rows] = field(default_factory=dict)  # place of a slice -> rows

    def units(self, networks: dict[str, PooledFeatures]) -> dict[str, tuple["ImageFeatures", int, WorkUnit]]:
        """Return where the rows of each unit belong, by the unit's key."""
        units = {}
        protocols = [dict(network.protocol) for network in networks.values()]
        for part in self.data.slices:
            unit = build_unit(
                self.name, f"{self.name} {part.name}", part.estimated_images, MeasureImages(part, tuple(networks), 0),
                data=self.data.digest, slice=part.name, networks=protocols, image_size=0,
            )  # fmt: skip
            units[unit.key] = (self, part.place, unit)
        return units

    @functools.cached_property
    def joined(self) -> Rows:
        """The features of all images that can be read, once all rows are received. Raises DataError for fewer than two."""
        joined = join_rows(self.rows)
        if len(joined["keys"]) < 2:
            causes = ", ".join(f"{count:,} x {cause}" for cause, count in Counter(joined["causes"].tolist()).items())
            raise DataError(
                f"{self.name}: {len(joined['keys'])} images of {self.data.url} can be read ({causes or 'it has no more'}); a "
                "distance needs at least 2"
            )
        return joined

    def describe(self) -> JsonObject:
        joined = self.joined
        return {
            "url": self.data.url,
            "digest": self.data.digest,
            "n": len(joined["keys"]),
            "unreadable": dict(Counter(joined["causes"].tolist())),
        }


@dataclass
class DistancePlan:
    """What is compared, after all checks that need no cluster."""

    networks: dict[str, PooledFeatures]
    generated: ImageFeatures
    reference: ImageFeatures | Reference


def plan_distance(config: DistanceConfig) -> DistancePlan:
    """Return the plan. Raises ConfigError and DataError."""
    networks = open_networks("networks", network_builders(config.networks, config.inception, config.resize))
    reference: ImageFeatures | Reference
    if config.reference.endswith(".npz"):
        if len(networks) > 1:
            raise ConfigError(f"networks: {config.reference} has the statistics of one network; name that one")
        (network,) = networks.values()
        reference = read_reference("reference", config.reference, dict(network.protocol) | {"image_size": 0})
    else:
        reference = ImageFeatures("reference", _open_images("reference", config.reference))
    return DistancePlan(networks, ImageFeatures("generated", _open_images("generated", config.generated)), reference)


def _open_images(name: str, url: str) -> EvaluationSet:
    try:
        return open_image_set(url)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def measure_distance(config: DistanceConfig, plan: DistancePlan) -> JsonObject:
    """Measure on a running Ray, write distance.json, and return its content. Raises DataError."""
    build = functools.partial(
        WorkerModels, network_builders(config.networks, config.inception, config.resize), max(1, int(config.cpus_per_worker))
    )
    spec = ReplicaSpec(build, config.num_workers, config.cpus_per_worker, config.gpus_per_worker, config.placement)
    cache = ResultCache(storage.join(config.output_dir, "units", "cuda" if config.gpus_per_worker else "cpu"), code_version())
    units = plan.generated.units(plan.networks)
    if isinstance(plan.reference, ImageFeatures):
        units |= plan.reference.units(plan.networks)
    with ReplicaPool(spec, cache, functools.partial(print, flush=True)) as pool:
        for result in pool.run([unit for _, _, unit in units.values()]):
            if result.rows is None:
                raise DataError(f"{result.unit.group}: {result.error}")
            images, place, _ = units[result.unit.key]
            images.rows[place] = result.rows
    details = DISTANCE_FORMAT.stamp(
        {
            "metrics": _metrics(plan),
            "warnings": _warnings(plan),
            "generated": plan.generated.describe(),
            "reference": plan.reference.describe()
            if isinstance(plan.reference, ImageFeatures)
            else {"url": config.reference, "digest": plan.reference.digest, "n": plan.reference.num_images},
            "protocol": config.protocol,
            "networks": {name: dict(network.protocol) for name, network in plan.networks.items()},
            "code_version": code_version(),
            "created": datetime.now().isoformat(timespec="seconds"),
        }
    )
    storage.write_bytes(storage.join(config.output_dir, DISTANCE), to_json(details))
    return details


def _metrics(plan: DistancePlan) -> dict[str, float]:
    generated, reference = plan.generated.joined, plan.reference
    metrics: dict[str, float] = {}
    for name, network in plan.networks.items():
        features = generated[f"features/{name}"]
        if isinstance(reference, ImageFeatures):
            metrics |= feature_metrics(network.figure, features, reference.joined[f"features/{name}"])
        else:
            metrics |= reference.metrics(network.figure, features)
        if network.classifier is not None and len(features) >= SPLITS:
            score = inception_score(features @ network.classifier.T)
            metrics |= {"inception_score": score.mean, "inception_score_std": score.std}
    check_declared(metrics)
    return metrics


def _warnings(plan: DistancePlan) -> list[str]:
    """Return a line for each network of which there are too few images."""
    num_generated = len(plan.generated.joined["keys"])
    real = plan.reference
    num_real = len(real.joined["keys"]) if isinstance(real, ImageFeatures) else real.num_images
    networks = plan.networks.values()
    lines = [few_images_warning(one.figure, num_generated, num_real, int(one.protocol["dim"])) for one in networks]
    return [line for line in lines if line]


def render_distance(details: JsonObject) -> str:
    """Return the table of the metrics, with the numbers of images."""
    rows = [("metric", "value")]
    rows += [(describe_metric(name).label, describe_metric(name).text(value)) for name, value in details["metrics"].items()]
    counts = [f"{details[name]['n']:,} {name}" for name in ("generated", "reference") if details[name]["n"]]
    lost = [
        f"{name}: {count:,} images left out ({cause})"
        for name in ("generated", "reference")
        for cause, count in details[name].get("unreadable", {}).items()
    ]
    return "\n".join(
        [render_table(rows), f"{' and '.join(counts)} images, protocol {details['protocol']}", *lost, *details["warnings"]]
    )
