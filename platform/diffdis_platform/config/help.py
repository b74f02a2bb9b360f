"""The help of a command, and suggestions for names that are not fields.

`--help` explains the main fields on one screen, `--help SECTION` those of one section, and `--help-all` every field. The texts
are the docstrings below the fields of the configuration.
"""

import argparse
import dataclasses
import difflib
import functools
import json
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffdis_platform.config.fields import FieldTypes, field_texts
from ray_platform.contracts import ConfigError

ALL = "all"  # the section of `--help-all`
_WIDTH = 110  # of the help outside of a terminal
_FLAG_WIDTH = 36
_METAVARS = {int: "N", float: "X", str: "TEXT", dict: "JSON"}

# Names that users try -> the fields that they mean, without the sections that only some commands have.
SYNONYMS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "learning_rate"), ("objective.lr_unet", "objective.lr_new")),
    **dict.fromkeys(("batch_size", "bs", "per_device_batch_size"), ("micro_batch_size", "global_batch_size")),
    **dict.fromkeys(("epochs", "num_epochs", "steps", "max_steps", "iterations", "num_iterations"), ("num_steps", "samples")),
    **dict.fromkeys(("workers", "gpus", "num_gpus", "nproc_per_node", "world_size"), ("num_workers", "gpus_per_worker")),
    **dict.fromkeys(("data_path", "data_dir", "train_data", "dataset", "input", "shards"), ("data.sources", "data_roots")),
    **dict.fromkeys(("output", "out", "out_dir", "save_dir", "logdir"), ("output_dir",)),
    **dict.fromkeys(("resolution", "size", "res"), ("data.image_size", "model.image_size", "height", "width")),
    **dict.fromkeys(("ckpt", "checkpoint_path", "model_path", "model", "pretrained"), ("checkpoint", "model", "warm_start")),
    **dict.fromkeys(("prompt", "prompts", "caption", "text"), ("captions", "captions_file")),
    **dict.fromkeys(("grad_accum", "accum_freq", "gradient_accumulation_steps"), ("global_batch_size",)),
    **dict.fromkeys(("amp", "bf16", "fp16", "mixed_precision"), ("precision", "dtype")),
    **dict.fromkeys(("grad_clip", "max_grad_norm", "clip_grad"), ("gradient_clipping",)),
    **dict.fromkeys(("warmup", "num_warmup_steps"), ("warmup_steps",)),
    **dict.fromkeys(("save_every", "save_steps", "save_interval"), ("checkpoint_every",)),
    **dict.fromkeys(("wandb", "mlflow", "tracker", "report_to"), ("tracking.backends", "tracking.uri")),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance"), ("guidance_scale", "guidance_scales")),
    **dict.fromkeys(("ema",), ("ema_decay",)),
    **dict.fromkeys(("url", "tracking_uri", "mlflow_uri"), ("tracking.uri",)),
    **dict.fromkeys(("val_every", "eval_every", "validation_every"), ("heldout_every",)),
    **dict.fromkeys(("zero", "deepspeed_stage", "stage"), ("zero_stage",)),
}


@dataclass(frozen=True)
class CommandHelp:
    """What `--help` says about a command."""

    command: str
    description: str  # what it does, in one sentence
    examples: tuple[str, ...] = ()  # the arguments of complete commands
    fields: tuple[str, ...] = ()  # explained by `--help`, by dotted name; empty: all of them

    @property
    def program(self) -> str:
        """The command as the user called it: the script of a checkout, or `diffdis`."""
        script = Path(sys.argv[0])
        return f"python {script}" if script.parent.name == "jobs" else f"diffdis {self.command}"


def current_recipes(recipes: Mapping[str, Callable[..., Any]]) -> str:
    """Return the names of the recipes that are not deprecated."""
    return ", ".join(name for name, recipe in recipes.items() if not str(recipe.__doc__).startswith("Deprecated"))


@dataclass(frozen=True)
class Option:
    """An option of a command that is not a field of its configuration."""

    flag: str
    text: str
    metavar: str = ""  # empty: the option takes no value


_HELP_OPTION = Option("--help", "Explain the main fields, or a section such as data; --help-all: all.", "[SECTION]")


def requested_section(arguments: Sequence[str]) -> str | None:
    """Return the word after `--help`, "" for `--help` alone, ALL for `--help-all`, and None without a request for help."""
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=False):
        flag, _, value = argument.partition("=")
        if flag == "--help-all":
            return ALL
        if flag in ("-h", "--help"):
            return value or ("" if following.startswith("-") else following)
    return None


def render_help(
    about: CommandHelp, section: str, config: Any, kinds: FieldTypes, options: Sequence[Option], aliases: Mapping[str, str]
) -> str:
    """Return the text for `--help`.

    Args:
        about: description, examples and main fields of the command.
        section: result of `requested_section`.
        config: the configuration whose values are shown as the defaults.
        kinds: types of all fields and sections, by dotted name.
        options: the options that are not fields.
        aliases: short names of fields.

    Raises:
        ConfigError: there is no such section or field.
    """
    section = aliases.get(f"--{section}", section).removeprefix("--")
    leaves = [name for name, kind in kinds.items() if not dataclasses.is_dataclass(kind)]
    is_short = not section and bool(about.fields)
    if is_short:
        shown = list(about.fields)
    else:
        shown = [name for name in leaves if section in ("", ALL) or f"{name}.".startswith(f"{section}.")]
    if not shown:
        sections = [name for name in kinds if name not in leaves and "." not in name]
        near = suggest(section, list(kinds), [])
        raise ConfigError(f"--help {section}: no such section; use one of {', '.join(near or sections)}, or --help-all")
    parser = argparse.ArgumentParser(
        usage=f"{about.program} [OPTION ...]",
        description=textwrap.fill(about.description, _WIDTH),
        epilog=_overview(about, kinds, leaves) if not section else None,
        formatter_class=_formatter,
        add_help=False,
    )
    if section in ("", ALL):
        group = parser.add_argument_group("options")
        for option in (*options, _HELP_OPTION):
            _add(group.add_argument, [option.flag], option.metavar, option.text)
    texts, short_names = (
        field_texts(type(config)),
        {field.removeprefix("--"): alias for alias, field in aliases.items() if "." in field},
    )
    groups = {}
    for name in shown:
        title = "main fields" if is_short else name.rpartition(".")[0] or "fields"
        if title not in groups:
            groups[title] = parser.add_argument_group(title, None if is_short else texts.get(title)).add_argument
        flags = [f"--{name}"] if name not in short_names else [short_names[name], f"--{name}"][: 1 if is_short else 2]
        text = _first_sentences(texts[name]) if is_short else texts[name]
        values = _values_text(kinds[name], _value_of(config, name), 40 if is_short else 1000)
        _add(groups[title], flags, _metavar(kinds[name]), text + values)
    return parser.format_help()


def _add(add_argument: Callable[..., Any], flags: Sequence[str], metavar: str, text: str) -> None:
    takes_value = {"metavar": metavar} if metavar else {"action": "store_true"}
    add_argument(*flags, help=text.replace("%", "%%"), **takes_value)


def _formatter(prog: str) -> argparse.HelpFormatter:
    width = min(shutil.get_terminal_size((_WIDTH, 0)).columns, _WIDTH)
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=_FLAG_WIDTH, width=width)


def _overview(about: CommandHelp, kinds: FieldTypes, leaves: Sequence[str]) -> str:
    """Return the sections whose fields `--help` does not explain, and the examples."""
    lines = []
    sections = [name for name, kind in kinds.items() if name not in leaves and "." not in name]
    if sections and about.fields:
        counts = [f"{name} ({sum(leaf.startswith(f'{name}.') for leaf in leaves)})" for name in sections]
        lines += [f"sections (number of fields): {', '.join(counts)}", ""]
    return "\n".join(
        [*lines, "examples:", *(_shell_lines(f"  {about.program} {example}".rstrip()) for example in about.examples)]
    )


def _shell_lines(command: str) -> str:
    """Return a command in lines of the help's width, broken before an option, which a shell joins."""
    unbroken = re.sub(" (?!--)", "\0", command)
    lines = textwrap.wrap(unbroken, _WIDTH - 2, subsequent_indent="      ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace("\0", " ")


def _metavar(kind: Any) -> str:
    """Return the placeholder of a value of this type; empty for a switch."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _metavar(members[0])
    if origin is Literal:
        return "N" if isinstance(members[0], int) else "NAME"
    if origin is tuple:
        return f"{_metavar(members[0])} ..."
    return "" if kind is bool else _METAVARS.get(origin or kind, "VALUE")


def _first_sentences(text: str) -> str:
    """Return the first sentence, and the one that explains the value 0."""
    first, *others = text.removesuffix(".").split(". ")
    return " ".join(f"{sentence}." for sentence in (first, *(other for other in others if other.startswith("0: "))))


def _value_of(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


def _values_text(kind: Any, value: Any, max_length: int) -> str:
    """Return the choices and the default, in parentheses."""
    parts = [", ".join(map(str, typing.get_args(kind)))] if typing.get_origin(kind) is Literal else []
    if value not in ("", (), {}, None):
        text = " ".join(map(str, value)) if isinstance(value, tuple) else value
        text = json.dumps(text) if isinstance(text, dict | bool) else str(text)
        parts.append(f"default: {text if len(text) <= max_length else f'{text[: max_length - 4]} ...'}")
    return f" ({'; '.join(parts)})" if parts else ""


def value_problem(message: str) -> str:
    """Return jsonargparse's message about a value of the wrong type in the words of a command line."""
    message = re.sub(r'^Parser key "([^"]+)"', r"\1", message)
    if union := re.search(r"Does not validate .* Subtypes: \[(?P<types>.*?)\] Errors: .* Given value: ?(?P<value>.*)", message):
        types = re.sub(r"<class '(\w+)'>", r"\1", union["types"]).replace(", NoneType", "")
        types = re.sub(r"tuple\[[^]]*\]", "tuple", types).replace(", ", " or ")
        message = f"{message[: union.start()]}{union['value']} is not of type {types}"
    message = re.sub(r"Expected a typing\.Literal\[(.*)\]\. Got value: ?(.*)", r"\2 is none of \1", message)
    message = re.sub(r"Expected an? <class '(\w+)'>\. Got value: ?(.*)", r"\2 is not of type \1", message)
    message = re.sub("is not of type dict$", """is not a JSON object such as '{"name": 1}'""", message)
    return re.sub(r"\btuple$", "list; write '[…, …]'", message)


def no_such_field(name: str, fields: FieldTypes, options: Collection[str] = ()) -> str:
    """Return what to say about a name that is not a field, with the fields or other options that may be meant."""
    near = suggest(name, [field for field, kind in fields.items() if not dataclasses.is_dataclass(kind)], options)
    return "no such field; " + (f"did you mean {' or '.join(f'--{other}' for other in near)}?" if near else "see --help-all")


def suggest(name: str, fields: Collection[str], options: Collection[str]) -> list[str]:
    """Return the fields or options that a user may mean by a name that does not exist, the most likely first.

    Args:
        name: the name, without dashes before it.
        fields: dotted names of the fields.
        options: names of other options.
    """
    word = name.replace("-", "_").lower()
    section, _, last = word.rpartition(".")
    targets = dict.fromkeys((word, last, *SYNONYMS.get(last, ())))
    same = [field for target in targets for field in fields if field == target or field.endswith(f".{target}")]
    if same:
        return list(dict.fromkeys(same))[:3]
    by_last_word = {option: option for option in options}
    for field in fields:
        by_last_word.setdefault(field.rpartition(".")[2], field)
    if near := difflib.get_close_matches(last, by_last_word, n=1, cutoff=0.75):
        return [by_last_word[near[0]]]
    longer = [f for f in fields if difflib.get_close_matches(last, f.rpartition(".")[2].split("_"), n=1, cutoff=0.8)]
    return sorted(longer, key=lambda field: not field.startswith(f"{section}."))[:3]
