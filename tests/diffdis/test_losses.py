"""The chunked loss over all ranks equals the reference on the concatenated batch, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from diffdis import losses
from tests.diffdis.plain_losses import plain_alignment_loss, plain_sigmoid_loss
from tests.support.ranks import shared_ranks

GLOBAL_BATCH, WIDTH = 12, 8


def whole_batch(num_draws):
    generator = torch.Generator().manual_seed(num_draws)
    predicted = F.normalize(torch.randn(GLOBAL_BATCH, num_draws, WIDTH, generator=generator), dim=-1)
    query = F.normalize(torch.randn(GLOBAL_BATCH, WIDTH, generator=generator), dim=-1)
    ids = torch.arange(GLOBAL_BATCH)
    ids[[3, 7, 11]] = 3  # three pairs with the same caption, on different ranks
    ids[1] = 0
    query = query[[0, 0, 2, 3, 4, 5, 6, 3, 8, 9, 10, 3]]  # equal captions have equal queries
    return predicted, query, ids, torch.tensor(9.0)


BIAS = -2.0


def build(name):
    """Return a loss of the table, whose parameters, if any, all have the value BIAS, and the parameters."""
    loss = losses.build_alignment_loss(name)
    parameters = list(loss.parameters()) if isinstance(loss, torch.nn.Module) else []
    for parameter in parameters:
        torch.nn.init.constant_(parameter, BIAS)
    return loss, parameters


def plain(name, *arguments):
    """Return the reference's result and parameters."""
    if name == "infonce":
        return plain_alignment_loss(*arguments), []
    bias = torch.tensor([BIAS], requires_grad=True)
    return plain_sigmoid_loss(*arguments, bias), [bias]


def chunked_on_a_rank(rank, world_size, name, num_draws, chunk, autocast):
    losses.TEXT_CHUNK = chunk
    predicted, query, ids, scale = whole_batch(num_draws)
    size = GLOBAL_BATCH // world_size
    mine = slice(rank * size, (rank + 1) * size)
    local = predicted[mine].clone().requires_grad_()
    scale.requires_grad_()
    loss, parameters = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = loss(local, query[mine], ids[mine], scale)
    assert result.mean.dtype == torch.float32
    result.mean.backward()
    return result.mean.detach(), result.loss, result.correct, local.grad, [x.grad for x in (scale, *parameters)]


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    return shared_ranks(request.param)


@pytest.mark.parametrize("name", ["infonce", "siglip"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("chunk", [5, 64])
def test_value_and_gradient_equal_the_plain_loss(ranks, name, num_draws, chunk, autocast):
    found = ranks.run(chunked_on_a_rank, ranks.world_size, name, num_draws, chunk, autocast)
    predicted, query, ids, scale = whole_batch(num_draws)
    predicted.requires_grad_()
    scale.requires_grad_()
    expected, parameters = plain(name, predicted, query, ids, scale)
    expected.loss.mean().backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.stack([f[0] for f in found]).mean(), expected.loss.mean(), **close)
    torch.testing.assert_close(torch.cat([f[1] for f in found], dim=1), expected.loss, **close)
    assert torch.equal(torch.cat([f[2] for f in found], dim=1), expected.correct)
    # The trainer averages the gradients of the ranks.
    torch.testing.assert_close(torch.cat([f[3] for f in found]) / ranks.world_size, predicted.grad, **close)
    of_parameters = [torch.stack(grads).mean(dim=0) for grads in zip(*(f[4] for f in found), strict=True)]
    torch.testing.assert_close(of_parameters, [x.grad for x in (scale, *parameters)], **close)
