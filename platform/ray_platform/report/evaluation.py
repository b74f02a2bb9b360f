"""What an evaluation found, as one HTML page that needs nothing else."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.report import charts, retrieval, sets, zero_shot
from ray_platform.report import quality as quality_report
from ray_platform.report.page import document, table, text, tile
from ray_platform.report.quality import curve_section, quality_section
from ray_platform.report.retrieval import retrieval_section
from ray_platform.report.sets import sets_section
from ray_platform.report.text import NOTHING, STYLE, Models, clipped, head, is_number, number, percent
from ray_platform.report.zero_shot import Scores, zero_shot_section


def report_page(details: Mapping[str, Any]) -> str:
    """The HTML. Class names, captions and keys come from the web: nothing of them is taken for markup.

    details: what `jobs/eval.py` found, in plain JSON types. Sections of which it has nothing are left out.
    """
    models = Models(details)
    sections = {
        "Zero-shot": zero_shot_section(details, models),
        "Set by set": sets_section(details, models),
        "Retrieval": retrieval_section(details, models),
        "Image quality": quality_section(details),
        "Steps and draws": curve_section(details, models),
    }
    anchors = dict(zip(sections, ("zero-shot", "sets", "retrieval", "quality", "curve"), strict=True))
    links = "".join(f'<a href="#{anchors[name]}">{name}</a>' for name, content in sections.items() if content)
    styles = (STYLE, charts.STYLE, zero_shot.STYLE, sets.STYLE, retrieval.STYLE, quality_report.STYLE)
    first = [head(details), _verdict(details), _tiles(details, models), f"<nav>{links}</nav>", _models(models)]
    return document(details["title"], "".join(styles), [*first, *sections.values()])


def _verdict(details: Mapping[str, Any]) -> str:
    """What went wrong, where the reader cannot miss it."""
    failures: Sequence[str] = details.get("failures", ())
    lost: dict[str, int] = {}  # the models read the same files
    for result in [*details.get("zero_shot", ()), *details.get("retrieval", ())]:
        if result["num_unreadable"]:
            lost[result["set"]] = max(lost.get(result["set"], 0), result["num_unreadable"])
    if not failures and not lost:
        return '<div class="card verdict">Everything that was asked for was measured, on every image.</div>'
    lines = [f"<li>{text(clipped(failure))}</li>" for failure in failures]
    if lost:
        counts = ", ".join(f"{count:,} of {name}" for name, count in lost.items())
        lines.append(f"<li>images that could not be read, and count as wrong: {text(counts)}; their keys are with the sets</li>")
    title = f"{len(failures):,} failure{'s'[: len(failures) != 1]}" if failures else "Not every image could be read"
    return f'<div class="card verdict stop"><b>{title}</b><ul>{"".join(lines)}</ul></div>'


def _tiles(details: Mapping[str, Any], models: Models) -> str:
    """The few numbers that a reader looks for first."""
    scores = Scores(details)
    tiles = []
    if scores.sets:
        complete = scores.complete(models.own)
        beside = ", ".join(f"{name} {percent(scores.mean(name, complete))}" for name in scores.published)
        mean = scores.mean(models.own, complete)
        what = f"mean over {len(scores.sets)} zero-shot set{'s'[: len(scores.sets) != 1]}" + (f"; {beside}" if beside else "")
        tiles.append((f"{percent(mean)} %" if is_number(mean) else NOTHING, what))
    for result in details.get("retrieval", ()):
        for metric, way in (("image_retrieval_recall@1", "text → image"), ("text_retrieval_recall@1", "image → text")):
            if result["model"] == models.own and metric in result["metrics"]:
                tiles.append((f"{percent(result['metrics'][metric])} %", f"{result['set']} R@1, {way}"))
    quality = details.get("quality", ())
    for metric in [name for name in (quality[0]["metrics"] if quality else ()) if quality_report.is_headline(name)]:
        known = [(p["metrics"].get(metric), p["guidance_scale"]) for p in quality if is_number(p["metrics"].get(metric))]
        if known:
            value, scale = min(known)
            tiles.append((number(value), f"lowest {quality_report.metric_title(metric)}, at guidance {scale:g}"))
    return f'<div class="tiles">{"".join(tile(*each) for each in tiles)}</div>' if tiles else ""


def _models(models: Models) -> str:
    rows = []
    for model in models.all:
        settings = " · ".join(f"{field.replace('_', ' ')} {value}" for field, value in model["settings"].items())
        step = NOTHING if model["step"] is None else f"{model['step']:,}"
        rows.append(
            f"<tr><td>{models.named(model['name'])}</td><td>{text(model['task'])}</td><td class='num'>{step}</td>"
            f"<td>{text(settings)}</td><td><code>{text(model['pretrained'])}</code></td></tr>"
        )
    head = '<th>model</th><th>task</th><th class="num">step</th><th>settings</th><th>checkpoint</th>'
    return f'<div class="card lead-in">{table(head, rows)}</div>'
