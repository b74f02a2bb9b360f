import functools
import io
import json
from dataclasses import asdict

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffdis.config import ObjectiveConfig
from diffdis.encoder import describe_encoders
from diffdis.task import DiffDisTask
from ray_platform.data.config import DataConfig
from ray_platform.tracking import TrackingConfig
from ray_platform.train.config import TrainConfig
from ray_platform.train.launch import Run

WORDS = ("red", "green", "blue", "heart", "circle", "star", "cat", "tree")


def write_shards(folder, num_shards=4, samples_a_shard=12):
    """LAION-style tars of 20 px images; their captions repeat."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for shard in range(num_shards):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar")) as tar:
            for i in range(samples_a_shard):
                buffer = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, format="PNG")
                caption = " ".join(rng.choice(WORDS, 2))
                tar.write({"__key__": f"{shard:05d}{i:04d}", "png": buffer.getvalue(), "txt": caption.encode()})
    return folder


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def make_run(tiny_model, shards):
    """make_run(output_dir, sources, objective fields, **TrainConfig fields) -> a Run of two workers over the tiny model."""

    def make(output_dir, sources=None, objective=None, **train) -> Run:
        objective = ObjectiveConfig(lr_unet=1e-3, lr_new=1e-3, **(objective or {}))
        fields = {
            "num_workers": 2, "num_steps": 6, "micro_batch_size": 4, "warmup_steps": 2, "log_every": 1, "preview_every": 0,
            "cpus_per_worker": 0.5, "max_failures": 0,
        }  # fmt: skip
        config = TrainConfig(**(fields | train))
        return Run(
            functools.partial(DiffDisTask, tiny_model, objective, ("red heart",)),
            DataConfig(sources=(str(sources or shards),), image_size=tiny_model.image_size),
            config,
            TrackingConfig(),
            str(output_dir),
            {"recipe": "test", "model": asdict(tiny_model), "objective": asdict(objective), "train": asdict(config)},
            functools.partial(describe_encoders, tiny_model),
        )

    return make


@pytest.fixture(scope="session")
def losses():
    """losses(output_dir) -> {step: (loss_generation, loss_alignment)} as MLflow holds them."""

    def read(output_dir):
        from mlflow import MlflowClient

        tracked = json.loads((output_dir / "mlflow.json").read_text())
        client = MlflowClient(tracked["tracking_uri"])
        curves = [
            {m.step: m.value for m in client.get_metric_history(tracked["run_id"], name)}
            for name in ("train/loss_generation", "train/loss_alignment")
        ]
        return {step: (curves[0][step], curves[1][step]) for step in sorted(curves[0])}

    return read
