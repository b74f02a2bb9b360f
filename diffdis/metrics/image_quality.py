"""Metrics of generated images: the Fréchet distance (FID with the features of FID's Inception), KID, precision and recall, the
Inception Score, and CLIPScore.

The Fréchet distance is computed in float64 from means and centered second moments: sums of raw squares lose the digits of a
covariance that is small against the mean.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

MAX_ROWS = 4096  # feature vectors that are in memory in float64 at a time
EXTRAPOLATED_SUBSETS = 15
# Below so many images per dimension, distances of Gaussians exceed the true ones several times, and do not fall as 1/n yet.
MIN_IMAGES_PER_DIMENSION = 5
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBORS = 3  # of precision and recall
SPLITS, _SPLIT_SEED = 10, 2020  # of the Inception Score; the seed of torch-fidelity
_ONE_IMAGE = "the covariance of one image is not defined: at least two are needed"


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and centered second moments of feature vectors, in float64."""

    n: int  # number of feature vectors
    mean: np.ndarray  # [d]
    second: np.ndarray  # [d, d], the sum of the outer products of the deviations from the mean

    @classmethod
    def of(cls, features: np.ndarray) -> "Moments":
        """Return the moments of features [n, d], n > 0. Raises ValueError if one is not finite."""
        if features.ndim != 2 or not len(features):
            raise ValueError(f"features of shape {features.shape}: [n, d] with at least one row is needed")
        parts = (_moments(features[i : i + MAX_ROWS]) for i in range(0, len(features), MAX_ROWS))
        total = functools.reduce(Moments.merge, parts)
        if not np.isfinite(total.mean).all():
            row = int((~np.isfinite(features).all(axis=1)).argmax())
            raise ValueError(f"features of image {row} are not finite: the feature network or the image is broken")
        return total

    @classmethod
    def of_statistics(cls, mean: np.ndarray, covariance: np.ndarray) -> "Moments":
        """Return the moments with a published mean [d] and covariance [d, d], whose number of images is not known.

        Raises ValueError for other shapes, or values that are not finite.
        """
        if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(f"mu {mean.shape} and sigma {covariance.shape}: [d] and [d, d] are needed")
        if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            raise ValueError("mu or sigma is not finite")
        n = 2**31  # large, so that no eigenvalue is left out for lack of images
        return cls(n, mean.astype(np.float64), covariance.astype(np.float64) * (n - 1))

    def merge(self, other: "Moments") -> "Moments":
        """Return the moments of both sets together.

        Chan, Golub and LeVeque (1983), "Algorithms for computing the sample variance".
        """
        n = self.n + other.n
        shift = other.mean - self.mean
        second = self.second + other.second + np.outer(shift, shift) * (self.n * other.n / n)
        return Moments(n, self.mean + shift * (other.n / n), second)

    @property
    def covariance(self) -> np.ndarray:
        """The covariance [d, d] with n - 1 in the denominator. Raises ValueError for a single feature vector."""
        if self.n < 2:
            raise ValueError(_ONE_IMAGE)
        return self.second / (self.n - 1)


def frechet_distance(a: Moments, b: Moments) -> float:
    """Return |m_a - m_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2), at least 0: Dowson and Landau (1982).

    The last trace is the sum of the roots of the eigenvalues of the symmetric matrix R^T S_b R with S_a = R R^T.
    Raises ValueError for features of different widths.
    """
    _check_width(len(a.mean), len(b.mean))
    # Take the root of the one with fewer samples, which is narrower if there are fewer samples than dimensions.
    fewer, more = sorted((a, b), key=lambda moments: moments.n)
    root = _root(torch.from_numpy(fewer.covariance))
    inner = root.T @ torch.from_numpy(more.covariance) @ root
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return _distance(a.mean - b.mean, float(traces), inner, rank=fewer.n - 1)


def frechet_distance_of_features(features: np.ndarray, reference: Moments) -> float:
    """Return `frechet_distance(Moments.of(features), reference)`, faster if there are fewer features [n, d] than dimensions.

    In that case the deviations from the mean are themselves a root of the covariance.
    """
    n, width = features.shape
    _check_width(width, len(reference.mean))
    if n >= width:
        return frechet_distance(Moments.of(features), reference)
    if n < 2:
        raise ValueError(_ONE_IMAGE)
    mean = features.mean(axis=0, dtype=np.float64)
    root = torch.from_numpy((features - mean) / np.sqrt(n - 1))  # [n, d]
    inner = root @ torch.from_numpy(reference.covariance) @ root.T
    traces = root.square().sum().item() + float(np.trace(reference.covariance))
    return _distance(mean - reference.mean, traces, inner, rank=min(n, reference.n) - 1)


def extrapolated_distance(features: np.ndarray, reference: Moments) -> float:
    """Return the distance extrapolated to infinitely many images: Chong and Forsyth (2020), "Effectively unbiased FID".

    A line is fitted to the distances of growing subsets of features [n, d] against 1/n and evaluated at 1/n = 0. The subsets grow
    in a random order with a fixed seed. The result can be negative. Two biases remain: that of the finite reference, and below
    about 5 d features, where distances do not yet fall as 1/n, a part of this one. Raises ValueError for fewer than 30 features.
    """
    if len(features) < 2 * EXTRAPOLATED_SUBSETS:
        raise ValueError(f"extrapolation from {len(features)} images: at least {2 * EXTRAPOLATED_SUBSETS} are needed")
    order = np.random.default_rng(0).permutation(len(features))
    points = list(_growing(features[order], reference))
    inverse, distances = (np.array(values) for values in zip(*points, strict=True))
    return float(np.polynomial.Polynomial.fit(inverse, distances, 1)(0.0))


def _growing(features: np.ndarray, reference: Moments) -> Iterator[tuple[float, float]]:
    """Yield (1/n, distance) of the first n features for growing n."""
    # Start at one half: smaller subsets lie further from the line and would bend it more than they stabilize it.
    sizes = np.linspace(len(features) // 2, len(features), EXTRAPOLATED_SUBSETS).astype(int).tolist()
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
    """Return R [d, r] with R R^T = covariance [d, d], where r is its rank."""
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    # Not positive definite: fewer samples than dimensions, or features that never vary.
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _distance(shift: np.ndarray, traces: float, inner: torch.Tensor, rank: int) -> float:
    """Return the distance, given that `inner` has at most `rank` nonzero eigenvalues.

    The others are left out: rounding makes them 1e-16 of the largest one, and their roots would be 1e-8.
    """
    values = torch.linalg.eigvalsh(inner)[-rank:]  # ascending
    root_trace = values.clamp(min=0.0).sqrt().sum().item()
    return max(0.0, float(shift @ shift) + traces - 2.0 * root_trace)


def _check_width(first: int, second: int) -> None:
    if first != second:
        raise ValueError(f"features of {first} and {second} dimensions cannot be compared: use one feature network")


class KID(NamedTuple):
    mean: float
    std: float | None  # over the subsets, with their number in the denominator, as in torchmetrics and torch-fidelity


def kernel_distance(x: np.ndarray, y: np.ndarray) -> KID:
    """Return KID with the kernel (x·y / d + 1)^3 over 100 subsets of 1000: Bińkowski et al. (2018), "Demystifying MMD GANs".

    Subsets are sampled without replacement and with a fixed seed; they have min(n, m) features if that is fewer than 1000. Then
    every subset contains all of x or y, their spread says little about the error, and there is no standard deviation. The
    estimate can be negative. Raises ValueError for fewer than two features x [n, d] or y [m, d].
    """
    _check_width(x.shape[1], y.shape[1])
    size = min(KID_SUBSET_SIZE, len(x), len(y))
    if size < 2:
        raise ValueError(f"KID of {len(x)} and {len(y)} features: at least two of each are needed")
    random = np.random.default_rng(0)
    # If a subset contains everything, all subsets are equal.
    num_subsets = 1 if size == len(x) == len(y) else KID_SUBSETS
    distances = []
    for _ in range(num_subsets):
        subsets = (features[random.choice(len(features), size, replace=False)] for features in (x, y))
        distances.append(squared_discrepancy(*subsets))
    is_sampled = size < min(len(x), len(y))
    return KID(float(np.mean(distances)), float(np.std(distances)) if is_sampled else None)


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """Return the unbiased estimate of MMD^2 from equally many features: x and y [m, d], m > 1.

    Products are computed in the features' precision, sums in float64, because nearly equal sums are subtracted.
    """
    first, second = torch.from_numpy(x), torch.from_numpy(y)
    m = len(first)
    within = _off_diagonal_sum(_kernel(first, first)) + _off_diagonal_sum(_kernel(second, second))
    return within / (m * (m - 1)) - 2.0 * _kernel(first, second).mean().item()


def _kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    base = (a @ b.T).double().div_(a.shape[1]).add_(1.0)
    return base.square().mul_(base)


def _off_diagonal_sum(kernel: torch.Tensor) -> float:
    return (kernel.sum() - kernel.diagonal().sum()).item()


class PrecisionRecall(NamedTuple):
    precision: float  # fraction of generated images inside the manifold of the real ones: fidelity
    recall: float  # fraction of real images inside the manifold of the generated ones: diversity


def precision_recall(generated: np.ndarray, real: np.ndarray) -> PrecisionRecall:
    """Return improved precision and recall: Kynkäänniemi et al. (2019), "Improved precision and recall metric".

    The manifold of a set is the union of the balls around its features whose radius is the distance to their third neighbor.
    Both depend on the numbers of images: compare them for equal numbers only. Raises ValueError for fewer than four features
    generated [n, d] or real [m, d].
    """
    _check_width(generated.shape[1], real.shape[1])
    if min(len(generated), len(real)) <= NEIGHBORS:
        raise ValueError(f"precision of {len(generated)} and {len(real)} images: at least {NEIGHBORS + 1} of each are needed")
    first, second = torch.from_numpy(generated).float(), torch.from_numpy(real).float()
    return PrecisionRecall(_fraction_inside(first, second), _fraction_inside(second, first))


def _fraction_inside(points: torch.Tensor, manifold: torch.Tensor) -> float:
    """Return the fraction of points [n, d] inside at least one ball of the manifold's features [m, d]."""
    radii = torch.cat([torch.cdist(rows, manifold).kthvalue(NEIGHBORS + 1).values for rows in manifold.split(MAX_ROWS)])
    num_inside = sum(int((torch.cdist(rows, manifold) <= radii).any(dim=1).sum()) for rows in points.split(MAX_ROWS))
    return num_inside / len(points)


class InceptionScore(NamedTuple):
    mean: float
    std: float  # over the splits


def inception_score(logits: np.ndarray) -> InceptionScore:
    """Return exp of the mean KL divergence of the classes of an image from those of all images of its split.

    Salimans et al. (2016), "Improved techniques for training GANs", with ten splits in torch-fidelity's random order, so that
    equal logits give its number. `logits` [n, C] are those of FID's Inception, without the bias, as in that tool. Raises
    ValueError for fewer than ten images.
    """
    if len(logits) < SPLITS:
        raise ValueError(f"Inception Score of {len(logits)} images: at least {SPLITS} are needed")
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(logits))
    log_p = torch.from_numpy(logits[order]).double().log_softmax(dim=1)
    scores = []
    for i in range(SPLITS):
        split = log_p[i * len(logits) // SPLITS : (i + 1) * len(logits) // SPLITS]
        divergence = (split.exp() * (split - split.exp().mean(dim=0).log())).sum(dim=1)
        scores.append(divergence.mean().exp().item())
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def clip_score(cosines: np.ndarray) -> float:
    """Return the mean of max(100 cos, 0) over the similarities [N] of images with their captions, as torchmetrics does.

    Hessel et al. (2021), "CLIPScore", define 2.5 max(cos, 0): divide by 40 for theirs. Raises ValueError if N is 0, or a
    similarity is not finite.
    """
    if not len(cosines) or not np.isfinite(cosines).all():
        raise ValueError(f"CLIPScore of {len(cosines)} cosines: at least one is needed, and all must be finite")
    return float(np.maximum(100.0 * np.asarray(cosines, dtype=np.float64), 0.0).mean())
