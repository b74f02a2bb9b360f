"""What is computed beforehand is what a step would compute."""

from types import SimpleNamespace

import torch

from diffdis.encoder import FrozenEncoder


def test_a_precomputed_batch_gives_the_inputs_of_its_images(make_task, tiny_model, batch):
    encoded = FrozenEncoder(tiny_model).encode(batch.images, batch.captions)
    assert {value.dtype.name for value in encoded.values()} == {"float16"}
    precomputed = SimpleNamespace(tensors=encoded, captions=batch.captions)
    cpu = torch.device("cpu")
    expected, found = make_task().inputs(batch, cpu), make_task().inputs(precomputed, cpu)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
