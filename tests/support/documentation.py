"""README.md and docs/*.md as tests read them: fenced blocks, their commands, and a shell that runs them as a reader would."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SHELL = ("", "bash", "sh", "shell", "console")  # a block that says nothing is one
_MARK = re.compile(r"<!-- (.*) -->")
_FENCE = re.compile(r"(\s*)```(\w*)")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the comment on the line above it."""

    page: str  # README.md, docs/quickstart.md
    line: int
    language: str
    mark: str  # `run by tests/…`, `needs a cloud`; empty: none
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL

    def commands(self) -> list[list[str]]:
        """Each command's words. Raises ValueError for what is no shell."""
        commands: list[list[str]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
            lexer.whitespace_split = True
            commands.append([])
            for word in lexer:
                if word and set(word) <= set(";&|"):
                    commands.append([])
                else:
                    commands[-1].append(word)
        return [command for command in commands if command]


def blocks(page: str) -> list[Block]:
    """All of them, in order. `page` is relative to the root."""
    return list(_read(page, (ROOT / page).read_text().splitlines()))


def _read(page: str, lines: list[str]) -> Iterator[Block]:
    begun, language, mark = -1, "", ""
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if begun >= 0:
            yield Block(page, begun + 1, language, mark, "\n".join(lines[begun + 1 : number]) + "\n")
            begun = -1
            continue
        fence = _FENCE.fullmatch(line)
        assert fence, f"{page}:{number + 1}: {line!r} is no fence that the tests can read"
        above = _MARK.fullmatch(lines[number - 1].strip()) if number else None
        begun, language, mark = number, fence[2], above[1] if above else ""
    assert begun < 0, f"{page}:{begun + 1}: the block does not end"


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page.relative_to(ROOT).as_posix())]


def blocks_run_by(file: str, page: str) -> list[Block]:
    """Those of a page that say that the test `file` runs them: it has to run them all, in this order."""
    mark = f"run by {Path(file).relative_to(ROOT).as_posix()}"
    found = [block for block in blocks(page) if block.mark == mark]
    assert found, f"{page} has no block that is {mark}"
    return found


class Shell:
    """A reader's terminal: what a block exports or activates, and the folder that it goes to, is there for the next one."""

    def __init__(self, scratch: Path, environment: Mapping[str, str], words: Mapping[str, str], start: Path | None = None):
        """It begins in `start`, or in `scratch`. `words`: what stands for the reader's own, and what is put in its place."""
        self.folder, self.environment, self.words = start or scratch, dict(environment), words
        self._state = scratch / "terminal.sh"
        self._state.write_text("")

    def run(self, block: Block) -> str:
        """What the block prints. It stops at the first command that fails, which is an AssertionError."""
        process = self.start(block)
        try:
            said, _ = process.communicate()
        except BaseException:  # the test's time is up, say
            os.killpg(process.pid, signal.SIGTERM)
            raise
        assert process.returncode == 0, f"{block} ended with {process.returncode}:\n{said[-6000:]}"
        return said

    def start(self, block: Block) -> subprocess.Popen[str]:
        """A block that does not end by itself; in a process group of its own."""
        text = block.text
        for word, own in self.words.items():
            text = text.replace(word, own)
        if block.language == "python":
            text = f"python - <<'END_OF_THE_BLOCK'\n{text}END_OF_THE_BLOCK\n"
        keep = f"{{ export -p; printf 'cd %q\\n' \"$PWD\"; }} > {shlex.quote(str(self._state))}"
        return subprocess.Popen(
            ["bash", "-e", "-o", "pipefail", "-c", f". {shlex.quote(str(self._state))}\n{text}\n{keep}\n"],
            cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip


def readers_environment() -> dict[str, str]:
    """Without what this test run has set up for itself."""
    ours = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    environment = {
        k: v for k, v in os.environ.items() if k not in ours and not k.startswith(("RAY_", "AWS_", "MLFLOW_", "PYTEST_"))
    }
    own = str(Path(sys.executable).parent)
    path = [folder for folder in environment["PATH"].split(os.pathsep) if folder != own]
    # Nobody is asked for credentials that this machine does not have.
    return environment | {"PATH": os.pathsep.join(path), "AWS_EC2_METADATA_DISABLED": "true"}
