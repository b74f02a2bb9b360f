import dataclasses

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from diffdis.config import DiffDisConfig, HeadConfig, ObjectiveConfig, TextEncoderConfig, UNetConfig
from diffdis.metrics.zero_shot import ZeroShotScores, subset_accuracy
from diffdis.pipeline import DiffDisPipeline
from diffdis.task import DiffDisTask
from tests.support.tiny_checkpoints import WIDTH, save_clip_text_encoder, save_stable_diffusion


@pytest.fixture
def pipeline(make_task):
    task = make_task()
    return task.pipeline(task.module.state_dict())


def test_an_exported_folder_gives_the_same_results(pipeline, batch, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffDisPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.embed_image(batch.images), pipeline.embed_image(batch.images))
    ours, theirs = (p.generate(["red heart"], num_steps=3)[0] for p in (pipeline, loaded))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    AutoModel.from_pretrained(tmp_path / "text_encoder")
    AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert DDIMScheduler.from_pretrained(tmp_path / "scheduler").config.prediction_type == "v_prediction"


def test_classify_and_rank_captions(pipeline, batch):
    probabilities = pipeline.classify(batch.images, ["cat", "tree", "star"], ["a {c}", "the {c}"], num_steps=2)
    assert probabilities.shape == (6, 3)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(6))
    order = pipeline.rank_captions(batch.images, ["cat", "tree"], num_steps=2)
    assert sorted(order[0].tolist()) == [0, 1]


def test_old_names_of_the_pipeline_still_work(pipeline, batch):
    with pytest.warns(DeprecationWarning, match="rank_captions"):
        order = pipeline.rank(batch.images, ["cat", "tree"], num_steps=2)
    assert torch.equal(order, pipeline.rank_captions(batch.images, ["cat", "tree"], num_steps=2))
    with pytest.warns(DeprecationWarning, match="indices"):
        [old] = pipeline.generate(["red heart"], num_steps=2, places=[7])
    [new] = pipeline.generate(["red heart"], num_steps=2, indices=[7])
    assert np.array_equal(np.asarray(old), np.asarray(new))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_any_scheduler_of_diffusers_samples(pipeline, name):
    """Also a stochastic one depends on the seed and the index of an image, not on the batch."""
    together = pipeline.generate(["red heart", "a"], num_steps=3, scheduler=name)
    own = getattr(diffusers, name).from_config(pipeline.build_scheduler(name).config)
    [alone] = pipeline.generate(["a"], num_steps=3, indices=[1], scheduler=own)
    assert np.abs(np.asarray(together[1]).astype(int) - np.asarray(alone)).max() <= 1
    with pytest.raises(ValueError, match=r"scheduler: .*NoSuchScheduler"):
        pipeline.generate(["a"], scheduler="NoSuchScheduler")


def test_the_ddim_scheduler_of_diffusers_gives_the_default_images(pipeline):
    own, theirs = (pipeline.generate(["red heart"], num_steps=5, scheduler=s)[0] for s in (None, "DDIMScheduler"))
    assert np.abs(np.asarray(own).astype(int) - np.asarray(theirs)).max() <= 1


def test_images_of_any_size_and_bad_input(pipeline, tmp_path):
    assert pipeline.embed_image([Image.new("RGBA", (50, 20), "red")], num_steps=1).shape == (1, 32)
    with pytest.raises(ValueError, match="is not uint8"):
        pipeline.embed_image(np.zeros((1, 8, 8, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"has no \{c\}"):
        pipeline.embed_classes(["cat"], ["a photo"])
    with pytest.raises(ValueError, match="image_dropout"):
        pipeline.embed_image([Image.new("RGB", (16, 16))], guidance=1.0)
    with pytest.raises(FileNotFoundError, match=r"diffdis\.json"):
        DiffDisPipeline.from_pretrained(tmp_path)


def test_an_untrained_model_and_shuffled_images_are_at_chance(pipeline):
    """400 images of 100 classes: at chance 4 are right on average; 14 or more have a probability below 1e-4."""
    images = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(400) % 100
    queries, classes = pipeline.embed_image(images, num_steps=2), pipeline.embed_classes([f"c {i}" for i in range(100)])
    untrained = ZeroShotScores.from_embeddings(queries.numpy(), classes.numpy(), labels)
    for scores in (untrained, untrained.with_shuffled_images()):
        assert scores.accuracy() * 400 < 14
    identity = np.eye(100, dtype=np.float32)
    perfect = ZeroShotScores.from_embeddings(identity[labels], identity, labels)
    assert perfect.accuracy() == subset_accuracy(identity[labels], identity, labels, 10) == 1.0
    assert perfect.with_shuffled_images().accuracy() * 400 < 14  # the control removes what a perfect model knows


@pytest.fixture
def stable_diffusion_task(tmp_path):
    """A small model warm-started from a folder in Stable Diffusion's layout, end to end."""
    folder = str(save_stable_diffusion(tmp_path / "sd"))
    config = DiffDisConfig(
        image_size=16,
        unet=UNetConfig(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2,
            norm_num_groups=8,
        ),
        text_encoder=TextEncoderConfig(token_dim=WIDTH, embedding_dim=WIDTH),  # of the same folder, as the autoencoder
        head=HeadConfig(num_layers=1, width=32, num_heads=2),
        warm_start=folder,
    )
    return DiffDisTask(config, ObjectiveConfig())


def test_a_stable_diffusion_folder_trains_exports_and_opens_in_diffusers(stable_diffusion_task, batch, tmp_path):
    task = stable_diffusion_task
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "sd" / "unet").state_dict()
    assert torch.equal(unet["conv_in.weight"], task.module.model.unet.conv_in.weight)
    loss, _ = task.module(task.inputs(batch, torch.device("cpu")), 0)
    loss.backward()
    task.save_pretrained(task.module.state_dict(), tmp_path / "export")
    AutoencoderKL.from_pretrained(tmp_path / "export" / "vae")
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "export")
    assert stock("red heart", num_inference_steps=2, height=16, width=16).images[0].size == (16, 16)
    loaded = DiffDisPipeline.from_pretrained(tmp_path / "export")
    assert loaded.generate(["red heart"], num_steps=2)[0].size == (16, 16)
    assert loaded.embed_image(batch.images, num_steps=2, guidance=1.0).shape == (6, WIDTH)


def test_a_warm_start_that_does_not_fit_names_the_field(stable_diffusion_task):
    config = stable_diffusion_task.config
    wider = dataclasses.replace(config, unet=dataclasses.replace(config.unet, block_out_channels=(16, 64)))
    with pytest.raises(ValueError, match=r"model\.unet\.block_out_channels: \(16, 64\), but .*sd.* has \(16, 32\)"):
        DiffDisTask(wider, ObjectiveConfig())


def test_a_bare_unet_starts_a_model_whose_encoders_come_from_elsewhere(stable_diffusion_task, tmp_path):
    given = stable_diffusion_task.config
    folder = tmp_path / "sd"
    bare = dataclasses.replace(given, warm_start=str(folder / "unet"))
    task = DiffDisTask(bare, ObjectiveConfig())
    expected = stable_diffusion_task.module.model.unet.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in task.module.model.unet.state_dict().items())
    for name in ("autoencoder", "text_encoder"):
        without = dataclasses.replace(bare, **{name: dataclasses.replace(getattr(given, name), path="")})
        with pytest.raises(ValueError, match=rf"model\.{name}\.path"):
            DiffDisTask(without, ObjectiveConfig())


@pytest.mark.parametrize("projection", [True, False])
def test_clip_text_encoders_with_and_without_projection(tmp_path, projection):
    from diffdis.text_encoder import build_text_encoder

    save_clip_text_encoder(tmp_path / "text_encoder", tmp_path / "tokenizer", projection=projection)
    encoder = build_text_encoder(TextEncoderConfig(path=str(tmp_path), token_dim=WIDTH, embedding_dim=WIDTH))
    states, pooled = encoder.encode(["red heart", "a"])
    assert states.shape == (2, 77, WIDTH)
    torch.testing.assert_close(pooled.norm(dim=1), torch.ones(2))
    expected = encoder.model(**encoder.tokenizer(["a"], padding="max_length", return_tensors="pt"))
    pooled_there = expected.text_embeds if projection else expected.pooler_output
    torch.testing.assert_close(pooled[1], torch.nn.functional.normalize(pooled_there[0], dim=0))


def test_a_text_encoder_of_another_width_is_refused(text_encoder_folder):
    from diffdis.text_encoder import build_text_encoder

    with pytest.raises(ValueError, match=r"token_dim, embedding_dim = 32, 32"):
        build_text_encoder(TextEncoderConfig(kind="mean_pool", path=str(text_encoder_folder)))
    with pytest.raises(ValueError, match=r"model\.text_encoder\.path"):
        build_text_encoder(TextEncoderConfig())
