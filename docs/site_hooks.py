"""Hooks of mkdocs: pages from the root of the repository become pages of the site, and links to source files become text."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ROOT_PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "LOG.md", "SECURITY.md")
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!https:|#)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root to the site."""
    for name in ROOT_PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links to where the site has the page. A link to another file of the repository becomes its text."""

    def site_link(link: re.Match[str]) -> str:
        folder = ROOT if page.file.src_uri in ROOT_PAGES else ROOT / "docs"
        path, _, anchor = link[2].partition("#")
        target = (folder / path).resolve().relative_to(ROOT).as_posix() if path else ""
        name = target if target in ROOT_PAGES else target.removeprefix("docs/")
        if path and name == target and target not in ROOT_PAGES:
            return link[1]
        return f"[{link[1]}]({name}{'#' * bool(anchor)}{anchor})"

    return _LINK.sub(site_link, markdown)
