"""The recipe `sd_v1_laion` learns to classify images: the same recipe function at small widths, with D = 768."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextModel

from diffdis.config import HeadConfig
from diffdis.task import DiffDisTask
from diffdis_platform.recipes import sd_v1_laion
from diffdis_platform.recipes.demo import PREVIEW_CAPTIONS
from ray_platform.train.config import TrainConfig
from ray_platform.train.optimizer import AdamW
from tests.support.tiny_checkpoints import save_clip_tokenizer, save_stable_diffusion

WIDTH = 768  # embedding width of CLIP ViT-L/14
COLORS = {
    "red": (255, 0, 0),
    "green": (0, 160, 0),
    "blue": (0, 0, 255),
    "white": (250, 250, 250),
    "yellow": (255, 230, 0),
    "orange": (255, 140, 0),
}
THINGS = sorted({caption.split()[-1] for caption in PREVIEW_CAPTIONS})[:8]
CAPTIONS = [f"{color} {thing}" for color in COLORS for thing in THINGS]


def save_letters_encoder(folder) -> None:
    """Save a CLIP text model of width 768 that averages letter embeddings, so that captions with common words are similar."""
    config = save_clip_tokenizer(folder / "tokenizer")
    config.update({"hidden_size": WIDTH, "num_attention_heads": 12, "projection_dim": WIDTH})
    model = CLIPTextModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embedding" in name:
                parameter.normal_(std=0.3 if "position" in name else 1.0)
            elif "v_proj.weight" in name or "out_proj.weight" in name:
                parameter.copy_(torch.eye(WIDTH) * (8 if "out_proj" in name else 1))
            elif "norm" not in name:
                parameter.zero_()
    model.save_pretrained(folder / "text_encoder")


@pytest.fixture(scope="module")
def small_stable_diffusion(tmp_path_factory):
    torch.manual_seed(0)
    folder = save_stable_diffusion(tmp_path_factory.mktemp("sd"))
    for name in ("unet", "text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 32, 64, 64), layers_per_block=1, cross_attention_dim=WIDTH, attention_head_dim=2,
        norm_num_groups=8,
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    ).save_pretrained(folder / "unet")  # fmt: skip
    save_letters_encoder(folder)
    return folder


def picture(caption: str, rng: np.random.Generator) -> np.ndarray:
    """Return a noisy gray square with a patch: the caption's object sets its position, the caption's color its fill."""
    color, thing = caption.split()
    image, place = np.full((16, 16, 3), 200.0), THINGS.index(thing)
    image[place // 4 * 8 :, place % 4 * 4 :][:8, :4] = COLORS[color]
    return (image + rng.normal(0, 10, image.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.slow
def test_the_recipe_learns_the_images_and_not_the_shortcut(small_stable_diffusion):
    recipe = sd_v1_laion()
    text_encoder = dataclasses.replace(recipe.model.text_encoder, cache_size=len(CAPTIONS))
    small = {"image_size": 16, "head": HeadConfig(num_layers=2, width=64, num_heads=2), "text_encoder": text_encoder}
    torch.manual_seed(0)
    task = DiffDisTask(
        dataclasses.replace(recipe.model, warm_start=str(small_stable_diffusion), **small), recipe.objective, CAPTIONS[:1]
    )
    queries = task.text_encoder.encode(CAPTIONS)[1]
    optimizer, rng = AdamW(task.parameter_groups(), TrainConfig()), np.random.default_rng(0)

    def accuracy() -> float:
        """Return the accuracy from pure noise, on images that were not used for training."""
        unseen = np.random.default_rng(1)
        images = [picture(caption, unseen) for caption in CAPTIONS for _ in range(2)]
        embedded = task.pipeline(task.module.state_dict()).embed_image(images, num_steps=5, num_draws=2)
        return ((embedded @ queries.T).argmax(dim=1) == torch.arange(len(CAPTIONS)).repeat_interleave(2)).float().mean().item()

    before, shuffled = accuracy(), torch.zeros(2)
    for step in range(120):
        chosen = [CAPTIONS[i] for i in rng.permutation(len(CAPTIONS))[:32]]
        batch = SimpleNamespace(tensors={"image": np.stack([picture(caption, rng) for caption in chosen])}, captions=chosen)
        loss, metrics = task.module(task.inputs(batch, torch.device("cpu")), step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.module.parameters(), 1.0)
        optimizer.step()
        shuffled += metrics["alignment/retrieval_shuffled_images"] if step >= 60 else 0
    correct, total = shuffled.tolist()
    chance = 1 / 32
    assert correct / total < chance + 4 * (chance / total) ** 0.5, "the shuffled-image control is at chance"
    assert before < 0.1
    assert accuracy() > 0.5
