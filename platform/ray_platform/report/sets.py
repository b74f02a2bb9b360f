"""One foldable card a zero-shot set: all models' figures, the classes, and which of them are taken for which."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from ray_platform.report.charts import profile
from ray_platform.report.page import Bar, bars, table, text
from ray_platform.report.text import Models, clipped, is_number, isolated, percent, section, thumbnail, unreadable
from ray_platform.report.zero_shot import METRICS, Scores
from ray_platform.units import duration_text

_ALL_AS_BARS = 60  # so many classes are all drawn; of more, the worst and the best
_BESIDE = 20  # so many are drawn beside the confusions, more above them
_ENDS = 12  # worst and best classes of many
_COLUMNS = 3

STYLE = """
details.set { margin-top: 8px; padding: 0; } details.set > div { padding: 4px 16px 16px; }
details.set > summary { display: grid; grid-template-columns: 12px minmax(130px, 1.2fr) 124px 110px 3fr; gap: 4px 14px;
  align-items: center; padding: 9px 16px; cursor: pointer; list-style: none; }
details.set > summary::-webkit-details-marker { display: none; }
details.set > summary::before { content: "▸"; color: var(--soft); } details.set[open] > summary::before { content: "▾"; }
details.set > summary > span { min-width: 0; overflow-wrap: anywhere; } details.set h3 { margin: 18px 0 6px; }
details.set > summary .soft bdi { color: var(--ink); }
details.set .soft { font-weight: 400; } summary { cursor: pointer; } details ul { margin: 6px 0; padding-left: 20px; }
.profile { background: var(--hollow); border-radius: 2px; overflow: hidden; }
details.set table { min-width: 480px; }
.two { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: 0 28px; }
.classes { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0 24px; align-items: start; }
.set .bins { grid-template-columns: minmax(0, 11em) minmax(60px, 1fr) 3.2em; margin-top: 0; }
.set .bins > span:nth-child(3n + 1) { overflow: hidden; text-overflow: ellipsis; }
.set .bins > span:nth-child(3n + 2) { background: var(--hollow); border-radius: 2px; align-self: stretch; margin: 2px 0; }
.set .bins i { height: 100%; } .set .bins b { background: var(--m1); }
.names { columns: 4 200px; column-gap: 24px; font-size: 12px; padding: 0 !important; list-style: none; }
.names li { display: flex; gap: 8px; break-inside: avoid; } .names bdi { flex: 1; min-width: 0; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.mixes { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(290px, 100%), 1fr)); gap: 12px 24px; }
.mix { font-size: 13px; min-width: 0; overflow-wrap: anywhere; } .mix .soft { display: block; font-size: 12px; }
.thumbs { display: flex; flex-wrap: wrap; gap: 5px; margin-top: 5px; }
.thumb { display: block; background: var(--hollow); border-radius: 3px; overflow: hidden; }
.thumb img { display: block; width: 100%; height: 100%; object-fit: cover; } .thumbs .thumb { height: 64px; width: 64px; }
@media (max-width: 860px) { .two, .classes { grid-template-columns: minmax(0, 1fr); gap: 8px; }
  details.set > summary { grid-template-columns: 12px 1fr auto; }
  details.set > summary > :nth-child(n + 3) { grid-column: 2 / -1; } }
"""


def sets_section(details: Mapping[str, Any], models: Models) -> str:
    """Nothing where no set was measured."""
    scores = Scores(details)
    if not scores.sets:
        return ""
    note = "Recall of a class: the share of its images whose best of all classes is this one. A card opens with a click."
    if models.baselines:
        note += f" The line across a bar is {models.baselines[0]}."
    cards = [_card(i, scores.of_set(name), scores, models) for i, name in enumerate(scores.sets)]
    return section("sets", "Set by set", f'<p class="soft">{text(note)}</p>', *cards)


def _card(i: int, results: Sequence[Mapping[str, Any]], scores: Scores, models: Models) -> str:
    """`results`: of one set. Classes and confusions are those of the first model that has a result."""
    result = min(results, key=lambda result: models.names.index(result["model"]))
    baseline = scores.of(result["set"], models.baselines[0]) if models.baselines and result["model"] == models.own else None
    classes, mixes = _classes(result, baseline), _confusions(result)
    body = f'<div class="two"><div>{classes}</div><div>{mixes}</div></div>' if _is_small(result) else classes + mixes
    whose = "" if result["model"] == models.own else f'<p class="soft">Classes and confusions of {isolated(result["model"])}.</p>'
    return (
        f'<details class="card set"><summary>{_summary(result)}</summary>'
        f'<div id="set-{i}">{_figures(results, models)}{unreadable(results, models)}{whose}{body}</div></details>'
    )


def _is_small(result: Mapping[str, Any]) -> bool:
    return len(result["per_class"]) <= _BESIDE


def _summary(result: Mapping[str, Any]) -> str:
    """What is worth knowing before the card is opened."""
    known = _by_recall(result)
    main = f"<b>{percent(result['metrics'][result['main_metric']])}</b>"
    said = []
    if known:
        worst = known[0]
        said.append(f"worst class {isolated(worst['class'])} {percent(worst['recall'])} %")
    if result["confusions"]:
        mix = result["confusions"][0]
        share = percent(mix["share"])
        said.append(f"most frequent confusion {isolated(mix['true'])} → {isolated(mix['predicted'])}, {share} % of its images")
    metric = METRICS[result["main_metric"]]
    shape = profile([one["recall"] for one in known], [], 22) if known else ""
    return (
        f"<span><b>{isolated(result['set'])}</b></span><span>{main} <span class='soft'>% {metric}</span></span>"
        f'<span>{shape}</span><span class="soft">{" · ".join(said)}</span>'
    )


def _figures(results: Sequence[Mapping[str, Any]], models: Models) -> str:
    head = "".join(f'<th class="num">{title}, %</th>' for title in METRICS.values())
    rows = []
    for result in results:
        values = "".join(f'<td class="num">{percent(result["metrics"].get(metric))}</td>' for metric in METRICS)
        rows.append(
            f'<tr><td>{models.named(result["model"])}</td>{values}<td class="num">{result["n"]:,}</td>'
            f'<td class="num">{result["num_unreadable"]:,}</td><td class="num">{text(duration_text(result["seconds"]))}</td></tr>'
        )
    more = '<th class="num">images</th><th class="num">unreadable</th><th class="num">time</th>'
    return table(f"<th>model</th>{head}{more}", rows)


def _by_recall(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The classes that have images, worst first."""
    known = [one for one in result["per_class"] if one["recall"] is not None and is_number(one["recall"])]
    return sorted(known, key=lambda one: (one["recall"], one["class"]))


def _names(result: Mapping[str, Any]) -> list[str]:
    return [one["class"] for one in result["per_class"]]


def _classes(result: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    known = _by_recall(result)
    if not known:
        return ""
    # By place, not by name: names repeat (ImageNet has 998 of 1000).
    places = {id(one): place for place, one in enumerate(result["per_class"])}
    marks = [one["recall"] for one in baseline["per_class"]] if baseline and _names(baseline) == _names(result) else []

    def drawn(classes: Sequence[Mapping[str, Any]]) -> str:
        return bars(_class_bar(one, marks[places[id(one)]] if marks else None) for one in classes)

    empty = len(result["per_class"]) - len(known)
    note = f'<p class="soft">{empty:,} class{"es"[: 2 * (empty != 1)]} without images.</p>' if empty else ""
    if len(known) <= _ALL_AS_BARS:
        num_columns = 1 if _is_small(result) else _COLUMNS
        length = -(-len(known) // num_columns)
        columns = [drawn(known[start : start + length]) for start in range(0, len(known), length)]
        shown = columns[0] if num_columns == 1 else f'<div class="classes">{"".join(columns)}</div>'
        return f"<h3>Recall by class, %</h3>{shown}{note}"
    values = [one["recall"] for one in known]
    others = [value for value in marks if value is not None]
    names = "".join(
        f'<li title="{text(_about(one))}">{isolated(one["class"])}<span class="num">{percent(one["recall"])}</span></li>'
        for one in known
    )
    shape = (
        f'<span class="soft">all {len(known):,}, best first; median {percent(median(values))}</span>'
        f'{profile(values, others, 190)}<div class="scale soft"><span>1</span><span>{len(known):,}</span></div>'
    )
    return (
        f'<h3>Recall by class, %</h3><div class="classes"><div>{shape}</div>'
        f'<div><span class="soft">worst {_ENDS}</span>{drawn(known[:_ENDS])}</div>'
        f'<div><span class="soft">best {_ENDS}</span>{drawn(known[: -_ENDS - 1 : -1])}</div></div>{note}'
        f'<details><summary class="soft">all {len(known):,} classes, worst first</summary>'
        f'<ul class="names">{names}</ul></details>'
    )


def _class_bar(one: Mapping[str, Any], mark: float | None) -> Bar:
    return Bar(clipped(one["class"]), one["recall"], percent(one["recall"]), mark=mark, about=_about(one))


def _about(one: Mapping[str, Any]) -> str:
    return f"{clipped(one['class'])}: {percent(one['recall'])} % of {one['count']:,} images"


def _confusions(result: Mapping[str, Any]) -> str:
    if not result["confusions"]:
        return ""
    return f'<h3>Most frequent confusions</h3><div class="mixes">{"".join(map(_confusion, result["confusions"]))}</div>'


def _confusion(mix: Mapping[str, Any]) -> str:
    images = "".join(map(thumbnail, mix["examples"]))
    names = f"<b>{isolated(mix['true'])}</b> → <b>{isolated(mix['predicted'])}</b>"
    counted = f"{mix['count']:,} images, {percent(mix['share'])} % of the class"
    return f'<div class="mix">{names} <span class="soft">{counted}</span><div class="thumbs">{images}</div></div>'
