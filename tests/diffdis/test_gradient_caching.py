"""Gradient caching: a step of several micro-batches, over any number of ranks, has the gradients of one large batch."""

import pytest
import torch
from torch import nn

from diffdis import losses
from diffdis.config import ObjectiveConfig
from diffdis.pipeline import DiffDisPipeline
from tests.support.ranks import shared_ranks

CPU = torch.device("cpu")


def gradients(task):
    return {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}


def assert_gradients_close(found, expected, tolerance=1e-5):
    """Compare all gradients as one vector, and the temperature's separately, because it is one number among thousands."""
    assert found.keys() == expected.keys()
    difference = torch.nn.utils.get_total_norm([found[name] - value for name, value in expected.items()])
    assert difference <= tolerance * torch.nn.utils.get_total_norm(expected.values())
    temperature = "model.temperature.log_scale"
    torch.testing.assert_close(found[temperature], expected[temperature], rtol=tolerance, atol=1e-7)


def accumulated(task, inputs, num_parts):
    """Return the gradients that a trainer accumulates over the micro-batches of a step, and their mean loss."""
    size = len(inputs["latent"]) // num_parts
    parts = [{k: v if k == "null_states" else v[i * size : (i + 1) * size] for k, v in inputs.items()} for i in range(num_parts)]
    seeds = list(range(num_parts))
    losses = []
    for part, seed, more in zip(parts, seeds, task.precompute_step_loss(parts, seeds, control=False), strict=True):
        loss, metrics = task.module(part, seed, **more)
        (loss / num_parts).backward()
        losses.append((loss.item(), (metrics["loss_alignment"][0] / metrics["loss_alignment"][1]).item()))
    return losses, gradients(task), [task.module.sample_noise(part, seed) for part, seed in zip(parts, seeds, strict=True)]


def with_noise(task, inputs, noise):
    """Return the loss and the metrics of a batch with the given random numbers."""
    task.module.sample_noise = lambda *_: noise
    return task.module(inputs, 0)


def make_alignment_task(make_task, negatives="step", task="alignment", **fields):
    return make_task(ObjectiveConfig(task=task, negatives=negatives, caption_dropout=0.0, **fields))


@pytest.mark.parametrize(
    ("name", "num_draws", "loss_name"),
    [
        *(("alignment", 1, "infonce"), ("alignment", 3, "infonce"), ("joint", 1, "infonce"), ("clip", 1, "infonce")),
        *(("alignment", 3, "siglip"), ("joint", 1, "siglip")),
    ],
)
def test_gradient_caching_equals_one_large_batch(make_task, batch, name, num_draws, loss_name):
    fields = {"task": name, "num_draws": num_draws, "alignment_loss": loss_name}
    task = make_alignment_task(make_task, **fields)
    inputs = task.inputs(batch, CPU)
    losses, found, noise = accumulated(task, inputs, 3)
    whole = make_alignment_task(make_task, **fields)
    together = type(noise[0])(*(torch.cat(values) for values in zip(*noise, strict=True)))
    loss, metrics = with_noise(whole, inputs, together)
    loss.backward()
    torch.testing.assert_close(sum(total for total, _ in losses) / 3, loss.item(), rtol=1e-5, atol=1e-6)
    alignment = (metrics["loss_alignment"][0] / metrics["loss_alignment"][1]).item()
    torch.testing.assert_close(sum(logged for _, logged in losses) / 3, alignment, rtol=1e-5, atol=1e-6)
    assert_gradients_close(found, gradients(whole))
    alone = make_alignment_task(make_task, "micro_batch", **fields)
    assert accumulated(alone, inputs, 3)[0][0][1] < losses[0][1], "fewer negatives are easier"


class WeightedInfoNCE(nn.Module):
    """A loss with a trainable parameter, registered as a new entry of the table."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.5))

    def forward(self, predicted, query, caption_ids, scale):
        return losses.InfoNCE()(predicted, query, caption_ids, scale * self.weight)


def test_a_loss_with_parameters_is_injected_by_name(make_task, batch, tmp_path, monkeypatch):
    monkeypatch.setitem(losses.ALIGNMENT_LOSSES, "weighted", WeightedInfoNCE)
    task = make_alignment_task(make_task, alignment_loss="weighted")
    inputs = task.inputs(batch, CPU)
    found = accumulated(task, inputs, 3)
    whole = make_alignment_task(make_task, alignment_loss="weighted")
    noise = type(found[2][0])(*(torch.cat(values) for values in zip(*found[2], strict=True)))
    with_noise(whole, inputs, noise)[0].backward()
    assert_gradients_close(found[1], gradients(whole))
    assert "alignment.weight" in found[1]
    assert any(group["name"].startswith("new") and len(group["params"]) for group in task.parameter_groups())
    task.save_pretrained(task.module.state_dict(), tmp_path)
    assert DiffDisPipeline.from_pretrained(tmp_path).embed_image(batch.images, num_steps=1).shape == (6, 32)
    with pytest.raises(ValueError, match=r"objective\.alignment_loss: .*infonce"):
        make_alignment_task(make_task, alignment_loss="infonse")


def cached_on_a_rank(rank, world_size, task, inputs, num_parts):
    size = len(inputs["latent"]) // world_size
    mine = {k: v if k == "null_states" else v[rank * size : (rank + 1) * size] for k, v in inputs.items()}
    task.module.sample_noise = fixed_noise(task, inputs, rank * num_parts, size // num_parts)
    return accumulated(task, mine, num_parts)[1]


def fixed_noise(task, inputs, first, size):
    """Return a `sample_noise` that gives sample i of the global batch the same noise on any rank."""
    whole = type(task.module).sample_noise(task.module, inputs, 5)

    def sample_noise(part, seed):
        start = (first + seed) * size
        return type(whole)(*(values[start : start + size] for values in whole))

    return sample_noise


@pytest.mark.ranks
def test_gradient_caching_over_two_ranks_equals_one_large_batch(make_task, batch):
    inputs = make_alignment_task(make_task).inputs(batch, CPU)
    found = []
    for world_size, num_parts in ((1, 1), (2, 3)):
        group = shared_ranks(world_size)
        results = group.run(cached_on_a_rank, world_size, make_alignment_task(make_task), inputs, num_parts)
        found.append({name: torch.stack([r[name] for r in results]).mean(dim=0) for name in results[0]})
    assert_gradients_close(found[1], found[0])
