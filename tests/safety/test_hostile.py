"""Every hostile input gets the answer in docs/safety.md, runs no code, writes nothing elsewhere, and needs little memory."""

import resource
import time
from pathlib import Path

import pytest

from tests.safety.cases import CANARY, Case
from tests.safety.checkpoints import CHECKPOINTS
from tests.safety.configs import CONFIGS, NAMES
from tests.safety.models import MODELS, SETS
from tests.safety.stores import STORES
from tests.safety.tars import IMAGES, TARS

GROUPS: dict[str, list[Case]] = {
    "Tars": TARS,
    "Images and captions": IMAGES,
    "Configurations": CONFIGS,
    "Names": [*NAMES, *STORES],
    "Checkpoints": CHECKPOINTS,
    "Models": MODELS,
    "Sets to evaluate on, and what an evaluation keeps": SETS,
}
CASES = [case for group in GROUPS.values() for case in group]
DOCS = Path(__file__).parents[2] / "docs" / "safety.md"
BEGIN, END = "<!-- hostile inputs: written by tests/safety/write_table.py -->\n", "<!-- end -->"
MAX_MB, MAX_CPU_SECONDS = 1536, 60


def table() -> str:
    """The tables of docs/safety.md."""
    lines = []
    for title, cases in GROUPS.items():
        lines += [f"**{title}**", "", "| input | where it enters | answer |", "|---|---|---|"]
        lines += [f"| {case.what} | {case.door} | {_cell(case)} |" for case in cases] + [""]
    return "\n".join(lines)


def _cell(case: Case) -> str:
    counted = " × " in case.answer or case.answer.endswith((" used", " done")) or case.answer.startswith("accepted")
    return f"`{case.answer}`" if counted else f"an error with `{case.answer}`"


@pytest.mark.parametrize("case", CASES, ids=[case.what.replace(" ", "-")[:60] for case in CASES])
def test_a_hostile_input_gets_its_answer(case, tmp_path, monkeypatch):
    folder, outside = tmp_path / "folder" / "inner", tmp_path / "folder" / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    case.check(case.feed(folder))
    assert time.process_time() - start < MAX_CPU_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_MB * 1024
    assert not list(tmp_path.rglob(CANARY)), "code ran"
    assert {path.name for path in outside.iterdir()} == {"secret.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}
    assert {path.name for path in outside.parent.iterdir()} == {"inner", "outside"}
    assert not Path("/tmp/escaped").exists()


def test_the_tables_in_the_docs_are_current():
    text = DOCS.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.partition(BEGIN)[2].partition(END)[0] == table(), "run python -m tests.safety.write_table"
