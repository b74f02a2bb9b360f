"""The journal of a run: the file `metrics.jsonl` in its output folder, to which everything about the run is written first.

Each line is a JSON object with its `time` (seconds since 1970) and one of

- `run`: start of a run, or of the launch that continues it: its name, tags, experiment and tracking URI;
- `step` and `metrics`, or `step` and `system` (load of the nodes; the step is the age of the run in seconds);
- `params`, `description` and `tags`, `data`, `artifact` (a file below `artifacts/`), `folder`, `model`, `registered_model`;
- `status`: how the launch ended.

Object storage cannot append, so the last object there is written again with every line until it has `_OBJECT_BYTES`; then
follows `metrics.jsonl.000001`. All objects, sorted by name, are one file.
"""

import base64
import errno
import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_platform import storage
from ray_platform.contracts import one_line
from ray_platform.formats import FileFormat
from ray_platform.json_values import JsonObject

logger = logging.getLogger(__name__)

JOURNAL_FORMAT = FileFormat("run journal")  # its version is in every `run`
_FILE = "metrics.jsonl"
_OBJECT_BYTES = 2**17
_READ_BYTES = 2**20
_RECENT_BYTES = 2**18  # at the end, in which an entry that is sent again can be


class Journal:
    """Appends entries to the journal of an output folder, and reads it. The methods may be called from several threads."""

    def __init__(self, output_dir: str) -> None:
        """Open the journal of an output folder, which need not exist. Raises StorageError if storage does not answer."""
        self.url = storage.join(output_dir, _FILE)
        self._is_local = "://" not in output_dir
        self._lock = threading.RLock()
        self._unwritten = b""  # lines that could not be written yet
        self._is_warned = False
        self._objects: list[tuple[str, int]] = [(self.url, 0)]  # in object storage: URL and size
        self._last_object = b""
        if not self._is_local and storage.exists(self.url):
            files = storage.list_folder(output_dir, f"{_FILE}*")
            self._objects = [(file.url, file.size) for file in files]
            self._last_object = storage.read_bytes(files[-1].url)
        recent = self._read_range(max(0, self.end() - _RECENT_BYTES), self.end())
        self._recent = set(recent.splitlines())
        if recent and not recent.endswith(b"\n"):
            self._unwritten = b"\n"  # a process died while it wrote the last line

    def append(self, entry: JsonObject) -> None:
        """Write an entry, unless it was written by an earlier process of the same actor. Never raises.

        If storage does not take it, it is kept in memory and written together with a later one.
        """
        line = json.dumps(entry, default=_encode).encode()
        with self._lock:
            if line not in self._recent:
                self._unwritten += line + b"\n"
                self.flush()

    def flush(self) -> None:
        """Try to write the lines that could not be written before."""
        with self._lock:
            try:
                if self._unwritten:
                    (self._append_to_file if self._is_local else self._append_to_object)(self._unwritten)
                self._unwritten, self._is_warned = b"", False
            except (OSError, storage.StorageError) as error:
                if not self._is_warned:
                    self._is_warned = True
                    logger.warning("%s: cannot be written, lines are kept in memory until it can: %s", self.url, one_line(error))

    def end(self) -> int:
        """Return the position after the last entry."""
        with self._lock:
            return self._size() + len(self._unwritten)

    def entries(self, start: int = 0) -> Iterator[tuple[JsonObject, int]]:
        """Return every entry after the position `start`, which is a number of bytes, with the position after it."""
        while block := self.read(start, _READ_BYTES):
            for line in block.splitlines(keepends=True):
                start += len(line)
                try:
                    entry = json.loads(line, object_hook=_decode)
                except ValueError:  # the process died while it wrote this line
                    entry = {}
                yield entry, start

    def read(self, start: int, num_bytes: int) -> bytes:
        """Return the complete lines in the bytes from `start` on: about `num_bytes`, at least one line if there is one."""
        with self._lock:
            block = self._read_range(start, start + num_bytes)
        end = block.rfind(b"\n") + 1
        if not end and len(block) == num_bytes:
            return self.read(start, 4 * num_bytes)  # a long line
        return block[:end] if end else block

    def _read_range(self, start: int, stop: int) -> bytes:
        if self._is_local:
            written = b""
            if Path(self.url).exists():
                with open(self.url, "rb") as file:
                    file.seek(start)
                    written = file.read(stop - start)
            size = self._size()
        else:
            written, size = b"", 0
            for url, object_size in self._objects:
                if size < stop and start < size + object_size:
                    content = self._last_object if url == self._objects[-1][0] else storage.read_bytes(url)
                    written += content[max(0, start - size) : stop - size]
                size += object_size
        return written + self._unwritten[max(0, start - size) : max(0, stop - size)]

    def _size(self) -> int:
        if not self._is_local:
            return sum(size for _, size in self._objects)
        return Path(self.url).stat().st_size if Path(self.url).exists() else 0

    def _append_to_file(self, data: bytes) -> None:
        Path(self.url).parent.mkdir(parents=True, exist_ok=True)
        with open(self.url, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(data) < len(data):
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())

    def _append_to_object(self, data: bytes) -> None:
        url, size = self._objects[-1]
        content = self._last_object + data
        if size >= _OBJECT_BYTES:
            url, content = f"{self.url}.{len(self._objects):06d}", data
        with storage.retrying_for(0):
            storage.write_bytes(url, content)
        if url != self._objects[-1][0]:
            self._objects.append((url, 0))
        self._objects[-1], self._last_object = (url, len(content)), content


def _encode(value: Any) -> Any:
    return {"base64": base64.b64encode(value).decode()} if isinstance(value, bytes) else str(value)


def _decode(value: JsonObject) -> Any:
    return base64.b64decode(value["base64"]) if value.keys() == {"base64"} else value
