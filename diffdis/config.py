"""Configuration of a DiffDis model (`DiffDisConfig`), with presets, and of its training (`ObjectiveConfig`).

Marks: [P] from the paper, [D] our decision where the paper is silent.
"""

import dataclasses
import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from diffdis.objective_config import ObjectiveConfig as ObjectiveConfig
from diffdis.objective_config import TaskName as TaskName

logger = logging.getLogger(__name__)

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class UNetConfig:
    """Arguments of diffusers' UNet2DConditionModel. The defaults are those of Stable Diffusion v1.

    A warm start replaces them by those of its folder.
    """

    in_channels: int = 4
    """Channels of the latent."""
    sample_size: int = 64
    """Side of the latent (not of the image), in latent pixels."""
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    """Channels of each level, from the finest to the coarsest."""
    layers_per_block: int = 2
    """Residual blocks per level."""
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    """diffusers' class of each down block."""
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    """diffusers' class of each up block."""
    attention_head_dim: int | tuple[int, ...] = 8
    """Number of attention heads, of all levels or of each one. (The name is diffusers'; it is not a width.)"""
    norm_num_groups: int = 32
    """Groups of the group normalizations."""
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    """Other arguments of UNet2DConditionModel, such as '{"use_linear_projection": true}'."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Frozen autoencoder. `kl`: diffusers' AutoencoderKL from `path`. `haar`: a fixed invertible transform without weights."""

    kind: Literal["kl", "haar"] = "kl"
    """`kl` is diffusers' AutoencoderKL from `path`; `haar` is a fixed invertible transform without weights."""
    path: str = ""
    """Folder of the autoencoder (or one with the subfolder vae/) in diffusers' layout, or a hub name. Not used by haar."""
    haar_levels: int = 1
    """Levels of the Haar transform; each one halves the side of the latent."""
    haar_mean: tuple[float, ...] = ()
    """Mean of each Haar channel over the training images, so that latents have mean 0."""
    haar_std: tuple[float, ...] = ()
    """Standard deviation of each Haar channel over the training images, so that latents have variance 1."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Frozen text encoder. `clip`: the query is the projected EOS state. `mean_pool`: any encoder, masked mean of its states."""

    kind: Literal["clip", "mean_pool"] = "clip"
    """`clip`: the query is the projected EOS state. `mean_pool`: any encoder; the query is the masked mean of its states."""
    path: str = ""
    """Folder of the text encoder in transformers' layout (tokenizer in it or in tokenizer/), or a hub name."""
    max_length: int = 77
    """Maximum length of a caption in tokens; longer captions are truncated."""
    token_dim: int = 768
    """Width of the encoder's token states. If this and embedding_dim have their defaults, both are read from `path`."""
    embedding_dim: int = 768
    """Width D of the text query."""
    cache_size: int = 0
    """Number of captions whose encoding is kept in memory, for datasets that repeat their captions."""


@dataclass(frozen=True)
class HeadConfig:
    """Transformer of the alignment head. [P: 6 x 768, 12 heads]"""

    num_layers: int = 6
    """Transformer layers of the alignment head."""
    width: int = 768
    """Width of the alignment head."""
    num_heads: int = 12
    """Attention heads of the alignment head."""


@dataclass(frozen=True)
class ScheduleConfig:
    """Noise schedule of images and text queries: scaled-linear betas, as in Stable Diffusion. [D]

    A warm start replaces the fields from num_timesteps to timestep_spacing by those of its folder, unless they are set.
    """

    num_timesteps: int = 1000
    """Number of timesteps of the diffusion."""
    beta_start: float = 0.00085
    """Noise variance (beta) of the first timestep."""
    beta_end: float = 0.012
    """Noise variance (beta) of the last timestep."""
    beta_schedule: Literal["scaled_linear", "linear"] = "scaled_linear"
    """How beta rises: `scaled_linear` is linear in its square root, as in Stable Diffusion."""
    zero_terminal_snr: bool = False
    """Rescale the betas so that the last timestep has no signal (Lin et al. 2024, algorithm 1). Needs v_prediction or
    sample, and timestep_spacing trailing."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """What the image stream predicts: the noise, the velocity v, or the clean latent (`sample` in diffusers)."""
    timestep_spacing: Literal["leading", "trailing"] = "leading"
    """How image sampling chooses its timesteps; diffusers' name."""
    query_snr: float = 2.0  # [D; LOG.md]
    """Signal strength of the text query: standard deviation of its signal relative to that of its noise, before noise is added.
    The paper's gamma is query_snr / sqrt(D); query_snr means the same for every width D."""
    gamma: float = 0.0
    """Deprecated; use query_snr, which is gamma * sqrt(D)."""
    query_prediction: Literal["x0", "epsilon"] = "x0"  # [P]
    """What the text stream predicts: the clean query (as in the paper), or the noise."""


@dataclass(frozen=True)
class DiffDisConfig:
    """Model configuration: everything that inference needs. Saved as `diffdis.json` in an exported folder."""

    image_size: int = 512
    """Side of the images in pixels."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    query_visibility: Literal["joint", "one_way"] = "joint"
    """`joint`: every token attends to every other one, as in the paper. `one_way`: image tokens do not attend to the query, so
    that the image branch runs once for any number of denoising steps and noise samples."""
    image_dropout: float = 0.1  # [D]
    """Fraction of samples whose image is masked in training, for guidance over the image."""
    encoder_dtype: Dtype = "float32"
    """dtype of the autoencoder and the text encoder on accelerators; on CPUs they use float32."""
    warm_start: str = ""
    """Weights to start from: Stable Diffusion, a U-Net, or a DiffDis export. Stable Diffusion is a folder in the layout of its
    versions 1 or 2. The autoencoder and text encoder of the weights are used unless other paths are given."""
    trained_for: TaskName = "joint"
    """What the model can do; training sets it to objective.task."""

    def __post_init__(self) -> None:
        unet, width = self.unet, self.text_encoder.embedding_dim
        if gamma := self.schedule.gamma:
            if not 0 < gamma <= 1:
                raise ValueError(f"model.schedule.gamma: {gamma} is not in (0, 1]; use query_snr = gamma sqrt(D), about 2")
            warnings.warn("model.schedule.gamma is deprecated; use query_snr = gamma sqrt(D)", FutureWarning, stacklevel=3)
            schedule = dataclasses.replace(self.schedule, query_snr=gamma * width**0.5, gamma=0.0)
            object.__setattr__(self, "schedule", schedule)
        if unet.sample_size % 2 ** (len(unet.block_out_channels) - 1):
            raise ValueError(
                f"model.unet.sample_size: {unet.sample_size} is not divisible by "
                f"{2 ** (len(unet.block_out_channels) - 1)}, as {len(unet.block_out_channels)} blocks need"
            )
        if self.schedule.zero_terminal_snr and "epsilon" in (self.schedule.prediction_type, self.schedule.query_prediction):
            raise ValueError(
                "model.schedule.zero_terminal_snr: at abar = 0 the noise says nothing about the image or the text; "
                "use prediction_type v_prediction or sample, and query_prediction x0"
            )
        if self.schedule.zero_terminal_snr and self.schedule.timestep_spacing != "trailing":
            raise ValueError(
                f"model.schedule.timestep_spacing: {self.schedule.timestep_spacing} never samples the last timestep, which "
                "zero_terminal_snr is about; use trailing"
            )
        if not 0 <= self.image_dropout < 1:
            raise ValueError(f"model.image_dropout: {self.image_dropout:g} is not in [0, 1); give a fraction such as 0.1")
        if self.schedule.query_snr <= 0:
            raise ValueError(f"model.schedule.query_snr: {self.schedule.query_snr:g} is not above 0; use about 2")
        if self.head.width % self.head.num_heads:
            raise ValueError(f"model.head.width: {self.head.width} is not divisible by num_heads ({self.head.num_heads})")
        if self.autoencoder.kind == "haar":
            factor = 2**self.autoencoder.haar_levels
            expected = (3 * factor**2, self.image_size // factor)
            if (unet.in_channels, unet.sample_size) != expected:
                raise ValueError(
                    f"model.unet: in_channels, sample_size = {unet.in_channels}, {unet.sample_size}, but "
                    f"{self.autoencoder.haar_levels} haar levels of {self.image_size} px need {expected[0]}, {expected[1]}"
                )

    @property
    def gamma(self) -> float:
        """The paper's scale of the text query before noise is added, query_snr / sqrt(D)."""
        return self.schedule.query_snr / self.text_encoder.embedding_dim**0.5

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as nested dictionaries."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DiffDisConfig":
        """Build the configuration from the result of `to_dict`. Unknown keys are ignored with a warning.

        Raises:
            ValueError: a value is of the wrong type or out of range.
        """
        return _build(cls, values, "")


def resolve_encoder_paths(config: DiffDisConfig) -> DiffDisConfig:
    """Use `warm_start` as the path of the autoencoder and the text encoder if they have none and it contains them.

    A repository of the hub is assumed to contain both.
    """
    if not config.warm_start:
        return config
    autoencoder, text_encoder = config.autoencoder, config.text_encoder
    if autoencoder.kind == "kl" and not autoencoder.path and _may_hold(config.warm_start, "vae"):
        autoencoder = dataclasses.replace(autoencoder, path=config.warm_start)
    if not text_encoder.path and _may_hold(config.warm_start, "text_encoder"):
        text_encoder = dataclasses.replace(text_encoder, path=config.warm_start)
    return dataclasses.replace(config, autoencoder=autoencoder, text_encoder=text_encoder)


def _may_hold(path: str, component: str) -> bool:
    return (Path(path) / component).is_dir() or not Path(path).exists()


_JSON_TYPES: dict[Any, Any] = {int: int, float: (int, float), str: str}
_MAX_INT = 2**24  # larger than any width, length or count of a model


def _build(cls: type, values: dict[str, Any], prefix: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    if unknown := [f"{prefix}{name}" for name in sorted(values) if name not in known]:
        logger.warning("ignoring unknown fields of a model's configuration: %s", ", ".join(unknown)[:200])
    kwargs = {}
    for name, value in ((name, value) for name, value in values.items() if name in known):
        kind = known[name].type
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            value = _build(kind, value, f"{prefix}{name}.")
        if kind in (int, float, str) and (not isinstance(value, _JSON_TYPES[kind]) or isinstance(value, bool)):
            raise ValueError(f"{prefix}{name}: {str(value)[:50]!r} is not of type {kind.__name__}")
        if kind is int and not 0 <= value <= _MAX_INT:
            raise ValueError(f"{prefix}{name}: {value:,} is not in 0..{_MAX_INT:,}")
        kwargs[name] = tuple(value) if isinstance(value, list) else value
    return cls(**kwargs)


def sd_v1(**changes: Any) -> DiffDisConfig:
    """Return the paper's size: SD v1's U-Net, CLIP ViT-L/14's text encoder, a head of 6 x 768 with 12 heads [P].

    The mask, image dropout and query_snr are those that worked in the demo [D; LOG.md].
    """
    base = DiffDisConfig(schedule=ScheduleConfig(query_snr=1.5), query_visibility="one_way", image_dropout=0.0)
    return dataclasses.replace(base, **changes)


def sd_v2(**changes: Any) -> DiffDisConfig:
    """Return `sd_v1` with the U-Net of Stable Diffusion 2 base and the widths of its text encoder, OpenCLIP ViT-H/14's.

    Its attention heads have width 64 at all levels, for which attention kernels are fastest; SD v1's have 40, 80 and 160.
    """
    unet = UNetConfig(attention_head_dim=(5, 10, 20, 20), options={"use_linear_projection": True})
    base = sd_v1(unet=unet, text_encoder=TextEncoderConfig(token_dim=1024, embedding_dim=1024))
    return dataclasses.replace(base, **changes)


# Statistics of the Haar channels over the demo's training images (measured once; see LOG.md).
_DEMO_HAAR_MEAN = (2.053, 0.2225, -0.0206, -0.0002, -0.0001, 0.0, 0.0014, 0.0, -0.0002, 0.0001, 0.0, 0.0)
_DEMO_HAAR_STD = (1.5977, 0.8776, 0.3967, 0.403, 0.165, 0.0775, 0.4232, 0.1713, 0.0816, 0.1788, 0.0692, 0.0329)


def demo(**changes: Any) -> DiffDisConfig:
    """Return a model for two CPU cores: 32 px, a U-Net trained from scratch, a text encoder with MiniLM's widths."""
    base = DiffDisConfig(
        image_size=32,
        unet=UNetConfig(
            in_channels=12,
            sample_size=16,
            block_out_channels=(32, 64, 128),
            layers_per_block=1,
            # No attention at 16 x 16: it would take half of the time.
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=4,
            norm_num_groups=16,
        ),
        autoencoder=AutoencoderConfig(kind="haar", haar_mean=_DEMO_HAAR_MEAN, haar_std=_DEMO_HAAR_STD),
        text_encoder=TextEncoderConfig(kind="mean_pool", max_length=12, token_dim=384, embedding_dim=384, cache_size=8192),
        head=HeadConfig(num_layers=2, width=128, num_heads=4),
        # A small network cannot predict noise, which fills all dimensions, as well as images, which do not (LOG.md).
        schedule=ScheduleConfig(prediction_type="sample", timestep_spacing="trailing", query_snr=1.96),
        query_visibility="one_way",
        image_dropout=0.0,
    )
    return dataclasses.replace(base, **changes)


def tiny(**changes: Any) -> DiffDisConfig:
    """Return a model for tests: 16 px, two levels, a text encoder of width 32; it differs from the others in size only."""
    base = DiffDisConfig(
        image_size=16,
        unet=UNetConfig(
            in_channels=12,
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        autoencoder=AutoencoderConfig(kind="haar"),
        text_encoder=TextEncoderConfig(kind="mean_pool", max_length=8, token_dim=32, embedding_dim=32),
        head=HeadConfig(num_layers=2, width=32, num_heads=2),
        schedule=ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing", query_snr=1.96),
        query_visibility="one_way",
        image_dropout=0.0,
    )
    return dataclasses.replace(base, **changes)
