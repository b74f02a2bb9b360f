"""How pages call and write figures of which only the flat name is known: `eval/vtab/cifar10/acc1`, `fd_efficientnet_lite0`."""

import re

from ray_platform.report.quality import metric_title
from ray_platform.report.text import is_number, number

_SHARES = re.compile(r"(^|[/_])(acc\d*|accuracy|recall|zero_shot_mean|r\d+|r_at_\d+)([/_@]|$)")
_DISTANCES = re.compile(r"(^|[/_])(fid|fd|kid|loss)([/_]|$)")
_NAMES = {"zero_shot_mean": "mean zero-shot accuracy", "accuracy": "zero-shot accuracy"}


def is_share(metric: str) -> bool:
    """Whether a page writes it in per cent, and differences of it in points."""
    return bool(_SHARES.search(metric))


def is_distance(metric: str) -> bool:
    """Whether it is better the smaller it is."""
    return bool(_DISTANCES.search(metric))


def title(metric: str) -> str:
    """`acc1, vtab/cifar10` for `eval/vtab/cifar10/acc1`; `FD-inception, guidance 3`; `image retrieval R@1, flickr30k`."""
    *above, last = metric.removeprefix("eval/").split("/")
    if last.startswith("guidance_") and above:
        return f"{_readable(above[-1])}, guidance {last.removeprefix('guidance_')}"
    return f"{_readable(last)}, {'/'.join(above)}" if above else _readable(last)


def value_text(metric: str, value: float | None) -> str:
    """`2.37 %` of a share, else the figure with the digits that mean something."""
    return f"{100 * value:.2f} %" if is_share(metric) and value is not None and is_number(value) else number(value)


def spread_text(metric: str, mean: float, spread: float) -> str:
    """A deviation from `mean`, with as many decimals, without its unit."""
    decimals = len(value_text(metric, mean).removesuffix(" %").partition(".")[2])
    return f"{shown(metric, spread):,.{decimals}f}"


def difference_text(metric: str, value: float | None) -> str:
    """With its sign; `+0.82 points` of shares."""
    if value is None or not is_number(value):
        return number(None)
    if is_share(metric):
        return f"{round(100 * value, 2) + 0.0:+.2f} points".replace("-", "−")
    return f"{'+' if value > 0 else ''}{number(value)}"


def shown(metric: str, value: float) -> float:
    """The value on a chart's axis: shares in per cent."""
    return 100 * value if is_share(metric) else value


def axis_title(metric: str) -> str:
    return f"{title(metric)}, %" if is_share(metric) else title(metric)


def _readable(name: str) -> str:
    if _DISTANCES.match(name):
        return metric_title(name)
    if name.startswith("accuracy_"):
        return f"accuracy, {name.removeprefix('accuracy_')}"
    name = re.sub(r"(?:^|_)(?:recall_at_|recall@|r_at_|r)(\d+)$", r" R@\1", name)
    return _NAMES.get(name, name.replace("_", " ").strip())
