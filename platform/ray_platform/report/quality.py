"""Generated images: distances to real ones for each guidance scale, how they were measured, and the images; and the curve of
accuracy against steps and draws."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.contracts import ConfigError
from ray_platform.evaluate.results import check_same_protocol
from ray_platform.report.charts import Line, Point, line_chart
from ray_platform.report.page import figure, table, text
from ray_platform.report.text import NOTHING, Models, clipped, facts, is_number, isolated, number, percent, section
from ray_platform.units import duration_text

STYLE = """
.best { font-weight: 600; } h3.apart { margin: 20px 0 8px; }
.took { display: inline-block; min-width: 4.6em; font-size: 12px; } .split h3 .patch { margin-left: 10px; }
.grids { grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); }
.grids figure img { height: auto; aspect-ratio: 1; object-fit: cover; border-radius: 4px; }
@media (max-width: 560px) { .grids { grid-template-columns: repeat(auto-fill, minmax(96px, 1fr)); } }
"""


def quality_section(details: Mapping[str, Any]) -> str:
    """Nothing where no images were drawn."""
    points = sorted(details.get("quality", ()), key=lambda point: point["guidance_scale"])
    if not points:
        return ""
    problem = _mixed_protocols(points)
    warning = f'<div class="card verdict stop">{text(problem)}</div>' if problem else ""
    chart = "" if problem else _chart(points)
    boxes = f'<div class="split"><div class="card">{_table(points, ranked=not problem)}{_protocols(points)}</div>{chart}</div>'
    return section("quality", "Image quality", warning, boxes, *map(_samples, points))


def curve_section(details: Mapping[str, Any], models: Models) -> str:
    """Accuracy against the number of denoising steps, a line for each number of draws; nothing where it was not measured."""
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for point in details.get("curve", ()):
        groups.setdefault((point["set"], point["model"]), []).append(point)
    if not groups:
        return ""
    cards = "".join(_curve(name, points, models.named(model)) for (name, model), points in groups.items())
    return section("curve", "Accuracy against denoising steps and draws", f'<div class="split">{cards}</div>')


def _metrics(points: Sequence[Mapping[str, Any]]) -> list[str]:
    found = dict.fromkeys(metric for point in points for metric in point["metrics"])
    return [metric for metric in found if not metric.endswith("_std")]


def is_headline(metric: str) -> bool:
    """The distances that a report is asked for: FID or FD-<network> over the images that were drawn."""
    return metric.startswith(("fid", "fd_")) and not metric.endswith("_infinity")


def metric_title(metric: str) -> str:
    """FID, FID ∞ (extrapolated to infinitely many images), KID; of other networks than Inception FD-<network>, KID-<network>."""
    if metric == "alignment":
        return metric
    figure, _, network = metric.removesuffix("_infinity").partition("_")
    return figure.upper() + f"-{network}" * bool(network) + " ∞" * metric.endswith("_infinity")


def _is_distance(metric: str) -> bool:
    """All but the agreement with the caption are better the smaller they are."""
    return metric != "alignment"


def _value(point: Mapping[str, Any], metric: str) -> str:
    value = number(point["metrics"].get(metric))
    spread = point["metrics"].get(f"{metric}_std")
    return f'{value} <span class="soft">± {number(spread)}</span>' if is_number(spread) else value


def _table(points: Sequence[Mapping[str, Any]], ranked: bool) -> str:
    metrics = _metrics(points)
    best = {}
    for metric in metrics:
        values = [point["metrics"].get(metric) for point in points]
        numbers = [value for value in values if value is not None and is_number(value)]
        if ranked and len(numbers) > 1:
            best[metric] = min(numbers) if _is_distance(metric) else max(numbers)
    rows = []
    for point in points:
        marks = [" best" * (metric in best and point["metrics"].get(metric) == best[metric]) for metric in metrics]
        cells = "".join(f'<td class="num{m}">{_value(point, metric)}</td>' for m, metric in zip(marks, metrics, strict=True))
        rows.append(
            f'<tr><td class="num">{point["guidance_scale"]:g}</td>{cells}<td class="num">{point["n"]:,}</td>'
            f'<td class="num">{text(duration_text(point["seconds"]))}</td></tr>'
        )
    titles = "".join(f'<th class="num">{text(metric_title(m))} {"↓" if _is_distance(m) else "↑"}</th>' for m in metrics)
    head = f'<th class="num">guidance</th>{titles}<th class="num">images</th><th class="num">time</th>'
    judges = dict.fromkeys(point["alignment_by"] for point in points if is_number(point["metrics"].get("alignment")))
    note = f'<p class="soft">Alignment with the caption as {", ".join(map(isolated, judges))} sees it.</p>' if judges else ""
    return table(head, rows) + note


def _chart(points: Sequence[Mapping[str, Any]]) -> str:
    """Distance against alignment, a point for each guidance scale; against guidance itself where nobody judged alignment."""
    distance = next((metric for metric in _metrics(points) if is_headline(metric)), "kid")
    known = [point for point in points if is_number(point["metrics"].get(distance))]
    aligned = [point for point in known if is_number(point["metrics"].get("alignment"))]
    shown = aligned if len(aligned) > 1 else known
    if len(shown) < 2:
        return ""
    by_alignment = shown is aligned
    title = metric_title(distance)
    line = []
    for point in shown:
        scale, y = f"{point['guidance_scale']:g}", point["metrics"][distance]
        x = point["metrics"]["alignment"] if by_alignment else point["guidance_scale"]
        about = f"guidance {scale}: {title} {number(y)}" + (f", alignment {number(x)}" if by_alignment else "")
        line.append(Point(x, y, scale if by_alignment else "", about))
    what = "alignment, by guidance scale" if by_alignment else "guidance scale"
    note = (
        "Numbers beside the points are guidance scales; better is to the right and below." if by_alignment else "Lower is better."
    )
    svg = line_chart([Line("", line)], "alignment" if by_alignment else "guidance scale", title)
    return f'<div class="card"><h3>{text(title)} against {what}</h3>{svg}<p class="soft">{note}</p></div>'


def _without_guidance(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What the figures of one table must share."""
    return {field: value for field, value in protocol.items() if not field.startswith("guidance")}


def _mixed_protocols(points: Sequence[Mapping[str, Any]]) -> str:
    try:
        for point in points[1:]:
            check_same_protocol(_without_guidance(points[0]["protocol"]), _without_guidance(point["protocol"]))
    except ConfigError as error:
        return str(error)
    return ""


def _protocols(points: Sequence[Mapping[str, Any]]) -> str:
    """Each protocol once, with the guidance scales that it was used for."""
    scales: dict[str, list[str]] = {}
    for point in points:
        key = json.dumps(_without_guidance(point["protocol"]), default=str)
        scales.setdefault(key, []).append(f"{point['guidance_scale']:g}")
    parts = []
    for key, used in scales.items():
        title = "protocol of these figures" if len(scales) == 1 else f"protocol at guidance {', '.join(used)}"
        parts.append(f"<details><summary>{title}</summary>{facts(json.loads(key))}</details>")
    return "".join(parts)


def _samples(point: Mapping[str, Any]) -> str:
    if not point["samples"]:
        return ""
    figures = "".join(figure(clipped(s["caption"]), clipped(s["caption"]), s["png"], "png") for s in point["samples"])
    return f'<h3 class="apart">Generated with guidance {point["guidance_scale"]:g}</h3><div class="sheet grids">{figures}</div>'


def _curve(name: str, points: Sequence[Mapping[str, Any]], model: str) -> str:
    draws = sorted({point["num_draws"] for point in points})
    steps = sorted({point["num_steps"] for point in points})
    known = {(point["num_draws"], point["num_steps"]): point for point in points}
    lines = []
    for i, n in enumerate(draws):
        of_draws = [known[n, k] for k in steps if (n, k) in known and is_number(known[n, k]["acc1"])]
        line = [Point(p["num_steps"], 100 * p["acc1"], about=_curve_about(p)) for p in of_draws]
        if line:
            lines.append(Line(_draws(n), line, strength=0.4 + 0.6 * (i + 1) / len(draws)))
    chart = line_chart(lines, "denoising steps", "acc1, %", steps) if lines and len(steps) > 1 else ""
    rows = [f'<tr><td class="num">{k}</td>{"".join(_curve_cell(known.get((n, k))) for n in draws)}</tr>' for k in steps]
    head = '<th class="num">steps</th>' + "".join(f'<th class="num">{_draws(n)}</th>' for n in draws)
    title = f'<h3>{isolated(name)} <span class="soft">{model}</span></h3>'
    return f'<div class="card">{title}{chart}{table(head, rows)}</div>'


def _draws(count: int) -> str:
    return f"{count} draw{'s'[: count != 1]}"


def _curve_about(point: Mapping[str, Any]) -> str:
    took = duration_text(point["seconds"])
    return f"{point['num_steps']} steps, {_draws(point['num_draws'])}: acc1 {percent(point['acc1'])} %, {took}"


def _curve_cell(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return f'<td class="num soft">{NOTHING}</td>'
    return f'<td class="num">{percent(point["acc1"])} <span class="soft took">{text(duration_text(point["seconds"]))}</span></td>'
