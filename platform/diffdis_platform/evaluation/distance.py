"""How sets of images are compared: metrics of their features, references, and the distance between two existing sets."""

import functools
import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from diffdis.feature_networks import PooledFeatures, build_feature_network
from diffdis.metrics.image_quality import (
    MIN_IMAGES_PER_DIMENSION,
    NEIGHBORS,
    SPLITS,
    Moments,
    extrapolated_distance,
    frechet_distance_of_features,
    inception_score,
    kernel_distance,
    precision_recall,
)  # fmt: skip
from diffdis_platform.config.distance import DistanceConfig
from diffdis_platform.config.evaluate import network_name
from diffdis_platform.evaluation.units import build_unit, open_pool
from ray_platform import storage
from ray_platform.cached_folders import with_cached_folders
from ray_platform.contracts import ConfigError, DataError, Rows, one_line
from ray_platform.evaluate.discovery import open_image_set
from ray_platform.evaluate.result_cache import read_arrays
from ray_platform.evaluate.results import check_same_protocol
from ray_platform.evaluate.sets import EvaluationSet
from ray_platform.evaluate.unit_work import MeasureImages
from ray_platform.formats import FileFormat
from ray_platform.json_values import JsonObject, to_json
from ray_platform.metric_registry import check_declared, describe_metric
from ray_platform.replicas import WorkUnit, join_rows
from ray_platform.terminal import render_table
from ray_platform.tracking.run_metadata import code_version
from ray_platform.units import plural

_MAX_STATISTICS = 2**28  # bytes, uncompressed: mu and sigma of 2,048 features have 2**25

# --- Metrics of features: generated [n, d] and real [m, d] -> metrics by their full names ---------------------------------------

# `figure` is the name of the network's Fréchet distance: "fid" or "fd_<network>".
FeatureMetric = Callable[[str, np.ndarray, np.ndarray], Mapping[str, float]]


def frechet_metrics(figure: str, generated: np.ndarray, real: np.ndarray | Moments) -> dict[str, float]:
    """Return the Fréchet distance and its extrapolation to infinitely many generated images."""
    reference = real if isinstance(real, Moments) else Moments.of(real)
    metrics = {figure: frechet_distance_of_features(generated, reference)}
    if len(generated) >= MIN_IMAGES_PER_DIMENSION * generated.shape[1]:  # of fewer images, distances do not fall as 1/n yet
        metrics[f"{figure}_infinity"] = extrapolated_distance(generated, reference)
    return metrics


def kid_metrics(figure: str, generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Return the kernel distance and its standard deviation over subsets."""
    kid, suffix = kernel_distance(generated, real), figure.removeprefix("fid").removeprefix("fd")
    return {f"kid{suffix}": kid.mean} | ({} if kid.std is None else {f"kid{suffix}_std": kid.std})


def precision_recall_metrics(figure: str, generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Return improved precision and recall; nothing for too few images."""
    if min(len(generated), len(real)) <= NEIGHBORS:
        return {}
    result, suffix = precision_recall(generated, real), figure.removeprefix("fid").removeprefix("fd")
    return {f"precision{suffix}": result.precision, f"recall{suffix}": result.recall}


# Add a metric of generated images by adding a function here and its names to ray_platform/metric_registry.py. The first metric of
# the first entry is the headline.
FEATURE_METRICS: list[FeatureMetric] = [frechet_metrics, kid_metrics, precision_recall_metrics]


def feature_metrics(figure: str, generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Return all metrics of features.

    Raises ValueError for features that are not finite, and ConfigError if the metric registry lacks a metric.
    """
    _check_finite("generated", generated)
    _check_finite("reference", real)
    metrics = {name: value for metric in FEATURE_METRICS for name, value in metric(figure, generated, real).items()}
    check_declared(metrics)
    return metrics


def _check_finite(kind: str, features: np.ndarray) -> None:
    invalid = ~np.isfinite(features).all(axis=1)
    if invalid.any():
        raise ValueError(
            f"{invalid.sum():,} of {len(features):,} {kind} images have NaN features, the first is image "
            f"{int(invalid.argmax()):,}; the feature network or the image is damaged"
        )


def few_images_warning(figure: str, num_generated: int, num_real: int | None, width: int) -> str:
    """Return why a Fréchet distance of so few images in `width` dimensions says little; empty if there are enough.

    `num_real` is None for published statistics, which do not say of how many images they are.
    """
    needed = MIN_IMAGES_PER_DIMENSION * width
    if min(num_generated, num_generated if num_real is None else num_real) >= needed:
        return ""
    real = "an unknown number of" if num_real is None else f"{num_real:,}"
    return (
        f"{describe_metric(figure).label}: {num_generated:,} generated and {real} real images in {width:,} dimensions; "
        f"with fewer than {needed:,} of either, the distance is biased by the number of images and says little: prefer KID"
    )


# --- Feature networks -----------------------------------------------------------------------------------------------------------


def network_builders(networks: Sequence[str], inception: str, resize: str) -> dict[str, Callable[[str], PooledFeatures]]:
    """Return the functions that build the feature networks on a replica, by the names of the rows with their features."""
    options = {"inception": (inception, resize)}  # no other network has a choice of weights or resizing
    return {
        f"features/{network_name(name)}": functools.partial(
            with_cached_folders, build_feature_network, name, *options.get(name, ("", ""))
        )
        for name in networks
    }


def open_networks(field: str, builders: Mapping[str, Callable[[str], PooledFeatures]]) -> dict[str, PooledFeatures]:
    """Build the networks on the driver, so that errors in a name or file are reported before anything runs on the cluster.

    Return them by their short names.

    Raises ConfigError, which begins with `field`.
    """
    try:
        return {name.removeprefix("features/"): build("cpu") for name, build in builders.items()}
    except (ValueError, OSError) as error:
        raise ConfigError(f"{field}: {one_line(error)}") from error


# --- References -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReferenceFeatures:
    """Features of real images and how they were measured."""

    features: np.ndarray  # [n, d]
    protocol: Mapping[str, str | int]

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.features).tobytes()).hexdigest()[:16]

    @property
    def num_images(self) -> int | None:
        return len(self.features)

    def metrics(self, figure: str, generated: np.ndarray) -> dict[str, float]:
        """Return all metrics of the generated images' features [n, d]. Raises ValueError."""
        return feature_metrics(figure, generated, self.features)

    def write(self, url: str) -> None:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, features=self.features, protocol=np.array(json.dumps(dict(self.protocol))))
        storage.write_bytes(url, buffer.getvalue())


@dataclass(frozen=True)
class PublishedStatistics:
    """Mean and covariance of the features of real images, as pytorch-fid and clean-fid publish them."""

    moments: Moments

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.moments.mean.tobytes() + self.moments.second.tobytes()).hexdigest()[:16]

    @property
    def num_images(self) -> int | None:
        return None  # the file does not say it

    def metrics(self, figure: str, generated: np.ndarray) -> dict[str, float]:
        """Return the Fréchet distance of the generated images' features [n, d]; KID and precision need each image's."""
        _check_finite("generated", generated)
        metrics = frechet_metrics(figure, generated, self.moments)
        check_declared(metrics)
        return metrics


Reference = ReferenceFeatures | PublishedStatistics


def read_reference(field: str, url: str, network: Mapping[str, str | int] | None = None) -> Reference:
    """Return the reference_<network>.npz of an evaluation, or a published .npz with `mu` and `sigma`.

    It must fit `network`, the protocol of the network whose features are compared with it. Raises ConfigError, which begins with
    `field`.
    """
    try:
        arrays = read_arrays(storage.read_bytes(url), _MAX_STATISTICS)
        if "features" in arrays:
            features = ReferenceFeatures(arrays["features"], json.loads(str(arrays["protocol"])))
            if network:
                check_same_protocol(features.protocol, network)
            return features
        moments = Moments.of_statistics(arrays["mu"], arrays["sigma"])
    except (ValueError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{field}: {url} is not an .npz with mu and sigma, nor a reference_<network>.npz of an evaluation "
            f"({one_line(error)}); give such a file or images"
        ) from None
    if network and network["dim"] != len(moments.mean):
        raise ConfigError(
            f"{field}: {url} has {len(moments.mean):,} features, but {network['network']} has {network['dim']:,}; give the "
            "statistics of that network"
        )
    return PublishedStatistics(moments)


# --- The distance between two existing sets: FID, KID, precision and recall, and the Inception Score ----------------------------

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
            count = plural(len(joined["keys"]), "image")
            raise DataError(
                f"{self.name}: {count} of {self.data.url} can be read ({causes or 'it has no more'}); a distance needs at least 2"
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
    generated = ImageFeatures("generated", _open_images("generated", config.generated))
    reference: ImageFeatures | Reference
    if config.reference.endswith(".npz"):
        if len(networks) > 1:
            raise ConfigError(f"networks: {config.reference} has the statistics of one network; name that one")
        (network,) = networks.values()
        reference = read_reference("reference", config.reference, dict(network.protocol) | {"image_size": 0})
    else:
        data = _open_images("reference", config.reference)
        is_same = data.digest == generated.data.digest  # then the units have the same keys, and run once for both
        reference = ImageFeatures("reference", data, generated.rows if is_same else {})
    return DistancePlan(networks, generated, reference)


def _open_images(name: str, url: str) -> EvaluationSet:
    try:
        return open_image_set(url)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error


def measure_distance(config: DistanceConfig, plan: DistancePlan) -> JsonObject:
    """Measure on a running Ray, write distance.json, and return its content. Raises DataError."""
    units = plan.generated.units(plan.networks)
    if isinstance(plan.reference, ImageFeatures):
        units |= plan.reference.units(plan.networks)
    with open_pool(config, network_builders(config.networks, config.inception, config.resize)) as pool:
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
        f"{name}: {plural(count, 'image')} left out ({cause})"
        for name in ("generated", "reference")
        for cause, count in details[name].get("unreadable", {}).items()
    ]
    return "\n".join(
        [render_table(rows), f"{' and '.join(counts)} images, protocol {details['protocol']}", *lost, *details["warnings"]]
    )
