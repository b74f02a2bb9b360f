"""The `@collective` marker of functions that every rank has to call, in the same order, because they wait for the other ranks."""

import functools
import os
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch.distributed as dist

P = ParamSpec("P")
T = TypeVar("T")

CHECK_VARIABLE = "RAY_PLATFORM_CHECK_COLLECTIVES"  # environment variable; 1: compare the ranks' calls, for tests and debugging


def collective(function: Callable[P, T]) -> Callable[P, T]:
    """Mark `function` as collective: a rank that does not call it leaves the others waiting in it.

    With `RAY_PLATFORM_CHECK_COLLECTIVES=1`, each call first compares the functions that the ranks are about to enter. It raises
    RuntimeError on every rank when they differ.
    """
    name = f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if os.environ.get(CHECK_VARIABLE) == "1" and dist.is_initialized():
            names = gather_objects(name)
            if len(set(names)) > 1:
                raise RuntimeError(
                    f"collective functions differ between ranks: {', '.join(names)}; every rank must call the same"
                )
        return function(*args, **kwargs)

    return call


def gather_objects(local: T) -> list[T]:
    """Return the objects of all ranks, by rank. Every rank must call it."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, local)
    return gathered
