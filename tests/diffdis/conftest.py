import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffdis.autoencoder import KLAutoencoder
from diffdis.config import ObjectiveConfig
from diffdis.task import DiffDisTask
from tests.support.tiny_checkpoints import draw_query_weights

CAPTIONS = ("red heart", "blue circle", "green leaf", "yellow star", "red heart", "black cat")


@pytest.fixture(params=["one_way", "joint"])
def visibility(request):
    return request.param


@pytest.fixture
def make_task(tiny_model):
    """Return make_task(objective, **config fields), which builds a tiny task with fixed weights."""

    def make(objective: ObjectiveConfig | None = None, **changes) -> DiffDisTask:
        torch.manual_seed(0)
        task = DiffDisTask(dataclasses.replace(tiny_model, **changes), objective or ObjectiveConfig(), CAPTIONS[:2])
        if task.config.trained_for in ("joint", "alignment") and not task.config.warm_start:
            draw_query_weights(task.module.model)
        return task

    return make


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    return SimpleNamespace(images=images, tensors={"image": images}, captions=CAPTIONS)


@pytest.fixture
def small_vae():
    """An AutoencoderKL like Stable Diffusion's, with two narrow levels and random weights."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = AutoencoderKL(**blocks, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1)
    return KLAutoencoder(vae.eval().requires_grad_(False))
