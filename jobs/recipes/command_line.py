"""From a recipe's name and overrides to a typed configuration: `--recipe demo --train.lr_schedule constant`."""

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from jsonargparse import ArgumentParser

from ray_platform.contracts import ConfigError
from recipes.config import PretrainConfig
from recipes.demo import demo
from recipes.sd_v1_laion import sd_v1_laion, sd_v1_laion_one_way

RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe for recipe in (demo, sd_v1_laion, sd_v1_laion_one_way)
}


LISTS = ("--data.sources", "--preview_captions")


@dataclass(frozen=True)
class CommandLine:
    recipe: str
    dry_run: bool
    config: PretrainConfig
    yaml: str  # the resolved configuration: `--config` starts from it again


class _Parser(ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigError(" ".join(message.split()))


def parse(arguments: Sequence[str]) -> CommandLine:
    """Raises ConfigError, in one line, for a recipe, field or value that does not exist."""
    name, arguments = _recipe_name(arguments), _as_lists(arguments)
    parser = _Parser(prog="jobs/pretrain.py", description=f"Pretrain DiffDis. Recipes: {', '.join(RECIPES)}.")
    parser.add_argument("--recipe", default=name, help="the configuration to start from")
    parser.add_argument("--config", action="config", help="a saved config.yaml to start from")
    parser.add_argument("--dry-run", action="store_true", help="check config, data and workers; print what would run")
    parser.add_class_arguments(PretrainConfig, default=RECIPES[name]())
    _check_fields(parser, arguments)
    values = parser.parse_args(list(arguments))
    yaml = parser.dump(values.clone(with_meta=False), skip_none=False)
    try:
        built = parser.instantiate(values)
    except ValueError as error:  # what a config's own checks say
        raise ConfigError(" ".join(str(error).split())) from error
    fields = {name: getattr(built, name) for name in PretrainConfig.__dataclass_fields__}
    return CommandLine(built.recipe, built.dry_run, PretrainConfig(**fields), yaml)


def _recipe_name(arguments: Sequence[str]) -> str:
    name = "demo"
    for flag, value in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag == "--recipe" or flag.startswith("--recipe="):
            name = flag.partition("=")[2] or value
    if name not in RECIPES:
        raise ConfigError(f"--recipe {name}: no such recipe; there are {', '.join(RECIPES)}")
    return name


def _as_lists(arguments: Sequence[str]) -> list[str]:
    """One plain value stands for a list of one: `--data.sources s3://bucket/folder`."""
    plain = list(arguments)
    for i, flag in enumerate(plain[:-1]):
        if flag in LISTS and not plain[i + 1].startswith("["):
            plain[i + 1] = json.dumps([plain[i + 1]])
    return plain


def _check_fields(parser: ArgumentParser, arguments: Sequence[str]) -> None:
    """A misspelt field is an error that offers the nearest one."""
    known = [option for action in parser._actions for option in action.option_strings]
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag.rstrip("+") not in known:
            near = difflib.get_close_matches(flag, known, n=1, cutoff=0.5)
            raise ConfigError(f"{flag}: no such field" + (f"; did you mean {near[0]}?" if near else "; see --help"))
