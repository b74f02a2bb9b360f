"""Recipes: functions that return a complete configuration. A recipe is one function and its entry in `RECIPES`.

The type that a recipe returns decides which command it belongs to: PretrainConfig to `diffdis pretrain`, SweepConfig to
`diffdis sweep`, CompareConfig to `diffdis compare`. The parameters of a recipe become options of the command.
"""

import dataclasses
import logging
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from diffdis.config import ObjectiveConfig, sd_v1
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SweepConfig
from diffdis_platform.recipes.demo import demo, demo_compare, demo_sweep
from ray_platform.data.config import DataConfig
from ray_platform.train.config import TrainConfig

logger = logging.getLogger(__name__)

# --- The paper's size on LAION-style shards: Stable Diffusion v1's U-Net warm-started, CLIP ViT-L/14's text encoder -------------


def sd_v1_laion() -> PretrainConfig:
    """The paper's model with the one-way mask. Set data.sources, and model.warm_start to a Stable Diffusion folder.

    The noise of the text query and lambda are those with which the demo does not learn the shortcut (docs/method.md).
    """
    return PretrainConfig(
        model=sd_v1(encoder_dtype="float16"),
        objective=ObjectiveConfig(lambda_alignment=0.02, num_draws=4, query_timestep_min=250),
        data=DataConfig(image_size=512),
        train=TrainConfig(
            num_workers=8,
            gpus_per_worker=1,
            cpus_per_worker=4,
            micro_batch_size=24,  # fits an 80 GB GPU, which then does not wait for its host: docs/sizing.md
            precision="bf16",
            # The optimizer's states fit a GPU of 80 GB, and a step costs the host a third less than under ZeRO 2: docs/sizing.md.
            zero_stage=0,
            warmup_steps=1000,
            lr_schedule="constant",
            ema_decay=0.9999,
        ),
    )


def sd_v1_laion_joint_mask() -> PretrainConfig:
    """The same with the paper's mask, under which image tokens attend to the query: one draw, and K steps cost K passes."""
    base = sd_v1_laion()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, query_visibility="joint"),
        objective=dataclasses.replace(base.objective, num_draws=1),
    )


def sd_v1_laion_one_way() -> PretrainConfig:
    """Deprecated: the same as sd_v1_laion."""
    logger.warning("the recipe sd_v1_laion_one_way is deprecated; use sd_v1_laion")
    return sd_v1_laion()


def sd_v1_laion_sweep() -> SweepConfig:
    """Return the sweep at the paper's size, with the one-way mask.

    Set the fields of sd_v1_laion, evaluation.data_roots and evaluation.quality.
    """
    base = sd_v1_laion()
    return SweepConfig(
        pretrain=base,
        evaluation=EvalConfig(gpus_per_worker=1.0, quality=QualityConfig(num_images=10_000)),
        samples=2_000_000,
        num_trials=16,
    )


# --- The table of recipes -------------------------------------------------------------------------------------------------------

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
