"""Links and pictures of README.md and docs/, and the code that they name."""

import ast
import re
import urllib.parse
from pathlib import Path

import pytest

from tests.support.documentation import PAGES, ROOT

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([\w./-]+\.py):([A-Za-z_][\w.]*)`")
_FILE = re.compile(r"`((?:diffdis|platform|jobs|tests|cluster|docs)/[\w./-]*\.\w+)`")


def text_of(page: Path) -> str:
    """Without fenced blocks: `[a](b)` in code is no link."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page):
    for link in _LINK.findall(text_of(page)):
        url = urllib.parse.urlsplit(link)
        if url.scheme:
            assert url.scheme == "https", f"{page.name}: {link}"
            continue
        target = (page.parent / url.path).resolve() if url.path else page
        assert target.exists(), f"{page.name}: {link} is not there"
        assert target.is_relative_to(ROOT), f"{page.name}: {link} leads out of the project"
        if url.fragment and target.suffix == ".md":
            assert url.fragment in anchors(target), f"{page.name}: {link}: there is no such heading; there are {anchors(target)}"


def test_every_page_is_in_the_index():
    linked = set(_LINK.findall(text_of(ROOT / "docs" / "index.md")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked
    assert "docs/index.md" in _LINK.findall(text_of(ROOT / "README.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page):
    for name in _FILE.findall(text_of(page)):
        assert (ROOT / name).exists(), f"{page.name}: there is no {name}"


def defined_in(file: Path) -> set[str]:
    """Functions, classes, their methods and attributes, and a module's names."""
    names: set[str] = set()

    def add(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                add(node.body, f"{prefix}{node.name}.")
            if isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    add(ast.parse(file.read_text()).body, "")
    return names


REFERENCES = [(page, *found) for page in PAGES for found in _CODE.findall(text_of(page))]


@pytest.mark.parametrize(("page", "file", "name"), REFERENCES, ids=lambda part: part.name if isinstance(part, Path) else part)
def test_the_code_that_a_page_names_exists(page, file, name):
    assert (ROOT / file).exists(), f"{page.name}: there is no {file}"
    assert name in defined_in(ROOT / file), f"{page.name}: {file} has no {name}"


def test_the_methods_page_names_the_code_of_every_file_of_the_method():
    """A file of diffdis/ that holds a part of the method is on the page."""
    named = {file for page, file, _ in REFERENCES if page.name == "method.md"}
    parts = ("schedule", "losses", "objective", "model", "fusion", "attention", "alignment_head", "image_branch", "encoder")
    parts += ("autoencoder", "text_encoder", "pipeline", "task", "warm_start")
    assert {f"diffdis/{part}.py" for part in parts} <= named
