"""Copies to a device."""

import numpy as np
import torch

from diffdis.transfer import copy_to


def test_arrays_of_any_type_and_shape_arrive_as_they_are():
    rng = np.random.default_rng(0)
    arrays = [
        rng.integers(0, 256, (3, 5), dtype=np.uint8),
        rng.standard_normal((2, 3, 4)).astype(np.float32).transpose(2, 0, 1),  # not contiguous
        np.array([True, False, True]),
        np.arange(5),
        np.zeros((0, 4), dtype=np.float16),
        torch.randn(7, dtype=torch.float64),
    ]
    arrays[0].flags.writeable = False  # as Arrow's buffers
    for copy, array in zip(copy_to("cpu", arrays), arrays, strict=True):
        expected = torch.tensor(np.asarray(array))
        assert copy.dtype == expected.dtype
        assert torch.equal(copy, expected)
        assert not np.shares_memory(copy.numpy(), np.asarray(array))
