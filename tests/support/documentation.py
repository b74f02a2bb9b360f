"""Parser of the documentation: fenced blocks, their commands, and a shell that runs them as a reader would."""

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])
SHELL = ("", "bash", "sh", "shell", "console")  # a block without a language is shell code
_FENCED = re.compile(
    r"(?:^ *<!-- (?P<mark>[^\n]*) -->\n)?^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """A fenced block and the comment on the line above it."""

    page: str  # README.md or, for example, docs/quickstart.md
    line: int
    language: str
    mark: str  # `run by tests/…` or `needs a cloud`, for example; empty if there is none
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def is_shell(self) -> bool:
        return self.language in SHELL

    def commands(self) -> list[list[str]]:
        """Return the words of each command. Raises ValueError if the block is not shell code."""
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


def text_of(page: Path) -> str:
    """Return the text of a page without its blocks."""
    return _FENCED.sub("", page.read_text())


def blocks(page: str) -> list[Block]:
    """Return the blocks of a page in order. `page` is relative to the root."""
    text = (ROOT / page).read_text()
    assert "```" not in text_of(ROOT / page), f"{page}: a fence does not begin or end a block"
    return [
        Block(page, text.count("\n", 0, fenced.start("indent")) + 1, fenced["language"], fenced["mark"] or "", fenced["text"])
        for fenced in _FENCED.finditer(text)
    ]


def all_blocks() -> list[Block]:
    return [block for page in PAGES for block in blocks(page.relative_to(ROOT).as_posix())]


def blocks_run_by(file: str, page: str) -> list[Block]:
    """Return the blocks of a page that are marked as run by the test `file`, which must run all of them in this order."""
    mark = f"run by {Path(file).relative_to(ROOT).as_posix()}"
    marked = [block for block in blocks(page) if block.mark == mark]
    assert marked, f"{page} has no block that is {mark}"
    return marked


class Shell:
    """A reader's terminal: exports, activated environments and the current folder carry over from one block to the next."""

    def __init__(self, scratch: Path, environment: Mapping[str, str], words: Mapping[str, str], start: Path | None = None):
        """Start in `start`, or in `scratch`. `words` maps placeholders in the docs to their replacements."""
        self.folder, self.environment, self.words = start or scratch, dict(environment), words
        self._state = scratch / "terminal.sh"
        self._state.write_text("")

    def run(self, block: Block) -> str:
        """Run a block and return its output. Raises AssertionError at the first command that fails."""
        process = self.start(block)
        try:
            output, _ = process.communicate()
        except BaseException:  # for example, a test timeout
            os.killpg(process.pid, signal.SIGTERM)
            raise
        assert process.returncode == 0, f"{block} ended with {process.returncode}:\n{output[-6000:]}"
        return output

    def start(self, block: Block) -> subprocess.Popen[str]:
        """Start a block that does not end by itself, in a new process group."""
        text = block.text
        for word, replacement in self.words.items():
            text = text.replace(word, replacement)
        if block.language == "python":
            text = f"python - <<'END_OF_THE_BLOCK'\n{text}END_OF_THE_BLOCK\n"
        keep = f"{{ export -p; printf 'cd %q\\n' \"$PWD\"; }} > {shlex.quote(str(self._state))}"
        return subprocess.Popen(
            ["bash", "-e", "-o", "pipefail", "-c", f". {shlex.quote(str(self._state))}\n{text}\n{keep}\n"],
            cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        )  # fmt: skip


def readers_environment() -> dict[str, str]:
    """Return the environment without the variables that this test run has set."""
    prefixes = ("RAY_", "AWS_", "MLFLOW_", "PYTEST_", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    path = [folder for folder in environment["PATH"].split(os.pathsep) if folder != str(Path(sys.executable).parent)]
    # Prevents requests for credentials to a cloud's metadata service, which this machine does not have.
    return environment | {"PATH": os.pathsep.join(path), "AWS_EC2_METADATA_DISABLED": "true"}
