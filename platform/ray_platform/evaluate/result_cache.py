"""The rows of finished units in storage, so that an interrupted evaluation resumes where it stopped."""

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ray_platform import storage
from ray_platform.contracts import Rows, one_line

_READS_AT_ONCE = 64


def cache_key(**identity: Any) -> str:
    """Return 32 hex digits; equal identities stand for equal results."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def read_arrays(content: bytes) -> Rows:
    """Return the arrays of an uncompressed .npz file, which may hold numbers and strings, but no objects.

    Raises:
        ValueError: The content is anything else.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            # Without compression the arrays cannot be larger than the file.
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("compressed")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(one_line(error)) from None


class ResultCache:
    """A folder, local or s3://, with one .npz file per finished unit, named by the unit's key. See `replicas.ResultStore`."""

    def __init__(self, folder: str):
        self.folder = folder

    def write(self, key: str, rows: Rows) -> None:
        """Raise StorageError when storage does not answer for two minutes."""
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **rows)
        storage.write_bytes(self._url(key), buffer.getvalue())

    def read(self, keys: Sequence[str]) -> dict[str, Rows]:
        """Return the rows that are stored for `keys`. A damaged file is ignored: its unit is computed again."""
        stored = {file.url for file in storage.list_folder(self.folder)} if storage.exists(self.folder) else set()
        keys_by_url = {url: key for key in keys if (url := self._url(key)) in stored or url.partition("://")[2] in stored}
        urls, results = list(keys_by_url), {}
        for start in range(0, len(urls), _READS_AT_ONCE):
            for url, content in storage.read_many(urls[start : start + _READS_AT_ONCE]).items():
                try:
                    results[keys_by_url[url]] = read_arrays(content)
                except ValueError:
                    continue
        return results

    def _url(self, key: str) -> str:
        return storage.join(self.folder, f"{key}.npz")
