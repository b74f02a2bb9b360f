"""The chunked loss over all ranks equals the reference on the concatenated batch, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from diffdis import losses
from tests.diffdis.plain_losses import plain_alignment_loss
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


def chunked_on_a_rank(rank, world_size, num_draws, chunk, autocast):
    losses.TEXT_CHUNK = chunk
    predicted, query, ids, scale = whole_batch(num_draws)
    size = GLOBAL_BATCH // world_size
    mine = slice(rank * size, (rank + 1) * size)
    local = predicted[mine].clone().requires_grad_()
    scale.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        result = losses.InfoNCE()(local, query[mine], ids[mine], scale)
    assert result.mean.dtype == torch.float32
    result.mean.backward()
    return result.mean.detach(), result.loss, result.correct, local.grad, scale.grad


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(request):
    return shared_ranks(request.param)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("num_draws", [1, 3])
@pytest.mark.parametrize("chunk", [5, 64])
def test_value_and_gradient_equal_the_plain_loss(ranks, num_draws, chunk, autocast):
    found = ranks.run(chunked_on_a_rank, ranks.world_size, num_draws, chunk, autocast)
    predicted, query, ids, scale = whole_batch(num_draws)
    predicted.requires_grad_()
    scale.requires_grad_()
    plain = plain_alignment_loss(predicted, query, ids, scale)
    plain.loss.mean().backward()
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.stack([f[0] for f in found]).mean(), plain.loss.mean(), **close)
    torch.testing.assert_close(torch.cat([f[1] for f in found], dim=1), plain.loss, **close)
    assert torch.equal(torch.cat([f[2] for f in found], dim=1), plain.correct)
    # The trainer averages the gradients of the ranks.
    torch.testing.assert_close(torch.cat([f[3] for f in found]) / ranks.world_size, predicted.grad, **close)
    torch.testing.assert_close(torch.stack([f[4] for f in found]).mean(), scale.grad, **close)
