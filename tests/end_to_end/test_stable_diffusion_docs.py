"""The commands of docs/from_stable_diffusion.md, in its order, on random weights in Stable Diffusion's layout."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.support.documentation import ROOT, Shell, blocks_run_by, readers_environment
from tests.support.tiny_checkpoints import WIDTH, save_stable_diffusion
from tests.support.training import write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

# What describes those weights, and a run of some steps on a CPU.
SMALL = f"""--recipe sd_v1_laion --model.image_size 16 --data.image_size 16 --model.unet.sample_size 8
 --model.unet.block_out_channels [16,32] --model.unet.layers_per_block 1
 --model.unet.down_block_types '["CrossAttnDownBlock2D","DownBlock2D"]'
 --model.unet.up_block_types '["UpBlock2D","CrossAttnUpBlock2D"]'
 --model.unet.attention_head_dim 2 --model.unet.norm_num_groups 8
 --model.text_encoder.token_dim {WIDTH} --model.text_encoder.embedding_dim {WIDTH}
 --model.head.num_layers 1 --model.head.width 32 --model.head.num_heads 2
 --train.num_workers 1 --train.gpus_per_worker 0 --train.cpus_per_worker 0.5 --train.micro_batch_size 4 --train.num_steps 4
 --train.preview_every 0""".replace("\n", "")


def test_the_page(tmp_path):
    save_stable_diffusion(tmp_path / "stable-diffusion-v1")
    shards = write_shards(tmp_path / "shards")
    words = {
        "--recipe sd_v1_laion": SMALL, "/models/stable-diffusion-v1": f"{tmp_path}/stable-diffusion-v1",
        "/data/my-shards": str(shards), "/data/my-sd-": f"{tmp_path}/my-sd-", "/data/heart.png": f"{tmp_path}/heart.png",
    }  # fmt: skip
    environment = readers_environment()
    shell = Shell(tmp_path, environment | {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}"}, words, start=ROOT)
    train, export, use = blocks_run_by(__file__, "docs/from_stable_diffusion.md")

    assert f"done: the model is in {tmp_path}/my-sd-run/export" in shell.run(train)
    assert "opens as DiffDisPipeline, diffusers' UNet2DConditionModel, diffusers' StableDiffusionPipeline" in shell.run(export)
    shell.run(use)
    assert Image.open(tmp_path / "heart.png").size == (16, 16)
