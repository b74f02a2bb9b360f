"""Links and images in README.md and docs/ resolve, and the files, code and fields that they mention exist."""

import ast
import re
import urllib.parse
from pathlib import Path

import pytest

from tests.support.documentation import PAGES, ROOT, text_of
from tests.support.messages import documented_messages

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([\w./-]+\.py):([A-Za-z_][\w.]*)`")
FILE = re.compile(r"`((?:diffdis|platform|jobs|tests|cluster|docs)/[\w./-]*\.\w+)`")
PARTS_OF_THE_METHOD = (
    "schedule", "losses", "objective", "model", "attention", "image_branch", "encoder",
    "autoencoder", "text_encoder", "pipeline", "task", "warm_start",
)  # fmt: skip


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates from the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_named_files_exist(page):
    text = text_of(page)
    for link in LINK.findall(text):
        url = urllib.parse.urlsplit(link)
        if url.scheme:
            assert url.scheme == "https", link
            continue
        target = (page.parent / url.path).resolve() if url.path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), f"{link} leads out of the project"
        if url.fragment and target.suffix == ".md":
            assert url.fragment in anchors(target), link
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []


def test_every_page_is_in_the_index():
    linked = set(LINK.findall(text_of(ROOT / "docs" / "index.md")))
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked
    assert "docs/index.md" in LINK.findall(text_of(ROOT / "README.md"))


def defined_names(body: list[ast.stmt], prefix: str = "") -> set[str]:
    """Return functions, classes, their methods and attributes, and a module's variables."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            names |= defined_names(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(prefix + target.id for target in targets if isinstance(target, ast.Name))
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_that_a_page_names_exists(page):
    for file, name in CODE.findall(text_of(page)):
        assert (ROOT / file).exists(), file
        assert name in defined_names(ast.parse((ROOT / file).read_text()).body), f"{file}:{name}"


def test_the_methods_page_names_every_part_of_the_method():
    named = {file for file, _ in CODE.findall(text_of(ROOT / "docs" / "method.md"))}
    assert {f"diffdis/{part}.py" for part in PARTS_OF_THE_METHOD} <= named


def test_every_documented_message_is_written_by_a_test():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    assert [fault for fault in documented_messages() if f'"{fault}"' not in tests] == []
