"""Start a training from existing weights: Stable Diffusion's U-Net, or a model that DiffDis exported."""

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from diffdis.config import DiffDisConfig, ScheduleConfig, TextEncoderConfig, UNetConfig, resolve_encoder_paths
from diffdis.model import DiffDis
from diffdis.pretrained import component_folder, load_component, local_folder, named_field, read_config
from diffdis.text_encoder import text_encoder_widths

logger = logging.getLogger(__name__)

ALIGNMENT_WEIGHTS = "alignment/model.safetensors"  # in an export, not in a Stable Diffusion folder


@dataclass(frozen=True)
class WarmStartReport:
    """Which tensors a warm start loaded."""

    path: str
    # Each by name, with the number of elements.
    loaded: dict[str, int]  # tensors of the model
    new: dict[str, int]  # tensors of the model that the folder does not have: newly initialized
    ignored: dict[str, int]  # tensors of the folder that the model does not have

    def summary(self) -> dict[str, Any]:
        """Return the counts of tensors and elements by part of the model, and the names of the ignored tensors."""
        return {"path": self.path, "loaded": _by_part(self.loaded), "new": _by_part(self.new), "ignored": list(self.ignored)}


def resolve_pretrained(config: DiffDisConfig) -> DiffDisConfig:
    """Complete a configuration from the folders that it names: the U-Net, the noise schedule and the widths of the text encoder.

    Fields of the schedule that differ from the folder stay, and are logged. Equal results on every rank, and idempotent.

    Raises:
        FileNotFoundError: a folder is missing.
        ValueError: a folder contains another kind of model, or a field contradicts it.
    """
    if config.warm_start:
        with named_field("model.warm_start"):
            check_supported(local_folder(config.warm_start))
            folder = component_folder(config.warm_start, "unet")
    config = resolve_encoder_paths(config)
    if config.text_encoder.path:
        with named_field("model.text_encoder.path"):
            config = dataclasses.replace(config, text_encoder=_resolve_text_encoder(config.text_encoder))
    if not config.warm_start:
        return config
    with named_field("model.warm_start"):
        values = read_config(folder)
        _check_unet(config, folder, values)
        scheduler = read_config(local_folder(config.warm_start) / "scheduler", "scheduler_config.json")
        schedule = _resolve_schedule(config.schedule, scheduler, config.warm_start)
        return dataclasses.replace(config, unet=_resolve_unet(config, folder, values), schedule=schedule)


def _resolve_text_encoder(config: TextEncoderConfig) -> TextEncoderConfig:
    default = TextEncoderConfig()
    if config.kind != "clip" or (config.token_dim, config.embedding_dim) != (default.token_dim, default.embedding_dim):
        return config
    token_dim, embedding_dim = text_encoder_widths(config)
    return dataclasses.replace(config, token_dim=token_dim, embedding_dim=embedding_dim)


def _resolve_unet(config: DiffDisConfig, folder: Path, values: dict[str, Any]) -> UNetConfig:
    """Return the U-Net that a folder's config.json describes, at the size of `config.image_size`."""
    known = {field.name for field in dataclasses.fields(UNetConfig)} - {"options"}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    default = UNetConfig()
    sample_size = config.unet.sample_size
    if config.autoencoder.kind == "kl" and config.autoencoder.path:
        vae = read_config(component_folder(config.autoencoder.path, "vae"))
        sample_size = config.image_size // 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
        if (channels := vae.get("latent_channels", 4)) != given.get("in_channels", 4):
            raise ValueError(
                f"model.autoencoder.path: its latents have {channels} channels, but the U-Net of {folder} takes "
                f"{given.get('in_channels', 4)}; use the autoencoder of the same model"
            )
    if isinstance(native := given.get("sample_size"), int) and native != sample_size:
        logger.warning(
            "model.image_size: %d px, latents of %d; the U-Net of %s was trained with latents of %d",
            *(config.image_size, sample_size, folder, native),
        )
    fields: dict[str, Any] = {name: given[name] for name in known & given.keys()} | {"sample_size": sample_size}
    for name in sorted(known & given.keys() - {"sample_size"}):
        chosen = getattr(config.unet, name)
        if chosen not in (getattr(default, name), given[name]):
            raise ValueError(f"model.unet.{name}: {chosen}, but {folder} has {given[name]}; leave the field out")
    ignored = {*known, "out_channels", "cross_attention_dim"}
    options = {name: value for name, value in values.items() if name not in ignored and not name.startswith("_")}
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    options = {name: value for name, value in options.items() if name in signature and value != signature[name].default}
    return UNetConfig(**fields, options=options)


def _resolve_schedule(config: ScheduleConfig, values: dict[str, Any], path: str) -> ScheduleConfig:
    """Return the noise schedule of a folder's scheduler_config.json, with the fields that differ from our defaults instead."""
    if not values:
        return config
    if values.get("beta_schedule") not in ("scaled_linear", "linear") or values.get("trained_betas"):
        raise ValueError(
            f"{path}: its scheduler has beta_schedule {values.get('beta_schedule')}, not scaled_linear or linear; "
            "give a Stable Diffusion v1 or v2"
        )
    names = {
        "num_timesteps": "num_train_timesteps",
        "zero_terminal_snr": "rescale_betas_zero_snr",
        **{name: name for name in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing")},
    }
    stored = {name: values[theirs] for name, theirs in names.items() if theirs in values}
    if stored.get("timestep_spacing") == "linspace":  # of some schedulers, which DDIM is not used with
        del stored["timestep_spacing"]
    if (predicted := stored.get("prediction_type", "epsilon")) not in ("epsilon", "v_prediction", "sample"):
        raise ValueError(f"{path}: its scheduler has prediction_type {predicted}; give epsilon, v_prediction or sample")
    default = ScheduleConfig()
    for name in [name for name in stored if getattr(config, name) not in (getattr(default, name), stored[name])]:
        logger.warning("model.schedule.%s: %s instead of %s of %s", name, getattr(config, name), stored.pop(name), path)
    return dataclasses.replace(config, **stored)


def check_supported(root: Path) -> None:
    """Raise ValueError, with what it is, for a model that is not a Stable Diffusion v1 or v2 for text to image."""
    pipeline = str(read_config(root, "model_index.json").get("_class_name", ""))
    unet = read_config(root / "unet") or read_config(root)
    scheduler = str(read_config(root / "scheduler", "scheduler_config.json").get("_class_name", ""))
    name = ""
    if (root / "transformer").is_dir() or "Transformer" in str(unet.get("_class_name", "")):
        transformer = str((read_config(root / "transformer") or unet).get("_class_name", pipeline))
        kinds = {"SD3": "Stable Diffusion 3", "StableDiffusion3": "Stable Diffusion 3", "Flux": "Flux"}
        name = next((kind for prefix, kind in kinds.items() if transformer.startswith(prefix)), transformer)
    elif unet.get("addition_embed_type") or "XL" in pipeline or (root / "text_encoder_2").is_dir():
        name = "Stable Diffusion XL"
    elif unet.get("time_cond_proj_dim") or "LatentConsistency" in pipeline or scheduler == "LCMScheduler":
        name = "a latent consistency model (LCM)"
    elif unet.get("in_channels") == 9:
        name = "an inpainting model"
    elif unet.get("class_embed_type") or unet.get("num_class_embeds"):
        name = "a model with class embeddings, such as an upscaler or unCLIP"
    elif unet.get("in_channels") == 8:
        name = "a model of image edits, such as InstructPix2Pix"
    if name:
        raise ValueError(f"{root}: is {name}; give a Stable Diffusion v1 or v2 for text to image")


# Arguments of UNet2DConditionModel that `image_features` does not implement: they must have diffusers' default.
_UNSUPPORTED = (
    *("center_input_sample", "mid_block_type", "only_cross_attention", "dual_cross_attention", "encoder_hid_dim"),
    *("encoder_hid_dim_type", "class_embed_type", "addition_embed_type", "addition_time_embed_dim", "num_class_embeds"),
    *("time_cond_proj_dim", "projection_class_embeddings_input_dim", "attention_type", "mid_block_only_cross_attention"),
    *("cross_attention_norm", "reverse_transformer_layers_per_block"),
)


def _check_unet(config: DiffDisConfig, folder: Path, values: dict[str, Any]) -> None:
    """Raise ValueError for a U-Net with parts that the alignment pass does not have, or for token states of another width."""
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    for name in _UNSUPPORTED:
        if values.get(name, signature[name].default) not in (signature[name].default, [], {}):
            raise ValueError(
                f"{folder}: {name} is {values[name]}, which is not supported; give a Stable Diffusion v1 or v2 for text to image"
            )
    if (width := values.get("cross_attention_dim", 1280)) != config.text_encoder.token_dim:
        raise ValueError(
            f"model.text_encoder: its token states have {config.text_encoder.token_dim} numbers, but the U-Net of {folder} takes "
            f"{width}; use the text encoder of the same model"
        )


def load_warm_start(model: DiffDis, path: str) -> WarmStartReport:
    """Copy the U-Net of `path/unet` (or of `path`, or of a repository of the hub) into the model; from a folder that DiffDis
    exported, also the other parts that the model has.

    Raises ValueError with the first tensor of the U-Net that differs: a partly loaded U-Net would be a different model.
    """
    folder = component_folder(path, "unet")
    source = {f"unet.{name}": tensor for name, tensor in load_component(UNet2DConditionModel, folder).state_dict().items()}
    if (others := local_folder(path) / ALIGNMENT_WEIGHTS).exists():
        source |= load_file(others)
    target = model.state_dict()
    check_same_unet({n: tuple(v.shape) for n, v in source.items()}, {n: tuple(v.shape) for n, v in target.items()}, path)
    shared = sorted(source.keys() & target.keys())
    model.load_state_dict({name: source[name] for name in shared}, strict=False)
    new, ignored = sorted(target.keys() - source), sorted(source.keys() - target)
    return WarmStartReport(path, _sizes(target, shared), _sizes(target, new), _sizes(source, ignored))


def check_same_unet(source: Mapping[str, tuple[int, ...]], target: Mapping[str, tuple[int, ...]], path: str) -> None:
    """Raise ValueError with the first tensor that differs between the shapes of a folder and those of the model."""
    differing = {name for name in source.keys() ^ target.keys() if name.startswith("unet.")}
    for name in sorted(differing):
        where = "the configured U-Net" if name in source else path
        raise ValueError(
            f"model.warm_start: {where} has no tensor {name.removeprefix('unet.')}; model.unet must describe the U-Net of {path}"
        )
    for name in sorted(source.keys() & target.keys()):
        if source[name] != target[name]:
            raise ValueError(
                f"model.warm_start: {name.removeprefix('unet.')} is {source[name]} in {path}, "
                f"{target[name]} in the configured model"
            )


def _sizes(tensors: Mapping[str, torch.Tensor], names: list[str]) -> dict[str, int]:
    return {name: tensors[name].numel() for name in names}


def _by_part(sizes: dict[str, int]) -> dict[str, dict[str, int]]:
    parts: dict[str, dict[str, int]] = {}
    for name, size in sizes.items():
        count = parts.setdefault(name.partition(".")[0], {"tensors": 0, "parameters": 0})
        count["tensors"] += 1
        count["parameters"] += size
    return parts
