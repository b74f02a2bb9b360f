"""Low-rank adapters: only they are trained, both passes use them, and diffusers generates the same images with them."""

import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from diffdis.config import DiffDisConfig, HeadConfig, ObjectiveConfig
from diffdis.lora import add_adapters, merge_adapters
from diffdis.pipeline import DiffDisPipeline
from diffdis.preflight import describe_training
from diffdis.task import DiffDisTask
from tests.support.tiny_checkpoints import SD_2, save_stable_diffusion

CPU = torch.device("cpu")
SETTINGS = {"num_inference_steps": 3, "height": 16, "width": 16, "output_type": "np"}


def config_of(folder) -> DiffDisConfig:
    return DiffDisConfig(image_size=16, head=HeadConfig(num_layers=1, width=32, num_heads=2), warm_start=str(folder))


def train(task, batch, num_steps=3):
    optimizer = torch.optim.AdamW([{**group, "lr": 0.02} for group in task.parameter_groups()])
    for step in range(num_steps):
        task.module(task.inputs(batch, CPU), step)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


def image_of(pipeline) -> np.ndarray:
    if isinstance(pipeline, StableDiffusionPipeline):
        pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    return pipeline("a red heart", latents=latents, **SETTINGS).images


@pytest.mark.parametrize("unet_options", [{}, SD_2], ids=["SD 1", "SD 2"])
def test_diffusers_loads_the_exported_adapters_and_generates_our_image(tmp_path, batch, unet_options):
    base = tmp_path / "base"
    untrained = DiffDisTask(
        config_of(save_stable_diffusion(tmp_path / "parts", unet_options)), ObjectiveConfig(task="generation")
    )
    untrained.save_pretrained(untrained.module.state_dict(), base)  # with the model_index.json of a released model
    task = DiffDisTask(config_of(base), ObjectiveConfig(task="generation", lora_rank=2))
    before = {name: value.clone() for name, value in task.module.state_dict().items()}
    stock = StableDiffusionPipeline.from_pretrained(base)
    of_base = image_of(stock)
    np.testing.assert_allclose(image_of(task.pipeline(before)), of_base, atol=1e-4)  # B is 0 at first

    train(task, batch)
    after = task.module.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {name for name in after if "lora_" in name}
    assert len(changed) == 2 * 4 * 2 * 4, "A and B of four projections in two attentions of four blocks"

    opened = task.save_pretrained(after, tmp_path / "export")
    assert "diffusers' StableDiffusionPipeline" in opened, "it generates the image of the merged weights"
    ours = image_of(DiffDisPipeline.from_pretrained(tmp_path / "export"))
    stock.load_lora_weights(tmp_path / "export" / "lora")
    theirs = image_of(stock)
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
    assert np.abs(theirs - of_base).max() > 0.01


@pytest.mark.parametrize("visibility", ["one_way", "joint"])
def test_both_passes_use_the_adapters(make_task, batch, visibility):
    """The walk over the U-Net's blocks has attention of its own."""
    task = make_task(ObjectiveConfig(lora_rank=2), query_visibility=visibility)
    model, inputs = task.module.model, task.inputs(batch, CPU)
    noise = task.module.sample_noise(inputs, 0)

    def predict():
        with torch.no_grad():
            image, queries = task.module._predict(inputs, noise)
        return image.predicted, queries.queries

    without = predict()
    with torch.no_grad():
        for name, parameter in model.unet.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    adapted = predict()
    for part, other in zip(adapted, without, strict=True):
        assert (part - other).abs().max() > 0.01
    merge_adapters(model.unet)
    assert not [name for name, _ in model.named_parameters() if "lora" in name or "base_layer" in name]
    for part, other in zip(predict(), adapted, strict=True):
        torch.testing.assert_close(part, other, rtol=1e-4, atol=1e-5)


def test_the_alignments_own_parts_are_trained_next_to_the_adapters(make_task, batch):
    task = make_task(ObjectiveConfig(lora_rank=2))
    trained = {name for name, parameter in task.module.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if name.startswith("model.unet.")} == {
        name for name, _ in task.module.named_parameters() if "lora_" in name
    }
    assert {"model.temperature.log_scale", "model.stream.blocks.0.fc_in.weight"} <= trained
    groups = {group["name"]: len(group["params"]) for group in task.parameter_groups()}
    assert groups["unet"] == len([name for name in trained if "lora_" in name])


def test_adapters_are_checked_before_a_run(tmp_path, monkeypatch):
    config, objective = config_of(save_stable_diffusion(tmp_path)), ObjectiveConfig(task="generation", lora_rank=2)
    assert describe_training(config, objective)["model.warm_start"]["parameters"] > 0
    with pytest.raises(ValueError, match=r"objective.lora_rank: -1 "):
        ObjectiveConfig(lora_rank=-1)
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it was not installed
    with pytest.raises(ValueError, match=r"objective.lora_rank: .*peft.*diffdis-platform\[lora\]"):
        describe_training(config, objective)


def test_adapters_of_a_unet_start_without_an_effect(make_task):
    unet = make_task(ObjectiveConfig()).module.model.unet
    inputs = torch.randn(1, 12, 8, 8), torch.tensor([5]), torch.randn(1, 8, 32)
    expected = unet(*inputs).sample
    add_adapters(unet, 3)
    assert torch.equal(unet(*inputs).sample, expected)
