"""Results of finished units in storage, so that an evaluation that was cut off goes on where it was."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ray_platform import storage
from ray_platform.contracts import one_line

Rows = dict[str, np.ndarray]  # of one unit, by name; numbers and strings, no objects

RETRY_SECONDS = 120.0  # while storage does not answer
_READ_AT_ONCE = 64


def cache_key(identity: Mapping[str, Any]) -> str:
    """32 hex digits: equal identities stand for equal results."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def read_arrays(content: bytes) -> Rows:
    """What `np.savez` wrote: numbers and texts, never objects. Raises ValueError for anything else."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # Nothing is compressed, so that what is read is no larger than the file.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(one_line(error)) from None


class ResultCache:
    """A folder, local or s3://, with a file a finished unit, named by its key."""

    def __init__(self, folder: str):
        self.folder = folder

    def write(self, key: str, rows: Rows) -> None:
        """Raises StorageError after two minutes without storage."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **rows)
        storage.with_retries(lambda: storage.write_bytes(self._url(key), buffer.getvalue()), RETRY_SECONDS)

    def read(self, keys: Sequence[str]) -> dict[str, Rows]:
        """What there is of `keys`. A file that cannot be read as what was written is as good as none: its unit is done again."""
        there = {file.url for file in storage.list_files(self.folder)} if storage.exists(self.folder) else set()
        urls = {url: key for key in keys if (url := self._url(key)) in there or url.partition("://")[2] in there}
        found = {}
        for start in range(0, len(urls), _READ_AT_ONCE):
            for url, content in storage.read_many(list(urls)[start : start + _READ_AT_ONCE]).items():
                try:
                    found[urls[url]] = read_arrays(content)
                except ValueError:
                    continue
        return found

    def _url(self, key: str) -> str:
        return storage.join(self.folder, f"{key}.npz")
