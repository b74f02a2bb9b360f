"""One parser for all commands: from a command line, a recipe and a saved config.yaml to a typed configuration."""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, Generic, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from diffdis_platform.config.fields import FieldTypes, check_secrets, field_names, field_types
from diffdis_platform.config.help import (
    CommandHelp,
    Option,
    current_recipes,
    no_such_field,
    render_help,
    requested_section,
    value_problem,
)
from diffdis_platform.config.saved import (
    CONFIG_FORMAT,
    current_name,
    dump_yaml,
    known_fields,
    load_yaml,
    read_saved,
    read_yaml,
    with_current_names,
)
from ray_platform.contracts import ConfigError, one_line
from ray_platform.formats import VERSION_KEY
from ray_platform.json_values import JsonObject, num_values, to_plain
from ray_platform.redaction import redacted_values
from ray_platform.storage_config import StorageConfig

Config = TypeVar("Config")
Recipes = Mapping[str, Callable[..., Config]]

_SHOWN = 200  # characters of a wrong value
_ONE_VALUE = "write one value after the flag, with quotes if it contains spaces"


# A configuration may come from someone else, and `class_path: some.module` in it would import that module.
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=["*"])


@dataclasses.dataclass(frozen=True)
class ParsedCommand(Generic[Config]):
    """A parsed command line."""

    config: Config
    recipe: str  # the recipe that the configuration started from; empty for a command without recipes
    switches: frozenset[str]  # the switches of the command that were given, such as `dry_run`
    yaml: str  # the resolved configuration without secrets; `--config` reads it


def parse(
    config_class: type[Config],
    argv: Sequence[str],
    about: CommandHelp,
    *,
    recipes: Recipes[Config] | None = None,
    switches: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
) -> ParsedCommand[Config]:
    """Parse the arguments of a command into a `config_class`.

    A field is set with `--dotted.name value`. A list takes one or more values or JSON (`--data.sources a b`), and a boolean field
    without a value means true. If `config_class` has a method `check`, it is called.

    Files of `--config` are read with the arguments that say how buckets are accessed.

    Args:
        config_class: dataclass of the configuration; its fields may be dataclasses.
        argv: the arguments after the name of the command.
        about: what `--help` says.
        recipes: functions that return the configuration to start from, by name; the first is the default. The parameters of
            a recipe become options of the command.
        switches: options without a value that are not part of the configuration, with their help text.
        aliases: short names of fields, such as `--resume` for `--train.resume`.

    Raises:
        SystemExit: the arguments ask for help, which is printed.
        ConfigError: an unknown recipe or field, an invalid value, a configuration file that cannot be read, or a secret that
            is missing or in the wrong place.
    """
    split = [argument.partition("=") for argument in argv]
    arguments = [(aliases or {}).get(flag, flag) + equals + value for flag, equals, value in split]
    fields = field_types(config_class)
    defaults = to_plain(dataclasses.asdict(config_class()))  # type: ignore[call-overload]
    _set_storage_variables(_with_storage_arguments(config_class(), arguments, fields))
    files = {path: read_yaml("--config", path, "give a saved config.yaml") for path in _flag_values(arguments, "--config")}
    parser = ArgumentParser(prog=about.program, exit_on_error=False, add_help=False)
    # In a complete file, the recipe is only a name, which may no longer exist.
    bases = [each for each in files.values() if str(each.get("recipe")) in (recipes or {}) or not _is_complete(each, defaults)]
    listed, base = _add_options(parser, arguments, bases, recipes or {}, switches or {})
    if (section := requested_section(arguments)) is not None:
        print(render_help(about, section, base or config_class(), fields, listed, aliases or {}), end="")
        sys.exit()
    # What a saved configuration contains next to the fields. A file does not name another one, which would not be checked.
    written = [option.flag.removeprefix("--").replace("-", "_") for option in listed if option.flag != "--config"]
    switch_names = {name.replace("-", "_") for name in switches or {}}
    from_files, is_saved = _file_values(files, fields, written, switch_names, defaults)
    flags, sections = _normalize(arguments, fields, listed)
    # A field that a saved configuration lacks is newer than the file: it gets its default, not the value of a recipe.
    start = config_class() if is_saved or base is None else base
    config, values = _with_given(start, parser, from_files | sections, flags)
    given = frozenset(name for name in switch_names if values[name])
    _set_storage_variables(config)
    if check := getattr(config, "check", None):
        check()
    saved = {VERSION_KEY: CONFIG_FORMAT.version} | {name: values[name] for name in written}
    saved |= dataclasses.asdict(config)  # type: ignore[call-overload]
    return ParsedCommand(config, values["recipe"] if recipes else "", given, dump_yaml(redacted_values(saved)))


def _add_options(
    parser: ArgumentParser, arguments: list[str], files: list[JsonObject], recipes: Recipes[Config], switches: Mapping[str, str]
) -> tuple[list[Option], Config | None]:
    """Add the options that are not fields. Return them, and the configuration of the recipe."""
    listed: list[Option] = []
    default = None
    if recipes:
        if (recipe := _option_value(arguments, files, "recipe", next(iter(recipes)))) not in recipes:
            raise ConfigError(f"--recipe {recipe}: no such recipe; choose one of {current_recipes(recipes)}")
        listed.append(Option("--recipe", f"Configuration to start from: {current_recipes(recipes)} (default: {recipe}).", "NAME"))
        parser.add_argument("--recipe", default=recipe)
        parameters = {
            name: _option_value(arguments, files, name, parameter.default)
            for name, parameter in inspect.signature(recipes[recipe]).parameters.items()
        }
        for name, value in parameters.items():
            text = (inspect.getdoc(recipes[recipe]) or "").partition(f"`{name}`: ")[2]
            listed.append(Option(f"--{name}", f"{text} (default: {value})", "TEXT"))
            parser.add_argument(f"--{name}", default=value)
        default = recipes[recipe](**parameters)
    listed.append(Option("--config", "config.yaml to start from, saved or with only some fields; local or s3://.", "FILE"))
    listed += [Option(f"--{name}", text) for name, text in switches.items()]
    for name in switches:
        parser.add_argument(f"--{name}", action="store_true")
    return listed, default


def _with_storage_arguments(config: Config, arguments: Sequence[str], fields: FieldTypes) -> Config:
    """Return `config` with the arguments that say how buckets are accessed."""
    chunks: list[list[str]] = []
    for argument in arguments:
        chunks += [[]] if argument.startswith("--") or not chunks else []
        chunks[-1].append(argument)
    sections = tuple(f"--{name}." for name, kind in fields.items() if kind is StorageConfig)
    given = [argument for chunk in chunks if chunk[0].startswith(sections) for argument in chunk]
    return _with_given(config, ArgumentParser(exit_on_error=False), {}, _normalize(given, fields, [])[0])[0] if given else config


def _set_storage_variables(config: Any) -> None:
    if isinstance(config, StorageConfig):
        config.set_variables()
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            _set_storage_variables(getattr(config, field.name))


def with_fields(config: Config, values: Mapping[str, Any]) -> Config:
    """Return `config` with other values for some fields, given by dotted name, validated like those of a command line.

    Raises:
        ConfigError: an unknown field, a value of the wrong type, or one that the configuration rejects.
    """
    fields = field_types(type(config))
    texts = [f"--{name}={value}" for name, value in values.items() if isinstance(value, str)]
    arguments, given = _normalize(texts, fields, [])
    given |= _flat({current_name(name): value for name, value in values.items() if not isinstance(value, str)}, fields)
    return _with_given(config, ArgumentParser(exit_on_error=False), given, arguments)[0]


def _with_given(config: Config, parser: ArgumentParser, values: JsonObject, arguments: Sequence[str]) -> tuple[Config, Namespace]:
    """Return `config` with the given fields, and the values of all options.

    Args:
        config: the configuration to start from.
        parser: knows the options that are not fields.
        values: JSON values of fields and options, by dotted name.
        arguments: flags with their values, which replace `values`.
    """
    fields = field_types(type(config))
    flags = [argument.partition("=")[0].removeprefix("--") for argument in arguments]
    names = [name for name in dict.fromkeys([*values, *flags]) if name in fields]
    for name in names:  # a parser of all fields would take most of the time of a command's start
        parser.add_argument(f"--{name}", type=fields[name], default=functools.reduce(getattr, name.split("."), config))
    try:
        base = parser.parse_object({name: value for name, value in values.items() if name not in flags})
        given = parser.parse_args(arguments, namespace=base)
    except (ArgumentError, ImportError, RecursionError) as error:  # ImportError: a class_path in a configuration
        raise ConfigError(value_problem(one_line(error))) from None
    check_secrets(to_plain(given.as_dict()))
    with _one_line_errors():
        return _replaced(config, {name: given[name] for name in names}), given


def _flat(values: JsonObject, fields: FieldTypes, options: Sequence[str] = (), prefix: str = "") -> JsonObject:
    """Return the values of nested sections by dotted name.

    Raises:
        ConfigError: an unknown name, a value in place of a section, or null or a boolean that the field does not have.
    """
    flat: JsonObject = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if name not in fields:
            if name not in options:
                raise ConfigError(f"--{name}: {no_such_field(name, fields)}")
        elif dataclasses.is_dataclass(fields[name]):
            if not isinstance(value, dict):
                raise _section_problem(f"--{name}", fields[name])
            flat |= _flat(value, fields, (), f"{name}.")
            continue
        # jsonargparse accepts null for every field, and true for 1.
        elif (value is None and not _may_be_null(fields[name])) or (isinstance(value, bool) and _is_number(fields[name])):
            raise ConfigError(f"{name}: {json.dumps(value)} is not a value of this field; leave it out for the default")
        flat[name] = value
    return flat


def _may_be_null(kind: Any) -> bool:
    return kind in (Any, type(None)) or type(None) in typing.get_args(kind)


def _is_number(kind: Any) -> bool:
    return typing.get_origin(kind) is typing.Literal and isinstance(typing.get_args(kind)[0], int)


def _replaced(config: Config, values: JsonObject) -> Config:
    """Return the dataclass `config` with other values for some fields, given by dotted name."""
    parts: dict[str, JsonObject] = {}
    for name, value in values.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    changes = {part: inner[""] if "" in inner else _replaced(getattr(config, part), inner) for part, inner in parts.items()}
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def is_list(kind: Any) -> bool:
    """Return whether `kind` is a tuple of any length."""
    return typing.get_origin(kind) is tuple and typing.get_args(kind)[-1] is Ellipsis


def check_output_dir(output_dir: str) -> None:
    """Raise ConfigError unless `output_dir` is an absolute folder or a URL: a job runs in a folder of its own."""
    if "://" not in output_dir and not os.path.isabs(output_dir):
        raise ConfigError(f"output_dir: {output_dir or 'empty'}; give an absolute folder or an s3:// URL")


def _flag_values(arguments: Sequence[str], flag: str) -> list[str]:
    """Return the values of a flag that decides how the other arguments are parsed."""
    pairs = zip(arguments, [*arguments[1:], ""], strict=False)
    values = [argument.partition("=")[2] or following for argument, following in pairs if argument.partition("=")[0] == flag]
    if any(not value or value.startswith("--") for value in values):
        raise _number_problem(flag, [], _ONE_VALUE)
    return values


def _option_value(arguments: Sequence[str], files: Sequence[JsonObject], name: str, default: str) -> str:
    """Return the recipe, or a parameter of it: from its flag, or else from the configuration files.

    Raises:
        ConfigError: they differ, so that the name of the recipe would not belong to the values.
    """
    given = _flag_values(arguments, f"--{name}")[-1:] + [str(values[name]) for values in files if name in values]
    if other := [value for value in given if value != given[0]]:
        raise ConfigError(f"--{name}: {given[0]}, but --config has {other[0]}; leave out one of them")
    return [*given, default][0]


def _normalize(arguments: Sequence[str], fields: FieldTypes, options: Sequence[Option]) -> tuple[list[str], JsonObject]:
    """Return the flags, and the fields of sections that are given as a whole.

    The values of a list become one JSON list, and a boolean flag without a value is true. Raises ConfigError for unknown flags
    and for too few or too many values.
    """
    by_flag = {option.flag: option for option in options}
    flags: list[str] = []
    sections: JsonObject = {}
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        values = [value] if equals else []
        while not equals and rest and not rest[0].startswith("--"):
            values.append(rest.pop(0))
        if not flag.startswith("--"):
            raise ConfigError(f"{one_line(flag, _SHOWN)}: not an option; write --name before a value")
        name = current_name(flag.removeprefix("--"))
        if option := by_flag.get(flag):
            if len(values) != bool(option.metavar):
                raise _number_problem(flag, values, _ONE_VALUE if option.metavar else "this flag has no value")
            flags += ["=".join([flag, *values])] if flag != "--config" else []  # see `_file_values`
        elif name not in fields:
            raise ConfigError(f"{flag}: {no_such_field(name, fields, [each.removeprefix('--') for each in by_flag])}")
        elif dataclasses.is_dataclass(fields[name]):
            sections |= _flat({name: _section_values(flag, fields[name], values)}, fields)
        else:
            flags.append(_typed_argument(f"--{name}", fields[name], values))
    return flags, sections


def _section_values(flag: str, kind: Any, values: list[str]) -> JsonObject:
    """Return the values of a section that is given as a JSON or YAML object."""
    with contextlib.suppress(ValueError):
        if isinstance(inner := load_yaml(" ".join(values)), dict):
            return inner
    raise _section_problem(flag, kind)


def _section_problem(flag: str, kind: Any) -> ConfigError:
    return ConfigError(f"{flag}: this is a section; give a JSON object, or its fields, such as {flag}.{field_names(kind)[0]}")


def _number_problem(flag: str, values: Sequence[str], remedy: str) -> ConfigError:
    return ConfigError(f"{flag}: {one_line(' '.join(values), _SHOWN) if values else 'no value'}: {remedy}")


def _typed_argument(flag: str, kind: Any, values: list[str]) -> str:
    if not values and kind is bool:
        return f"{flag}=true"
    members = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    if kind is int or int in typing.get_args(kind):
        values = [_plain_integer(value) for value in values]
    takes_list = is_list(kind) or (len(values) > 1 and any(typing.get_origin(member) is tuple for member in members))
    if values and takes_list and not (len(values) == 1 and values[0].startswith("[")):
        texts = str in typing.get_args(kind)
        return f"{flag}={json.dumps(values) if texts else '[' + ','.join(values) + ']'}"
    if len(values) != 1:
        raise _number_problem(flag, values, _ONE_VALUE)
    return f"{flag}={values[0]}"


def _plain_integer(text: str) -> str:
    """Return an integer in scientific notation, such as 1e3, in digits; any other text as it is."""
    if re.fullmatch(r"\d+(\.\d*)?[eE]\+?\d{1,2}", text) and (value := Decimal(text)) == int(value):
        return str(int(value))
    return text


@contextlib.contextmanager
def _one_line_errors(prefix: str = "") -> Iterator[None]:
    """Turn the errors of a configuration's own checks into ConfigErrors of one line."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"{prefix}{one_line(error)}") from error


def _file_values(
    files: Mapping[str, JsonObject], fields: FieldTypes, options: list[str], switches: set[str], defaults: JsonObject
) -> tuple[JsonObject, bool]:
    """Return the fields and options that the files set, by dotted name, and whether one of the files is a complete saved
    configuration. A later file replaces values of an earlier one.

    They are the fields of a saved config.yaml that still exist. In any other file, all fields must exist.
    """
    result: JsonObject = {}
    has_complete = False
    for path, values in files.items():
        # Only this parser writes the version to a file and, before that, a complete one with options such as `recipe`.
        is_complete = _is_complete(values, defaults)
        is_saved = VERSION_KEY in values or bool(is_complete and values.keys() & set(options))
        sections = {name for name, value in values.items() if isinstance(value, dict)}
        foreign = sections - fields.keys()
        if len(foreign) > len(sections) / 2 or (foreign and not is_saved):
            raise ConfigError(f"--config: {path}: {min(foreign)} is not a section of this command; give a config.yaml of it")
        unknown: list[str] = []
        with _one_line_errors(f"--config: {path}: "):
            if is_saved:
                current = read_saved(values, fields, path, options)
            else:
                current, unknown = known_fields(with_current_names(values), fields, set(options) - switches)
        if unknown:
            raise ConfigError(f"--config: {path}: {unknown[0]}: {no_such_field(unknown[0], fields, set(options) - switches)}")
        has_complete = has_complete or (is_saved and is_complete)
        current = {name: value for name, value in current.items() if name not in switches}  # a dry run saves `dry_run: true`
        try:
            result |= _flat(current, fields, options)
        except ConfigError as error:
            raise ConfigError(f"--config: {path}: {error}") from None
    return result, has_complete


def _is_complete(values: JsonObject, defaults: JsonObject) -> bool:
    """Return whether a file has most fields, as a saved configuration has. One with fewer was written by hand."""
    return num_values(values) > num_values(defaults) / 3
