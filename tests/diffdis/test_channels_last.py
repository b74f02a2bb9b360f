"""With channels-last weights and inputs, no feature map of a training step has another layout."""

import dataclasses

import pytest
import torch
from torch import nn

from diffdis.config import ObjectiveConfig

CHANNELS_LAST = torch.channels_last


def is_converted(x: torch.Tensor) -> bool:
    """Return whether a convolution with channels-last weights would convert this input."""
    return x.shape[1] > 1 and x[0, 0].numel() > 1 and not x.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("options", [{}, {"use_linear_projection": True}], ids=["convolutions", "linear"])
@pytest.mark.parametrize("task_name", ["joint", "generation", "alignment"])
def test_no_convolution_of_a_step_converts_its_input(make_task, tiny_model, batch, visibility, task_name, options):
    unet = dataclasses.replace(tiny_model.unet, options=options)
    task = make_task(ObjectiveConfig(task=task_name), query_visibility=visibility, unet=unet)
    inputs = task.inputs(batch, torch.device("cpu"))
    expected, _ = task.module(inputs, 0)
    task.module.to(memory_format=CHANNELS_LAST)
    seen, converted = set(), []

    def watch(name):
        def hook(_, arguments):
            seen.add(name)
            converted.extend([name] * is_converted(arguments[0]))

        return hook

    for name, module in task.module.model.unet.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(watch(name))
    images = {name: x.contiguous(memory_format=CHANNELS_LAST) if x.ndim == 4 else x for name, x in inputs.items()}
    for mode in (True, False):
        task.module.train(mode)
        loss, _ = task.module(images, 0)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert converted == []
    assert "conv_in" in seen
    assert any("shortcut" in name for name in seen)
    assert any("up_blocks" in name for name in seen) == (task_name != "alignment")
