"""The reports in docs/results are those of the current code: `python tests/docs/test_results.py` writes them again."""

import json
import re

import pytest

from ray_platform.report.sweep import sweep_page
from tests.support.documentation import ROOT
from tests.support.html_page import Page

RESULTS = ROOT / "docs" / "results"
SWEEPS = ("sweep", "sweep_by_images")


def render(name: str) -> str:
    return sweep_page(json.loads((RESULTS / f"{name}.json").read_text()))


@pytest.mark.parametrize("name", SWEEPS)
def test_the_reports_of_sweeps_are_current(name):
    assert Page((RESULTS / f"{name}.html").read_text()).text == Page(render(name)).text


def test_the_page_about_sweeps_has_the_figures_of_its_reports():
    scores: dict[str, set[tuple[str, str]]] = {}
    for name in SWEEPS:
        for trial in json.loads((RESULTS / f"{name}.json").read_text())["trials"]:
            metrics = trial["metrics"]
            pair = f"{100 * metrics['accuracy']:.2f} %", f"{metrics['fd_efficientnet_lite0']:.1f}"
            scores.setdefault(str(int(trial["name"].removeprefix("trial_"))), set()).add(pair)
    table = (ROOT / "docs" / "sweeps.md").read_text().partition("| trial | lr U-Net")[2]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in table.splitlines() if re.match(r"\| \d", line)]
    assert len(rows) == 7
    for trial, *_, accuracy, distance in rows:
        assert (accuracy, distance) in scores[re.match(r"\d", trial)[0]], trial


if __name__ == "__main__":
    for page in SWEEPS:
        (RESULTS / f"{page}.html").write_text(render(page))
