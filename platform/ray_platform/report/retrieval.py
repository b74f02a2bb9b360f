"""Retrieval both ways: recalls beside published ones, and what was found for a few captions and images."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ray_platform.report.page import figure, table, text
from ray_platform.report.text import Models, clipped, isolated, percent, section, thumbnail, unreadable
from ray_platform.units import duration_text

# CLIP_benchmark's names: what is retrieved.
_DIRECTIONS = {"image_retrieval_recall": "text → image", "text_retrieval_recall": "image → text"}

STYLE = """
.retrieval td { border-top: 1px solid var(--line); } .retrieval .first { padding-left: 12px; border-left: 1px solid var(--line); }
.retrieval tr.of th { padding-top: 14px; font-size: 13px; color: var(--ink); } .retrieval th.group { text-align: center; }
.asked { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr)); gap: 10px; }
.asked .card > p { margin: 0 0 10px; overflow-wrap: anywhere; display: -webkit-box; -webkit-line-clamp: 4;
  -webkit-box-orient: vertical; overflow: hidden; }
.found { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 8px; }
.found figure { position: relative; border: 2px solid transparent; border-radius: 5px; padding: 2px; }
.found figure img { height: auto; aspect-ratio: 1; object-fit: cover; border-radius: 3px; margin-bottom: 3px; }
.found .right figure { border-color: var(--good); } .found .right figcaption { color: var(--good); font-weight: 600; }
.of-image { display: grid; grid-template-columns: 116px minmax(0, 1fr); gap: 14px; }
.of-image > .thumb { width: 116px; height: 116px; }
.of-image ol { margin: 0; padding: 0; list-style: none; font-size: 13px; }
.of-image li { display: grid; grid-template-columns: 16px minmax(0, 1fr) auto; gap: 6px; padding: 2px 0; }
.of-image li { overflow-wrap: anywhere; }
.of-image li > span:nth-child(2) { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.of-image li > :first-child { color: var(--soft); } .of-image li.right > :first-child { color: var(--good); font-weight: 600; }
"""


def retrieval_section(details: Mapping[str, Any], models: Models) -> str:
    """Nothing where no set was measured."""
    results: Sequence[Mapping[str, Any]] = details.get("retrieval", ())
    if not results:
        return ""
    names = dict.fromkeys(result["set"] for result in results)
    by_set = {name: [result for result in results if result["set"] == name] for name in names}
    published = details.get("published_retrieval", {})
    lost = "".join(unreadable(each, models) for each in by_set.values())
    examples = "".join(_examples(result) for result in results if result["model"] == models.own)
    return section("retrieval", "Retrieval", _table(by_set, published, models), lost, examples)


def _table(by_set: Mapping[str, Sequence[Mapping[str, Any]]], published: Mapping[str, Any], models: Models) -> str:
    metrics = dict.fromkeys(metric for results in by_set.values() for result in results for metric in result["metrics"])
    columns = [[m for m in metrics if m.startswith(f"{direction}@")] for direction in _DIRECTIONS]
    columns = [sorted(each, key=_rank) for each in columns]
    flat = [metric for each in columns for metric in each]
    firsts = {each[0] for each in columns if each}
    groups = "".join(
        f'<th class="group first" colspan="{len(each)}">{title}</th>'
        for each, title in zip(columns, _DIRECTIONS.values(), strict=True)
        if each
    )
    ranks = "".join(f'<th class="num{" first" if metric in firsts else ""}">R@{_rank(metric)}</th>' for metric in flat)
    rows = []
    for name, results in by_set.items():
        size = f"{results[0]['num_images']:,} images, {results[0]['num_texts']:,} captions"
        rows.append(f'<tr class="of"><th colspan="{len(flat) + 3}">{isolated(name)} <span class="soft">{size}</span></th></tr>')
        for result in results:
            took = text(duration_text(result["seconds"]))
            last = f'<td class="num first">{result["num_unreadable"]:,}</td><td class="num">{took}</td>'
            rows.append(f"<tr><td>{models.named(result['model'])}</td>{_cells(result['metrics'], flat, firsts)}{last}</tr>")
        for model, sets in published.items():
            if name in sets:
                cells = _cells(sets[name], flat, firsts)
                rows.append(f'<tr class="soft"><td>{isolated(model)}, published</td>{cells}<td class="first"></td><td></td></tr>')
    head = (
        f'<tr><th></th>{groups}<th class="first"></th><th></th></tr>'
        f'<tr><th>recall, %</th>{ranks}<th class="num first">unreadable</th><th class="num">time</th></tr>'
    )
    return f'<div class="card">{table(head, rows, "retrieval")}</div>'


def _cells(metrics: Mapping[str, float], columns: Sequence[str], firsts: set[str]) -> str:
    return "".join(f'<td class="num{" first" if m in firsts else ""}">{percent(metrics.get(m))}</td>' for m in columns)


def _rank(metric: str) -> int:
    found = re.search(r"@(\d+)$", metric)
    return int(found[1]) if found else 0


def _examples(result: Mapping[str, Any]) -> str:
    captions = "".join(map(_for_caption, result.get("examples", ())))
    images = "".join(map(_for_image, result.get("image_examples", ())))
    found = {"the best images for a caption": captions, "the best captions for an image": images}
    return "".join(
        f'<h3 class="apart">{isolated(result["set"])}: {what}, ✓ where right</h3><div class="asked">{cards}</div>'
        for what, cards in found.items()
        if cards
    )


def _for_caption(example: Mapping[str, Any]) -> str:
    found = "".join(
        f'<div class="{"right" if image["right"] else "wrong"}">'
        + figure(f"{image['similarity']:.3f}{' ✓' * image['right']}", image["key"], image.get("jpeg", ""))
        + "</div>"
        for image in example["images"]
    )
    caption = text(clipped(example["caption"]))
    missed = "" if any(image["right"] for image in example["images"]) else _missed("image", len(example["images"]))
    return f'<div class="card"><p dir="auto" title="{caption}">{caption}</p><div class="found">{found}</div>{missed}</div>'


def _for_image(example: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<li class="{"right" if caption["right"] else "wrong"}"><span>{"✓" if caption["right"] else "✗"}</span>'
        f'<span dir="auto" title="{text(clipped(caption["text"]))}">{text(clipped(caption["text"]))}</span>'
        f'<span class="num soft">{caption["similarity"]:.3f}</span></li>'
        for caption in example["captions"]
    )
    missed = "" if any(caption["right"] for caption in example["captions"]) else _missed("caption", len(example["captions"]))
    return f'<div class="card of-image">{thumbnail(example)}<div><ol>{rows}</ol>{missed}</div></div>'


def _missed(what: str, num_shown: int) -> str:
    return f'<div class="soft missed">no right {what} among the best {num_shown}</div>'
