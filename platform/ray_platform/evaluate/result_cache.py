"""The rows of finished units in storage, so that an interrupted evaluation resumes where it stopped."""

import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from ray_platform import storage
from ray_platform.contracts import DataError, Rows, UnitOrigin, one_line
from ray_platform.formats import FileFormat

UNIT_FORMAT = FileFormat("cached unit", version=2)  # version 1 had the rows only
_RECORD = "unit_record"  # array of a file that has its UnitOrigin as JSON
_READS_AT_ONCE = 64


def cache_key(**identity: Any) -> str:
    """Return 32 hex digits; equal identities stand for equal results."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def read_arrays(content: bytes, max_uncompressed: int = 0) -> Rows:
    """Return the arrays of an .npz file, which may hold numbers and strings, but no objects.

    Raises:
        ValueError: The content is anything else, or is compressed and has more than `max_uncompressed` bytes.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            entries = archive.infolist()
            is_compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            # Without compression the arrays cannot be larger than the file.
            if is_compressed and sum(entry.file_size for entry in entries) > max_uncompressed:
                raise ValueError("compressed, and too large")
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(one_line(error)) from None


class ResultCache:
    """A folder, local or s3://, with one .npz file per finished unit, named by the unit's key. See `replicas.ResultStore`."""

    def __init__(self, folder: str, code_version: str):
        """`code_version` is stored with the rows that are written."""
        self.folder, self.code_version = folder, code_version

    def write(self, key: str, rows: Rows) -> None:
        """Raise StorageError when storage does not answer for two minutes."""
        buffer, origin = io.BytesIO(), UnitOrigin(self.code_version, datetime.now().isoformat(timespec="seconds"))
        record = json.dumps(UNIT_FORMAT.stamp(origin._asdict()))
        np.savez(buffer, allow_pickle=False, **rows, **{_RECORD: np.array(record)})
        storage.write_bytes(self._url(key), buffer.getvalue())

    def read(self, keys: Sequence[str]) -> Iterator[tuple[str, Rows, UnitOrigin]]:
        """Yield the keys whose rows are stored, with the rows and where they come from; few files at a time are in memory.

        A file that is damaged, or that newer code wrote, is ignored: its unit is computed again.
        """
        stored = {file.url for file in storage.list_folder(self.folder)} if storage.exists(self.folder) else set()
        keys_by_url = {url: key for key in keys if (url := self._url(key)) in stored or url.partition("://")[2] in stored}
        urls = list(keys_by_url)
        for start in range(0, len(urls), _READS_AT_ONCE):
            for url, content in storage.read_many(urls[start : start + _READS_AT_ONCE]).items():
                try:
                    rows = read_arrays(content)
                    origin = _origin(rows.pop(_RECORD, None), url)
                except (ValueError, AttributeError, RecursionError, DataError):
                    continue
                yield keys_by_url[url], rows, origin

    def _url(self, key: str) -> str:
        return storage.join(self.folder, f"{key}.npz")


def _origin(record: np.ndarray | None, url: str) -> UnitOrigin:
    """Return what a file says about itself. Raises ValueError, AttributeError and DataError."""
    values = UNIT_FORMAT.read(json.loads(str(record)) if record is not None else {}, UnitOrigin._fields, url)
    return UnitOrigin(*(str(values.get(name) or "unknown") for name in UnitOrigin._fields))
