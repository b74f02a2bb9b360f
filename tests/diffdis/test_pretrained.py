"""Common layouts of pretrained weights load with the same outputs as in their libraries, or fail with a one-line error."""

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection

from diffdis import schedule
from diffdis.autoencoder import build_autoencoder
from diffdis.config import DiffDisConfig, HeadConfig, ObjectiveConfig, ScheduleConfig, TextEncoderConfig
from diffdis.pretrained import weight_files
from diffdis.task import DiffDisTask
from diffdis.text_encoder import build_text_encoder, text_encoder_widths
from diffdis.warm_start import resolve_pretrained
from tests.support.tiny_checkpoints import (
    SAMPLE,
    SD_2,
    V_PREDICTION,
    WIDTH,
    ZERO_SNR,
    save_clip,
    save_mean_pool_encoder,
    save_stable_diffusion,
)

UNET, TEXT = "unet/diffusion_pytorch_model", "text_encoder/model"


def started_from(folder, **changes):
    """Return a recipe's configuration that sets only the folder, as users start."""
    head = HeadConfig(num_layers=1, width=32, num_heads=2)
    return DiffDisConfig(image_size=16, head=head, warm_start=str(folder), **changes)


def set_values(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rename_as(suffix):
    def change(folder):
        for stem in (UNET, "vae/diffusion_pytorch_model", TEXT):
            (folder / f"{stem}.safetensors").rename(folder / f"{stem}{suffix}")

    return change


def convert(dtype):
    def change(folder):
        for stem in (UNET, "vae/diffusion_pytorch_model", TEXT):
            file = folder / f"{stem}.safetensors"
            save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file, {"format": "pt"})
        set_values(folder / "text_encoder" / "config.json", dtype=str(dtype).removeprefix("torch."))

    return change


def as_bin(folder):
    for stem, name in ((UNET, UNET), ("vae/diffusion_pytorch_model",) * 2, (TEXT, "text_encoder/pytorch_model")):
        torch.save(load_file(folder / f"{stem}.safetensors"), folder / f"{name}.bin")
        (folder / f"{stem}.safetensors").unlink()


def in_shards(folder):
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(folder / "unet", max_shard_size="100KB")
    CLIPTextModel.from_pretrained(folder / "text_encoder").save_pretrained(folder / "text_encoder", max_shard_size="20KB")
    for stem in (UNET, TEXT):
        (folder / f"{stem}.safetensors").unlink(missing_ok=True)
    assert len(list((folder / "unet").glob("*-of-*.safetensors"))) > 1


def without_prefix(folder):
    """As transformers 5 saves a CLIPTextModel."""
    file = folder / f"{TEXT}.safetensors"
    save_file({name.removeprefix("text_model."): value for name, value in load_file(file).items()}, file, {"format": "pt"})


def with_old_names(folder):
    """Rename attention weights to the older names in SD v1's published autoencoder."""
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    tensors = {}
    for name, value in load_file(file).items():
        for new, before in old.items():
            name = name.replace(new, before)
        tensors[name] = value
    save_file(tensors, file, {"format": "pt"})


def as_xl(folder):
    (folder / "text_encoder_2").mkdir()
    set_values(folder / "unet" / "config.json", addition_embed_type="text_time")


def as_transformer(name):
    def change(folder):
        shutil.rmtree(folder / "unet")
        (folder / "transformer").mkdir()
        (folder / "transformer" / "config.json").write_text(json.dumps({"_class_name": name}))

    return change


def with_hostile_pickle(folder):
    (folder / f"{UNET}.safetensors").unlink()
    (folder / f"{UNET}.bin").write_bytes(pickle.dumps(print))


def without_a_tensor(folder):
    tensors = load_file(folder / f"{UNET}.safetensors")
    del tensors["conv_in.weight"]
    save_file(tensors, folder / f"{UNET}.safetensors", {"format": "pt"})


def unet_values(**values):
    return lambda folder: set_values(folder / "unet" / "config.json", **values)


def scheduler_values(**values):
    return lambda folder: set_values(folder / "scheduler" / "scheduler_config.json", **values)


LOADED = {
    "Stable Diffusion 1": ({}, {}, lambda folder: None),
    "Stable Diffusion 2 base": (SD_2, {}, lambda folder: None),
    "Stable Diffusion 2.1": (SD_2, V_PREDICTION, lambda folder: None),
    "v-prediction with zero terminal SNR": (SD_2, V_PREDICTION | ZERO_SNR, lambda folder: None),
    "a prediction of x0": ({}, SAMPLE, lambda folder: None),
    "linear betas": ({}, {"beta_schedule": "linear"}, lambda folder: None),
    "another time embedding": ({"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-3}, {}, lambda folder: None),
    "a variant": ({}, {}, rename_as(".fp16.safetensors")),
    "float16": ({}, {}, convert(torch.float16)),
    "bfloat16": ({}, {}, convert(torch.bfloat16)),
    "bin": ({}, {}, as_bin),
    "shards": ({}, {}, in_shards),
    "old names in the autoencoder": ({}, {}, with_old_names),
    "a text encoder that transformers 5 saved": ({}, {}, without_prefix),
}


@pytest.mark.parametrize("layout", LOADED)
def test_a_layout_has_the_outputs_of_the_libraries(tmp_path, layout):
    unet_options, scheduler, change = LOADED[layout]
    folder = save_stable_diffusion(tmp_path / "sd", unet_options, scheduler)
    kinds = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
    expected = {name: kind.from_pretrained(folder / name).eval() for name, kind in kinds.items()}
    change(folder)
    if layout in ("float16", "bfloat16"):
        expected = {name: module.to(getattr(torch, layout)).float() for name, module in expected.items()}

    task = DiffDisTask(started_from(folder), ObjectiveConfig())

    z, t, c = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.randn(3, 77, WIDTH)
    tokens = task.text_encoder.tokenizer(["a red heart"], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        close(task.module.model.predict_image(z, t, c), expected["unet"](z, t, c).sample)
        close(task.text_encoder.encode(["a red heart"])[0], expected["text_encoder"](tokens).last_hidden_state)
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        latent = expected["vae"].encode(pixels).latent_dist.mode() * expected["vae"].config.scaling_factor
        close(task.autoencoder.encode_image(pixels), latent)
    close(schedule.alphas_cumprod(task.config.schedule), DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod)
    assert task.config.schedule.prediction_type == scheduler.get("prediction_type", "epsilon")


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


REJECTED = {
    "Stable Diffusion XL": (as_xl, "is Stable Diffusion XL"),
    "an inpainting model": (unet_values(in_channels=9), "is an inpainting model"),
    "an LCM": (unet_values(time_cond_proj_dim=256), r"latent consistency model \(LCM\)"),
    "an LCM's scheduler": (scheduler_values(_class_name="LCMScheduler"), r"latent consistency model \(LCM\)"),
    "Stable Diffusion 3": (as_transformer("SD3Transformer2DModel"), "is Stable Diffusion 3"),
    "Flux": (as_transformer("FluxTransformer2DModel"), "is Flux"),
    "an upscaler": (unet_values(num_class_embeds=1000), "class embeddings"),
    "a U-Net with other parts": (unet_values(encoder_hid_dim=64), "encoder_hid_dim is 64"),
    "another text encoder's U-Net": (unet_values(cross_attention_dim=64), "takes 64"),
    "another noise schedule": (scheduler_values(beta_schedule="squaredcos_cap_v2"), "beta_schedule squaredcos_cap_v2"),
    "a prediction of a flow": (scheduler_values(prediction_type="flow_prediction"), "prediction_type flow_prediction"),
    "zero terminal SNR that is never sampled": (
        scheduler_values(**SAMPLE, rescale_betas_zero_snr=True), "timestep_spacing: leading",
    ),
    "other channels": (lambda f: set_values(f / "vae" / "config.json", latent_channels=16), "16 channels"),
    "a pickle": (with_hostile_pickle, r"diffusion_pytorch_model\.bin: not a file of plain tensors"),
    "no weights": (lambda folder: (folder / f"{UNET}.safetensors").unlink(), "no weights"),
    "a missing tensor": (without_a_tensor, r"lacks the tensor conv_in\.weight"),
    "a text encoder that is a T5": (
        lambda folder: set_values(folder / "text_encoder" / "config.json", model_type="t5"), "has a t5, which is not supported",
    ),
    "a text encoder that is a BERT": (
        lambda folder: set_values(folder / "text_encoder" / "config.json", model_type="bert"), "kind mean_pool",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", REJECTED)
def test_what_cannot_be_used_is_one_line(tmp_path, layout):
    change, message = REJECTED[layout]
    folder = save_stable_diffusion(tmp_path / "sd")
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        DiffDisTask(started_from(folder), ObjectiveConfig())
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("model.")


def test_fields_that_contradict_the_folder(tmp_path, caplog):
    folder = save_stable_diffusion(tmp_path / "sd", SD_2, V_PREDICTION)
    values = resolve_pretrained(started_from(folder))
    assert (values.unet.attention_head_dim, values.unet.options["use_linear_projection"]) == ((2, 4), True)
    assert resolve_pretrained(values) == values
    assert not caplog.records
    trailing = ScheduleConfig(timestep_spacing="trailing")
    assert resolve_pretrained(started_from(folder, schedule=trailing)).schedule.timestep_spacing == "trailing"
    assert "model.schedule.timestep_spacing: trailing instead of leading" in caplog.text
    larger = resolve_pretrained(DiffDisConfig(image_size=32, warm_start=str(folder)))
    assert larger.unet.sample_size == 16
    assert "model.image_size: 32 px, latents of 16" in caplog.text


# --- Text encoders -------------------------------------------------------------------------------------------------------------


def clip_folder(folder, kind, *, bin=False, architectures=True, **config):
    """Save a CLIP with one of transformers' classes. Also returns its pooled embedding of a caption."""
    whole = save_clip(folder)
    model = kind.from_pretrained(whole)
    if kind is not CLIPModel:
        model.save_pretrained(whole)
    if bin:
        torch.save(load_file(whole / "model.safetensors"), whole / "pytorch_model.bin")
        (whole / "model.safetensors").unlink()
    values = json.loads((whole / "config.json").read_text())
    if not architectures:
        values.pop("architectures")
    values.get("text_config", values).update(config)
    (whole / "config.json").write_text(json.dumps(values))
    return whole, model.eval()


@pytest.mark.parametrize("kind", [CLIPModel, CLIPTextModel, CLIPTextModelWithProjection])
@pytest.mark.parametrize(
    "layout",
    [{}, {"bin": True}, {"architectures": False}, {"eos_token_id": 2}, {"projection_dim": 512}],
    ids=["plain", "bin", "no architectures", "legacy eos id", "wrong projection_dim"],
)
def test_a_clip_gives_the_embedding_of_transformers(tmp_path, kind, layout):
    folder, model = clip_folder(tmp_path / "clip", kind, **layout)
    config = TextEncoderConfig(path=str(folder), token_dim=WIDTH, embedding_dim=WIDTH)
    assert text_encoder_widths(config) == (WIDTH, WIDTH)
    for _ in range(2):  # the result is deterministic
        encoder = build_text_encoder(config)
        tokens = encoder.tokenizer(["a red heart", "b"], padding="max_length", max_length=77, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            if kind is CLIPModel:
                pooled = model.get_text_features(tokens).pooler_output
            else:
                out = model(tokens)
                pooled = out.text_embeds if kind is CLIPTextModelWithProjection else out.pooler_output
            close(encoder.encode(["a red heart", "b"])[1], torch.nn.functional.normalize(pooled, dim=-1))


def test_a_text_encoder_of_another_kind_or_width(tmp_path):
    bert = save_mean_pool_encoder(tmp_path / "bert")
    with pytest.raises(ValueError, match="kind mean_pool"):
        build_text_encoder(TextEncoderConfig(path=str(bert)))
    with pytest.raises(ValueError, match=r"token_dim, embedding_dim = 32, 32"):
        build_text_encoder(TextEncoderConfig(kind="mean_pool", path=str(bert)))
    with pytest.raises(ValueError, match=r"model\.text_encoder\.path"):
        build_text_encoder(TextEncoderConfig())
    set_values(bert / "config.json", model_type="t5")
    with pytest.raises(ValueError, match="has a t5"):
        build_text_encoder(TextEncoderConfig(kind="mean_pool", path=str(bert)))


def test_the_shift_factor_of_an_autoencoder_is_used(tmp_path):
    folder = save_stable_diffusion(tmp_path / "sd")
    set_values(folder / "vae" / "config.json", shift_factor=0.5, scaling_factor=2.0)
    config = resolve_pretrained(started_from(folder)).autoencoder
    autoencoder, image = build_autoencoder(config), torch.rand(1, 3, 16, 16)
    mode = AutoencoderKL.from_pretrained(folder / "vae").encode(image).latent_dist.mode()
    close(autoencoder.encode_image(image), (mode - 0.5) * 2.0)
    close(autoencoder.decode_latent(autoencoder.encode_image(image)), autoencoder.vae.decode(mode).sample)
    set_values(folder / "vae" / "config.json", latents_mean=[0.0] * 4)
    with pytest.raises(ValueError, match="latents_mean"):
        build_autoencoder(config)


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    """Uses the cache layout of the hub's client: tests cannot download, but cached files are used offline."""
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in ("sd", "older", "incomplete"):
        root = tmp_path / f"models--someone--{name}"
        folder = save_stable_diffusion(root / "snapshots" / commit)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text(commit)
        # The client's list of all files of the repository. Older clients wrote none.
        files = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
        files += ["README.md", "v1-5-pruned.ckpt", "unet/diffusion_pytorch_model.non_ema.safetensors"]  # not downloaded
        listing = {"format_version": 1, "files": {file: {"size": 1, "blob_id": "0" * 40} for file in files}}
        if name != "older":
            (root / "trees").mkdir()
            (root / "trees" / f"{commit}.json").write_text(json.dumps(listing))
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("sd", "older"):
        assert DiffDisTask(started_from(f"someone/{name}"), ObjectiveConfig()).config.unet.block_out_channels == (16, 32)
    for name, problem in (("incomplete", "its download is incomplete"), ("else", "no such folder, and the hub")):
        with pytest.raises(FileNotFoundError, match=rf"model\.warm_start: someone/{name}: {problem}"):
            DiffDisTask(started_from(f"someone/{name}"), ObjectiveConfig())


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", "model.fp16.safetensors", "pytorch_model.bin"], ["model.safetensors"]),
        (["model.fp16.safetensors", "pytorch_model.bin"], ["model.fp16.safetensors"]),
        (["diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.fp16.safetensors"],
         ["diffusion_pytorch_model.fp16.safetensors"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
         ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]),
        (["pytorch_model.bin", "flax_model.msgpack", "open_clip_pytorch_model.bin"], ["pytorch_model.bin"]),
        (["config.json"], []),
    ],
)  # fmt: skip
def test_which_files_are_the_weights(names, chosen):
    assert weight_files(names) == chosen
