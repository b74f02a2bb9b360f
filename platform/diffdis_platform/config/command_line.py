"""From a recipe's name and overrides to a typed configuration: `--recipe demo --train.lr_schedule constant`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffdis_platform.config.arguments import Parser, early, resolve
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.recipes.demo import demo
from diffdis_platform.recipes.sd_v1_laion import sd_v1_laion, sd_v1_laion_one_way
from ray_platform.contracts import ConfigError

RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    recipe.__name__: recipe for recipe in (demo, sd_v1_laion, sd_v1_laion_one_way)
}


@dataclass(frozen=True)
class CommandLine:
    recipe: str
    dry_run: bool
    config: PretrainConfig
    yaml: str  # the resolved configuration: `--config` starts from it again


def parse(arguments: Sequence[str]) -> CommandLine:
    """Raises ConfigError, in one line, for a recipe, field or value that does not exist."""
    arguments = _spelled_out(arguments)
    name = recipe_name(arguments, RECIPES)
    parser = Parser(prog="jobs/pretrain.py", description=f"Pretrain DiffDis. Recipes: {', '.join(RECIPES)}.")
    parser.add_argument("--recipe", default=name, help="the configuration to start from")
    parser.add_argument("--config", action="config", help="a saved config.yaml to start from")
    parser.add_argument("--dry-run", action="store_true", help="check config, data and workers; print what would run")
    parser.add_class_arguments(PretrainConfig, default=RECIPES[name]())
    built, yaml = resolve(parser, arguments)
    fields = {name: getattr(built, name) for name in PretrainConfig.__dataclass_fields__}
    return CommandLine(built.recipe, built.dry_run, PretrainConfig(**fields), yaml)


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """`--resume auto` and `--profile` stand for the fields of `train`."""
    return [
        "--train.profile=true" if a == "--profile" else a.replace("--resume", "--train.resume", 1) if a[:8] == "--resume" else a
        for a in arguments
    ]


def recipe_name(arguments: Sequence[str], recipes: Mapping[str, Any]) -> str:
    """The one of `recipes` that `arguments` ask for, else the first. Raises ConfigError for one that does not exist."""
    name = early(arguments, "--recipe", next(iter(recipes)))
    if name not in recipes:
        raise ConfigError(f"--recipe {name}: no such recipe; there are {', '.join(recipes)}")
    return name
