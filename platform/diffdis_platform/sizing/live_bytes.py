"""How much memory tensors take at most while something runs."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that come to life inside, and of the most that were alive at a time, without those of `known`.

    torch's own tracker (torch.distributed._tools.mem_tracker) stops at sizes that depend on data, as InfoNCE's diagonal does
    under fake tensors; such storages are left out here: they are indices.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now, self.peak = 0, 0
        self._seen: dict[int, Any] = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in known)}

    def __enter__(self) -> "LiveBytes":
        """Without collections of garbage meanwhile, whose moment is not the same in every run."""
        gc.collect()
        self._collecting = gc.isenabled()
        gc.disable()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._collecting:
            gc.enable()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._seen or not isinstance(size, int):
            return

        def gone(_: Any) -> None:
            self.now -= size
            del self._seen[key]

        self.now += size
        self.peak = max(self.peak, self.now)
        self._seen[key] = weakref.ref(storage, gone)
