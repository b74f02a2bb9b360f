import dataclasses
import json
import re

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from diffdis import schedule
from diffdis.config import DiffDisConfig, HeadConfig, ObjectiveConfig, ScheduleConfig, TextEncoderConfig
from diffdis.metrics.zero_shot import ZeroShotScores, subset_accuracy
from diffdis.pipeline import DiffDisPipeline
from diffdis.task import DiffDisTask, check_export
from tests.support.tiny_checkpoints import SAMPLE, SD_2, V_PREDICTION, WIDTH, ZERO_SNR, save_clip, save_stable_diffusion


@pytest.fixture
def pipeline(make_task):
    task = make_task()
    return task.pipeline(task.module.state_dict())


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"diffdis\.json"):
        DiffDisPipeline.from_pretrained(tmp_path)


def test_an_exported_folder_gives_the_same_results(pipeline, batch, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = DiffDisPipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded.embed_image(batch.images), pipeline.embed_image(batch.images))
    ours, theirs = (p.generate(["red heart"], num_inference_steps=3)[0] for p in (pipeline, loaded))
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
    with pytest.warns(DeprecationWarning, match="indices|num_inference_steps"):
        [old] = pipeline.generate(["red heart"], num_steps=2, places=[7])
    [new] = pipeline.generate(["red heart"], num_inference_steps=2, indices=[7])
    assert np.array_equal(np.asarray(old), np.asarray(new))


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerAncestralDiscreteScheduler"])
def test_any_scheduler_of_diffusers_samples(pipeline, name):
    """Even with a stochastic scheduler, an image depends only on the seed and its index, not on the batch."""
    state = torch.get_rng_state()
    pipeline.scheduler = name
    assert torch.equal(torch.get_rng_state(), state), "choosing one does not draw from the caller's random numbers"
    together = pipeline.generate(["red heart", "a"], num_inference_steps=3)
    config = pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, name).from_config(config, beta_start=0.3)  # replaced by the model's noise schedule
    [alone] = pipeline.generate(["a"], num_inference_steps=3, indices=[1])
    assert np.abs(np.asarray(together[1]).astype(int) - np.asarray(alone)).max() <= 1
    pipeline.scheduler = ""
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler


@pytest.mark.parametrize("name", ["NoSuchScheduler", "FlowMatchEulerDiscreteScheduler", "UnCLIPScheduler", "AutoencoderKL"])
def test_a_scheduler_that_cannot_sample_is_named_before_the_first_step(pipeline, name):
    with pytest.raises(ValueError, match=f"scheduler: .*{name}"):
        pipeline.scheduler = name


SAMPLERS = {"DDIM", "DDPM", "DPMSolverMultistep", "EulerDiscrete", "UniPCMultistep"}
WITHOUT_ZERO_SNR = {"DEISMultistep", "DPMSolverSinglestep", "HeunDiscrete", "LMSDiscrete", "SASolver"}


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction_type", ["sample", pytest.param("v_prediction", marks=pytest.mark.slow)])
def test_an_accepted_scheduler_has_the_noise_schedule_of_the_model(prediction_type, zero_snr):
    config = ScheduleConfig(prediction_type=prediction_type, zero_terminal_snr=zero_snr, timestep_spacing="trailing")
    accepted, messages = set(), []
    for name in (name for name in dir(diffusers) if name.endswith("Scheduler")):
        try:
            scheduler = schedule.build_scheduler(name, config)
        except ValueError as error:
            messages.append(f"{name} {error}")
            continue
        accepted.add(name.removesuffix("Scheduler"))
        torch.testing.assert_close(scheduler.alphas_cumprod, schedule.alphas_cumprod(config), rtol=0, atol=1e-4)
        scheduler.set_timesteps(10)
        assert scheduler.timesteps[0] > scheduler.timesteps[-1]
    assert accepted >= SAMPLERS
    pattern = r"(\w+) scheduler: [^\n]*\1[^\n]*; use (?!\1)\w+Scheduler[^\n]*"
    assert not [message for message in messages if not re.fullmatch(pattern, message)]
    assert accepted >= {"EulerAncestralDiscrete"} or prediction_type == "sample"
    assert accepted & WITHOUT_ZERO_SNR == (set() if zero_snr else WITHOUT_ZERO_SNR)


def test_a_schedulers_own_noise_schedule_is_replaced_or_an_error():
    config = ScheduleConfig()
    for betas in ({}, {"trained_betas": [0.1] * 1000}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "squaredcos_cap_v2"}):
        scheduler = schedule.build_scheduler(diffusers.EulerDiscreteScheduler(**betas), config)
        torch.testing.assert_close(scheduler.alphas_cumprod, schedule.alphas_cumprod(config))
    with pytest.raises(ValueError, match=r"scheduler: UniPCMultistepScheduler .*noise schedule"):
        schedule.build_scheduler(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True), config)


def test_the_best_image_has_the_highest_score_of_the_model_itself(pipeline):
    prompts, names = ["red heart", "black cat"], [["5", "5/1", "5/2", "5/3"], ["9", "9/1", "9/2", "9/3"]]
    settings = {"num_inference_steps": 2, "output_type": "latent"}
    best = pipeline.generate(prompts, best_of=4, indices=[5, 9], batch_size=3, **settings)
    ranked = pipeline.generate(prompts, best_of=4, num_images_per_prompt=4, indices=[5, 9], **settings)
    for row, (prompt, keys) in enumerate(zip(prompts, names, strict=True)):
        candidates = pipeline.generate([prompt] * 4, indices=keys, **settings)
        scores = pipeline.embed_latent(candidates, keys, num_steps=1, num_draws=4) @ pipeline.embed_text(prompt)[0]
        order = scores.argsort(descending=True)
        torch.testing.assert_close(best[row], candidates[order[0]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ranked[4 * row : 4 * row + 4], candidates[order], rtol=1e-4, atol=1e-4)
    [single] = pipeline.generate("red heart", indices=[5], **settings)
    torch.testing.assert_close(candidates[0], pipeline.generate("black cat", indices=[9], **settings)[0], rtol=1e-4, atol=1e-4)
    assert any(torch.allclose(single, image, rtol=1e-4, atol=1e-4) for image in ranked[:4])


def test_the_best_of_too_few_images_or_without_scores_is_an_error(pipeline, make_task):
    assert len(pipeline.generate(["a", "b"], best_of=2, num_inference_steps=1)) == 2
    for settings in ({"best_of": 2, "num_images_per_prompt": 3}, {"best_of": 0}):
        with pytest.raises(ValueError, match="best_of"):
            pipeline.generate("a", num_inference_steps=1, **settings)
    task = make_task(ObjectiveConfig(task="generation"))
    with pytest.raises(ValueError, match=r"best_of: 2 .*both tasks"):
        task.pipeline(task.module.state_dict()).generate("a", best_of=2)


def test_the_ddim_scheduler_of_diffusers_gives_the_default_images(pipeline):
    [own] = pipeline.generate("red heart", num_inference_steps=5)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)
    [theirs] = pipeline.generate("red heart", num_inference_steps=5)
    assert np.abs(np.asarray(own).astype(int) - np.asarray(theirs)).max() <= 1


def test_one_text_is_a_list_of_one(pipeline, batch):
    [image] = pipeline.generate("red heart", num_inference_steps=2)
    assert np.array_equal(image, pipeline.generate(["red heart"], num_inference_steps=2)[0])
    assert pipeline.classify(batch.images[0], "cat", "a {c}", num_steps=1).tolist() == [[1.0]]
    assert torch.equal(pipeline.embed_text("cat"), pipeline.embed_text(["cat"]))
    assert pipeline.rank_captions(batch.images[:1], "cat", num_steps=1).tolist() == [[0]]


def test_the_pipeline_is_called_as_those_of_diffusers(pipeline):
    steps = []

    def on_step(called, index, timestep, values):
        steps.append((index, timestep))
        return {"latents": values["latents"] * 0 if index == 1 else values["latents"]}

    settings = {"num_inference_steps": 2, "guidance_scale": 3.0}
    out = pipeline(["red heart", "cat"], negative_prompt="blue", num_images_per_prompt=2, output_type="np", **settings)
    assert out.images.shape == (4, 16, 16, 3)
    assert 0 <= out.images.min() <= out.images.max() <= 1
    plain = pipeline(["red heart", "cat"], num_images_per_prompt=2, output_type="np", **settings).images
    assert not np.array_equal(out.images, plain)
    tensor = pipeline("red heart", output_type="pt", **settings).images
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1), plain[:1], atol=1e-4)
    pipeline.set_progress_bar_config(disable=True)
    latents = pipeline("red heart", callback_on_step_end=on_step, output_type="latent", **settings).images
    assert [index for index, _ in steps] == [0, 1]
    assert not latents.any()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn((2, 12, 8, 8), generator=torch.Generator().manual_seed(5))
    by_generator, by_latents = (
        pipeline.generate(["red heart", "cat"], output_type="np", **settings, **noise_of)
        for noise_of in ({"generator": generator}, {"latents": noise})
    )
    assert np.array_equal(by_generator, by_latents)
    assert pipeline.generate("cat", height=32, width=8, **settings)[0].size == (8, 32)


def test_results_do_not_depend_on_the_internal_batches(pipeline, batch):
    prompts = ["red heart", "cat", "tree"]
    whole, parts = (
        pipeline.generate(prompts, num_inference_steps=2, batch_size=n, output_type="pt", negative_prompt=["a", "b", "c"])
        for n in (3, 2)
    )
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
    embedded = [pipeline.embed_image(batch.images, num_steps=2, batch_size=n) for n in (6, 4)]
    torch.testing.assert_close(*embedded, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.generate([]), "prompt: empty"),
        (lambda p: p.generate(["a", 3]), "prompt: 3 is not a text"),
        (lambda p: p.generate(["a", "b"], negative_prompt=["a", "b", "c"]), "negative_prompt: 3 for 2"),
        (lambda p: p.generate(["a", "b"], indices=[1]), "indices: 1 for 2"),
        (lambda p: p.generate("a", latents=torch.zeros(1, 4, 8, 8)), r"latents: \(1, 4, 8, 8\) is not \(1, 12, 8, 8\)"),
        (lambda p: p.generate("a", height=15), "height: 15 is not a multiple of 4"),
        (lambda p: p.generate("a", output_type="jpg"), "output_type: 'jpg'"),
        (lambda p: p.generate("a", num_inference_steps=0), "num_steps: 0"),
        (lambda p: p.generate("a", num_images_per_prompt=0), "num_images_per_prompt, batch_size: 0, 32"),
        (lambda p: p.embed_image([]), "images: empty"),
        (lambda p: p.embed_image(["none.png"]), "none.png: no such file"),
        (lambda p: p.embed_image(np.zeros((1, 8, 8, 5))), r"images: .* \(8, 8, 5\) is not an image"),
        (lambda p: p.embed_image([Image.new("RGB", (4, 4))], keys=["a", "b"]), "keys: 2 for 1"),
        (lambda p: p.embed_image([Image.new("RGB", (4, 4))], guidance=1.0), "image_dropout"),
        (lambda p: p.classify([Image.new("RGB", (4, 4))], []), "class_names: empty"),
        (lambda p: p.embed_classes(["cat"], ["a photo"]), r"has no \{c\}"),
        (lambda p: p.embed_text([]), "captions: empty"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(pipeline, call, message):
    with pytest.raises(ValueError, match=message) as raised:
        call(pipeline)
    assert "\n" not in str(raised.value)


def test_long_captions_are_reported(pipeline):
    with pytest.warns(UserWarning, match="1 of 2 captions have more than 8 tokens and are cut, such as 'a very"):
        pipeline.embed_text(["a very long caption", "short"])


def test_embeddings_of_classes_are_computed_once(pipeline, monkeypatch):
    first = pipeline.embed_classes(["cat", "tree"], ["a {c}"])
    monkeypatch.setattr(pipeline.text_encoder, "encode", None)
    assert torch.equal(pipeline.embed_classes(["cat", "tree"], ["a {c}"]), first)


def test_half_precision(pipeline, batch):
    settings = {"num_inference_steps": 3, "guidance_scale": 1.0, "output_type": "pt"}
    exact = pipeline.embed_image(batch.images, num_steps=3), pipeline.generate("red heart", **settings)
    pipeline.to(torch.bfloat16)
    assert pipeline.dtype == torch.bfloat16
    assert pipeline.model.alphas_cumprod.dtype == torch.float32
    half = pipeline.embed_image(batch.images, num_steps=3), pipeline.generate("red heart", **settings)
    assert torch.nn.functional.cosine_similarity(half[0], exact[0]).min() > 0.98
    torch.testing.assert_close(half[1], exact[1], rtol=0, atol=0.05)
    assert pipeline.classify(batch.images, ["cat", "tree"], num_steps=2).dtype == torch.float32


def test_an_untrained_model_and_shuffled_images_are_at_chance(pipeline):
    """400 images of 100 classes: at chance, 4 are correct on average; 14 or more have a probability below 1e-4."""
    images = np.random.default_rng(0).integers(0, 256, (400, 16, 16, 3), dtype=np.uint8)
    labels = np.arange(400) % 100
    queries, classes = pipeline.embed_image(images, num_steps=2), pipeline.embed_classes([f"c {i}" for i in range(100)])
    untrained = ZeroShotScores.from_embeddings(queries.numpy(), classes.numpy(), labels)
    for scores in (untrained, untrained.with_shuffled_images()):
        assert scores.accuracy() * 400 < 14
    identity = np.eye(100, dtype=np.float32)
    perfect = ZeroShotScores.from_embeddings(identity[labels], identity, labels)
    assert perfect.accuracy() == subset_accuracy(identity[labels], identity, labels, 10) == 1.0
    assert perfect.with_shuffled_images().accuracy() * 400 < 14  # shuffled images bring even a perfect model to chance


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """Return make(clip, *options), which builds a task from a folder like SD v1 and exports it.

    `clip` selects CLIP's text encoder instead of SD's. make returns the task, the export folder and the text that states what can
    open the export.
    """
    folder = tmp_path_factory.mktemp("sd")

    def make(clip=False, *options):
        root = save_stable_diffusion(folder / "sd", *options)
        path = str(save_clip(folder / "clip")) if clip else ""
        head = HeadConfig(num_layers=1, width=32, num_heads=2)
        text_encoder = TextEncoderConfig(path=path, token_dim=WIDTH, embedding_dim=WIDTH)
        config = DiffDisConfig(image_size=16, head=head, text_encoder=text_encoder, warm_start=str(root), image_dropout=0.1)
        task = DiffDisTask(config, ObjectiveConfig())
        opened = task.save_pretrained(task.module.state_dict(), folder / "export", {"recipe": "sd_v1_laion", "step": 7})
        return task, folder / "export", opened

    return make


@pytest.mark.parametrize(
    ("clip", "options"),
    [(False, ()), (True, ()), (False, (SD_2, V_PREDICTION)), (False, ({}, SAMPLE)), (False, ({}, SAMPLE | ZERO_SNR))],
)
def test_an_export_gives_the_same_images_in_diffusers(stable_diffusion, batch, clip, options):
    task, export, opened = stable_diffusion(clip, *options)
    assert "diffusers' StableDiffusionPipeline" in opened
    loss, _ = task.module(task.inputs(batch, torch.device("cpu")), 0)
    loss.backward()
    stock, ours = StableDiffusionPipeline.from_pretrained(export), DiffDisPipeline.from_pretrained(export)
    for scheduler in (None, diffusers.DPMSolverMultistepScheduler):
        if scheduler:
            stock.scheduler, ours.scheduler = (scheduler.from_config(p.scheduler.config) for p in (stock, ours))
        settings = {"num_inference_steps": 5, "output_type": "np", "negative_prompt": ["a", "b"]}
        theirs = stock(["red heart", "cat"], generator=torch.Generator().manual_seed(3), height=16, width=16, **settings).images
        own = ours(["red heart", "cat"], generator=torch.Generator().manual_seed(3), **settings).images
        np.testing.assert_allclose(own, theirs, atol=1e-4)
    # Weights from a file may lie at other addresses, where sums of a CPU's kernels differ in the last bit.
    torch.testing.assert_close(ours.embed_text("cat"), task.text_encoder.encode(["cat"])[1])
    assert ours.embed_image(batch.images, num_steps=2, guidance=1.0).shape == (6, WIDTH)
    names = load_file(export / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names), "as in all published files"
    card = (export / "README.md").read_text()
    assert "license:" in card
    assert "| Recipe | sd_v1_laion |" in card


def test_encoders_in_half_precision_are_exported_as_they_were_loaded(stable_diffusion, tmp_path):
    """As on an accelerator, where a training keeps them in `model.encoder_dtype` and on another device than the export."""
    task, export, _ = stable_diffusion(True)
    expected = {name: load_file(export / name / f) for name, f in (
        ("vae", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors"),
    )}  # fmt: skip
    task.autoencoder.to(torch.bfloat16)
    task.text_encoder.to(torch.bfloat16)
    assert "diffusers' StableDiffusionPipeline" in task.save_pretrained(task.module.state_dict(), tmp_path)
    for name, tensors in expected.items():
        (file,) = (tmp_path / name).glob("*.safetensors")
        saved = load_file(file)
        assert all(torch.equal(saved[key], value) for key, value in tensors.items())


def test_an_export_that_diffusers_reads_differently_is_an_error(stable_diffusion, tmp_path):
    task, export, _ = stable_diffusion()
    values = json.loads((export / "vae" / "config.json").read_text())
    (export / "vae" / "config.json").write_text(json.dumps(values | {"scaling_factor": 1.0}))
    with pytest.raises(ValueError, match="generates another image"):
        check_export(task.pipeline(task.module.state_dict()), export)


def test_a_bare_unet_starts_a_model_whose_encoders_come_from_elsewhere(stable_diffusion):
    given = stable_diffusion()[0].config
    bare = dataclasses.replace(given, warm_start=f"{given.warm_start}/unet")
    task = DiffDisTask(bare, ObjectiveConfig())
    expected = UNet2DConditionModel.from_pretrained(bare.warm_start).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in task.module.model.unet.state_dict().items())
    for name in ("autoencoder", "text_encoder"):
        without = dataclasses.replace(bare, **{name: dataclasses.replace(getattr(given, name), path="")})
        with pytest.raises(ValueError, match=rf"model\.{name}\.path"):
            DiffDisTask(without, ObjectiveConfig())
