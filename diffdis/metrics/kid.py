"""KID: the squared maximum mean discrepancy of two sets of features, which is unbiased however few they are."""

from typing import NamedTuple

import numpy as np
import torch

SUBSETS, SUBSET_SIZE = 100, 1000


class KID(NamedTuple):
    mean: float
    std: float  # over the subsets, with SUBSETS in the denominator, as the peers give it


def kernel_distance(x: np.ndarray, y: np.ndarray) -> KID:
    """Bińkowski et al. (2018), "Demystifying MMD GANs": the kernel (x·y / d + 1)^3, 100 subsets of 1000.

    x [n, d] and y [m, d]; subsets of min(n, m) where that is fewer, drawn without replacement, always the same ones. The
    estimate can be below 0. Raises ValueError for fewer than two features, or widths that differ.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared: use one feature network")
    size = min(SUBSET_SIZE, len(x), len(y))
    if size < 2:
        raise ValueError(f"KID of {len(x)} and {len(y)} features: at least two of each are needed")
    random = np.random.default_rng(0)
    # Where a subset is all that there is, every subset is the same one.
    subsets = 1 if size == len(x) == len(y) else SUBSETS
    distances = []
    for _ in range(subsets):
        chosen = (features[random.choice(len(features), size, replace=False)] for features in (x, y))
        distances.append(squared_discrepancy(*chosen))
    return KID(float(np.mean(distances)), float(np.std(distances)))


def squared_discrepancy(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimate of MMD^2 from as many features of each: x and y [m, d], m > 1.

    Products are in the features' precision; what is made of them is in float64, since nearly equal sums are subtracted.
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
