"""The runs of a controlled comparison by arm and seed, and the differences of arms."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ray_platform.report import metric_names
from ray_platform.report.text import NOTHING, NUM_COLOURS, is_number, isolated
from ray_platform.units import duration_text

_COST = re.compile(r"seconds|flops|samples|parameters")
_VISIBILITY = "model.query_visibility"
_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


class Pair(NamedTuple):
    """A difference of two arms, first minus second, over the seeds that both have."""

    metric: str
    first: str
    second: str
    mean: float | None
    interval: tuple[float, float] | None  # 95 %; None with one seed
    n: int

    @property
    def outcome(self) -> str:
        """`shown`: the interval excludes zero in favour of the first arm; `against` it; `open`: it includes zero; `single`: one
        seed, no interval."""
        if self.interval is None:
            return "single"
        low, high = self.interval
        if low <= 0 <= high:
            return "open"
        return "shown" if (high < 0) == metric_names.is_distance(self.metric) else "against"


class Arms:
    """What `comparison_page` takes, read."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self._arms: Mapping[str, Mapping[str, Any]] = details["arms"]
        self._config: Mapping[str, Any] = details.get("config", {})
        self.names = list(self._arms)
        found = dict.fromkeys(name for arm in self._arms.values() for run in arm["seeds"].values() for name in run)
        measured = [name for name in found if any(self.mean(arm, name) is not None for arm in self.names)]
        self.costs = [name for name in measured if _COST.search(name)]
        self.metrics = [name for name in measured if not _COST.search(name)]
        self.pairs = [pair for key, entry in details.get("paired", {}).items() if (pair := self._pair(key, entry))]

    def number(self, name: str) -> int:
        """The arm's place; arms without a finished run come after all others."""
        return self.names.index(name) if name in self.names else len(self.names)

    def colour(self, name: str) -> str:
        """The CSS class that sets an arm's colour, `--c`."""
        return f"m{self.number(name) % NUM_COLOURS}"

    def line_colour(self, name: str) -> str:
        """The same, for a chart's line."""
        number = self.number(name) % NUM_COLOURS
        return f"var(--m{number})" if number else "var(--bar)"

    def named(self, name: str) -> str:
        """An arm's name behind a patch of its colour, as HTML."""
        return f'<i class="patch {self.colour(name)}"></i>{isolated(name)}'

    def seeds(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        return self._arms[name]["seeds"]

    def mean(self, name: str, metric: str) -> float | None:
        return _known(self._arms[name]["mean"].get(metric))

    def std(self, name: str, metric: str) -> float | None:
        return _known(self._arms[name]["std"].get(metric))

    def best(self, metric: str) -> float | None:
        """The best mean of several."""
        means = [mean for name in self.names if (mean := self.mean(name, metric)) is not None]
        if len(means) < 2:
            return None
        return min(means) if metric_names.is_distance(metric) else max(means)

    @property
    def claimed(self) -> list[Pair]:
        """The two differences that the claim is about, as far as they were measured."""
        accuracy = [pair for pair in self.pairs if (pair.metric, pair.first, pair.second) == ("accuracy", "joint", "alignment")]
        distance = [pair for pair in self.pairs if (pair.metric, pair.first, pair.second) == ("fd", "joint", "generation")]
        return [*accuracy, *distance]

    def differences(self, pair: Pair) -> dict[str, float]:
        """Seed by seed."""
        first, second = (self._arms[name]["seeds"] for name in (pair.first, pair.second))
        return {
            seed: first[seed][pair.metric] - second[seed][pair.metric]
            for seed in first
            if seed in second and is_number(first[seed].get(pair.metric)) and is_number(second[seed].get(pair.metric))
        }

    def visibility(self, name: str) -> str:
        """The arm's mask, `joint` or `one_way`."""
        base = self._config.get("pretrain", {}).get("model", {}).get("query_visibility", "")
        return self._fields(name).get(_VISIBILITY, base)

    def fields_text(self, name: str) -> str:
        """What the arm sets."""
        return ", ".join(f"{field} {value}" for field, value in self._fields(name).items()) or NOTHING

    @property
    def of_both_masks(self) -> list[str]:
        """The arms of the first task that was trained under both masks."""
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

    def _pair(self, key: str, entry: Mapping[str, Any]) -> Pair | None:
        """Of `<metric>_<arm>_minus_<arm>`; None of arms that are not there."""
        left, _, second = key.rpartition("_minus_")
        firsts = [name for name in self.names if left.endswith(f"_{name}")]
        if not firsts or second not in self.names:
            return None
        first = max(firsts, key=len)
        low, high = _known(entry["low"]), _known(entry["high"])
        interval = None if low is None or high is None else (low, high)
        return Pair(left.removesuffix(f"_{first}"), first, second, _known(entry["mean"]), interval, entry["n"])


def cost_title(name: str) -> str:
    return "training time" if name == "seconds" else name.replace("seconds", "time").replace("_", " ").replace("flops", "FLOPs")


def cost_text(name: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    if "seconds" in name:
        return duration_text(value)
    if name == "samples":
        return f"{value:,.0f}"
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if value >= scale), (1.0, ""))
    return f"{value / scale:.3g} {unit}".strip()


def _known(value: float | None) -> float | None:
    return value if is_number(value) else None
