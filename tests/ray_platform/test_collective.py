"""The decorator `@collective` and its check."""

import os

import pytest
import torch

from ray_platform.train.collective import CHECK_VARIABLE, collective

pytestmark = pytest.mark.ranks


@collective
def gather_rank(rank):
    ranks = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, rank)
    return ranks


@collective
def gather_nothing(rank):
    return []


def call(rank, only_rank_0):
    os.environ[CHECK_VARIABLE] = "1"
    try:
        return (gather_rank if rank == 0 or not only_rank_0 else gather_nothing)(rank)
    except RuntimeError as error:
        return str(error)
    finally:
        del os.environ[CHECK_VARIABLE]


def test_ranks_that_call_different_collectives_fail_instead_of_hanging(two_ranks):
    assert two_ranks.run(call, False) == [[0, 1], [0, 1]]
    for message in two_ranks.run(call, True):
        assert "gather_rank" in message
        assert "gather_nothing" in message
