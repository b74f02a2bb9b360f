"""What a sweep found, as one HTML page that needs nothing else, and its pictures as files."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.report import metric_names, sweep_charts
from ray_platform.report import text as report_text
from ray_platform.report.charts import standalone
from ray_platform.report.page import document, table, text, tile
from ray_platform.report.parallel_coordinates import choice_text
from ray_platform.report.sweep_charts import learning_curves, parallel_coordinates, pareto, pareto_note
from ray_platform.report.text import NOTHING, clipped, facts, head, is_number, isolated, section
from ray_platform.units import duration_text

_STATES = {"finished": "finished", "stopped": "stopped early", "failed": "failed"}
_STYLE = """
.card > p { margin: 6px 0 0; } .charts h3 { margin-bottom: 8px; } .wide-card { margin-top: 10px; }
.trials td, .trials th { white-space: nowrap; }
.trials th.num { white-space: normal; min-width: 84px; } .trials th small { display: block; font-weight: 400; }
.trials th:first-child, .trials td:first-child { position: sticky; left: 0; background: var(--card); z-index: 1; }
.trials .best { font-weight: 600; } .trials .faint td { color: var(--soft); } .tag { font-size: 11px; color: var(--soft); }
.tag.front { color: var(--bar); } .tag.failed { color: var(--bad); }
.facts { margin-top: 10px; }
"""


def sweep_page(details: Mapping[str, Any]) -> str:
    """The HTML. Names, values and errors are not taken for markup.

    details: what `jobs/sweep.py` found, in plain JSON types: title, created (ISO), seconds, code_version, command, recipe,
    objectives [{metric, mode: max|min}], space {field: {values} or {low, high, log}}, budget_samples, scheduler, search,
    trials [{name, state: finished|stopped|failed, default, error, values, history [{step, samples, seconds, metrics}],
    metrics, run_id, url}], front [names], best {metric: name}.
    """
    parts = [
        head(details), _verdict(details), _tiles(details), _pictures(details),
        section("trials", "Trials", f'<div class="card">{_trials(details)}</div>'),
        section("command", "How to do it again", _command(details)),
    ]  # fmt: skip
    return document(details["title"], report_text.STYLE + sweep_charts.STYLE + _STYLE, parts)


def pictures(details: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG that needs nothing else: those of the three pictures for which there are values.

    details: as `sweep_page` takes them.
    """
    objectives = details["objectives"]
    found = {"parallel_coordinates.svg": (parallel_coordinates(details), "All trials", sweep_charts.NOTE_ON_ALL)}
    for number, other in enumerate(objectives[1:]):
        title = f"{metric_names.title(other['metric'])} against {metric_names.title(objectives[0]['metric'])}"
        found[_file("pareto", number)] = (pareto(details, objectives[0], other), title, pareto_note(objectives[0], other))
    for number, objective in enumerate(objectives):
        title = f"{metric_names.title(objective['metric'])} while training"
        found[_file("learning_curves", number)] = (learning_curves(details, objective["metric"]), title, sweep_charts.NOTE)
    style = report_text.STYLE + sweep_charts.STYLE
    return {name: standalone(svg, style, title, note) for name, (svg, title, note) in found.items() if svg}


def _file(name: str, number: int) -> str:
    return f"{name}_{number + 1}.svg" if number else f"{name}.svg"


def _of_state(details: Mapping[str, Any], state: str) -> list[Mapping[str, Any]]:
    return [trial for trial in details["trials"] if trial["state"] == state]


def _best(details: Mapping[str, Any], metric: str) -> Mapping[str, Any] | None:
    return next((trial for trial in details["trials"] if trial["name"] == details["best"].get(metric)), None)


def _default(details: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The trial of the recipe's own values, if it was trained as long as the best ones."""
    return next((trial for trial in details["trials"] if trial["default"] and trial["state"] == "finished"), None)


def _verdict(details: Mapping[str, Any]) -> str:
    """What failed, where the reader cannot miss it; then whether anything is better than the recipe's own values."""
    failed = _of_state(details, "failed")
    failures = ""
    if failed:
        lines = "".join(f"<li><b>{isolated(one['name'])}</b> {text(clipped(one['error']))}</li>" for one in failed)
        count = f"{len(failed):,} of {len(details['trials']):,} trials failed"
        failures = f'<div class="card verdict stop"><b>{count}</b><ul>{lines}</ul></div>'
    lines = "".join(f"<li>{_comparison(details, objective)}</li>" for objective in details["objectives"])
    title = f"Against the recipe's own values, each after {details['budget_samples']:,} samples"
    kind = "" if any(_gain(details, objective["metric"]) for objective in details["objectives"]) else " null"
    note = '<p class="soft">A trial is one run: the best of many is in part the luckiest.</p>'
    return f'{failures}<div class="card verdict{kind}"><b>{title}</b><ul>{lines}</ul>{note}</div>'


def _gain(details: Mapping[str, Any], metric: str) -> float:
    """Of the best trial over the recipe's own values; 0 where nothing is better, or one of both was not measured."""
    best, default = _best(details, metric), _default(details)
    if best is None or default is None or not is_number(default["metrics"].get(metric)):
        return 0.0
    return best["metrics"][metric] - default["metrics"][metric]


def _comparison(details: Mapping[str, Any], objective: Mapping[str, str]) -> str:
    """One objective in a sentence."""
    metric = objective["metric"]
    name, best, default = text(metric_names.title(metric)), _best(details, metric), _default(details)
    if best is None:
        return f"{name}: no trial was trained to the end"
    value = metric_names.value_text(metric, best["metrics"].get(metric))
    if default is None or not is_number(default["metrics"].get(metric)):
        return f"{name}: best {value}, {isolated(best['name'])}; the recipe's own values were not measured"
    own = metric_names.value_text(metric, default["metrics"][metric])
    gain = _gain(details, metric)
    if not gain:
        return f"{name}: no trial is better than the recipe's {own}"
    difference = metric_names.difference_text(metric, gain)
    return f"{name}: {value} of {isolated(best['name'])} against the recipe's {own} ({difference})"


def _tiles(details: Mapping[str, Any]) -> str:
    tiles = []
    default = _default(details)
    for objective in details["objectives"]:
        metric = objective["metric"]
        best = _best(details, metric)
        if best is None:
            continue
        own = f"; the recipe: {metric_names.value_text(metric, default['metrics'].get(metric))}" if default else ""
        label = f"{metric_names.title(metric)}, best trial{own}"
        tiles.append((metric_names.value_text(metric, best["metrics"].get(metric)), label))
    counts = [f"{len(_of_state(details, state)):,} {label}" for state, label in _STATES.items() if _of_state(details, state)]
    trained = sum(trial["history"][-1]["samples"] for trial in details["trials"] if trial["history"])
    whole = details["budget_samples"] * len(details["trials"])
    tiles.append((f"{len(details['trials']):,}", f"trials: {', '.join(counts)}"))
    share = f"{100 * trained / whole:.0f} % of what all trials to the end would take" if whole else "in all"
    tiles.append((f"{trained:,}", f"samples trained on, {share}"))
    return f'<div class="tiles">{"".join(tile(*each) for each in tiles)}</div>'


def _pictures(details: Mapping[str, Any]) -> str:
    first, *others = details["objectives"]
    cards = []
    for other in others:
        title = f"{metric_names.title(other['metric'])} against {metric_names.title(first['metric'])}"
        cards.append(_card(title, pareto(details, first, other), pareto_note(first, other)))
    curves = "; ".join([sweep_charts.NOTE, "colours as in the picture of all trials"])
    for objective in details["objectives"]:
        metric = objective["metric"]
        cards.append(_card(f"{metric_names.title(metric)} while training", learning_curves(details, metric), curves))
    wide = parallel_coordinates(details)
    note = f"{sweep_charts.NOTE_ON_ALL}; a pointer shows all of a trial"
    wide_card = f'<div class="card wide-card"><div class="scroll">{wide}</div><p class="soft">{note}</p></div>' if wide else ""
    content = f'<div class="charts">{"".join(cards)}</div>{wide_card}'
    return section("pictures", "What was found", content) if wide_card or any(cards) else ""


def _card(title: str, svg: str, note: str) -> str:
    return f'<div class="card"><h3>{text(title)}</h3>{svg}<p class="soft">{text(note)}</p></div>' if svg else ""


def _trials(details: Mapping[str, Any]) -> str:
    fields = "".join(_field_head(field) for field in details["space"])
    scores = "".join(
        f'<th class="num">{text(metric_names.title(each["metric"]))} {"↑" if each["mode"] == "max" else "↓"}</th>'
        for each in details["objectives"]
    )
    heads = f'<th>trial</th>{scores}{fields}<th class="num">samples</th><th class="num">time</th><th>MLflow run</th>'
    return table(heads, [_row(details, trial) for trial in _ranked(details)], "trials")


def _field_head(field: str) -> str:
    above, _, name = field.rpartition(".")
    return f'<th class="num">{f"<small>{text(above)}</small>" if above else ""}{text(name)}</th>'


def _ranked(details: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """Finished ones first, the best by the first objective at the top; failed ones last."""
    objective = details["objectives"][0]

    def order(trial: Mapping[str, Any]) -> tuple[int, float]:
        value = trial["metrics"].get(objective["metric"])
        loss = (-value if objective["mode"] == "max" else value) if is_number(value) else float("inf")
        return list(_STATES).index(trial["state"]), loss

    return sorted(details["trials"], key=order)


def _row(details: Mapping[str, Any], trial: Mapping[str, Any]) -> str:
    tags = [f'<span class="tag {trial["state"]}">{_STATES[trial["state"]]}</span>'] if trial["state"] != "finished" else []
    if trial["default"]:
        tags.append('<span class="tag">the recipe</span>')
    if trial["name"] in details["front"]:
        tags.append('<span class="tag front">front</span>')
    scores = "".join(_score(details, trial, each["metric"]) for each in details["objectives"])
    values = "".join(_value(trial, field) for field in details["space"])
    last = trial["history"][-1] if trial["history"] else None
    samples, took = (f"{last['samples']:,}", duration_text(last["seconds"])) if last else (NOTHING, NOTHING)
    faint = ' class="faint"' if trial["state"] != "finished" else ""
    return (
        f"<tr{faint}><td>{isolated(trial['name'])} {' '.join(tags)}</td>{scores}{values}"
        f'<td class="num">{samples}</td><td class="num">{text(took)}</td><td>{_run(trial)}</td></tr>'
    )


def _score(details: Mapping[str, Any], trial: Mapping[str, Any], metric: str) -> str:
    best = " best" if details["best"].get(metric) == trial["name"] else ""
    return f'<td class="num{best}">{metric_names.value_text(metric, trial["metrics"].get(metric))}</td>'


def _value(trial: Mapping[str, Any], field: str) -> str:
    if field not in trial["values"]:
        return f'<td class="num">{NOTHING}</td>'
    value = trial["values"][field]
    return f'<td class="num" title="{text(clipped(json.dumps(value)))}">{text(clipped(choice_text(value)))}</td>'


def _run(trial: Mapping[str, Any]) -> str:
    """A link where there is a page of the run."""
    name = f"<code>{text(trial['run_id'])}</code>" if trial["run_id"] else NOTHING
    return f'<a href="{text(trial["url"])}">{name}</a>' if trial["url"].startswith(("http://", "https://")) else name


def _command(details: Mapping[str, Any]) -> str:
    made = {
        "recipe": details["recipe"], "search": details["search"], "scheduler": details["scheduler"],
        "samples a trial": f"{details['budget_samples']:,}",
    }  # fmt: skip
    made |= {field: _space_text(space) for field, space in details["space"].items()}
    return f'<div class="card"><pre>{text(details["command"])}</pre>{facts(made)}</div>'


def _space_text(space: Mapping[str, Any]) -> str:
    if "values" in space:
        return ", ".join(map(choice_text, space["values"]))
    ends = f"{choice_text(space['low'])} to {choice_text(space['high'])}"
    return f"{ends}, logarithmic" if space.get("log") else ends
