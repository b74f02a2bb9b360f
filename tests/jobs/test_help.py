"""`--help` of every command: each field is explained, one screen is enough, and its examples are valid command lines."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from diffdis_platform.cli import COMMANDS, main
from diffdis_platform.commands import pretrain
from diffdis_platform.config.fields import field_texts, field_types
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.saved import read_saved
from ray_platform.contracts import ConfigError

JOBS = Path(__file__).parents[2] / "jobs"
_MAX_LINES, _MAX_COLUMNS = 40, 110


def _command(name):
    return importlib.import_module(f"diffdis_platform.commands.{name.replace('-', '_')}")


def _config_class(name):
    return typing.get_args(typing.get_type_hints(_command(name).parse_arguments)["return"])[0]


def _help(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_field_is_explained_by_help_all(name, capsys):
    config_class = _config_class(name)
    assert not [field for field, text in field_texts(config_class).items() if len(text) < 5]
    printed = _help(capsys, name, "--help-all").split()
    fields = {field for field, kind in field_types(config_class).items() if not dataclasses.is_dataclass(kind)}
    assert not {f"--{field}" for field in fields} - set(printed)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_on_a_screen_and_its_examples_are_valid(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["diffdis"])
    monkeypatch.delenv("COLUMNS", raising=False)
    printed = _help(capsys, name, "--help")
    assert printed.count("\n") <= _MAX_LINES
    assert max(map(len, printed.splitlines())) <= _MAX_COLUMNS
    for example in _command(name).HELP.examples:
        assert f"diffdis {name} {example}" in re.sub(r" \\\n +", " ", printed)
        _command(name).parse_arguments(shlex.split(example))


def test_help_shows_a_section_the_aliases_and_the_values_of_the_recipe(capsys):
    printed = _help(capsys, "pretrain", "--help", "data")
    assert "--data.sources" in printed
    assert "--data.filters.min_size" in printed
    assert "--train" not in printed
    assert "--profile" in _help(capsys, "pretrain", "-h")
    assert "(default: 32)" in _help(capsys, "pretrain", "--help", "data.image_size")
    assert "(default: 512)" in _help(capsys, "pretrain", "--recipe", "sd_v1_laion", "--help", "data.image_size")
    with pytest.raises(ConfigError, match=r"--help dta: .*data"):
        pretrain.parse_arguments(["--help", "dta"])


@pytest.mark.parametrize(
    ("command", "typed", "meant"),
    [
        ("pretrain", "--lr", ["objective.lr_unet", "objective.lr_new"]),
        ("pretrain", "--batch_size", ["train.micro_batch_size", "train.global_batch_size"]),
        ("pretrain", "--batch-size", ["train.micro_batch_size", "train.global_batch_size"]),
        ("pretrain", "--epochs", ["train.num_steps"]),
        ("pretrain", "--num_steps", ["train.num_steps"]),
        ("pretrain", "--train.num_stpes", ["train.num_steps"]),
        ("pretrain", "--data.sources+", ["data.sources"]),
        ("pretrain", "--resum", ["train.resume"]),
        ("pretrain", "--train.lr", ["objective.lr_unet", "objective.lr_new"]),
        ("pretrain", "--train.hang", ["train.hang_seconds"]),
        ("pretrain", "--train.nonsense", []),
        ("sweep", "--lr", ["pretrain.objective.lr_unet", "pretrain.objective.lr_new"]),
        ("generate", "--prompt", ["captions", "captions_file"]),
        ("generate", "--steps", ["num_steps"]),
        ("eval", "--dataset", ["data_roots"]),
        ("inspect", "--dry-run", []),
    ],
)
def test_an_unknown_name_suggests_the_fields_that_are_meant(command, typed, meant):
    with pytest.raises(ConfigError) as raised:
        _command(command).parse_arguments([typed, "1"])
    message = str(raised.value)
    assert message.startswith(f"{typed}: no such field")
    named = [word.strip("?") for word in message.split() if word.startswith("--")][1:]
    assert named == [f"--{field}" for field in meant or ["help-all"]]


def test_integers_may_be_written_with_an_exponent():
    config = pretrain.parse_arguments(["--train.num_steps", "1e3", "--train.num_workers=[1,2]", "--train.seed=2.5e1"]).config
    assert (config.train.num_steps, config.train.num_workers, config.train.seed) == (1000, (1, 2), 25)
    with pytest.raises(ConfigError, match=r"train.num_steps: 15\.5 is not of type int"):
        pretrain.parse_arguments(["--train.num_steps", "1.55e1"])


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--train.precision=float16", ("train.precision: float16 is none of", "'fp32', 'bf16', 'fp16'")),
        ("--train.num_workers=two", ("train.num_workers: two is not of type int or list; write",)),
        ("--train.num_workers=[2, x]", ("train.num_workers: [2, 'x'] is not of type int or list; write",)),
        ("--train.betas=0.9", ("train.betas: 0.9 is not of type list; write '[…, …]'",)),
        ("--train.num_steps=", ("train.num_steps:  is not of type int",)),
        ("--train=5", ("--train: this is a section", "--train.num_workers")),
        ("--model.schedule=own.yaml", ("--model.schedule: this is a section",)),
        ("--data.placement=cpu", ("data.placement: cpu is not a JSON object", "such as '{\"name\": 1}'")),
    ],
)
def test_a_value_of_another_type_is_told_what_is_expected(argument, words):
    with pytest.raises(ConfigError) as raised:
        pretrain.parse_arguments([argument])
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.sources"], "--data.sources: no value: write one value"),
        (["--train.num_steps", "1", "2"], "--train.num_steps: 1 2: write one value"),
        (["--output_dir", "/my", "run"], "--output_dir: /my run: write one value after the flag, with quotes"),
        (["run.yaml", "--train.num_steps", "1"], "run.yaml: not an option"),
        (["--dry-run", "yes"], "--dry-run: yes: this flag has no value"),
        (["--dry-run=5"], "--dry-run: 5: this flag has no value"),
        (["--recipe"], "--recipe: no value: write one value"),
        (["--config"], "--config: no value: write one value"),
        (["--config", "--dry-run"], "--config: no value: write one value"),
    ],
)
def test_too_few_and_too_many_values_are_named(arguments, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        pretrain.parse_arguments(arguments)


def test_an_unknown_field_in_a_file_is_named_with_the_file_and_the_closest_field(tmp_path):
    (tmp_path / "own.yaml").write_text("train: {num_step: 5}\n")
    with pytest.raises(ConfigError, match=r"^--config: .*own\.yaml: train\.num_step: no such field; .* --train\.num_steps\?"):
        pretrain.parse_arguments(["--config", str(tmp_path / "own.yaml")])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("config: /etc/hostname", "config: no such field"),
        ("dry_run: true", "dry_run: no such field"),
        ("train: 5", r"own\.yaml: train: 5 is not a section"),
        ("model: {schedule: }", "model.schedule: None is not a section"),
        ("format_version: x", "format_version is 'x'"),
        ("train: {num_steps: null}", "train.num_steps: null is not a value of this field"),
        ("output_dir: null", "output_dir: null is not a value of this field"),
        ("output_dir: !!int abc", "cannot be read as YAML"),
        ("output_dir: 2020-13-45", "cannot be read as YAML"),
    ],
)
def test_a_file_cannot_contain_options_and_values_in_place_of_sections(tmp_path, content, message):
    (tmp_path / "own.yaml").write_text(f"{content}\n")
    with pytest.raises(ConfigError, match=f"^--config: .*{message}"):
        pretrain.parse_arguments(["--config", str(tmp_path / "own.yaml")])


def test_a_checkpoint_whose_section_is_a_value_is_not_blamed_on_the_command_line():
    with pytest.raises(ValueError, match=r"^train: 5 is not a section"):
        read_saved({"train": 5}, field_types(PretrainConfig), "s3://bucket/run/step_1/complete.json")


@pytest.mark.parametrize("version", ["", "format_version: 1\n"])
def test_a_configuration_of_another_command_is_named(tmp_path, version):
    """Saved ones have a version, and lose the fields that no longer exist; but sections do not go away."""
    (tmp_path / "other.yaml").write_text(f"{version}suite: demo\nscoring: {{num_draws: 8}}\n")
    with pytest.raises(ConfigError, match=r"^--config: .*other\.yaml: scoring is not a section of this command; give "):
        pretrain.parse_arguments(["--config", str(tmp_path / "other.yaml")])


@pytest.mark.ranks
@pytest.mark.parametrize("script", sorted(path.name for path in JOBS.glob("[a-z]*.py")))
def test_without_the_packages_a_script_says_how_to_install_them(script):
    done = subprocess.run([sys.executable, "-S", str(JOBS / script), "--help"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "make setup" in done.stderr
