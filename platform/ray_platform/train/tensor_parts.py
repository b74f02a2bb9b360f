"""Parts of tensors in the files of a checkpoint: how they are named, and how they are joined, whichever ranks wrote them."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from ray_platform.contracts import ConfigError
from ray_platform.train.collective import collective, gather_objects


def part_key(name: str, shape: Sequence[int], start: int, part: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Return the name in a file of the elements of a flattened tensor from `start` on, and the tensor to write under it.

    That of a whole tensor is `<state>/<parameter>`, that of a part `<state>/<parameter>@<start>@<shape of the whole>`.
    """
    if part.numel() == math.prod(shape):
        return name, part.reshape(tuple(shape))
    return f"{name}@{start}@{'x'.join(map(str, shape))}", part


def parse_part_key(key: str, shape: Sequence[int]) -> tuple[str, int, tuple[int, ...]]:
    """Return (`<state>/<parameter>`, start, shape of the whole tensor) of a tensor in a file. Raises ValueError."""
    name, *place = key.split("@")
    if not place:
        return name, 0, tuple(shape)
    start, whole = int(place[0]), tuple(int(size) for size in place[-1].split("x"))
    if len(place) != 2 or not 0 <= start <= start + math.prod(shape) <= math.prod(whole):
        raise ValueError(f"{key[:100]!r} is not a part of a tensor")
    return name, start, whole


class TensorJoiner:
    """Joins the parts of tensors that were read from several files."""

    def __init__(self) -> None:
        self._incomplete: dict[str, tuple[torch.Tensor, int]] = {}  # flat tensor, number of elements that it lacks

    def add(self, key: str, part: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        """Return (name, tensor) when `part` completes the tensor. Raises ValueError for a key that is not one of a part."""
        name, start, shape = parse_part_key(key, part.shape)
        if part.shape == shape:
            return name, part
        flat, lacking = self._incomplete.get(name) or (part.new_zeros(math.prod(shape)), math.prod(shape))
        flat[start:][: part.numel()] = part
        self._incomplete[name] = flat, lacking - part.numel()
        if self._incomplete[name][1] > 0:
            return None
        del self._incomplete[name]
        return name, flat.view(shape)

    def check_complete(self) -> None:
        """Raises ValueError when a tensor lacks parts."""
        for name in self._incomplete:
            raise ValueError(f"a part of {name} is missing")


class ReadTensors:
    """Tensors of a checkpoint whose parts the ranks have read, each another one."""

    @collective
    def __init__(self, local: Mapping[str, torch.Tensor], device: torch.device):
        """`local`: what this rank has read, by the keys of `part_key`."""
        self.local, self.device = local, device
        self._parts: dict[str, list[tuple[int, str, int]]] = {}  # name -> (rank that read it, its key, its start) of every part
        self._whole: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        keys = gather_objects({key: (tuple(tensor.shape), tensor.dtype) for key, tensor in local.items()})
        for rank, of_rank in enumerate(keys):
            for key, (part_shape, dtype) in of_rank.items():
                name, start, shape = parse_part_key(key, part_shape)
                self._parts.setdefault(name, []).append((rank, key, start))
                self._whole[name] = shape, dtype

    def parameters(self, state: str) -> set[str]:
        """Return the parameters, and buffers, of which the state was saved."""
        return {name.partition("/")[2] for name in self._parts if name.startswith(f"{state}/")}

    @collective
    def join(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        """Return a tensor on every rank, sent by those that read its parts; None if it was not saved.

        Raises ConfigError for another shape than the saved one.
        """
        if name not in self._parts:
            return None
        saved_shape, dtype = self._whole[name]
        if tuple(shape) != saved_shape:
            raise ConfigError(
                f"model: {name.partition('/')[2]} is {tuple(shape)}, but {saved_shape} in the checkpoint; "
                "use the model that it was trained with"
            )
        tensor = torch.zeros(saved_shape, dtype=dtype, device=self.device)
        for rank, key, start in self._parts[name]:
            if rank == dist.get_rank():
                part = self.local[key]
                tensor.view(-1)[start:][: part.numel()] = part.flatten().to(self.device)
        if len(self._parts[name]) == 1:
            dist.broadcast(tensor, src=self._parts[name][0][0])
        else:  # the other ranks' elements are 0, and integers add up exactly
            dist.all_reduce(tensor.view(torch.int32))
        return tensor
