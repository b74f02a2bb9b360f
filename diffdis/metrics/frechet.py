"""The Fréchet distance of two sets of features: FID, where the features are the FID Inception's.

Arithmetic in float64, from means and centred second moments: sums of raw squares would lose what the mean is large against.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

ROWS_AT_ONCE = 4096  # so many features are in memory in float64
NUM_SUBSETS = 15


@dataclass(frozen=True, eq=False)
class Moments:
    """Of n feature vectors: their mean [d] and the sum of the outer products of what each deviates from it [d, d], float64."""

    n: int
    mean: np.ndarray
    second: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """features [n, d], n > 0. Raises ValueError for features that are not finite."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features of shape {features.shape}: [n, d] with one row at least is needed")
        parts = (_moments(features[i : i + ROWS_AT_ONCE]) for i in range(0, len(features), ROWS_AT_ONCE))
        total = next(parts)
        for part in parts:
            total = total.merge(part)
        if not np.isfinite(total.mean).all():
            row = int((~np.isfinite(features).all(axis=1)).argmax())
            raise ValueError(f"features of image {row} are not finite: the feature network or the image is broken")
        return total

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together: Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance"."""
        n = self.n + other.n
        shift = other.mean - self.mean
        second = self.second + other.second + np.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, self.mean + shift * (other.n / n), second)

    @property
    def covariance(self) -> np.ndarray:
        """[d, d], with n - 1 in the denominator. Raises ValueError for a single feature vector."""
        if self.n < 2:
            raise ValueError("the covariance of one image is not defined: at least two are needed")
        return self.second / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Dowson and Landau (1982): |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), at least 0.

    The last trace is the sum of the roots of the eigenvalues of R^T S_b R with S_a = R R^T, which is symmetric. Raises ValueError
    for features of different widths.
    """
    _check_width(len(a.mean), b)
    # The root of the one with fewer samples: it is narrower where they are fewer than dimensions.
    fewer, more = sorted((a, b), key=lambda moments: moments.n)
    root = _root(torch.from_numpy(fewer.covariance))
    inner = root.T @ torch.from_numpy(more.covariance) @ root
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return _distance(a.mean - b.mean, float(traces), inner, rank=fewer.n - 1)


def frechet_distance_of_features(features: np.ndarray, reference: Moments) -> float:
    """`frechet_distance(Moments.of(features), reference)`, in less time where features [n, d] are fewer than their dimensions:
    their deviations from the mean are a root of their covariance themselves."""
    n, width = features.shape
    _check_width(width, reference)
    if n >= width:
        return frechet_distance(Moments.of(features), reference)
    if n < 2:
        raise ValueError("the covariance of one image is not defined: at least two are needed")
    mean = features.mean(axis=0, dtype=np.float64)
    root = torch.from_numpy((features - mean) / np.sqrt(n - 1))  # [n, d]
    inner = root @ torch.from_numpy(reference.covariance) @ root.T
    traces = root.square().sum().item() + float(np.trace(reference.covariance))
    return _distance(mean - reference.mean, traces, inner, rank=min(n, reference.n) - 1)


def extrapolated_distance(features: np.ndarray, reference: Moments) -> float:
    """The distance that infinitely many images like these would have: Chong and Forsyth (2020), "Effectively unbiased FID".

    Distances of growing subsets of features [n, d] against 1/n, and a line through them at 1/n = 0. The subsets grow in a random
    order, always the same one. The result can be below 0. Two biases stay: the one of the reference's own finite number,
    and, below some 5 d features, where distances do not yet fall as 1/n, a part of this one.
    Raises ValueError for fewer than 30 features.
    """
    if len(features) < 2 * NUM_SUBSETS:
        raise ValueError(f"extrapolation from {len(features)} images: at least {2 * NUM_SUBSETS} are needed")
    order = np.random.default_rng(0).permutation(len(features))
    points = list(_growing(features[order], reference))
    inverse, distances = (np.array(values) for values in zip(*points, strict=True))
    return float(np.polynomial.Polynomial.fit(inverse, distances, 1)(0.0))


def _growing(features: np.ndarray, reference: Moments) -> Iterator[tuple[float, float]]:
    """(1/n, distance) of the first n features, for growing n."""
    # From a half on: smaller subsets lie further off the line, and would bend it more than they steady it.
    sizes = np.linspace(len(features) // 2, len(features), NUM_SUBSETS).astype(int).tolist()
    width, total = features.shape[1], None
    for start, stop in pairwise([0, *sizes]):
        if stop < width:
            yield 1 / stop, frechet_distance_of_features(features[:stop], reference)
        else:
            part = Moments.of(features[start if total else 0 : stop])
            total = total.merge(part) if total else part
            yield 1 / stop, frechet_distance(total, reference)


def _moments(features: np.ndarray) -> Moments:
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    deviations = torch.from_numpy(features - mean)
    return Moments(len(features), mean, (deviations.T @ deviations).numpy())


def _root(covariance: torch.Tensor) -> torch.Tensor:
    """R [d, r] with R R^T = covariance [d, d], r its rank."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    # Not positive definite: fewer samples than dimensions, or features that never vary.
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _distance(shift: np.ndarray, traces: float, inner: torch.Tensor, rank: int) -> float:
    """`inner` has at most `rank` eigenvalues that are not 0. The others are left out: rounding makes them 1e-16 of the largest,
    and the root makes that 1e-8."""
    values = torch.linalg.eigvalsh(inner)[-rank:]  # ascending
    root_trace = values.clamp(min=0.0).sqrt().sum().item()
    return max(0.0, float(shift @ shift) + traces - 2.0 * root_trace)


def _check_width(width: int, reference: Moments) -> None:
    if width != len(reference.mean):
        raise ValueError(f"features of {width} and {len(reference.mean)} dimensions cannot be compared: use one feature network")
