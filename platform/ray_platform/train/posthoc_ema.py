"""Post-hoc EMA (Karras et al. 2024, arXiv 2312.02696): averages of any width from the averages of a few widths in checkpoints.

The average of width sigma over t updates counts the weights after update tau by the power function
(gamma + 1) tau^gamma / t^(gamma + 1), whose standard deviation is sigma t.
"""

import logging
from collections.abc import Sequence

import numpy as np
import torch

from ray_platform.contracts import ConfigError
from ray_platform.train.checkpoint_format import Manifest, list_checkpoints, read_manifest, read_weights
from ray_platform.train.config import width_state

logger = logging.getLogger(__name__)

MAX_WIDTH = 0.28  # that of gamma = 0, the plain mean, is 1 / sqrt(12)


def power_of(width: float) -> float:
    """Return gamma of the width sigma: sigma^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (algorithm 2)."""
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def power_decay_at(width: float, num_updates: int) -> float:
    """Return the decay at an update n, counted from 1: (1 - 1 / n)^(gamma + 1) (eq. 3)."""
    return (1 - 1 / num_updates) ** (power_of(width) + 1)


def inner_products(t_a: np.ndarray, gamma_a: np.ndarray, t_b: np.ndarray, gamma_b: np.ndarray) -> np.ndarray:
    """Return the integral of the product of two averages' power functions (appendix C, algorithm 3)."""
    ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def snapshot_weights(snapshots: Sequence[tuple[int, float]], num_updates: int, width: float) -> np.ndarray:
    """Return the factor of each snapshot (its number of updates, its width) in the average of a width after `num_updates`.

    Their weighted sum is the closest one to its power function by least squares. The factors are scaled to the sum 1, so that
    weights that never change stay as they are.
    """
    t = np.array([n for n, _ in snapshots], dtype=np.float64)
    gamma = np.array([power_of(each) for _, each in snapshots])
    products = inner_products(t[:, None], gamma[:, None], t[None], gamma[None])
    target = inner_products(t, gamma, np.array(float(num_updates)), np.array(power_of(width)))
    factors = np.linalg.lstsq(products, target, rcond=None)[0]
    return factors / factors.sum()


def reconstruct(url: str, stored: Sequence[float], width: float) -> dict[str, torch.Tensor]:
    """Return the average of a width at the checkpoint `url`, from those of `stored` widths in the checkpoints on the way to it.

    Raises ConfigError for a width that cannot be reconstructed.
    """
    if not stored or not 0 < width < MAX_WIDTH:
        raise ConfigError(
            f"weights: an EMA of the width {width:g} needs a run with train.ema_widths, such as '[0.05, 0.1]', and a width "
            f"between 0 and {MAX_WIDTH}"
        )
    manifest = read_manifest(url)
    by_step = _snapshots_before(url, manifest, stored) | {manifest.num_updates: url}
    snapshots = [(n, each) for n in sorted(by_step) for each in stored]
    total: dict[str, torch.Tensor] = {}
    types: dict[str, torch.dtype] = {}
    for (n, each), factor in zip(snapshots, snapshot_weights(snapshots, manifest.num_updates, width), strict=True):
        for name, tensor in read_weights(by_step[n], width_state(each)):
            types[name] = tensor.dtype
            total[name] = total.get(name, 0.0) + factor * tensor.double()
    return {name: tensor.to(types[name]) for name, tensor in total.items()}


def _snapshots_before(url: str, manifest: Manifest, stored: Sequence[float]) -> dict[int, str]:
    """Return the checkpoints with averages of the `stored` widths through which training passed on its way to `url`, by updates.

    Logs a warning when another run, from which this one branched, has none of them.
    """
    output_dir, _, launch, _ = url.rsplit("/", 3)
    by_step: dict[int, str] = {}
    missing = []
    for ancestor, last_step in (manifest.branched_at | {launch: manifest.step}).items():
        elsewhere, _, name = ancestor.rpartition("/checkpoints/")
        manifests = {each: read_manifest(each) for each in list_checkpoints(elsewhere or output_dir, name)}
        passed = {
            each.num_updates: at
            for at, each in manifests.items()
            if each.step <= last_step and set(stored) <= set(each.config.get("train", {}).get("ema_widths", ()))
        }
        if elsewhere and not passed:
            missing.append(f"{ancestor} up to step {last_step}")
        by_step |= passed  # of launches whose branches are unknown, the later one's
    if missing:
        logger.warning(
            "weights: no checkpoint with averages of train.ema_widths is left of %s, from which %s branched; the average is "
            "reconstructed from the later ones, which is less exact",
            *(", ".join(missing), output_dir),
        )
    return {n: at for n, at in by_step.items() if 0 < n < manifest.num_updates}
