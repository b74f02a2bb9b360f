"""HTML pages in a parser and in a browser, untrusted text for injection tests, and saved details of older releases.

`python -m tests.support.html_page REPORT.html docs/images/NAME_report.png` takes a screenshot for the documentation.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

VOID = {"meta", "img", "br"}
EVIL = "</style></title><script>alert(1)</script>\"'><img src=x onerror=alert(1)>&lt;"
_REPORTS = Path(__file__).parents[1] / "fixtures" / "reports"


def saved_details(name: str) -> Any:
    """Return the details of a synthetic comparison or sweep, as release ba8fcc6 wrote them."""
    return json.loads((_REPORTS / f"{name}.json").read_text(encoding="utf-8"))


@contextmanager
def browser_page(width: int = 1440, height: int = 900) -> Iterator[Any]:
    """Yield a page of Debian's headless chromium; skip the test if chromium is not installed."""
    browser = shutil.which("chromium")
    if not browser:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = opened.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(90_000)
        yield page
        opened.close()


def save_first_screen(page: Any, report: Path, image: Path, height: int = 1000) -> None:
    """Write what a reader of a report sees first, as the documentation shows it."""
    page.set_viewport_size({"width": 1200, "height": height})
    page.goto(report.absolute().as_uri())
    page.screenshot(path=image)


class Page(HTMLParser):
    """A parsed page. Rejects tags that are not closed in order, and repeated attributes and ids."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._cells: list[list[list[str]]] = []
        self.texts: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        assert len(set(self.attributes("id"))) == len(self.attributes("id"))

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self._cells.append([])
        if tag in ("td", "th"):
            self._cells[-1].append([])

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self._cells[-1][-1].append(data)

    @property
    def text(self) -> str:
        """Return the page's text with single spaces."""
        return " ".join("".join(self.texts).split())

    @property
    def rows(self) -> list[list[str]]:
        """Return the rows of all tables, cell by cell."""
        return [[" ".join("".join(cell).split()) for cell in row] for row in self._cells]

    def rows_of(self, first: str) -> list[list[str]]:
        return [row for row in self.rows if row[0].startswith(first)]

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.tags)


def poisoned(value: Any, spared: set[str], spoilt_keys: set[str] = frozenset(), field: str = "") -> Any:
    """Return details with markup appended to every text except in `spared` fields, and to the keys of `spoilt_keys`."""
    if isinstance(value, dict):
        ending = EVIL if field in spoilt_keys else ""
        return {key + ending: poisoned(inner, spared, spoilt_keys, "" if ending else key) for key, inner in value.items()}
    if isinstance(value, list):
        return [poisoned(inner, spared, spoilt_keys, field) for inner in value]
    return value + EVIL if value and isinstance(value, str) and field not in spared else value


def check_poison_is_text(html: str, least: int) -> Page:
    """Check that injected markup stays text: it creates no elements and loads or runs nothing. Returns the page."""
    page = Page(html)
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= least
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    assert all(not name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    assert not [text for text in ("url(", "@import") if text in html] + [s for s in page.attributes("style") if EVIL in s]
    return page


if __name__ == "__main__":
    with browser_page() as opened:
        save_first_screen(opened, Path(sys.argv[1]), Path(sys.argv[2]))
