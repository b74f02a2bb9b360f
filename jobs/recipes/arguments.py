"""From a command line to typed configurations: `--data.sources s3://bucket/folder`. Shared by the jobs."""

import difflib
import json
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace

from ray_platform.contracts import ConfigError

LISTS = (
    "data.sources", "train.heldout_sources", "objective.freeze", "preview_captions", "captions", "data_roots", "baselines",
    "quality.networks", "quality.guidance_scales", "arms",
)  # fmt: skip


class Parser(ArgumentParser):
    """Whatever it refuses is a ConfigError of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(" ".join(message.split()))


def resolve(parser: Parser, arguments: Sequence[str]) -> tuple[Namespace, str]:
    """(the instantiated values, the same as YAML). Raises ConfigError, in one line, for a field or value that does not exist."""
    arguments = _as_lists(arguments)
    _check_fields(parser, arguments)
    values = parser.parse_args(arguments)
    yaml = parser.dump(values.clone(with_meta=False), skip_none=False)
    try:
        return parser.instantiate(values), yaml
    except ValueError as error:  # what a config's own checks say
        raise ConfigError(" ".join(str(error).split())) from error


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
