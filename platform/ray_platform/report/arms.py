"""The arms of a controlled comparison, and the differences between them."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ray_platform.metric_registry import Metric, describe_metric
from ray_platform.report.records import Claim, ComparisonDetails, PairedDifference
from ray_platform.report.render import color_class
from ray_platform.units import NO_VALUE, is_number

_VISIBILITY = "model.query_visibility"


class Difference(NamedTuple):
    """The difference of a metric between two arms, first minus second, over the seeds that both have."""

    metric: Metric
    first: str
    second: str
    mean: float | None
    interval: tuple[float, float] | None  # 95 %; None with one seed
    n: int

    @property
    def outcome(self) -> Literal["favorable", "adverse", "inconclusive", "single"]:
        """Whether the interval excludes zero, for or against the first arm, or includes it; `single` without an interval."""
        if self.interval is None:
            return "single"
        low, high = self.interval
        if low <= 0 <= high or self.metric.direction is None:
            return "inconclusive"
        return "favorable" if (high < 0) == (self.metric.direction == "min") else "adverse"

    @property
    def interval_text(self) -> str:
        if self.interval is None:
            return "no interval"
        return " to ".join(self.metric.difference_text(end, with_unit=False) for end in self.interval)


class Arms:
    """The arms of a comparison with their runs, means and configurations."""

    def __init__(self, details: ComparisonDetails) -> None:
        self._arms = details["arms"]
        self._config: Mapping[str, Any] = details.get("config", {})
        self.names = list(self._arms)
        names = dict.fromkeys(name for arm in self._arms.values() for run in arm["seeds"].values() for name in run)
        measured = [describe_metric(name) for name in names if any(self.mean(arm, name) is not None for arm in self.names)]
        self.metrics = [metric for metric in measured if not metric.is_cost]
        self.costs = [metric for metric in measured if metric.is_cost]
        paired = details.get("paired", {}).items()
        self.differences = [each for key, entry in paired if (each := self._difference(key, entry))]

    def color(self, name: str) -> str:
        """Return the CSS class of an arm's color; arms without a finished run come after all others."""
        return color_class(self.names, name)

    def seeds(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """Return the runs of an arm by seed."""
        return self._arms[name]["seeds"]

    def mean(self, name: str, metric: str) -> float | None:
        return _known(self._arms[name]["mean"].get(metric))

    def std(self, name: str, metric: str) -> float | None:
        return _known(self._arms[name]["std"].get(metric))

    def is_best(self, name: str, metric: Metric) -> bool:
        """Return whether the arm's mean is the best one of several."""
        means = [mean for arm in self.names if (mean := self.mean(arm, metric.name)) is not None]
        return metric.direction is not None and len(means) > 1 and self.mean(name, metric.name) == metric.best(means)

    def claimed(self, claim: Claim) -> list[Difference]:
        """Return the differences that a claim is about, as far as they were measured."""
        known = {(each.metric.name, each.first, each.second): each for each in self.differences}
        return [known[difference] for difference in claim.differences if difference in known]

    def by_seed(self, difference: Difference) -> dict[str, float]:
        """Return a difference seed by seed."""
        first, second = self.seeds(difference.first), self.seeds(difference.second)
        pairs = {seed: (first[seed].get(difference.metric.name), second[seed].get(difference.metric.name))
                 for seed in first if seed in second}  # fmt: skip
        return {seed: a - b for seed, (a, b) in pairs.items() if is_number(a) and is_number(b)}

    def visibility(self, name: str) -> str:
        """Return the arm's attention mask, `joint` or `one_way`."""
        base = self._config.get("pretrain", {}).get("model", {}).get("query_visibility", "")
        return self._fields(name).get(_VISIBILITY, base)

    def fields_text(self, name: str) -> str:
        """Return the fields that the arm sets, with their values."""
        return ", ".join(f"{field} {value}" for field, value in self._fields(name).items()) or NO_VALUE

    def with_both_masks(self) -> list[str]:
        """Return the arms of the first task that was trained with both masks."""
        by_task: dict[str, list[str]] = {}
        base = self._config.get("pretrain", {}).get("objective", {}).get("task", "")
        for name in self.names:
            by_task.setdefault(self._fields(name).get("objective.task", base), []).append(name)
        for names in by_task.values():
            if {"joint", "one_way"} <= {self.visibility(name) for name in names}:
                return names
        return []

    def _fields(self, name: str) -> Mapping[str, Any]:
        return self._config.get("arms", {}).get(name, {})

    def _difference(self, key: str, entry: PairedDifference) -> Difference | None:
        """Return the difference of a key `<metric>_<arm>_minus_<arm>`; None if one of the arms has no run."""
        left, _, second = key.rpartition("_minus_")
        candidates: Sequence[str] = [name for name in self.names if left.endswith(f"_{name}")]
        if not candidates or second not in self.names:
            return None
        first = max(candidates, key=len)
        low, high = _known(entry["low"]), _known(entry["high"])
        interval = None if low is None or high is None else (low, high)
        metric = describe_metric(left.removesuffix(f"_{first}"))
        return Difference(metric, first, second, _known(entry["mean"]), interval, entry["n"])


def _known(value: float | None) -> float | None:
    return value if is_number(value) else None
