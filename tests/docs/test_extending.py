"""Every Python block of docs/extending.md runs unchanged; the blocks of one section share a namespace."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.documentation import ROOT, blocks

pytestmark = pytest.mark.ranks  # the examples run in a separate process because they register recipes and filters
PAGE = "docs/extending.md"
# Runs the sections in one process, because importing torch for each one would take most of the time. Prints {section: traceback}.
RUNNER = """
import json, os, sys, tempfile, traceback
failures = {}
for section, sources in json.load(sys.stdin).items():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        namespace = {"__name__": "extending"}
        try:
            for source in sources:
                exec(compile(source, section, "exec"), namespace)
        except BaseException:
            failures[section] = traceback.format_exc()
        os.chdir("/")
print("\\nRESULT " + json.dumps(failures))
"""


def sections() -> dict[str, list[str]]:
    """Return the sources of the page's Python blocks by section. Leading blank lines preserve line numbers in tracebacks."""
    lines = (ROOT / PAGE).read_text().splitlines()
    headings = {number: line.removeprefix("## ") for number, line in enumerate(lines, 1) if line.startswith("## ")}
    sources: dict[str, list[str]] = {}
    for block in blocks(PAGE):
        if block.language == "python":
            section = headings[max(number for number in headings if number < block.line)]
            sources.setdefault(section, []).append("\n" * block.line + block.text)
    return sources


SECTIONS = sections()


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "platform"), str(ROOT))), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(SECTIONS), env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return json.loads(process.stdout.rpartition("RESULT ")[2])


@pytest.mark.parametrize("section", SECTIONS)
def test_the_examples_of_a_section_run(failures, section):
    assert section not in failures, failures[section]
