import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from diffdis.config import ObjectiveConfig, tiny
from diffdis.task import DiffDisTask
from tests.tiny_checkpoints import save_mean_pool_encoder

CAPTIONS = ("red heart", "blue circle", "green leaf", "yellow star", "red heart", "black cat")


@pytest.fixture(params=["one_way", "joint"])
def visibility(request):
    return request.param


@pytest.fixture
def make_task(text_encoder_folder):
    """make_task(objective fields…, **config fields) -> a tiny task with fixed initial weights."""

    def make(objective: ObjectiveConfig | None = None, **changes) -> DiffDisTask:
        config = tiny(**changes)
        encoder = dataclasses.replace(config.text_encoder, path=str(text_encoder_folder))
        torch.manual_seed(0)
        return DiffDisTask(dataclasses.replace(config, text_encoder=encoder), objective or ObjectiveConfig(), CAPTIONS[:2])

    return make


@pytest.fixture
def batch():
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    return SimpleNamespace(images=images, captions=CAPTIONS)


@pytest.fixture(scope="session")
def text_encoder_folder(tmp_path_factory):
    return save_mean_pool_encoder(tmp_path_factory.mktemp("text_encoder"))
