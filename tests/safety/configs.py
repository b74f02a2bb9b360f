"""Hostile configurations and names, passed to the jobs' command lines."""

import json
import sys
from pathlib import Path
from unittest import mock

from diffdis_platform.commands import compare
from diffdis_platform.commands.pretrain import parse_arguments as parse
from diffdis_platform.config import evaluate
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from tests.safety.cases import CANARY, Feed, line_of


def saved(text: str) -> Feed:
    """Return a case: a saved configuration from an untrusted source."""

    def feed(folder: Path) -> str:
        (folder / "config.yaml").write_text(text.replace("CANARY", str(folder / CANARY)))
        arguments = ["--config", str(folder / "config.yaml")]
        return line_of(lambda: json.dumps(parse(arguments).config.train.deepspeed), ConfigError)

    return feed


def suite(text: str) -> Feed:
    def feed(folder: Path) -> str:
        (folder / "suite.yaml").write_text(text)
        return line_of(lambda: evaluate.suite_sets(str(folder / "suite.yaml")), ConfigError, DataError)

    return feed


def arm(name: str) -> Feed:
    arguments = ["--output_dir", "/x", "--own_arms", json.dumps({name: {"objective.task": "joint"}})]
    return lambda folder: line_of(lambda: compare.parse_arguments(arguments), ConfigError)


def source(text: str) -> Feed:
    return lambda folder: line_of(lambda: build_catalog(DataConfig(sources=(text,))), ConfigError, DataError)


def output_dir(folder: Path) -> str:
    return line_of(lambda: storage.write_bytes("/x\0y", b""), DataError)


def module_that_runs_code(folder: Path) -> str:
    (folder / "hostile_module.py").write_text(f"open({str(folder / CANARY)!r}, 'w')\nclass Thing: pass\n")
    with mock.patch("sys.path", [str(folder), *sys.path]):
        return saved("train: {zero_stage: 1, deepspeed: {x: {class_path: hostile_module.Thing}}}")(folder)


def nested_aliases() -> str:
    """Return nested YAML aliases, each list with ten copies of the previous one: 10 ** 10 values in a few hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "train:\n  deepspeed:\n" + "\n".join(f"    {line}" for line in lines)


POPEN = json.dumps({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "CANARY"]}})
CONFIGS = {
    "`!!python/object/apply:os.system` in YAML": saved("train: {deepspeed: !!python/object/apply:os.system ['touch CANARY']}"),
    "`class_path: subprocess.Popen` with arguments in a free field": saved(
        f"train: {{zero_stage: 1, deepspeed: {{x: {POPEN}}}}}"
    ),
    "`class_path` of a module that runs code when it is imported": module_that_runs_code,
    "`class_path: subprocess.Popen` for the whole model": saved(f"model: {POPEN}"),
    "YAML aliases that stand for 10,000,000,000 values": saved(nested_aliases()),
    "a YAML list within itself": saved("train: {deepspeed: {x: &a [*a]}}"),
    "100,000 nested brackets": saved("[" * 100_000),
    "a configuration of 5 MB": saved("#" * 5_000_000),
    "a file that is binary": saved("\x00\x01\x02"),
    "`!!python/object` in a suite": suite("sets: !!python/object/apply:os.system ['true']"),
    "a set named `../../etc`": suite("sets: ['../../etc']"),
    "a set whose name holds the character 0": suite('sets: ["a\\0b"]'),
    "a set whose name holds a line break": suite('sets: ["a\\nb"]'),
    "a set whose name has 5,000 letters": suite(f"sets: [{'a' * 5000}]"),
    "an absolute name of a set": suite("sets: [/etc]"),
    "an arm named `../../escaped`": arm("../../escaped"),
    "an arm whose name has 300 letters": arm("a" * 300),
    "a pattern of 10,000,000,000 shards": source("/x/{0..9999999999}.tar"),
    "a pattern whose braces multiply": source("/x/" + "{0..99}" * 10 + ".tar"),
    "a source with the character 0": source("/x\0y"),
    "another scheme": source("http://169.254.169.254/latest"),
    "a run's folder with the character 0": output_dir,
}
