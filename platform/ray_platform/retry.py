"""The retry policy and the errors of `storage`.

An operation during which storage does not answer (no connection, a timeout, a 5xx error) is retried with exponential backoff. A
missing file, a missing permission and wrong credentials are errors at once. Transfers (reading and writing content) are retried
for `RETRY_SECONDS`. Queries (listing, existence, deletion) are not: they are the first thing that a command does, and a wrong
endpoint should be reported at once. `retrying_for` sets another time for a block of code.
"""

import errno
import functools
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Concatenate, Literal, ParamSpec, TypeVar

from botocore.exceptions import BotoCoreError, NoCredentialsError, PartialCredentialsError  # type: ignore[import-untyped]

from ray_platform.contracts import DataError
from ray_platform.redaction import redacted

RETRY_SECONDS = 120.0  # for how long a transfer is retried
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 20.0  # between two attempts
# Errors of a local disk that no retry can fix.
_PERMANENT = {errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS, errno.EINVAL}

T = TypeVar("T")
P = ParamSpec("P")
_retry_seconds: ContextVar[float | None] = ContextVar("retry_seconds", default=None)


class StorageError(DataError):
    """Error of a storage operation. `is_transient`: it may disappear by itself, so a retry makes sense."""

    def __init__(self, message: str, kind: Literal["missing", "forbidden", "unavailable"], is_transient: bool = True) -> None:
        super().__init__(message, kind, is_transient)
        self.kind = kind
        self.is_transient = kind == "unavailable" and is_transient

    def __str__(self) -> str:
        return redacted(self.args[0])


@contextmanager
def retrying_for(seconds: float) -> Iterator[None]:
    """Retry every operation that this thread starts in the block, queries included, for `seconds`; 0: do not retry."""
    token = _retry_seconds.set(seconds)
    try:
        yield
    finally:
        _retry_seconds.reset(token)


def storage_operation(retried: bool) -> Callable[[Callable[Concatenate[str, P], T]], Callable[Concatenate[str, P], T]]:
    """Decorate a function of a URL: errors become `StorageError`, and the module's policy decides about retries."""

    def decorate(function: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
        @functools.wraps(function)
        def run(url: str, *args: P.args, **kwargs: P.kwargs) -> T:
            seconds = _retry_seconds.get()
            if seconds is None:
                seconds = RETRY_SECONDS if retried else 0.0
            deadline, wait = time.monotonic() + seconds, _FIRST_WAIT_S
            while True:
                try:
                    with storage_errors(url):
                        return function(url, *args, **kwargs)
                except StorageError as error:
                    wait = min(wait * (1 + random.random()), _MAX_WAIT_S)  # random: not all processes at the same time
                    if not error.is_transient or time.monotonic() + wait > deadline:
                        raise
                    time.sleep(wait)

        return run

    return decorate


@contextmanager
def storage_errors(url: str) -> Iterator[None]:
    """Turn the errors of fsspec, s3fs and botocore into a `StorageError` of one line that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        no_bucket = "its bucket does not exist; correct the name or create it"
        problem = no_bucket if "bucket does not exist" in str(error) else "no such file or folder; correct the path"
        raise StorageError(f"{url}: {problem}", "missing") from None
    except PermissionError:
        problem = "permission denied; correct the owner or the mode of the file"
        if url.startswith("s3://"):
            problem = "access denied (403): the credentials are wrong or lack a permission; "
            problem += "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"
        raise StorageError(f"{url}: {problem}", "forbidden") from None
    except (NoCredentialsError, PartialCredentialsError):
        problem = "no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
        raise StorageError(f"{url}: {problem}", "forbidden") from None
    except (BotoCoreError, TimeoutError, ConnectionError) as error:
        endpoint = (custom_endpoint() or "AWS's own").rpartition("@")[2]
        problem = f"cannot reach the S3 endpoint ({endpoint}; {type(error).__name__}); check AWS_ENDPOINT_URL and the network"
        raise StorageError(f"{url}: {problem}", "unavailable") from None
    except OSError as error:
        message = f"{url}: {' '.join(str(error).split())}; check that the path can be read and written"
        raise StorageError(message, "unavailable", is_transient=error.errno not in _PERMANENT) from None


def custom_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
