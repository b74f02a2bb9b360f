"""Local copies of models in object stores, for the libraries that open folders only."""

import dataclasses
import hashlib
import os
import stat
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import filelock

from ray_platform.contracts import DataError
from ray_platform.object_store import PACKAGES
from ray_platform.storage import find_files, get_folder

T = TypeVar("T")


def cached_folder(url: str) -> str:
    """Return a local copy of a folder or file in an object store, or `url` itself if it is a path.

    The first process of a machine that asks for it fetches it. It is fetched again when it changes. Raises StorageError, and
    DataError when other users could write to the cache.
    """
    if url.partition("://")[0] not in ("s3", *PACKAGES):
        return url
    _, path, entries = find_files(url)
    listing = [(name, sorted(entry.items())) for name, entry in sorted(entries.items())]  # each store has other digests and times
    name = hashlib.sha256(repr((url, listing)).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"diffdis-cache-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if not stat.S_ISDIR((info := cache.lstat()).st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise DataError(f"{cache}: is a link, or other users may write to it, so models in it cannot be trusted; remove it")
    with filelock.FileLock(cache / f"{name}.lock"):
        folder = cache / name
        if not folder.exists():
            temporary = cache / f".{name}.{uuid.uuid4().hex}"
            get_folder(url, temporary)
            temporary.replace(folder)
    return str(folder / os.path.basename(path) if list(entries) == [path] else folder)


def with_cached_folders(build: Callable[..., T], *arguments: Any) -> T:
    """Return `build(*arguments)`, with every URL in arguments that are dataclasses replaced by its `cached_folder`."""
    return build(*(_localized(argument) for argument in arguments))


def _localized(value: Any) -> Any:
    if isinstance(value, str):
        return cached_folder(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _localized(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value
