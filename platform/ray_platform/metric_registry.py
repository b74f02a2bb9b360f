"""The registry of metrics: name, label, unit, format and direction of every metric that is measured, compared or displayed.

Add a metric by adding one entry to `METRICS` (or by calling `register`). Reports, sweeps, comparisons and the metrics that go to
MLflow read this registry; a metric that it lacks is an error where the metric is produced or chosen as an objective.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from string import Formatter
from typing import Literal

from ray_platform.contracts import ConfigError
from ray_platform.units import NO_VALUE, duration_text, is_number, number_text, quantity_text

Direction = Literal["max", "min"]
Format = Literal["fraction", "number", "duration", "count", "quantity"]


@dataclass(frozen=True)
class Metric:
    """How a metric is called, written and compared.

    A name with placeholders (`fd_{network}`) declares a family; its label may use the same placeholders.
    """

    name: str
    label: str
    direction: Direction | None  # whether larger or smaller values are better; None for a quantity that is only displayed
    format: Format = "number"  # fraction: stored as 0 to 1, displayed in percent
    unit: str = ""
    is_cost: bool = False  # resources that a run consumed, as opposed to what it achieved

    @property
    def is_fraction(self) -> bool:
        return self.format == "fraction"

    @property
    def arrow(self) -> str:
        """`↑` if higher is better, `↓` if lower is better."""
        return {"max": "↑", "min": "↓", None: ""}[self.direction]

    @property
    def axis_label(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def axis_value(self, value: float) -> float:
        """Return the value on a chart's axis: fractions in percent."""
        return 100 * value if self.is_fraction else value

    def is_better(self, a: float, b: float) -> bool:
        """Return whether `a` is strictly better than `b`; False for a metric without a direction."""
        return a > b if self.direction == "max" else a < b if self.direction == "min" else False

    def best(self, values: Iterable[float]) -> float:
        """Return the best of `values`. Raises ValueError if there are none."""
        return min(values) if self.direction == "min" else max(values)

    def text(self, value: float | None, with_unit: bool = True) -> str:
        """Return the value as a reader expects it: `2.37 %`, `47.7 min`, `1.4 P`; a dash where it is not defined."""
        if not is_number(value):
            return NO_VALUE
        if self.format == "fraction":
            return f"{100 * value:.2f}{' %' * with_unit}"
        if self.format == "duration":
            return duration_text(value)
        if self.format == "count":
            return f"{value:,.0f}"
        return quantity_text(value) if self.format == "quantity" else number_text(value)

    def spread_text(self, mean: float, spread: float) -> str:
        """Return a deviation from `mean` with as many decimals as `mean` has, without its unit."""
        decimals = len(self.text(mean, with_unit=False).partition(".")[2])
        return f"{self.axis_value(spread):,.{decimals}f}"

    def difference_text(self, difference: float | None, with_unit: bool = True, decimals: int | None = None) -> str:
        """Return a difference with its sign; differences of fractions in points (`+0.82 points`).

        Other numbers have `decimals` decimals, or three or four significant digits.
        """
        if not is_number(difference):
            return NO_VALUE
        if self.is_fraction:
            return f"{round(100 * difference, 2) + 0.0:+.2f}{' points' * with_unit}".replace("-", "−")
        text = number_text(difference) if decimals is None else f"{difference:,.{decimals}f}".replace("-", "−")
        return f"{'+' if difference > 0 else ''}{text}"


def _fraction(name: str, label: str) -> Metric:
    return Metric(name, label, "max", "fraction", "%")


METRICS: tuple[Metric, ...] = (
    # Zero-shot classification.
    _fraction("acc1", "acc1"),
    _fraction("acc5", "acc5"),
    _fraction("mean_per_class_recall", "mean per class recall"),
    _fraction("zero_shot_mean", "mean zero-shot accuracy"),  # of the main metrics of the 12 sets
    _fraction("accuracy", "zero-shot accuracy"),  # mean acc1 of the evaluated sets
    _fraction("accuracy_{set}", "accuracy, {set}"),
    _fraction("num_steps_{steps}_num_draws_{draws}", "acc1 with {steps} steps and {draws} draws"),
    # Retrieval: what is retrieved, and the rank.
    _fraction("image_retrieval_recall@{k}", "image retrieval R@{k}"),
    _fraction("text_retrieval_recall@{k}", "text retrieval R@{k}"),
    _fraction("retrieval_recall@{k}", "retrieval R@{k}"),  # mean of both directions
    _fraction("retrieval_r{k}", "retrieval R@{k}"),
    _fraction("image_to_text_r{k}", "image to text R@{k}"),
    _fraction("text_to_image_r{k}", "text to image R@{k}"),
    # Image quality: FID is the Fréchet distance in the features of Inception, FD-<network> in those of another network;
    # ∞ is the extrapolation to infinitely many images.
    Metric("fid", "FID", "min"),
    Metric("fid_infinity", "FID ∞", "min"),
    Metric("fd", "FD", "min"),
    Metric("fd_infinity", "FD ∞", "min"),
    Metric("fd_{network}", "FD-{network}", "min"),
    Metric("fd_{network}_infinity", "FD-{network} ∞", "min"),
    Metric("kid", "KID", "min"),
    Metric("kid_{network}", "KID-{network}", "min"),
    Metric("kid_std", "KID, standard deviation", None),
    Metric("kid_{network}_std", "KID-{network}, standard deviation", None),
    _fraction("precision", "precision"),
    _fraction("precision_{network}", "precision-{network}"),
    _fraction("recall", "recall"),
    _fraction("recall_{network}", "recall-{network}"),
    Metric("inception_score", "Inception Score", "max"),
    Metric("inception_score_std", "Inception Score, standard deviation", None),
    Metric("alignment", "alignment", "max"),  # of generated images with their captions: CLIP score
    Metric("standard_error_{metric}", "standard error, {metric}", None, "fraction", "%"),
    # Sizes of what was measured.
    Metric("num_images", "images", None, "count"),
    Metric("num_missing", "missing images", None, "count"),
    Metric("num_unreadable", "unreadable images", None, "count"),
    Metric("num_reference", "reference images", None, "count"),
    # Training.
    Metric("loss", "loss", "min"),
    Metric("loss_{term}", "loss {term}", "min"),
    Metric(
        "loss_generation_weighted", "loss generation, weighted", "min"
    ),  # what training minimizes; loss_generation has no weights
    Metric("samples_per_second", "samples/s", "max"),
    Metric("mfu", "MFU", "max", "fraction", "%"),
    # What a run cost.
    Metric("samples", "samples", "min", "count", is_cost=True),
    Metric("seconds", "training time", "min", "duration", is_cost=True),
    Metric("parameters", "parameters", "min", "quantity", is_cost=True),
    Metric("flops", "FLOPs", "min", "quantity", is_cost=True),
    Metric("flops_per_sample", "FLOPs per sample", "min", "quantity", is_cost=True),
    Metric("scoring_seconds", "scoring time", "min", "duration", is_cost=True),
    Metric("generation_seconds", "image generation time", "min", "duration", is_cost=True),
)

_exact: dict[str, Metric] = {}
_families: list[tuple[int, re.Pattern[str], Metric]] = []  # number of literal characters, pattern, family


def register(metric: Metric) -> None:
    """Add a metric or a family of metrics. Raises ConfigError if the name is declared already."""
    if metric.name in _exact or any(metric.name == family.name for _, _, family in _families):
        raise ConfigError(f"metric {metric.name}: declared twice; choose another name")
    parts = list(Formatter().parse(metric.name))
    if all(placeholder is None for _, placeholder, _, _ in parts):
        _exact[metric.name] = metric
        return
    # A rank is a number, so that retrieval_r{k} does not take retrieval_recall_at_1.
    values = {name: r"\d+" if name == "k" else ".+" for _, name, _, _ in parts if name}
    pattern = "".join(re.escape(text) + (f"(?P<{name}>{values[name]})" if name else "") for text, name, _, _ in parts)
    _families.append((sum(len(text) for text, *_ in parts), re.compile(pattern), metric))
    _families.sort(key=lambda family: -family[0])  # the most specific family first: fd_{network}_infinity before fd_{network}


for _metric in METRICS:
    register(_metric)


def find_metric(name: str) -> Metric:
    """Return the declared metric with its full name and label. Raises ConfigError if the registry lacks it.

    `name` is a metric's name (`acc1`, `fd_inception`, `image_retrieval_recall@1`), or the name under which a run tracks it, with
    the dataset above it (`eval/vtab/cifar10/acc1`) or the guidance scale below it (`eval/fid/guidance_3`); MLflow's spelling of
    `@` is `_at_`.
    """
    last, context = _split(name)
    metric = _declared(last) or _declared(last.replace("_at_", "@"))
    if metric is None:
        raise ConfigError(f"metric {name}: not declared; add it to METRICS in ray_platform/metric_registry.py")
    return replace(metric, name=name, label=f"{metric.label}, {context}" if context else metric.label)


def describe_metric(name: str) -> Metric:
    """Return the declared metric; a plain number without a direction for one that the registry lacks.

    For pages only, which must also show the results of older releases and of other tasks.
    """
    try:
        return find_metric(name)
    except ConfigError:
        last, context = _split(name)
        return Metric(name, ", ".join(filter(None, (last.replace("_", " "), context))), None)


def check_declared(names: Iterable[str]) -> None:
    """Raise ConfigError if the registry lacks one of the metrics."""
    for name in names:
        find_metric(name)


def _split(name: str) -> tuple[str, str]:
    """Return the metric's own name and the context: the dataset above it or the guidance scale below it."""
    *above, last = name.removeprefix("eval/").split("/")
    if last.startswith("guidance_") and above:
        return above[-1], f"guidance {last.removeprefix('guidance_')}"
    return last, "/".join(above)


def _declared(name: str) -> Metric | None:
    if name in _exact:
        return _exact[name]
    metric, best_of, number = name.rpartition("_best_of_")
    if best_of and (single := _declared(metric)):  # of the best image of so many for each caption
        return replace(single, name=name, label=f"{single.label}, best of {number}")
    for _, pattern, family in _families:
        if match := pattern.fullmatch(name):
            return replace(family, name=name, label=family.label.format_map(match.groupdict()))
    return None
