"""The documentation can be read in a terminal and in a narrow window: short lines, and tables for tabular data only."""

import re

import pytest

from tests.support.documentation import PAGES, ROOT, text_of

MAX_LINE, MAX_CELL_WORDS = 120, 25
README_LINES = 150


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_and_table_cells_are_short(page):
    lines = enumerate(page.read_text().splitlines(), 1)
    assert not [f"{number}: {len(line)} characters" for number, line in lines if len(line) > MAX_LINE]
    rows = [line for line in text_of(page).splitlines() if line.startswith("|")]
    cells = [cell for row in rows for cell in re.split(r"(?<!\\)\|", row)]
    assert not [cell for cell in cells if len(cell.split()) > MAX_CELL_WORDS]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) < README_LINES
