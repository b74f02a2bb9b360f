"""Standard errors of accuracies and recalls over a finite set of samples, and of paired differences between two models."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

NORMAL_95 = 1.959964  # half the width of a 95 % interval, in standard errors
# Standard errors of means that are 0 up to rounding: all samples of each group are equal.
_NO_SPREAD = 1e-12


class Interval(NamedTuple):
    """A mean difference and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Outcomes:
    """Per-sample values whose mean is a metric: 1 for a hit and 0 for a miss, or differences of two models' hits.

    With `groups`, the metric is the mean over the groups of each group's mean, such as the mean recall over classes. Samples of
    one cluster are not independent, such as the captions of one image.
    """

    values: np.ndarray  # [N]
    groups: np.ndarray | None = None  # [N] integers from 0
    clusters: np.ndarray | None = None  # [N] integers from 0; None: all samples are independent

    @property
    def mean(self) -> float:
        return float(self._group_means().mean())

    @property
    def standard_error(self) -> float:
        """For independent hits without groups it is sqrt(p (1 - p) / n).

        If all samples of each group are equal, this would be 0, although n equal outcomes do not prove that all are: none wrong
        of 40 is likely up to a rate of 9 %. Then it is z / (n + z^2), z = 1.96, for n samples or clusters: z standard errors from
        0 or 1 end where the 95 % interval of Wilson (1927) does, at a rate of z^2 / (n + z^2).
        """
        counts = np.bincount(self._group_of_sample())
        means = np.full(len(counts), np.nan)
        means[counts > 0] = self._group_means()
        group = self._group_of_sample()
        deviations = (self.values - means[group]) / counts[group] / np.count_nonzero(counts)
        num_independent = len(deviations)
        if self.clusters is not None:
            num_independent = len(np.unique(self.clusters))
            deviations = np.bincount(self.clusters, weights=deviations)
        error = float(np.sqrt((deviations**2).sum()))
        return error if error > _NO_SPREAD else NORMAL_95 / (num_independent + NORMAL_95**2)

    def minus(self, other: "Outcomes") -> Interval:
        """Return the paired difference to another model's outcomes of the same samples, as McNemar's test pairs them.

        Raises ValueError if the samples are not the same ones.
        """
        if len(self.values) != len(other.values):
            raise ValueError(f"outcomes of {len(self.values)} and {len(other.values)} samples cannot be paired")
        difference = Outcomes(self.values.astype(np.float64) - other.values, self.groups, self.clusters)
        mean, margin = difference.mean, NORMAL_95 * difference.standard_error
        return Interval(mean, max(-1.0, mean - margin), min(1.0, mean + margin))

    def _group_of_sample(self) -> np.ndarray:
        return np.zeros(len(self.values), dtype=np.int64) if self.groups is None else self.groups

    def _group_means(self) -> np.ndarray:
        """Return the means of the groups that have samples."""
        counts = np.bincount(self._group_of_sample())
        sums = np.bincount(self._group_of_sample(), weights=self.values)
        return sums[counts > 0] / counts[counts > 0]
