"""Check of a training's model and weights on the driver, in seconds and without the memory that they take."""

import dataclasses
from typing import Any

import torch
from safetensors import safe_open

from diffdis.config import DiffDisConfig, ObjectiveConfig
from diffdis.feature_networks import build_feature_network
from diffdis.model import DiffDis
from diffdis.objective import Objective
from diffdis.pretrained import component_folder, describe_weights, local_folder, named_field
from diffdis.schedule import check_terminal_weight
from diffdis.text_encoder import describe_text_encoder
from diffdis.warm_start import ALIGNMENT_WEIGHTS, check_same_unet, resolve_pretrained


def describe_training(config: DiffDisConfig, objective: ObjectiveConfig) -> dict[str, Any]:
    """Open all weights and build the model, both without values, and return what the weights are, by field.

    Raises:
        FileNotFoundError: weights are missing.
        ValueError: weights cannot be used or do not fit the model, or two fields contradict each other.
    """
    config = dataclasses.replace(resolve_pretrained(config), trained_for=objective.task)
    check_terminal_weight(config.schedule, objective)  # only of a new training: earlier checkpoints remain exportable
    weights = {}
    if config.autoencoder.kind == "kl":
        with named_field("model.autoencoder.path"):
            weights["model.autoencoder.path"] = describe_weights(component_folder(config.autoencoder.path, "vae"))
    with named_field("model.text_encoder.path"):
        weights["model.text_encoder.path"] = describe_text_encoder(config.text_encoder)
    num_image_features = 0
    if objective.repa_weight:
        with named_field("objective.repa_network"):
            num_image_features = build_feature_network(objective.repa_network).width
    with torch.device("meta"):
        model = DiffDis(config, objective.temperature)
        model_shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}  # before adapters are added
        Objective(model, objective, num_image_features).freeze()
    if config.warm_start:
        with named_field("model.warm_start"):
            unet = describe_weights(component_folder(config.warm_start, "unet"))
            shapes = {f"unet.{name}": shape for name, shape in unet.shapes.items()} | _alignment_shapes(config.warm_start)
            check_same_unet(shapes, model_shapes, config.warm_start)
            weights["model.warm_start"] = unet
    return {field: described.summary() for field, described in weights.items()}


def _alignment_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parts besides the U-Net in a model that DiffDis exported; empty for other folders."""
    file = local_folder(path) / ALIGNMENT_WEIGHTS
    if not file.exists():
        return {}
    with safe_open(file, "pt") as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
