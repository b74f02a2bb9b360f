"""From a command line to typed configurations: `--data.sources s3://bucket/folder`. Shared by the jobs."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ray_platform.contracts import ConfigError, one_line
from ray_platform.redaction import is_redacted, redacted_values

LISTS = (
    "data.sources", "train.heldout_sources", "objective.freeze", "preview_captions", "captions", "data_roots", "baselines",
    "quality.networks", "quality.guidance_scales", "arms",
)  # fmt: skip
LARGEST_CONFIG = 2**20  # bytes
MOST_VALUES = 100_000  # of a configuration, with all that its YAML aliases stand for
_S3_CREDENTIALS = re.compile(r"s3a?://[^/]*@")

# A configuration may come from others, and `class_path: some.module` in it would import that.
set_parsing_settings(instantiate_subclass_spec_in_any=False, import_path_denylist=["*"])


class Parser(ArgumentParser):
    """Whatever it refuses is a ConfigError of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(one_line(message))


def resolve(parser: Parser, arguments: Sequence[str]) -> tuple[Namespace, str]:
    """(the instantiated values, the same as YAML without secrets). Raises ConfigError, in one line, for a field or value that
    does not exist, a configuration that is none, and a secret that a saved configuration does not have."""
    arguments = _as_lists(arguments)
    _check_fields(parser, arguments)
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.partition("=")[0] == "--config":
            _check_config(Path(argument.partition("=")[2] or following))
    try:
        values = parser.parse_args(arguments)
    except ImportError as error:  # what a class_path names
        raise ConfigError(one_line(error)) from None
    text = parser.dump(values.clone(with_meta=False), skip_none=False)
    plain = yaml.safe_load(text)
    _check_secrets(plain)
    if (public := redacted_values(plain)) != plain:
        text = yaml.safe_dump(public, sort_keys=False)
    try:
        return parser.instantiate(values), text
    except ValueError as error:  # what a config's own checks say
        raise ConfigError(one_line(error)) from error


def early(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of `flag`, on which depends what the others are parsed from."""
    found = default
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):  # there may be none at all
        if argument == flag or argument.startswith(f"{flag}="):
            found = argument.partition("=")[2] or following
    return found


def _as_lists(arguments: Sequence[str]) -> list[str]:
    """One plain value stands for a list of one: `--data.sources s3://bucket/folder`."""
    plain = list(arguments)
    for i, flag in enumerate(plain[:-1]):
        if flag.startswith("--") and is_list(flag[2:]) and not plain[i + 1].startswith("["):
            plain[i + 1] = json.dumps([plain[i + 1]])
    return plain


def is_list(field: str) -> bool:
    """Whether one plain value may stand for a list of one; `field` may be another one's part, as in `pretrain.data.sources`."""
    return any(field == name or field.endswith(f".{name}") for name in LISTS)


def _check_fields(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """A misspelt field is an error that offers the nearest one."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag.rstrip("+") not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            raise ConfigError(f"{flag}: no such field" + (f"; did you mean {near[0]}?" if near else "; see --help"))


def _check_config(path: Path) -> None:
    """That a file is YAML of a size that a configuration can have, before anything is built of it."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_CONFIG + 1)
    except OSError as error:
        raise ConfigError(f"--config: {path}: {error.strerror}; give a saved config.yaml") from None
    if len(content) > LARGEST_CONFIG:
        raise ConfigError(f"--config: {path} has more than {LARGEST_CONFIG:,} bytes: it is no configuration")
    try:
        values = _num_values(yaml.compose(content, yaml.SafeLoader), {})
    except (yaml.YAMLError, UnicodeError, RecursionError) as error:
        what = one_line(error)
        raise ConfigError(f"--config: {path} is no YAML that can be read ({what}); give a saved config.yaml") from None
    if values > MOST_VALUES:
        raise ConfigError(f"--config: {path} stands for more than {MOST_VALUES:,} values: its aliases multiply; write them out")


def _num_values(node: Any, known: dict[int, int]) -> int:
    """In a YAML node, aliases counted as what they stand for; a node within itself is endless."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is known
        inner: list[Any] = []
        if isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_num_values(part, known) for part in inner)
    return known[id(node)]


def _check_secrets(plain: Mapping[str, Any]) -> None:
    """Those that were left out when the configuration was saved must be given again; those of S3 have another place."""
    for field, value in _texts(plain):
        if is_redacted(value):
            raise ConfigError(f"--{field}: a secret in it was not saved with the configuration; give this field again")
        if _S3_CREDENTIALS.match(value):
            raise ConfigError(
                f"{field}: a URL holds credentials (before an @); leave them out, and set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY"
            )


def _texts(value: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """(dotted field, text) of all texts in a configuration; those of a list have the list's field."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts(inner, f"{field}.{name}" if field else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, field)
    elif isinstance(value, str):
        yield field, value
