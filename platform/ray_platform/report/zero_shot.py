"""All zero-shot sets in one table: the model beside its baselines and the published figures of CLIP."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.report.page import table, text
from ray_platform.report.text import NOTHING, Models, is_number, isolated, percent, section, signed

METRICS = {"acc1": "acc1", "acc5": "acc5", "mean_per_class_recall": "per class"}

STYLE = """
.sets th, .sets td { padding-right: 10px; } .sets tbody th { font: inherit; color: inherit; min-width: 158px; }
.sets tbody th .soft { display: block; font-size: 11px; white-space: nowrap; } .sets td { vertical-align: middle; }
.sets thead tr:first-child th { padding-bottom: 0; } .sets th.group { border-bottom: 1px solid var(--line); }
.sets tbody th { border-top: 1px solid var(--line); } .sets thead th { vertical-align: bottom; }
.sets thead th.num { white-space: normal; overflow-wrap: anywhere; min-width: 52px; max-width: 130px; }
.sets th:first-child { position: sticky; left: 0; background: var(--card); z-index: 1; }
.sets td.own { font-weight: 600; } .sets td.first, .sets th.first { padding-left: 12px; border-left: 1px solid var(--line); }
.sets .mean td, .sets .mean th { border-top: 2px solid var(--line); font-weight: 600; }
.up { color: var(--good); } .down { color: var(--bad); } .main { text-decoration: underline; text-underline-offset: 3px; }
.plot { width: 19%; min-width: 150px; }
.track { display: block; position: relative; height: 14px; background: var(--hollow); border-radius: 2px; }
.track i { position: absolute; top: 0; bottom: 0; } .track .fill { left: 0; border-radius: 2px; background: var(--bar); }
.track .chance { left: 0; background: var(--meant); opacity: .45; }
.track .tick { width: 3px; margin-left: -1.5px; top: -2px; bottom: -2px; background: var(--c);
  box-shadow: 0 0 0 1px var(--card); }
.p0 { --c: var(--soft); } .p1 { --c: var(--ink); }
.scale { display: flex; justify-content: space-between; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 12px; color: var(--soft); margin-bottom: 8px; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; background: var(--c); }
.legend i.thin { width: 3px; height: 13px; border-radius: 0; vertical-align: -2px; }
.legend i.chance { background: var(--meant); opacity: .45; }
"""


class Scores:
    """Zero-shot results by set and model, and what was published of them."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        results: Sequence[Mapping[str, Any]] = details.get("zero_shot", ())
        self.sets = list(dict.fromkeys(result["set"] for result in results))
        published: Mapping[str, Mapping[str, float]] = details.get("published", {})
        self.published = {model: figures for model, figures in published.items() if not figures.keys().isdisjoint(self.sets)}
        self._results = {(result["set"], result["model"]): result for result in results}
        self._means: Mapping[str, float | None] = details.get("means", {})

    def of(self, name: str, model: str) -> Mapping[str, Any] | None:
        return self._results.get((name, model))

    def of_set(self, name: str) -> list[Mapping[str, Any]]:
        """The results of a set, in the order of models."""
        return [result for (of, _), result in self._results.items() if of == name]

    def main(self, name: str, model: str) -> float | None:
        """The main metric of a model that was evaluated, or that was published."""
        if model in self.published:
            return self.published[model].get(name)
        result = self.of(name, model)
        return result["metrics"][result["main_metric"]] if result else None

    def complete(self, model: str) -> bool:
        """Whether every set that the mean is defined over was measured."""
        return is_number(self._means.get(model))

    def mean(self, model: str, complete: bool) -> float | None:
        """Over all sets of the benchmark, or over those that are in this report; None where one of them is missing."""
        if complete:
            return self.published[model].get("mean") if model in self.published else self._means.get(model)
        values = [self.main(name, model) for name in self.sets]
        numbers = [value for value in values if value is not None and is_number(value)]
        return sum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def zero_shot_section(details: Mapping[str, Any], models: Models) -> str:
    """Nothing where no set was measured."""
    scores = Scores(details)
    if not scores.sets:
        return ""
    rows = [*(_row(i, name, scores, models) for i, name in enumerate(scores.sets)), _mean_row(scores, models)]
    content = f'<div class="card">{_legend(scores, models)}{table(_head(scores, models), rows, "sets")}</div>'
    return section("zero-shot", "Zero-shot classification", content)


def _legend(scores: Scores, models: Models) -> str:
    marks = [f'<span><i class="{models.colour(models.own)}"></i>{isolated(models.own)}</span>']
    marks += [f'<span><i class="thin {models.colour(name)}"></i>{isolated(name)}</span>' for name in models.baselines]
    marks += [f'<span><i class="thin p{i % 2}"></i>{isolated(name)}, published</span>' for i, name in enumerate(scores.published)]
    marks.append('<span><i class="chance"></i>chance</span><span>in %; the main metric of a set is <u>underlined</u></span>')
    return f'<div class="legend">{"".join(marks)}</div>'


def _head(scores: Scores, models: Models) -> str:
    names = [*models.baselines, *scores.published]
    first = next(iter(scores.published), None)
    beside = f'<th class="num">to {text(first)}</th>' if first else ""
    others = "".join(f'<th class="num">{isolated(name)}</th>' for name in names)
    all_metrics = "".join(f'<th class="num{" first" if i == 0 else ""}">{title}</th>' for i, title in enumerate(METRICS.values()))
    main_columns = 2 + len(names) + (first is not None)
    return (
        f'<tr><th></th><th class="group" colspan="{main_columns}">main metric</th>'
        f'<th class="group first" colspan="{len(METRICS)}">this model, all metrics</th><th></th></tr>'
        '<tr><th>set</th><th><span class="scale"><span>0</span><span>50</span><span>100</span></span></th>'
        f'<th class="num">this model</th>{beside}{others}{all_metrics}<th class="num">un&shy;readable</th></tr>'
    )


def _row(i: int, name: str, scores: Scores, models: Models) -> str:
    own, results = scores.of(name, models.own), scores.of_set(name)
    num_classes = len(results[0]["per_class"])
    about = f"{num_classes:,} class{'es'[: 2 * (num_classes != 1)]} · {results[0]['n']:,} images"
    cells = "".join(_metric(metric, own) for metric in METRICS)
    lost = max(result["num_unreadable"] for result in results)
    mains = _main_cells([scores.main(name, model) for model in _columns(scores, models)], scores)
    return (
        f'<tr><th scope="row"><a href="#set-{i}">{isolated(name)}</a><span class="soft">{about}</span></th>'
        f'<td class="plot">{_track(name, scores, models)}</td>{mains}{cells}'
        f'<td class="num{" down" if lost else " soft"}">{lost:,}</td></tr>'
    )


def _columns(scores: Scores, models: Models) -> list[str]:
    return [models.own, *models.baselines, *scores.published]


def _main_cells(values: Sequence[float | None], scores: Scores) -> str:
    """Of the model, its difference to the first published figure, of baselines, and published ones."""
    num_published = len(scores.published)
    cells = [f'<td class="num own">{percent(values[0])}</td>']
    if num_published:
        cells.append(_difference(values[0], values[len(values) - num_published]))
    for i, value in enumerate(values[1:], start=1):
        soft = " soft" if i >= len(values) - num_published else ""
        cells.append(f'<td class="num{soft}">{percent(value)}</td>')
    return "".join(cells)


def _difference(value: float | None, published: float | None) -> str:
    if value is None or published is None or not is_number(value):
        return f'<td class="num soft">{NOTHING}</td>'
    return f'<td class="num {"up" if value >= published else "down"}">{signed(value - published)}</td>'


def _metric(metric: str, result: Mapping[str, Any] | None) -> str:
    kinds = "num" + " first" * (metric == next(iter(METRICS)))
    if result is None:
        return f'<td class="{kinds} soft">{NOTHING}</td>'
    value = percent(result["metrics"].get(metric))
    return f'<td class="{kinds}">{f"<span class=main>{value}</span>" if metric == result["main_metric"] else value}</td>'


def _track(name: str, scores: Scores, models: Models) -> str:
    """The main metric as a bar from 0 to 100 %, with a line across it for each figure to compare with."""
    own = scores.main(name, models.own)
    parts = []
    if own is not None and is_number(own):
        parts.append(f'<i class="fill" style="width:{100 * own:.1f}%"></i>')
    parts.append(f'<i class="chance" style="width:{100 * scores.of_set(name)[0]["chance"]:.1f}%"></i>')
    kinds = [(f"p{i % 2}", each) for i, each in enumerate(scores.published)]
    kinds += [(models.colour(each), each) for each in models.baselines]
    for kind, each in kinds:
        value = scores.main(name, each)
        if value is not None and is_number(value):
            about = text(f"{each}: {percent(value)}")
            parts.append(f'<i class="tick {kind}" style="left:{100 * value:.1f}%" title="{about}"></i>')
    return f'<span class="track">{"".join(parts)}</span>'


def _mean_row(scores: Scores, models: Models) -> str:
    complete = scores.complete(models.own)
    means = [scores.mean(model, complete) for model in _columns(scores, models)]
    of = f"{len(scores.sets)} sets" if complete else f"the {len(scores.sets)} sets above"
    cells = _main_cells(means, scores)
    empty = f'<td class="first"></td>{"<td></td>" * len(METRICS)}'
    return f'<tr class="mean"><th scope="row">mean of {of}</th><td></td>{cells}{empty}</tr>'
