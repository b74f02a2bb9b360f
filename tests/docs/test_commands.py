"""Every command in README.md and docs/ is run by the test that the page names, is marked, or passes the parser of its job."""

import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.cli import submit
from ray.scripts.scripts import start

from diffdis_platform.cli import COMMANDS
from diffdis_platform.commands.generate import GenerateConfig
from diffdis_platform.commands.inspect import InspectConfig
from diffdis_platform.commands.precompute import PrecomputeConfig
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.distance import DistanceConfig
from diffdis_platform.config.evaluate import EvalConfig
from diffdis_platform.config.export import ExportConfig
from diffdis_platform.config.fields import field_types
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.sizing.config import SizingConfig
from ray_platform.contracts import ConfigError
from tests.support.documentation import PAGES, ROOT, Block, all_blocks, text_of

BLOCKS = all_blocks()
NEEDS = ("a cloud", "a GPU", "a registered model", "root", "the hub")
PREFIXES = ("export", "cd", "source")  # commands that only prepare a later command
SCRIPTS = {"jobs/inspect_data.py": "inspect", "jobs/run_demo.py": "demo"}  # all other scripts are named after their commands
CONFIGS = (
    PretrainConfig, PrecomputeConfig, InspectConfig, EvalConfig, SweepConfig, CompareConfig, ExportConfig, GenerateConfig,
    SizingConfig, DistanceConfig,
)  # fmt: skip
OTHER_FLAGS = {"--recipe", "--config", "--dry-run", "--help", "--list", "--demo_data", "--output", "--resume", "--profile"}
OTHER_FLAGS |= {"--output_format", "--sort", "--help-all"} | {
    option for command in (start, submit) for parameter in command.params for option in parameter.opts
}  # of img2dataset, tar and Ray


def parse_command(name: str, arguments: Sequence[str]) -> Any:
    """Parse the arguments of `diffdis <name>`, or of the script `jobs/<name>.py`."""
    name = SCRIPTS.get(name, Path(name).stem).replace("-", "_")
    return importlib.import_module(f"diffdis_platform.commands.{name}").parse_arguments(arguments)


def job_of(command: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return (script or command, arguments) of `python jobs/x.py …` or `diffdis x …`, also after `ray job submit`, or None."""
    words = list(command)
    if words[:3] == ["ray", "job", "submit"] and "--" in words:
        words = words[words.index("--") + 1 :]
    if words[:2] == ["sh", "jobs/restart.sh"]:
        words = words[3:]
    program, name = Path(words[0]).name, words[1] if len(words) > 1 else ""
    is_job = (program == "diffdis" and name in COMMANDS) or (program in ("python", "python3") and name.startswith("jobs/"))
    return (name, words[2:]) if is_job else None


def documented_jobs() -> list[tuple[str, str, list[str]]]:
    """Return (block, script, arguments) of all commands. A block that begins with a flag continues its page's last command."""
    jobs: list[tuple[str, str, list[str]]] = []
    for block in (block for block in BLOCKS if block.is_shell):
        for command in block.commands():
            if job := job_of(command):
                jobs.append((str(block), *job))
            elif command[0].startswith("--"):
                before, script, arguments = jobs[-1]
                assert before.startswith(f"{block.page}:"), f"{block}: {command[0]} belongs to no command"
                jobs.append((str(block), script, [word for word in arguments if word != "…"] + command))
    return jobs


def test_the_jobs_own_parsers_take_the_documented_lines():
    errors = []
    for block, script, arguments in documented_jobs():
        # "…" at the end of a line stands for arguments given in the text; no flag may follow it.
        arguments = arguments[:-1] if arguments[-1:] == ["…"] else arguments
        if arguments[:1] in (["--help"], ["--help-all"]):
            assert script in COMMANDS or (ROOT / script).exists()
            continue
        try:
            parse_command(script, arguments)
        except ConfigError as error:
            errors.append(f"{block}: {error}")
    assert not errors


def test_every_command_is_run_or_parsed_or_needs_what_is_not_here():
    shells = [block for block in BLOCKS if block.is_shell]
    run = [command for block in shells if block.mark.startswith("run by ") for command in block.commands()]
    for block in shells:
        if block.mark.startswith("needs "):
            assert block.mark.removeprefix("needs ").startswith(NEEDS), f"{block}: {block.mark!r} is none of {NEEDS}"
            continue
        for command in block.commands():
            assert command in run or job_of(command) or command[0].startswith("--") or command[0] in PREFIXES, (
                f"{block}: `{' '.join(command)}` is run by no test: put `<!-- run by tests/… -->` above the block and let that "
                "test run it (tests/support/documentation.py), or `<!-- needs a cloud -->`"
            )


def test_the_test_that_a_block_names_runs_the_blocks_of_that_page():
    for block in BLOCKS:
        if block.mark.startswith("run by "):
            test = ROOT / block.mark.removeprefix("run by ")
            assert f'blocks_run_by(__file__, "{block.page}")' in test.read_text(), f"{test.name} does not run {block}"


def test_no_command_hides_in_a_block_of_another_language():
    for block in (block for block in BLOCKS if not block.is_shell):
        assert block.language in ("python", "yaml", "json", "text", "mermaid"), f"{block}: {block.language} is not known here"
        assert not re.search(r"^\s*(python jobs/|ray job submit|make |docker |kubectl )", block.text, re.MULTILINE), (
            f"{block}: a command; leave the block's language out"
        )
        if block.language == "python":
            compile(block.text, str(block), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_and_flags_in_the_text_exist(page):
    fields = set().union(*(field_types(config) for config in CONFIGS))
    groups = "|".join({name.partition(".")[0] for name in fields if "." in name})
    text = text_of(page)
    assert not [line for line in text.splitlines() if line.count("`") % 2], "code within the text must end on its line"
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text):
        field = re.match(rf"(?:--)?((?:{groups})\.[a-z_][\w.]*)(\*?)", span)
        if field and not field[1].endswith((".py", ".json", ".yaml", ".md", ".html")):
            name = field[1].rstrip(".")
            assert name in fields or (field[2] and any(known.startswith(f"{name}.") for known in fields)), f"`{span}`"
        flag = re.match(r"--([A-Za-z_][\w.-]*)", span)
        assert not flag or flag[1].rstrip(".") in fields or flag[1].endswith(".") or flag[0] in OTHER_FLAGS, f"`{span}`"


def test_commands_are_read_as_a_shell_reads_them():
    """Covers comments, continuation lines, several commands in one line, and flags that no longer exist."""
    block = Block("x.md", 1, "", "", "cd here && make demo  # comment\npython jobs/eval.py --a 'b c' \\\n  --d [1,2]\n")
    assert block.commands() == [["cd", "here"], ["make", "demo"], ["python", "jobs/eval.py", "--a", "b c", "--d", "[1,2]"]]
    submitted = ["ray", "job", "submit", "--working-dir", ".", "--", "python", "jobs/eval.py", "--x"]
    assert job_of(submitted) == ("jobs/eval.py", ["--x"])
    assert job_of([*submitted[:6], "sh", "jobs/restart.sh", "5", *submitted[6:]]) == ("jobs/eval.py", ["--x"])
    assert job_of(["diffdis", "eval", "--x"]) == ("eval", ["--x"])
    with pytest.raises(ConfigError, match="no such field"):
        parse_command("pretrain", ["--train.num_stepz", "1"])
    with pytest.raises(ConfigError, match="no such field"):
        parse_command("jobs/build_demo_shards.py", ["--outputs", "x"])
