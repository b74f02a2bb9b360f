"""The `@collective` marker of functions that every rank has to call, in the same order, because they wait for the other ranks."""

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

F = TypeVar("F", bound=Callable[..., Any])

CHECK_VARIABLE = "RAY_PLATFORM_CHECK_COLLECTIVES"  # environment variable; 1: compare the ranks' calls, for tests and debugging


def collective(function: F) -> F:
    """Mark `function` as collective: a rank that does not call it leaves the others waiting in it.

    With `RAY_PLATFORM_CHECK_COLLECTIVES=1`, each call first compares the functions that the ranks are about to enter.

    Raises:
        RuntimeError: in that mode, on every rank, when the ranks call different collective functions.
    """
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if os.environ.get(CHECK_VARIABLE) == "1" and dist.is_initialized():
            names: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(names, name)
            if len(set(names)) > 1:
                raise RuntimeError(
                    f"collective functions differ between ranks: {', '.join(names)}; every rank must call the same"
                )
        return function(*arguments, **options)

    call.__collective__ = True  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
