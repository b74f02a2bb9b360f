"""Operations, parameters and bytes of a run, counted without running it.

The real modules run on torch's fake tensors, which have shapes and no contents: Stable Diffusion takes seconds and no memory.
Fake tensors and dispatch modes are private or experimental APIs of torch; only this module uses them.
"""

import functools
import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, CLIPTextConfig, CLIPTextModelWithProjection

from diffdis.config import AutoencoderConfig, DiffDisConfig, ObjectiveConfig, TextEncoderConfig
from diffdis.encoder import PRECOMPUTED
from diffdis.feature_networks import build_feature_network
from diffdis.model import DiffDis
from diffdis.objective import Objective
from diffdis.pretrained import component_folder, named_field, read_config
from diffdis.step_records import StepNoise
from diffdis.warm_start import resolve_pretrained
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.cached_folders import with_cached_folders
from ray_platform.contracts import ConfigError, one_line
from ray_platform.train.profiling import count_flops, operation_counter

HALF = 2  # bytes of a number
# Operations besides views that launch no kernel on an accelerator.
_NO_KERNEL = {
    f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view",
                                 "lift_fresh", "_local_scalar_dense", "is_same_size", "set_", "resize_")
}  # fmt: skip


@dataclass(frozen=True)
class Encoders:
    """Counts of the frozen autoencoder and text encoder, which compute the inputs."""

    parameters: int
    weight_bytes: int  # in `model.encoder_dtype`
    autoencoder_flops: float  # per sample, forward
    text_encoder_flops: float
    peak_bytes: int  # of one micro-batch, in addition to the parameters
    image_network_flops: float = 0.0  # of objective.repa_network, whose weights and memory are not counted

    @property
    def flops(self) -> float:
        return self.autoencoder_flops + self.text_encoder_flops + self.image_network_flops


@dataclass(frozen=True)
class Counts:
    """Counts of a model on one rank."""

    trained: int  # parameters
    frozen: int
    num_tensors: int  # trained
    launches: int  # of kernels, by the forward and backward pass of one micro-batch
    flops: float  # per sample, forward and backward, as train/flops_per_second counts them
    executed_flops: float  # per sample, including recomputed activations, gradient caching and logged values
    activation_bytes: int  # peak of one micro-batch, in addition to weights, their gradients and optimizer states
    row_bytes: int  # of a precomputed sample, without key and caption
    embedding_dim: int
    encoders: Encoders


def count(config: PretrainConfig, num_micro_batches: int = 1) -> Counts:
    """Return the counts of a run with `num_micro_batches` per step. Raises ConfigError for a model that cannot be built."""
    train = config.train
    half, again = train.precision != "fp32", train.activation_checkpointing
    try:
        model = resolve_pretrained(config.model) if Path(config.model.warm_start or "-").exists() else config.model
        return _count(model, config.objective, train.micro_batch_size, half, again, num_micro_batches > 1)
    except (ValueError, OSError) as error:
        raise ConfigError(one_line(error)) from error


class CountedObjective(Objective):
    """Objective with the mean number of recognizable noisy images in each step: fake tensors have no values to count them by."""

    def recognizable_rows(self, noise: StepNoise) -> torch.Tensor:
        fraction = min(1.0, self.objective.noised_alignment_limit / self.model.config.schedule.num_timesteps)
        return torch.arange(round(len(noise.timesteps) * self.objective.caption_dropout * fraction))


@functools.lru_cache(maxsize=8)
def _count(model: DiffDisConfig, objective: ObjectiveConfig, size: int, half: bool, again: bool, accumulating: bool) -> Counts:
    """Count for micro-batches of `size`, `half` precision, activations computed `again`, and several micro-batches per step."""
    width, network_flops = 0, 0
    if objective.repa_weight:
        with named_field("objective.repa_network"):
            network = with_cached_folders(build_feature_network, objective.repa_network)
        with operation_counter() as counter:  # of one real image: this network need not work with fake tensors
            width = network.width
        network_flops = counter.get_total_flops()
    with torch.device("meta"):  # peft moves adapters to a device, which parameters that are fake tensors refuse
        module = CountedObjective(DiffDis(replace(model, trained_for=objective.task)), objective, width)
    module.freeze()
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True):  # sizes that depend on data become symbols
        module.to_empty(device="cpu")
        counts = _count_module(module, width, size, half, again, accumulating)
    return replace(counts, encoders=replace(counts.encoders, image_network_flops=network_flops))


def _count_module(module: Objective, num_image_features: int, size: int, half: bool, again: bool, accumulating: bool) -> Counts:
    model, objective = module.model.config, module.objective
    inputs = functools.partial(_inputs, model, num_image_features=num_image_features)
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    flops = count_flops(module, inputs(2), seed=0) / 2  # two samples, as the trainer counts
    if again:
        module.enable_activation_checkpointing()
    executed, launches, peak = measure_step(module, inputs(size), half)
    if objective.negatives == "step" and objective.task != "generation" and accumulating:
        with torch.no_grad():
            more, more_launches, _ = _measure(module, (), lambda: module.predict_queries(inputs(size), 0))
        executed, launches = executed + more, launches + more_launches
    row = inputs(1)
    return Counts(
        trained=sum(trained),
        frozen=sum(p.numel() for p in module.parameters()) - sum(trained),
        num_tensors=len(trained),
        launches=launches,
        flops=flops,
        executed_flops=executed / size,
        activation_bytes=peak,
        row_bytes=sum(HALF * row[name].numel() for name in PRECOMPUTED),
        embedding_dim=model.text_encoder.embedding_dim,
        encoders=_encoders(model, size),
    )


def _inputs(config: DiffDisConfig, size: int, num_image_features: int) -> dict[str, torch.Tensor]:
    """Return tensors with the shapes that `DiffDisTask.inputs` returns."""
    unet, text = config.unet, config.text_encoder
    image_features = {"image_features": torch.randn(size, num_image_features)} if num_image_features else {}
    return image_features | {
        "latent": torch.randn(size, unet.in_channels, unet.sample_size, unet.sample_size),
        "token_states": torch.randn(size, text.max_length, text.token_dim),
        "query": torch.randn(size, text.embedding_dim),
        "caption_ids": torch.zeros(size, dtype=torch.long),
        "null_states": torch.randn(1, text.max_length, text.token_dim),
    }


def measure_step(module: Objective, inputs: dict[str, torch.Tensor], half: bool) -> tuple[int, int, int]:
    """Return operations, launches and peak bytes of the forward and backward pass of one micro-batch, in training mode.

    The gradients of weights are dropped immediately, because they are counted with the optimizer states.
    """
    for name, parameter in module.named_parameters() if half else ():  # as ray_platform.train.engine.convert_weights does
        if not name.startswith(("model.temperature.", "alignment.")):
            parameter.data = parameter.data.to(torch.bfloat16)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step() -> None:
        module(inputs, 0)[0].backward()

    return _measure(module, inputs.values(), step)


def _encoders(config: DiffDisConfig, size: int) -> Encoders:
    autoencoder, text_encoder = _autoencoder(config.autoencoder), _text_encoder(config.text_encoder)
    dtype = getattr(torch, config.encoder_dtype)
    for module in filter(None, (autoencoder, text_encoder)):
        for parameter in module.parameters():  # fake parameters refuse Module.to
            parameter.data = parameter.data.to(dtype)
    pixels = torch.randn(size, 3, config.image_size, config.image_size, dtype=dtype)
    ids = torch.zeros(size, config.text_encoder.max_length, dtype=torch.long)
    image_flops, image_bytes, parameters = 0, 0, sum(p.numel() for p in text_encoder.parameters())
    with torch.no_grad():
        if autoencoder is not None:
            image_flops, _, image_bytes = _measure(autoencoder.eval(), (), lambda: autoencoder.encode(pixels).latent_dist.mode())
            parameters += sum(p.numel() for p in autoencoder.parameters())
        text_flops, _, text_bytes = _measure(text_encoder.eval(), (), lambda: text_encoder(input_ids=ids))
    weight_bytes = parameters * dtype.itemsize
    return Encoders(parameters, weight_bytes, image_flops / size, text_flops / size, max(image_bytes, text_bytes) + pixels.nbytes)


def _autoencoder(config: AutoencoderConfig) -> Any:
    """Return the autoencoder, of Stable Diffusion's shape if no path is given; None for haar, which needs few operations."""
    if config.kind == "haar":
        return None
    if Path(config.path or "-").exists():  # nothing is downloaded for a prediction
        return AutoencoderKL.from_config(read_config(component_folder(config.path, "vae")))
    return stable_diffusion_autoencoder()


def stable_diffusion_autoencoder() -> AutoencoderKL:
    """Return an autoencoder of Stable Diffusion v1's shape, with random weights."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    )


def _text_encoder(config: TextEncoderConfig) -> Any:
    """Return the text encoder, of CLIP's shape if no path is given."""
    if Path(config.path or "-").exists():
        config_of_path = AutoConfig.from_pretrained(component_folder(config.path, "text_encoder"))
        if config.kind == "clip":
            return CLIPTextModelWithProjection(getattr(config_of_path, "text_config", config_of_path))
        return AutoModel.from_config(config_of_path)
    if config.kind == "mean_pool":
        raise ConfigError("model.text_encoder.path: give the folder (or hub name) of the text encoder")
    return clip_text_encoder(config)


def clip_text_encoder(config: TextEncoderConfig, **special_tokens: int) -> CLIPTextModelWithProjection:
    """Return a text encoder of CLIP ViT-L/14's shape, or of OpenCLIP ViT-H/14's in Stable Diffusion 2; with random weights."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=config.token_dim,
            intermediate_size=4 * config.token_dim,
            num_hidden_layers=23 if config.token_dim == 1024 else 12,
            num_attention_heads=config.token_dim // 64,
            projection_dim=config.embedding_dim,
            vocab_size=49408,
            **special_tokens,
        )
    )


def _measure(module: torch.nn.Module, inputs: Iterable[torch.Tensor], run: Callable[[], Any]) -> tuple[int, int, int]:
    """Return the operations of `run`, the kernels that it launches, and the peak bytes of the tensors that it creates."""
    with operation_counter() as counter:
        run()
    # In a second pass: the counter's hooks on modules keep tensors alive that activation checkpointing frees.
    gc.collect()
    was_collecting = gc.isenabled()
    gc.disable()  # its time differs between runs
    try:
        with KernelCounter([*module.parameters(), *module.buffers(), *inputs]) as tracker:
            run()
    finally:
        if was_collecting:
            gc.enable()
    return counter.get_total_flops(), tracker.launches, tracker.peak


class KernelCounter(TorchDispatchMode):
    """Counter of the kernels launched inside the context, and of the bytes of all storages created there.

    An operation is one launch unless it is a view or an allocation, although some, such as a norm, launch a few kernels.
    Storages of the `known` tensors are not counted.

    torch's tracker (torch.distributed._tools.mem_tracker) fails for sizes that depend on data, such as InfoNCE's diagonal under
    fake tensors; such storages, which are indices, are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.launches, self.now, self.peak = 0, 0, 0  # now, peak: bytes that are alive
        self._seen: dict[int, Any] = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.name().partition(".")[0]  # type: ignore[attr-defined]
        self.launches += name.startswith("aten::") and not func.is_view and name not in _NO_KERNEL  # type: ignore[attr-defined]
        for value in result if isinstance(result, list | tuple) else [result]:
            if isinstance(value, torch.Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen or not isinstance(size, int):
            return

        def subtract(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.ref(storage, subtract)
