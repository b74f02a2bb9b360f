"""Precomputed encodings equal the encodings of a training step."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import torch

from diffdis.autoencoder import to_latents
from diffdis.encoder import FrozenEncoder, move_encoders
from diffdis.text_encoder import LENGTH_STEP


def test_a_precomputed_batch_gives_the_inputs_of_its_images(make_task, tiny_model, batch):
    encoded = FrozenEncoder(tiny_model).encode(batch.images, batch.captions)
    assert {value.dtype.name for value in encoded.values()} == {"float16"}
    precomputed = SimpleNamespace(tensors=encoded, captions=batch.captions)
    cpu = torch.device("cpu")
    expected, found = make_task().inputs(batch, cpu), make_task().inputs(precomputed, cpu)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_a_score_in_half_precision_leaves_training_the_same_inputs(make_task, tiny_model, batch):
    """Frozen encoders disable autocast; otherwise a preview would leave different encodings in the cache."""
    cached = dataclasses.replace(tiny_model.text_encoder, cache_size=10)
    task, cpu = make_task(text_encoder=cached), torch.device("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scored = task.inputs(batch, cpu)
    expected = make_task(text_encoder=cached).inputs(batch, cpu)
    for found in (scored, task.inputs(batch, cpu)):
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_cached_captions_are_padded_by_their_own_length_alone(make_task, tiny_model):
    """Otherwise the batch in which a caption first occurs would matter, and most of the encoder's work would be padding."""
    captions = ["red", "red heart", "a red heart on a green leaf in a blue circle", "cat", ""]
    cached = dataclasses.replace(tiny_model.text_encoder, cache_size=10)
    encoder = make_task(text_encoder=cached).text_encoder
    widths = []
    encoder.model.register_forward_pre_hook(lambda _, __, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    states, queries = encoder.encode(captions)
    assert sorted(widths) == [LENGTH_STEP, cached.max_length]
    alone = [make_task(text_encoder=cached).text_encoder.encode([caption]) for caption in captions]
    assert torch.equal(states, torch.cat([s for s, _ in alone]))
    assert torch.equal(queries, torch.cat([q for _, q in alone]))
    expected = make_task().text_encoder.encode(captions)
    torch.testing.assert_close((states, queries), expected, rtol=1e-4, atol=1e-5)


def test_an_accelerator_gets_half_precision_and_channels_last_weights(tiny_model, small_vae):
    """The images of a batch are channels-last already, and other weights would be converted at each use."""
    seen, config = [], dataclasses.replace(tiny_model, encoder_dtype="float16")
    small_vae.vae.encoder.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    to_latents(small_vae, np.zeros((2, 16, 16, 3), np.uint8), torch.device("cpu"))
    move_encoders(config, torch.device("meta"), small_vae)
    weight = small_vae.vae.encoder.conv_in.weight
    assert weight.dtype == torch.float16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_half_precision_changes_latents_by_less_than_a_percent(small_vae):
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    expected = to_latents(small_vae, images, torch.device("cpu"))
    found = to_latents(small_vae.to(torch.float16), images, torch.device("cpu"))
    assert 0 < (found - expected).norm() < 0.01 * expected.norm()
