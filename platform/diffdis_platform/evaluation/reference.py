"""What generated images are compared with, and how: features of real images, or published statistics of them."""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from diffdis.metrics.image_quality import (
    MIN_IMAGES_PER_DIMENSION,
    NEIGHBORS,
    Moments,
    extrapolated_distance,
    frechet_distance_of_features,
    kernel_distance,
    precision_recall,
)  # fmt: skip
from ray_platform import storage
from ray_platform.contracts import ConfigError, one_line
from ray_platform.evaluate.result_cache import read_arrays
from ray_platform.evaluate.results import check_same_protocol
from ray_platform.metric_registry import check_declared, describe_metric

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
