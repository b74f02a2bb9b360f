"""KID: the squared maximum mean discrepancy of two sets of features, whose estimate is unbiased however few there are."""

from typing import NamedTuple

import numpy as np
import torch

NUM_SUBSETS, SUBSET_SIZE = 100, 1000


class KID(NamedTuple):
    mean: float
    std: float  # over the subsets, with their number in the denominator, as in torchmetrics and torch-fidelity


def kernel_distance(x: np.ndarray, y: np.ndarray) -> KID:
    """Return KID with the kernel (x·y / d + 1)^3 over 100 subsets of 1000: Bińkowski et al. (2018), "Demystifying MMD GANs".

    Subsets are sampled without replacement and with a fixed seed; they have min(n, m) features if that is fewer than 1000. The
    estimate can be negative.

    Args:
        x: Features [n, d].
        y: Features [m, d].

    Raises:
        ValueError: There are fewer than two features, or their widths differ.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: use one feature network")
    size = min(SUBSET_SIZE, len(x), len(y))
    if size < 2:
        raise ValueError(f"KID of {len(x)} and {len(y)} features: at least two of each are needed")
    random = np.random.default_rng(0)
    # If a subset contains everything, all subsets are equal.
    num_subsets = 1 if size == len(x) == len(y) else NUM_SUBSETS
    distances = []
    for _ in range(num_subsets):
        subsets = (features[random.choice(len(features), size, replace=False)] for features in (x, y))
        distances.append(squared_discrepancy(*subsets))
    return KID(float(np.mean(distances)), float(np.std(distances)))


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
