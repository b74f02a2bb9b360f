"""Hostile configurations and names, by what the jobs' command lines make of them."""

import json
from pathlib import Path

from diffdis_platform.commands import compare
from diffdis_platform.commands.pretrain import parse_arguments as parse
from diffdis_platform.config import evaluate
from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from tests.safety.cases import CANARY, Case, line_of

PRETRAIN, EVAL, COMPARE = "`jobs/pretrain.py --config`", "`jobs/eval.py --suite`", "`jobs/compare.py --own_arms`"


def saved(text: str):
    """A configuration that somebody sent."""

    def feed(folder: Path) -> str:
        (folder / "config.yaml").write_text(text.replace("CANARY", str(folder / CANARY)))
        arguments = ["--config", str(folder / "config.yaml")]
        return line_of(lambda: json.dumps(parse(arguments).config.train.deepspeed), ConfigError)

    return feed


def suite(text: str):
    def feed(folder: Path) -> str:
        (folder / "suite.yaml").write_text(text)
        return line_of(lambda: evaluate.suite_sets(str(folder / "suite.yaml")), ConfigError, DataError)

    return feed


def arm(name: str):
    arguments = ["--output_dir", "/x", "--own_arms", json.dumps({name: {"objective.task": "joint"}})]
    return lambda folder: line_of(lambda: compare.parse_arguments(arguments), ConfigError)


def source(text: str):
    return lambda folder: line_of(lambda: build_catalog(DataConfig(sources=(text,))), ConfigError, DataError)


def popen() -> str:
    return json.dumps({"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "CANARY"]}})


def module(folder: Path) -> str:
    """A module that runs code as it is imported, named by a configuration."""
    import sys

    (folder / "hostile_module.py").write_text(f"open({str(folder / CANARY)!r}, 'w')\nclass Thing: pass\n")
    sys.path.insert(0, str(folder))
    try:
        return saved("train: {deepspeed: {x: {class_path: hostile_module.Thing}}}")(folder)
    finally:
        sys.path.remove(str(folder))


def aliases() -> str:
    """Ten lists of ten of the one before: 10 ** 10 values in some hundred bytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    return "train:\n  deepspeed:\n" + "\n".join(f"    {line}" for line in lines)


CONFIGS = [
    Case(
        "`!!python/object/apply:os.system` in YAML",
        PRETRAIN,
        "os.system",
        saved("train: {deepspeed: !!python/object/apply:os.system ['touch CANARY']}"),
    ),
    Case(
        "`class_path: subprocess.Popen` with arguments in a free field",
        PRETRAIN,
        'accepted: {…"class_path": "subprocess.Popen"…',
        saved(f"train: {{deepspeed: {{x: {popen()}}}}}"),
    ),
    Case(
        "`class_path` of a module that runs code when it is imported",
        PRETRAIN,
        'accepted: {…"class_path": "hostile_module.Thing"…',
        module,
    ),
    Case("`class_path: subprocess.Popen` for the whole model", PRETRAIN, "subprocess.Popen", saved(f"model: {popen()}")),
    Case("YAML aliases that stand for 10,000,000,000 values", PRETRAIN, "config.yaml…100,000 values", saved(aliases())),
    Case("a YAML list within itself", PRETRAIN, "config.yaml…100,000 values", saved("train: {deepspeed: {x: &a [*a]}}")),
    Case("100,000 nested brackets", PRETRAIN, "config.yaml…nested", saved("[" * 100_000)),
    Case("a configuration of 5 MB", PRETRAIN, "config.yaml…1,048,576 bytes", saved("#" * 5_000_000)),
    Case("a file that is binary", PRETRAIN, "config.yaml…YAML", saved("\x00\x01\x02")),
    Case("a field that there is not", PRETRAIN, "evil", saved("evil: 1")),
    Case("`!!python/object` in a suite", EVAL, "suite.yaml…sets", suite("sets: !!python/object/apply:os.system ['true']")),
]

NAMES = [
    Case("a set named `../../etc`", EVAL, "suite…../../etc", suite("sets: ['../../etc']")),
    Case("a set whose name holds the character 0", EVAL, "suite…a\\x00b", suite('sets: ["a\\0b"]')),
    Case("a set whose name holds a line break", EVAL, "suite…a\\nb", suite('sets: ["a\\nb"]')),
    Case("a set whose name has 5,000 letters", EVAL, "suite…aaaa", suite(f"sets: [{'a' * 5000}]")),
    Case("an absolute name of a set", EVAL, "suite…/etc", suite("sets: [/etc]")),
    Case("an arm named `../../escaped`", COMPARE, "own_arms…../../escaped", arm("../../escaped")),
    Case("an arm whose name has 300 letters", COMPARE, "own_arms…aaa", arm("a" * 300)),
    Case(
        "a pattern of 10,000,000,000 shards",
        "`data.sources`",
        "{0..9999999999}.tar…1,000,000 files",
        source("/x/{0..9999999999}.tar"),
    ),
    Case("a pattern whose braces multiply", "`data.sources`", ".tar…1,000,000 files", source("/x/" + "{0..99}" * 10 + ".tar")),
    Case("a source with the character 0", "`data.sources`", "/x\\x00y", source("/x\0y")),
    Case("another scheme", "`data.sources`", "http://169.254.169.254/latest", source("http://169.254.169.254/latest")),
    Case(
        "a run's folder with the character 0",
        "`output_dir`",
        "/x\\x00y",
        lambda folder: line_of(lambda: storage.write_bytes("/x\0y", b""), DataError),
    ),
]
