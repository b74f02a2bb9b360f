"""The retry policy of `storage`.

An operation during which storage does not answer (no connection, a timeout, a 5xx error) is retried with exponential backoff. A
missing file, a missing permission and wrong credentials are errors at once. Transfers (reading and writing content) are retried
for `RETRY_SECONDS` from their first failure, because a large file on slow storage may take longer than that. Queries (listing,
existence, deletion) are retried until `QUERY_SECONDS` after their start: they are the first thing that a command does, and a
wrong endpoint should be reported within seconds. `retrying_for` sets another time for a block of code.
"""

import functools
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Concatenate, ParamSpec, TypeVar

from ray_platform.storage_errors import StorageError, storage_errors

RETRY_SECONDS = 120.0  # for how long a transfer is retried
QUERY_SECONDS = 10.0  # for how long a query is retried
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 20.0  # between two attempts

T = TypeVar("T")
P = ParamSpec("P")
_retry_seconds: ContextVar[float | None] = ContextVar("retry_seconds", default=None)


@contextmanager
def retrying_for(seconds: float) -> Iterator[None]:
    """Retry every operation that this thread starts in the block, queries included, for `seconds`; 0: do not retry."""
    token = _retry_seconds.set(seconds)
    try:
        yield
    finally:
        _retry_seconds.reset(token)


def storage_operation(is_query: bool) -> Callable[[Callable[Concatenate[str, P], T]], Callable[Concatenate[str, P], T]]:
    """Decorate a function of a URL: errors become `StorageError`, and the module's policy decides about retries."""

    def decorate(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
        @functools.wraps(function)
        def run(url: str, *args: P.args, **kwargs: P.kwargs) -> T:
            seconds = _retry_seconds.get()
            if seconds is None:
                seconds = QUERY_SECONDS if is_query else RETRY_SECONDS
            deadline, wait = (time.monotonic() + seconds if is_query else math.inf), _FIRST_WAIT_S
            while True:
                try:
                    with storage_errors(url):
                        return function(url, *args, **kwargs)
                except StorageError as error:
                    deadline = min(deadline, time.monotonic() + seconds)
                    wait = min(wait * (1 + random.random()), _MAX_WAIT_S)  # random: not all processes at the same time
                    if not error.is_transient or time.monotonic() + wait > deadline:
                        raise
                    time.sleep(wait)

        return run

    return decorate
