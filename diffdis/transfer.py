"""Copies from the host to an accelerator for which the host does not wait."""

from collections.abc import Sequence

import numpy as np
import torch

_ALIGNMENT = 16  # bytes, at least the size of a number


def copy_to(device: torch.device | str, arrays: Sequence[np.ndarray | torch.Tensor]) -> list[torch.Tensor]:
    """Return copies on `device` of arrays or tensors of the host, of any types, in one transfer.

    It starts from pinned memory, so that the host continues at once; torch keeps that memory until the transfer has ended.
    """
    types = [array.dtype if isinstance(array, torch.Tensor) else torch.from_numpy(array[:0].copy()).dtype for array in arrays]
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
    packed = torch.empty(total, dtype=torch.uint8, pin_memory=torch.device(device).type != "cpu")

    def unpack(buffer: torch.Tensor) -> list[torch.Tensor]:
        parts = zip(starts, arrays, types, strict=True)
        return [buffer[start : start + a.nbytes].view(dtype).view(a.shape) for start, a, dtype in parts]

    for place, array in zip(unpack(packed), arrays, strict=True):
        if isinstance(array, torch.Tensor):
            place.copy_(array)
        else:
            np.copyto(place.numpy(), array)
    return unpack(packed.to(device, non_blocking=True))
