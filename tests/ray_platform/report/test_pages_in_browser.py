"""In a browser, the pages load no external resources, fit the window, follow dark mode, and show their images and figures."""

import pytest
from PIL import Image

from diffdis_platform.comparison.summary import CLAIM
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.filters import FilterConfig
from ray_platform.data.inspection import inspect_unit
from ray_platform.report.comparison import comparison_page
from ray_platform.report.evaluation import evaluation_page
from ray_platform.report.inspection import inspection_page, summarize
from ray_platform.report.sweep import sweep_page
from tests.ray_platform.conftest import samples_of, tar_of
from tests.support.evaluation_details import evaluation
from tests.support.html_page import browser_page, save_first_screen, saved_details

pytestmark = pytest.mark.ranks  # starts a browser
OVERFLOW = "() => document.documentElement.scrollWidth - document.documentElement.clientWidth"
BROKEN = "() => [...document.images].filter(image => !image.naturalWidth && image.checkVisibility()).length"
FIGURES = "() => [...document.querySelectorAll('svg')].map(svg => [svg.getAttribute('role'), svg.getAttribute('aria-label')])"
COLORS = """() => [getComputedStyle(document.querySelector('.card')).backgroundColor,
  ...[...document.querySelectorAll('svg:not(.profile) text')].map(text => getComputedStyle(text).fill)]"""


def _inspection_page(folder):
    (folder / "0.tar").write_bytes(tar_of(samples_of(0, 20)))
    config = DataConfig(sources=(str(folder / "0.tar"),), image_size=16, filters=FilterConfig(min_size=1))
    catalog = build_catalog(config)
    counted = inspect_unit(catalog.pools[0][0], config)
    return inspection_page(summarize(catalog, config, counted, 2), counted.thumbnails, config)


@pytest.fixture(scope="module")
def browser():
    with browser_page(1200) as page:
        yield page


@pytest.mark.parametrize(
    ("name", "html"),
    [
        ("evaluation", lambda _: evaluation_page(evaluation(), "")),
        ("comparison", lambda _: comparison_page(saved_details("comparison"), CLAIM)),
        ("sweep", lambda _: sweep_page(saved_details("sweep"))),
        ("inspection", lambda folder: _inspection_page(folder)),
    ],
)
def test_a_page_fits_loads_nothing_and_follows_the_dark_mode(browser, tmp_path, name, html):
    file, requests, errors = tmp_path / f"{name}.html", [], []
    file.write_text(html(tmp_path), encoding="utf-8")
    browser.on("request", lambda request: requests.append(request.url))
    browser.on("pageerror", lambda error: errors.append(str(error)))
    for width in (1200, 400):
        browser.set_viewport_size({"width": width, "height": 900})
        browser.goto(file.as_uri())
        assert browser.evaluate(OVERFLOW) <= 0, f"{width} px"
    assert {url for url in requests if not url.startswith("data:")} == {file.as_uri()}
    assert not errors
    assert browser.evaluate(BROKEN) == 0
    figures = browser.evaluate(FIGURES)
    if name != "inspection":  # it has bars and no table
        assert figures
        assert browser.locator("table").first.evaluate("table => table.parentElement.scrollWidth >= table.clientWidth")
    assert all(role == "img" and label for role, label in figures)
    save_first_screen(browser, file, tmp_path / "screen.png")
    with Image.open(tmp_path / "screen.png") as screen:
        assert screen.size == (1200, 1000)
        assert len(screen.convert("L").getcolors()) > 50, "not a blank page"
    light = browser.evaluate(COLORS)
    browser.emulate_media(color_scheme="dark")
    dark = browser.evaluate(COLORS)
    browser.emulate_media(color_scheme="light")
    assert len(light) > 10 or (name == "inspection" and len(light) == 1)
    assert all(a != b for a, b in zip(light, dark, strict=True))
