"""Files in folders and in object stores.

`object_store` opens and configures the stores. Every error is a `DataError` of one line that names the URL and never the
credentials (`storage_errors`). `retry` documents the retries.
"""

import contextlib
import fnmatch
import io
import json
import os
import posixpath
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import quote
from urllib.request import url2pathname

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import FileSystem, S3FileSystem
from pyarrow.fs import LocalFileSystem as ArrowLocalFileSystem

from ray_platform.contracts import DataError, one_line
from ray_platform.json_values import JsonObject
from ray_platform.names import check_below, expand_braces, is_pattern
from ray_platform.object_store import arrow_filesystem, open_store
from ray_platform.retry import retrying_for, storage_operation
from ray_platform.storage_errors import StorageError, s3_code, storage_errors

__all__ = ["StorageError", "retrying_for"]

SMALL_BYTES = 64 * 2**20  # limit for files that describe others
LISTING_BYTES = 2**30  # limit for a file that names every shard of a source
_REQUESTS_AT_ONCE, _READS_AT_ONCE, _SMALL_FILE_RETRY_SECONDS = 16, 32, 5.0  # the latter two by read_many
_READ_AHEAD_BYTES = 2**20  # of a file that is opened on S3
_VERSION_FIELDS = ("ETag", "etag", "blob_id", "mtime", "last_modified", "Last-Modified")  # of an Entry, the best first
Entry = dict[str, Any]  # what fsspec knows of a file: its name, type, size and version


@dataclass(frozen=True)
class StoredFile:
    """A file in storage: its absolute path or `s3://` URL, and its size in bytes."""

    url: str
    size: int
    version: str = ""  # another one after a change: the ETag, or else the time of the change; empty: unknown


@storage_operation(is_query=True)
def list_files(source: str) -> tuple[StoredFile, ...]:
    """Return the files that `source` names, sorted by URL.

    That is a file, a folder (without its subfolders), a glob (`s3://bucket/part-*/*.tar`) or a brace pattern
    (`s3://bucket/{00000..00009}.tar`). The name of an existing file or folder is not a pattern. Raises StorageError if a file,
    folder or bucket is missing; an empty folder, and a glob without a match, return ().
    """
    filesystem, path = _resolve(source)
    by_pattern = is_pattern(path) and not filesystem.exists(path)
    if by_pattern and "{" in path:
        return _list_expanded(filesystem, path)
    if by_pattern:
        matches = filesystem.glob(path, detail=True)
        if not matches:
            # fsspec reports no match where the bucket or folder is missing; listing it raises the right error.
            filesystem.ls(re.split(r"[*?\[]", path)[0].rpartition("/")[0])
        entries = list(matches.values())
    else:
        info = filesystem.info(path)
        entries = filesystem.ls(path, detail=True) if info["type"] == "directory" else [info]
    return _as_files(filesystem, _resolve_links(filesystem, entries, deep="**" in path))


@storage_operation(is_query=True)
def list_folder(folder: str, pattern: str = "*") -> tuple[StoredFile, ...]:
    """Return the files below `folder`, which is not a pattern, that match `pattern`, such as `*/step_*/complete.json`.

    `**` stands for all files, at any depth; a name is found without a listing. Raises StorageError if the folder is missing.
    """
    filesystem, path = _resolve(folder)
    entries: list[Entry] = filesystem.ls(path, detail=True)
    if pattern == "**":
        return _as_files(filesystem, _resolve_links(filesystem, filesystem.find(path, detail=True).values(), deep=True))
    for depth, part in enumerate(pattern.split("/")):
        if depth:
            folders, entries = [entry["name"] for entry in entries if entry["type"] == "directory"], []
            for top in folders:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    entries += filesystem.ls(top, detail=True) if set("*?[") & set(part) else [filesystem.info(f"{top}/{part}")]
        entries = [entry for entry in entries if fnmatch.fnmatchcase(posixpath.basename(entry["name"]), part)]
    return _as_files(filesystem, _resolve_links(filesystem, entries, deep=False))


def _resolve_links(filesystem: Any, entries: Iterable[Entry], deep: bool, seen: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """Replace links by what they point to (Hugging Face's cache consists of links); with `deep`, by the files of a folder."""
    for entry in entries:
        if not entry.get("islink"):
            yield entry
            continue
        try:
            name, pointed_to = entry["name"], filesystem.info(entry["name"])
        except FileNotFoundError:
            yield entry | {"type": "file", "size": 0}  # a file that cannot be read, so that its loss is reported
        else:
            target, parent = os.path.realpath(name), os.path.realpath(os.path.dirname(name))
            if pointed_to["type"] != "directory":
                yield pointed_to
            elif deep and target not in seen and not f"{parent}/".startswith(f"{target}/"):  # links may form a cycle
                yield from _resolve_links(filesystem, filesystem.find(name, detail=True).values(), deep, seen | {target})


@storage_operation(is_query=False)
def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Return the content of a file, or its bytes start..stop (fewer if it ends before). Raises StorageError."""
    filesystem, path = _resolve(url)
    if url.startswith("s3://") and (arrow := arrow_filesystem(path.partition("/")[0])):
        try:
            return _read_by_arrow(arrow, path, start, stop)
        except OSError as error:
            if "curlCode: 28" in str(error):  # too late: s3fs would wait as long again
                raise TimeoutError from None
            # s3fs has clearer errors.
    return _read_by_fsspec(filesystem, path, start or 0, stop) if start or stop else filesystem.cat_file(path)


def read_small(url: str, max_bytes: int = SMALL_BYTES) -> bytes:
    """Return the content of a file that describes others. Raises DataError if it has more than `max_bytes`; StorageError."""
    content = read_bytes(url, 0, max_bytes + 1)
    if len(content) > max_bytes:
        raise DataError(f"{url}: has more than {max_bytes:,} bytes, so it is not a file of this kind; write it again")
    return content


def read_json(url: str) -> JsonObject:
    """Return the object in a small JSON file. Raises DataError if it is not one; StorageError."""
    try:
        value = json.loads(read_small(url))
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url}: is not a JSON object ({one_line(error)}); write it again, or remove it") from None
    return value


@storage_operation(is_query=False)
def read_buffer(url: str) -> pa.Buffer:
    """Return the content of a file in memory of Arrow's pool, which reuses pages without zeroing them. Raises StorageError."""
    filesystem, path = _resolve(url)
    if not isinstance(filesystem, LocalFileSystem):
        return pa.py_buffer(read_bytes(url))
    with pa.OSFile(path) as file:
        return file.read_buffer()


def _read_by_arrow(filesystem: S3FileSystem, path: str, start: int | None, stop: int | None) -> bytes:
    """Read from S3 with Arrow: 2 to 3 times as fast as s3fs, at less than half of its CPU time (tests/benchmarks/s3_reads.py)."""
    with filesystem.open_input_file(path) as file:
        if start is None and stop is None:
            return file.read()
        size, start = file.size(), start or 0
        return file.read_at(max(0, min(size if stop is None else stop, size) - start), start)


def _read_by_fsspec(filesystem: Any, path: str, start: int, stop: int | None) -> bytes:
    if stop is not None and stop <= start:
        return b""
    try:
        content = filesystem.cat_file(path, start=start, end=stop)
    except OSError as error:
        if s3_code(error) in ("InvalidRange", "416"):  # it ends before
            return b""
        raise
    # A web server that does not support ranges sends the whole file.
    return content if stop is None or len(content) <= stop - start else content[start:stop]


def read_many(urls: Sequence[str]) -> dict[str, bytes]:
    """Return the contents of many small files, which are read concurrently. Files that cannot be read are left out.

    Threads that read with Arrow take a quarter of the CPU time of s3fs' own concurrency.
    """

    def read(url: str) -> bytes | None:
        with retrying_for(_SMALL_FILE_RETRY_SECONDS), contextlib.suppress(StorageError):
            return read_bytes(url)
        return None

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        contents = pool.map(read, urls)
        return {url: content for url, content in zip(urls, contents, strict=True) if content is not None}


@contextlib.contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """Open a seekable binary file. On S3, the ranges that are read are fetched with `read_bytes`. Raises StorageError."""
    with storage_errors(url):
        filesystem, path = _resolve(url)
        if isinstance(filesystem, LocalFileSystem):
            with open(path, "rb") as file:
                yield file
        else:
            yield cast(IO[bytes], io.BufferedReader(_RemoteFile(url, _file_size(url)), _READ_AHEAD_BYTES))


@storage_operation(is_query=False)
def _file_size(url: str) -> int:
    filesystem, path = _resolve(url)
    return int(filesystem.info(path)["size"])


class _RemoteFile(io.RawIOBase):
    """A file on S3. Every read is one request."""

    def __init__(self, url: str, size: int):
        self.url, self.size, self.position = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def readinto(self, buffer: Any) -> int:
        content = read_bytes(self.url, self.position, self.position + len(buffer)) if self.position < self.size else b""
        buffer[: len(content)] = content
        self.position += len(content)
        return len(content)


@storage_operation(is_query=False)
def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file. A reader sees either the old content or the new one. Raises StorageError."""
    filesystem, path = _resolve(url)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(path, data)
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # so that a crash of the machine cannot leave a name without its content
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@storage_operation(is_query=False)
def create_bytes(url: str, data: bytes) -> bool:
    """Write a file unless one exists, and return whether it was written. Raises StorageError.

    S3 servers that do not support this check write the file, also if another process created it at the same time.
    """
    filesystem, path = _resolve(url)
    try:
        filesystem.pipe_file(path, data, mode="create")
    except OSError as error:
        if isinstance(error, FileExistsError) or s3_code(error) in ("PreconditionFailed", "ConditionalRequestConflict"):
            return False
        if s3_code(error) != "NotImplemented":
            raise
        if filesystem.exists(path):
            return False
        filesystem.pipe_file(path, data)
    return True


@storage_operation(is_query=True)
def delete(url: str) -> None:
    """Remove a file, or a folder with everything below it, if it exists. Raises StorageError."""
    with contextlib.suppress(FileNotFoundError):
        filesystem, path = _resolve(url)
        if isinstance(filesystem, LocalFileSystem):
            filesystem.rm(path, recursive=True)
        else:  # one by one, as its `rm` would expand patterns
            entries = filesystem.find(path, withdirs=True, detail=True)
            files = [name for name, entry in entries.items() if entry["type"] == "file"]
            with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
                list(pool.map(filesystem.rm_file, files))
            for folder in [*sorted(entries.keys() - files, reverse=True), path]:  # some servers have folders, which must be empty
                filesystem.rm_file(folder)


def put_folder(folder: Path, url: str) -> None:
    """Copy every file below the local `folder` to below `url`. Raises DataError if there is none; StorageError."""
    sources = sorted(path for path in folder.rglob("*") if path.is_file())
    if not sources:
        raise DataError(f"{folder}: there are no files in it to copy to {url}; name another folder")
    _put_files(url, folder, sources)


@storage_operation(is_query=False)
def _put_files(url: str, folder: Path, sources: Sequence[Path]) -> None:
    filesystem, path = _resolve(url)
    filesystem.put([str(source) for source in sources], [f"{path}/{source.relative_to(folder).as_posix()}" for source in sources])


@storage_operation(is_query=False)
def get_folder(url: str, folder: Path) -> None:
    """Copy every file below `url`, or the file `url`, to below the local `folder`.

    Raises DataError if a name leads out of `folder`; StorageError.
    """
    filesystem, path, entries = find_files(url)
    sources = [source for source in entries if not source.endswith("/")]
    top = os.path.dirname(path) if sources == [path] else path
    targets = [folder / check_below(source.removeprefix(f"{top}/"), url) for source in sources]
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
    filesystem.get(sources, [str(target) for target in targets])


@storage_operation(is_query=False)
def find_files(url: str) -> tuple[Any, str, dict[str, Entry]]:
    """Return the file system of `url`, its path in it, and all files below it, at least one."""
    filesystem, path = _resolve(url)
    entries = filesystem.find(path, detail=True)
    if not entries:
        raise FileNotFoundError(path)
    return filesystem, path, entries


@storage_operation(is_query=True)
def exists(url: str) -> bool:
    """Return whether a file or folder exists. Raises StorageError if storage does not tell (wrong credentials, no endpoint)."""
    filesystem, path = _resolve(url)
    try:
        filesystem.info(path)  # the `exists` of s3fs takes every error of a bucket for its absence
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def literal_filesystem(url: str) -> tuple[FileSystem | None, str]:
    """Return Arrow's file system of a folder and the path in it for Ray, which would parse the path as a URI.

    For an object store, return None, with which Ray opens its own client in every process, and the quoted URI.
    """
    filesystem, path = _resolve(url)
    if isinstance(filesystem, LocalFileSystem):
        return ArrowLocalFileSystem(), path
    scheme, _, rest = url.partition("://")
    return None, f"{scheme}://{quote(rest)}"


def join(url: str, *parts: str) -> str:
    """Return `url` and `parts` joined by single slashes."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def _resolve(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path in it. Local paths become absolute: workers have another current folder."""
    if "\0" in url:
        raise DataError(f"{url!r}: a name cannot contain a null character; correct it")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalFileSystem(auto_mkdir=True), os.path.abspath(os.path.expanduser(url))
    if scheme == "file":
        return LocalFileSystem(auto_mkdir=True), os.path.abspath(url2pathname(rest))
    return open_store(url)


def _stored_file(filesystem: Any, entry: Entry) -> StoredFile:
    url = entry["name"] if isinstance(filesystem, LocalFileSystem) else filesystem.unstrip_protocol(entry["name"])
    version = next((entry[name] for name in _VERSION_FIELDS if entry.get(name)), "")
    return StoredFile(url, int(entry["size"] or 0), str(version))


def _as_files(filesystem: Any, entries: Iterable[Entry]) -> tuple[StoredFile, ...]:
    files = (_stored_file(filesystem, entry) for entry in entries if entry["type"] == "file")
    # S3 consoles mark a folder by an empty object whose name ends in "/".
    return tuple(sorted((file for file in files if not file.url.endswith("/")), key=lambda file: file.url))


def _list_expanded(filesystem: Any, pattern: str) -> tuple[StoredFile, ...]:
    """Return the files that a brace pattern names, all of which must exist, with one listing per folder."""
    expected = expand_braces(pattern)
    if "https" in filesystem.protocol:  # web servers seldom list folders
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            entries = list(pool.map(filesystem.info, expected))
    else:
        folders = sorted({path.rpartition("/")[0] for path in expected})
        entries = [entry for folder in folders for entry in filesystem.ls(folder, detail=True)]
    existing = {entry["name"]: entry for entry in _resolve_links(filesystem, entries, deep=False) if entry["type"] == "file"}
    if missing := [path for path in expected if path not in existing]:
        raise DataError(
            f"{pattern}: {len(missing)} of its {len(expected)} files are missing, the first is {missing[0]}; "
            "correct the range or write the missing files"
        )
    return tuple(_stored_file(filesystem, existing[path]) for path in sorted(expected))
