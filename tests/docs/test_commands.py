"""Every command in README.md and docs/: run by the test that the page names, or marked, or a job's that its own parser takes."""

import dataclasses
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.scripts.scripts import start

from diffdis_platform.cli import COMMANDS
from diffdis_platform.commands.generate import GenerateConfig
from diffdis_platform.commands.inspect import InspectConfig
from diffdis_platform.commands.precompute import PrecomputeConfig
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.sizing.config import SizingConfig
from ray_platform.contracts import ConfigError
from tests.support.documentation import PAGES, ROOT, Block, all_blocks, blocks

BLOCKS = all_blocks()
SHELL_BLOCKS = [block for block in BLOCKS if block.is_shell]
NEEDS = ("a cloud", "a GPU", "a registered model", "root")
# What only stands before another command, or sets something.
PREFIXES = ("export", "cd", "source")


SCRIPTS = {"jobs/inspect_data.py": "inspect", "jobs/run_demo.py": "demo"}  # the others have the names of their commands


def parse_command(name: str, arguments: Sequence[str]) -> Any:
    """Parse the arguments of `diffdis <name>`, or of the script `jobs/<name>.py`."""
    name = SCRIPTS.get(name, Path(name).stem.replace("_", "-"))
    return importlib.import_module(f"diffdis_platform.commands.{name.replace('-', '_')}").parse_arguments(arguments)


def job_of(command: Sequence[str]) -> tuple[str, list[str]] | None:
    """(script or command, arguments) of `python jobs/x.py …` or `diffdis x …`, also behind `ray job submit … --`; else None."""
    words = list(command)
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
    if len(words) > 1 and words[0] == "diffdis" and words[1] in COMMANDS:
        return words[1], words[2:]
    python = bool(words) and Path(words[0]).name in ("python", "python3")
    return (words[1], words[2:]) if python and len(words) > 1 and words[1].startswith("jobs/") else None


def jobs_in(page: str) -> list[tuple[Block, str, list[str]]]:
    """All jobs' command lines of a page. A block that begins with a flag goes on with the page's last one."""
    found: list[tuple[Block, str, list[str]]] = []
    for block in (block for block in blocks(page) if block.is_shell):
        for command in block.commands():
            if job := job_of(command):
                found.append((block, *job))
            elif command[0].startswith("--"):
                assert found, f"{block}: {command[0]} belongs to no command"
                _, script, arguments = found[-1]
                found.append((block, script, [word for word in arguments if word != "…"] + command))
    return found


JOBS = [job for page in PAGES for job in jobs_in(page.relative_to(ROOT).as_posix())]


@pytest.mark.parametrize(("block", "script", "arguments"), JOBS, ids=lambda part: str(part) if isinstance(part, Block) else None)
def test_the_jobs_own_parser_takes_the_line(block, script, arguments):
    # "…" ends a line whose rest the text has; it must not hide a flag behind it.
    if arguments[-1:] == ["…"]:
        arguments = arguments[:-1]
    if arguments == ["--help"]:
        assert script in COMMANDS or (ROOT / script).exists()
        return
    try:
        parse_command(script, arguments)
    except ConfigError as error:
        pytest.fail(f"{block}: {error}")


def is_run(block: Block) -> bool:
    return block.mark.startswith("run by ")


RUN = {tuple(command) for block in SHELL_BLOCKS if is_run(block) for command in block.commands()}


@pytest.mark.parametrize("block", SHELL_BLOCKS, ids=str)
def test_every_command_is_run_or_parsed_or_needs_what_is_not_here(block):
    if block.mark.startswith("needs "):
        assert block.mark.removeprefix("needs ").startswith(NEEDS), f"{block}: {block.mark!r} is none of {NEEDS}"
        return
    for command in block.commands():
        taken = tuple(command) in RUN or job_of(command) or command[0].startswith("--") or command[0] in PREFIXES
        assert taken, (
            f"{block}: `{' '.join(command)}` is run by no test: put `<!-- run by tests/… -->` above the block and let that test "
            "run it (tests/support/documentation.py), or `<!-- needs a cloud -->`"
        )


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_run(block)], ids=str)
def test_the_test_that_a_block_names_runs_the_blocks_of_that_page(block):
    """By `blocks_run_by`, which gives it all of them."""
    test = ROOT / block.mark.removeprefix("run by ")
    assert test.exists(), f"{block}: there is no {test.relative_to(ROOT)}"
    assert f'blocks_run_by(__file__, "{block.page}")' in test.read_text(), f"{test.name} does not take the blocks of {block.page}"


@pytest.mark.parametrize("block", [block for block in BLOCKS if not block.is_shell], ids=str)
def test_no_command_hides_in_a_block_of_another_language(block):
    assert block.language in ("python", "yaml", "json", "text", "mermaid"), f"{block}: {block.language} is not known here"
    assert not re.search(r"^\s*(python jobs/|ray job submit|make |docker |kubectl )", block.text, re.MULTILINE), (
        f"{block}: a command; leave the block's language out"
    )
    if block.language == "python":
        compile(block.text, str(block), "exec")


def fields_of(kind: Any, prefix: str = "") -> set[str]:
    """All dotted names of a dataclass of dataclasses, the dataclasses' own included."""
    names = set()
    for field in dataclasses.fields(kind):
        value = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        names.add(f"{prefix}{field.name}")
        if dataclasses.is_dataclass(value):
            names |= fields_of(type(value), f"{prefix}{field.name}.")
    return names


CONFIGS = (
    PretrainConfig, PrecomputeConfig, InspectConfig, EvalConfig, SweepConfig, CompareConfig, ExportConfig, GenerateConfig,
    SizingConfig,
)  # fmt: skip
FIELDS = set().union(*(fields_of(config) for config in CONFIGS))
ROOMS = sorted({name.partition(".")[0] for name in FIELDS if "." in name})
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_FIELD = re.compile(rf"(?:--)?((?:{'|'.join(ROOMS)})\.[a-z_][\w.]*)(\*?)")


def spans(page: Path) -> list[str]:
    """The code within the text, without the blocks."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert not [line for line in text.splitlines() if line.count("`") % 2], f"{page.name}: code within the text ends on its line"
    return _SPAN.findall(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_in_the_text_exist(page):
    for span in spans(page):
        if (found := _FIELD.match(span)) and not found[1].endswith((".py", ".json", ".yaml", ".md", ".html")):
            name = found[1].rstrip(".")
            known = any(field.startswith(f"{name}.") for field in FIELDS) if found[2] else name in FIELDS
            assert known, f"{page.name}: `{span}`: there is no field {name}"


def test_flags_in_the_text_exist():
    """Short names (`--resume auto`) and flags that are no fields, too."""
    known = {f"--{name}" for name in FIELDS}
    known |= {"--recipe", "--config", "--dry-run", "--help", "--list", "--demo_data", "--output", "--resume", "--profile"}
    ray_start = {option for parameter in start.params for option in parameter.opts}
    for page in PAGES:
        for span in spans(page):
            flag = re.match(r"--[A-Za-z_][\w.-]*", span)
            others = {"--output_format"} | ray_start  # img2dataset's, Ray's
            assert not flag or flag[0].rstrip(".") in known or flag[0].endswith(".") or flag[0] in others, (
                f"{page.name}: `{span}`: no job has {flag[0]}"
            )


def test_the_reader_is_not_fooled():
    """What the checks above stand on: comments, continued lines, several commands, flags that are gone."""
    block = Block("x.md", 1, "", "", "cd here && make demo  # comment\npython jobs/eval.py --a 'b c' \\\n  --d [1,2]\n")
    assert block.commands() == [["cd", "here"], ["make", "demo"], ["python", "jobs/eval.py", "--a", "b c", "--d", "[1,2]"]]
    submitted = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/eval.py", "--x"]
    assert job_of(submitted) == ("jobs/eval.py", ["--x"])
    assert job_of(["diffdis", "eval", "--x"]) == ("eval", ["--x"])
    with pytest.raises(ConfigError, match="no such field"):
        parse_command("pretrain", ["--train.num_stepz", "1"])
    with pytest.raises(SystemExit):
        parse_command("jobs/build_demo_shards.py", ["--outputs", "x"])
