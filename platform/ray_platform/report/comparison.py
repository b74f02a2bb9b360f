"""What a controlled comparison found, as one HTML page that needs nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.report import charts, metric_names, row_chart
from ray_platform.report import text as report_text
from ray_platform.report.charts import Line, Point, line_chart
from ray_platform.report.comparison_runs import Arms, Pair, cost_text, cost_title
from ray_platform.report.page import document, image, table, text, tile
from ray_platform.report.row_chart import Row
from ray_platform.report.text import NOTHING, clipped, facts, head, is_number, section

_IMAGE = 72  # px wide on the page
_STYLE = """
.card > p { margin: 8px 0 0; } .charts h3 { margin-bottom: 8px; } .stack { display: grid; gap: 10px; }
.arms td, .arms th { white-space: nowrap; } .arms th { font-size: 13px; color: var(--ink); } .best { font-weight: 600; }
.arms th:first-child, .arms td:first-child { position: sticky; left: 0; background: var(--card); z-index: 1; }
.arms .cost td { border-top: 2px solid var(--line); } .few { width: auto; min-width: 0; }
.few td + td, .few th + th { padding-left: 24px; }
.few .fields td { white-space: normal; max-width: 260px; text-align: right; color: var(--soft); }
.few .fields td:first-child { text-align: left; color: inherit; } .verdict .patch, .rows h4 .patch { margin-left: 3px; }
.key span { margin-right: 18px; white-space: nowrap; } .rows .num small { color: var(--soft); }
.cells { display: flex; flex-wrap: wrap; gap: 14px 16px; margin-top: 10px; }
.cells figure img { width: 72px; height: 72px; margin: 0; border-radius: 0 0 4px 4px; object-fit: contain; }
.cells .side { display: flex; gap: 3px; margin-bottom: 4px; } .cells .side > span { border-top: 3px solid var(--c); width: 72px; }
summary { cursor: pointer; }
"""


def comparison_page(details: Mapping[str, Any]) -> str:
    """The HTML. Names, captions and errors are not taken for markup.

    details: what `jobs/compare.py` found, in plain JSON types: title, created (ISO), seconds, code_version, command, config,
    config_digest, environment, arms {arm: {seeds {seed: {metric or cost: number}}, mean, std}}, paired
    {<metric>_<arm>_minus_<arm>: {mean, low, high, n}}, claim {holds, why}, failures [line], grids [{arm, seed, samples
    [{caption, png}]}], curves {arm: {seed: [{samples, metrics}]}}. Sections of which it has nothing are left out.
    """
    arms = Arms(details)
    parts = [
        head(details), _failures(details), _verdict(details, arms), _tiles(details, arms),
        section("arms", "The arms", f'<div class="card">{_arms(arms, details)}</div>') if arms.names else "",
        _paired(arms), _runs(arms), _masks(arms), _curves(details, arms), _grids(details, arms),
        section("command", "How to do it again", _command(details)),
    ]  # fmt: skip
    style = report_text.STYLE + charts.STYLE + row_chart.STYLE + _STYLE
    return document(details["title"], style, parts)


def _failures(details: Mapping[str, Any]) -> str:
    """Where the reader cannot miss them."""
    failures: Sequence[str] = details.get("failures", ())
    if not failures:
        return ""
    lines = "".join(f"<li>{text(clipped(failure))}</li>" for failure in failures)
    return f'<div class="card verdict stop"><b>{len(failures):,} failure{"s"[: len(failures) != 1]}</b><ul>{lines}</ul></div>'


def _verdict(details: Mapping[str, Any], arms: Arms) -> str:
    """Whether the claim holds, said plainly."""
    claim = details["claim"]
    pairs = arms.claimed
    if claim["holds"]:
        kind, title = "", "The claim holds: the joint model is better than the single-task models at both tasks"
    elif any(pair.outcome == "against" for pair in pairs):
        kind, title = " stop", "The claim does not hold: the joint model is worse at one of the tasks, or at both"
    elif len(pairs) < 2 or any(pair.outcome == "single" for pair in pairs):
        kind, title = " null", "No verdict: the claim is about two differences, each over several seeds"
    else:
        kind, title = " null", "Null result: the claim is not shown"
    lines = "".join(f"<li>{_sentence(pair, arms)}</li>" for pair in pairs)
    listed = f"<ul>{lines}</ul>" if lines else ""
    why = f'<p class="soft">{text(clipped(claim["why"]))}</p>' if len(pairs) < 2 else ""  # else the list says it
    return f'<div class="card verdict{kind}"><b>{title}</b>{listed}{why}</div>'


def _sentence(pair: Pair, arms: Arms) -> str:
    name, first, second = text(metric_names.title(pair.metric)), arms.named(pair.first), arms.named(pair.second)
    if pair.mean is None or pair.outcome in ("open", "single"):
        verdict = ", which shows no difference" if pair.outcome == "open" else ""
        return f"{name}: {first} minus {second} is {_difference(pair)} ({_interval(pair)}){verdict}"
    size = metric_names.difference_text(pair.metric, abs(pair.mean)).removeprefix("+")
    return f"{name}: {first} is {'above' if pair.mean > 0 else 'below'} {second} by {size} ({_interval(pair)})"


def _difference(pair: Pair) -> str:
    return metric_names.difference_text(pair.metric, pair.mean)


def _interval(pair: Pair) -> str:
    seeds = f"{pair.n} seed{'s'[: pair.n != 1]}"
    if pair.interval is None:
        return f"{seeds}, no interval"
    low, high = (metric_names.difference_text(pair.metric, end).removesuffix(" points") for end in pair.interval)
    return f"95 % interval {low} to {high}, {seeds}"


def _tiles(details: Mapping[str, Any], arms: Arms) -> str:
    tiles = [
        (_difference(pair), f"{metric_names.title(pair.metric)}, {pair.first} minus {pair.second}; {_interval(pair)}")
        for pair in arms.claimed
    ]
    seeds = {seed for name in arms.names for seed in arms.seeds(name)}
    tiles.append((f"{len(arms.names)} × {len(seeds)}", "arms × seeds"))
    samples = {run["samples"] for name in arms.names for run in arms.seeds(name).values() if "samples" in run}
    if samples:
        tiles.append((" to ".join(f"{each:,.0f}" for each in sorted({min(samples), max(samples)})), "samples a run"))
    return f'<div class="tiles">{"".join(tile(*each) for each in tiles)}</div>'


def _arms(arms: Arms, details: Mapping[str, Any]) -> str:
    """Mean and spread over the seeds, and what a run cost: a column an arm."""
    names = "".join(f'<th class="num">{arms.named(name)}</th>' for name in arms.names)
    seeds = "".join(f'<td class="num">{len(arms.seeds(name)):,}</td>' for name in arms.names)
    rows = [f"<tr><td>seeds</td>{seeds}</tr>", *(_scores(metric, arms) for metric in arms.metrics)]
    rows += [_costs(cost, arms, arms.names, first=i == 0) for i, cost in enumerate(arms.costs)]
    where = f", on {text(clipped(details['environment']))}" if details.get("environment") else ""
    note = f"Mean over the seeds ± standard deviation; the best mean is bold. Costs are of one run{where}."
    return f'{table(f"<th></th>{names}", rows, "arms")}<p class="soft">{note}</p>'


def _scores(metric: str, arms: Arms) -> str:
    cells = []
    for name in arms.names:
        mean, std = arms.mean(name, metric), arms.std(name, metric)
        spread = ""
        if mean is not None and std is not None:
            spread = f' <span class="soft">± {metric_names.spread_text(metric, mean, std)}</span>'
        best = " best" if mean is not None and mean == arms.best(metric) else ""
        cells.append(f'<td class="num{best}">{metric_names.value_text(metric, mean)}{spread}</td>')
    direction = "↓" if metric_names.is_distance(metric) else "↑"
    return f"<tr><td>{text(metric_names.title(metric))} {direction}</td>{''.join(cells)}</tr>"


def _costs(cost: str, arms: Arms, names: Sequence[str], first: bool) -> str:
    cells = "".join(f'<td class="num">{text(cost_text(cost, arms.mean(name, cost)))}</td>' for name in names)
    kind = ' class="cost"' if first else ""
    return f"<tr{kind}><td>{text(cost_title(cost))}</td>{cells}</tr>"


def _paired(arms: Arms) -> str:
    """A forest plot for each unit."""
    groups: dict[str, list[Pair]] = {}
    for pair in arms.pairs:
        if pair.mean is not None:
            unit = "points" if metric_names.is_share(pair.metric) else pair.metric.partition("_")[0]
            groups.setdefault(unit, []).append(pair)
    cards = {}
    for unit, pairs in groups.items():
        title = "Accuracy and retrieval, in points" if unit == "points" else metric_names.title(unit)
        who = pairs[0].first if len({pair.first for pair in pairs}) == 1 else "the first"
        ends = (f"← {who} worse", f"{who} better →")
        if metric_names.is_distance(unit):
            ends = (f"← {who} better", f"{who} worse →")
        rows = [_pair_row(pair, arms) for pair in sorted(pairs, key=lambda pair: arms.number(pair.second))]
        cards[unit] = f'<div class="card"><h3>{text(title)}</h3>{row_chart.row_chart(rows, zero=True, ends=ends)}</div>'
    if not cards:
        return ""
    note = (
        "Differences of the runs of one seed: a dot a seed, their mean, and its 95 % interval (Student's t). Green: the interval "
        "excludes zero, in favour of the first; red: against it; grey: it includes zero."
    )
    shares, others = cards.pop("points", ""), "".join(cards.values())
    content = shares + (f'<div class="stack">{others}</div>' if others else "")
    return section("paired", "Paired differences", f'<div class="split">{content}</div><p class="soft">{note}</p>')


def _pair_row(pair: Pair, arms: Arms) -> Row:
    spread = f"<br><small>{_ends(pair)}</small>"
    value = f'<span class="num">{metric_names.difference_text(pair.metric, pair.mean).removesuffix(" points")}{spread}</span>'
    dots = [
        (metric_names.shown(pair.metric, value), f"seed {seed}: {metric_names.difference_text(pair.metric, value)}")
        for seed, value in arms.differences(pair).items()
    ]
    mean = None if pair.mean is None else metric_names.shown(pair.metric, pair.mean)
    interval = pair.interval and (
        metric_names.shown(pair.metric, pair.interval[0]),
        metric_names.shown(pair.metric, pair.interval[1]),
    )
    kind = {"shown": "shown", "against": "against"}.get(pair.outcome, "open")
    between = f"{arms.named(pair.first)} minus {arms.named(pair.second)}"
    return Row(text(metric_names.title(pair.metric)), value, kind, dots, mean, interval, between)


def _ends(pair: Pair) -> str:
    if pair.interval is None:
        return "no interval"
    return " to ".join(metric_names.difference_text(pair.metric, end).removesuffix(" points") for end in pair.interval)


def _runs(arms: Arms) -> str:
    """Every run as a dot."""
    cards = []
    for metric in arms.metrics:
        rows = [_run_row(name, metric, arms) for name in arms.names if arms.mean(name, metric) is not None]
        better = "lower is better" if metric_names.is_distance(metric) else "higher is better"
        title = f'<h3>{text(metric_names.axis_title(metric))} <span class="soft">{better}</span></h3>'
        if rows:
            cards.append(f'<div class="card">{title}{row_chart.row_chart(rows)}</div>')
    note = "A dot a seed, their mean, and one standard deviation to each side."
    return section("runs", "Every run", f'<div class="charts">{"".join(cards)}</div><p class="soft">{note}</p>') if cards else ""


def _run_row(name: str, metric: str, arms: Arms) -> Row:
    dots = [
        (metric_names.shown(metric, run[metric]), f"{name}, seed {seed}: {metric_names.value_text(metric, run[metric])}")
        for seed, run in arms.seeds(name).items()
        if is_number(run.get(metric))
    ]
    mean, std = arms.mean(name, metric), arms.std(name, metric)
    ends = (metric_names.shown(metric, mean - std), metric_names.shown(metric, mean + std)) if mean is not None and std else None
    value = f'<span class="num">{metric_names.value_text(metric, mean).removesuffix(" %")}</span>'
    return Row(arms.named(name), value, arms.colour(name), dots, None if mean is None else metric_names.shown(metric, mean), ends)


def _masks(arms: Arms) -> str:
    """Arms of one task under both masks, where there are such: their figures and costs, and what else differs."""
    names = arms.of_both_masks
    if not names:
        return ""
    heads = "".join(f'<th class="num">{arms.named(name)}</th>' for name in names)
    masks = "".join(f'<td class="num">{text(arms.visibility(name))}</td>' for name in names)
    fields = "".join(f"<td>{text(arms.fields_text(name))}</td>" for name in names)
    rows = [f"<tr><td>mask</td>{masks}</tr>", f'<tr class="fields"><td>what was set</td>{fields}</tr>']
    for metric in arms.metrics:
        means = [arms.mean(name, metric) for name in names]
        if any(mean is not None for mean in means):
            cells = "".join(f'<td class="num">{metric_names.value_text(metric, mean)}</td>' for mean in means)
            rows.append(f"<tr><td>{text(metric_names.title(metric))}</td>{cells}</tr>")
    rows += [_costs(cost, arms, names, first=i == 0) for i, cost in enumerate(arms.costs)]
    return section("masks", "The masks side by side", f'<div class="card">{table(f"<th></th>{heads}", rows, "arms few")}</div>')


def _curves(details: Mapping[str, Any], arms: Arms) -> str:
    """A line a run, in the colour of its arm, over the samples; a chart for each figure that was followed."""
    runs = [(arm, seed, points) for arm, seeds in details.get("curves", {}).items() for seed, points in seeds.items()]
    cards = []
    for metric in dict.fromkeys(metric for _, _, points in runs for point in points for metric in point["metrics"]):
        lines, named = [], set()
        for arm, seed, points in runs:
            about = f"{arm}, seed {seed}"
            line = [_curve_point(point, metric, about) for point in points if is_number(point["metrics"].get(metric))]
            if line:
                lines.append(Line("" if arm in named else arm, line, 0.75, arms.line_colour(arm)))
                named.add(arm)
        if lines:
            chart = line_chart(lines, "samples", metric_names.axis_title(metric))
            cards.append(f'<div class="card"><h3>{text(metric_names.title(metric))} while training</h3>{chart}</div>')
    return section("curves", "While training", f'<div class="charts">{"".join(cards)}</div>') if cards else ""


def _curve_point(point: Mapping[str, Any], metric: str, about: str) -> Point:
    value = point["metrics"][metric]
    said = f"{about}: {metric_names.value_text(metric, value)} after {point['samples']:,} samples"
    return Point(point["samples"], metric_names.shown(metric, value), about=said)


def _grids(details: Mapping[str, Any], arms: Arms) -> str:
    """For each seed, images of the same captions from the same noise by all arms, beside each other."""
    by_seed: dict[str, list[Mapping[str, Any]]] = {}
    for grid in details.get("grids", ()):
        if grid["samples"]:
            by_seed.setdefault(str(grid["seed"]), []).append(grid)
    parts = []
    for number, (seed, grids) in enumerate(by_seed.items()):
        key = "".join(f"<span>{arms.named(grid['arm'])}</span>" for grid in grids)
        title = f'<span class="key">seed {text(seed)}, from left to right: {key}</span>'
        opened = " open" * (number == 0)
        parts.append(f"<details{opened}><summary>{title}</summary>{_cells(grids, arms)}</details>")
    note = '<p class="soft">The same captions from the same noise; not chosen.</p>'
    return section("images", "Images", f'<div class="card">{"".join(parts)}{note}</div>') if parts else ""


def _cells(grids: Sequence[Mapping[str, Any]], arms: Arms) -> str:
    pictures = [{(i, s["caption"]): s["png"] for i, s in enumerate(grid["samples"])} for grid in grids]
    kinds = [f'class="{arms.colour(grid["arm"])}" title="{text(grid["arm"])}"' for grid in grids]
    width = _IMAGE * len(grids) + 3 * (len(grids) - 1)
    cells = []
    for key in sorted({key for of_arm in pictures for key in of_arm}):
        images = [image(of_arm.get(key, ""), "png") for of_arm in pictures]
        sides = "".join(f"<span {kind}>{each}</span>" for kind, each in zip(kinds, images, strict=True))
        caption = text(clipped(key[1]))
        cells.append(
            f'<figure style="width:{width}px" title="{caption}"><span class="side">{sides}</span>'
            f'<figcaption dir="auto">{caption}</figcaption></figure>'
        )
    return f'<div class="cells">{"".join(cells)}</div>'


def _command(details: Mapping[str, Any]) -> str:
    digest = facts({"digest of the configuration": details.get("config_digest", NOTHING)})
    config = f"<details><summary>configuration</summary>{facts(details['config'])}</details>" if details.get("config") else ""
    return f'<div class="card"><pre>{text(details["command"])}</pre>{digest}{config}</div>'
