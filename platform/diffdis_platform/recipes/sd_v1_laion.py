"""The paper's size on LAION-style shards: Stable Diffusion v1's U-Net warm-started, CLIP ViT-L/14's text encoder."""

import dataclasses

from diffdis.config import sd_v1
from diffdis_platform.config.pretrain import PretrainConfig
from ray_platform.data.config import DataConfig
from ray_platform.train.config import TrainConfig


def sd_v1_laion() -> PretrainConfig:
    """The paper's model. Set data.sources, model.warm_start, model.autoencoder.path and model.text_encoder.path."""
    return PretrainConfig(
        model=sd_v1(),
        data=DataConfig(image_size=512),
        train=TrainConfig(
            num_workers=8,
            gpus_per_worker=1,
            cpus_per_worker=4,
            micro_batch_size=24,  # fills an 80 GB GPU, so that it does not wait for its host: docs/sizing.md
            precision="bf16",
            zero_stage=2,
            warmup_steps=1000,
            lr_schedule="constant",
        ),
    )


def sd_v1_laion_one_way() -> PretrainConfig:
    """The same with the one-way mask: the image branch runs once for any number of draws and denoising steps."""
    base = sd_v1_laion()
    return dataclasses.replace(base, model=dataclasses.replace(base.model, query_visibility="one_way"))
