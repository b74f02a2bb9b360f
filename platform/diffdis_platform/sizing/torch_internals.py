"""Private and experimental APIs of torch that sizing uses: fake tensors, and the peak memory of the tensors of a computation."""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode


def fake_tensors() -> FakeTensorMode:
    """Return a context whose tensors have shapes and no contents; sizes that depend on data become symbols."""
    return FakeTensorMode(shape_env=ShapeEnv())


class LiveBytes(TorchDispatchMode):
    """Counter of the bytes of all storages that are created inside the context, without those of the `known` tensors.

    `now` and `peak` are the bytes that are alive. torch's tracker (torch.distributed._tools.mem_tracker) fails for sizes that
    depend on data, such as InfoNCE's diagonal under fake tensors; such storages, which are indices, are not counted.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: dict[int, Any] = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}

    def __enter__(self) -> "LiveBytes":
        """Suspend garbage collection, whose time differs between runs."""
        gc.collect()
        self._collecting = gc.isenabled()
        gc.disable()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._collecting:
            gc.enable()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen or not isinstance(size, int):
            return

        def subtract(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.ref(storage, subtract)


def _tensors(result: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors that an operation returned."""
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, list | tuple):
        for part in result:
            yield from _tensors(part)
