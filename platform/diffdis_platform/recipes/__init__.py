"""Recipes: functions that return a complete configuration. A recipe is one function and its entry in `RECIPES`.

The type that a recipe returns decides which command it belongs to: PretrainConfig to `diffdis pretrain`, SweepConfig to
`diffdis sweep`, CompareConfig to `diffdis compare`. The parameters of a recipe become options of the command.
"""

import typing
from collections.abc import Callable
from typing import Any, TypeVar

from diffdis_platform.recipes.demo import demo, demo_compare, demo_sweep
from diffdis_platform.recipes.sd_v1_laion import sd_v1_laion, sd_v1_laion_joint_mask, sd_v1_laion_one_way, sd_v1_laion_sweep

RecipeConfig = TypeVar("RecipeConfig")

# The first recipe of a command is its default.
RECIPES: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "sd_v1_laion": sd_v1_laion,
    "sd_v1_laion_joint_mask": sd_v1_laion_joint_mask,
    "sd_v1_laion_one_way": sd_v1_laion_one_way,
    "demo_sweep": demo_sweep,
    "sd_v1_laion_sweep": sd_v1_laion_sweep,
    "demo_compare": demo_compare,
}


def recipes_of(config_class: type[RecipeConfig]) -> dict[str, Callable[..., RecipeConfig]]:
    """Return the recipes that return a `config_class`, by name."""
    return {name: recipe for name, recipe in RECIPES.items() if typing.get_type_hints(recipe)["return"] is config_class}
