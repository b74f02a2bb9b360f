"""One small door to folders and `s3://` alike. Nothing else in the platform knows fsspec, s3fs or Arrow's file systems.

Credentials, region and endpoint come from the usual AWS places (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws, roles).
Whatever goes wrong becomes a `DataError` of one line that names the URL, never the credentials.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

import botocore.session  # type: ignore[import-untyped]
import filelock
import fsspec
import pyarrow as pa
from botocore.exceptions import (  # type: ignore[import-untyped]
    BotoCoreError,
    NoCredentialsError,
    PartialCredentialsError,
)
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem, resolve_s3_region

from ray_platform.contracts import DataError, one_line
from ray_platform.names import check_below, expand_braces
from ray_platform.redaction import redacted

# s3fs tries each call five times by itself. Botocore's own tries would multiply that to minutes at a dead endpoint.
READ_TIMEOUT_S = 20  # without a byte
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 20.0  # of `with_retries`
SMALL_BYTES = 64 * 2**20  # most of what describes data; a larger file is something else
LISTING_BYTES = 2**30  # of one that names every shard of a source
_S3_CLIENT = {"connect_timeout": 5, "read_timeout": READ_TIMEOUT_S, "retries": {"total_max_attempts": 1}}

T = TypeVar("T")


class StorageError(DataError):
    """What storage answered. `kind` tells whether trying again can help: only what is `unavailable` comes back by itself."""

    def __init__(self, message: str, kind: Literal["missing", "forbidden", "unavailable"]) -> None:
        super().__init__(message, kind)
        self.kind = kind

    def __str__(self) -> str:
        return redacted(self.args[0])


@dataclass(frozen=True)
class StoredFile:
    """A file in storage: its absolute path or `s3://` URL, and its size in bytes."""

    url: str
    size: int


def with_retries(call: Callable[[], T], seconds: float) -> T:
    """Call `call` again, after growing pauses, while storage is unavailable. What is missing or forbidden is asked for twice."""
    deadline, wait, tries = time.monotonic() + seconds, _FIRST_WAIT_S, 0
    while True:
        try:
            return call()
        except StorageError as error:
            tries += 1
            wait = min(wait * (1 + random.random()), _LONGEST_WAIT_S)  # not all callers at once
            last = tries == 2 if error.kind != "unavailable" else time.monotonic() + wait > deadline
            if last:
                raise
            time.sleep(wait)


def list_files(source: str) -> tuple[StoredFile, ...]:
    """The files that `source` names, sorted by URL: a file, a folder (not what is below its subfolders), a glob
    (`s3://bucket/part-*/*.tar`) or a brace pattern (`s3://bucket/{00000..00009}.tar`).

    Raises DataError when a file, folder or bucket is missing. An empty folder, and a glob without match, give nothing.
    """
    with _errors(source):
        filesystem, path = _resolve(source)
        if "{" in path:
            return _list_expanded(filesystem, path)
        if any(char in path for char in "*?["):
            found = filesystem.glob(path, detail=True)
            if not found:
                # fsspec calls a missing bucket or folder an empty match; listing what precedes the pattern tells.
                filesystem.ls(re.split(r"[*?\[]", path)[0].rpartition("/")[0])
            entries = list(found.values())
        else:
            info = filesystem.info(path)
            entries = filesystem.ls(path, detail=True) if info["type"] == "directory" else [info]
        followed = _followed(filesystem, entries, deep="**" in path)
        files = (_stored_file(filesystem, entry) for entry in followed if entry["type"] == "file")
        # S3 consoles mark a folder by an empty object whose name ends in "/".
        return tuple(sorted((file for file in files if not file.url.endswith("/")), key=lambda file: file.url))


def _followed(
    filesystem: Any, entries: Iterable[dict[str, Any]], deep: bool, seen: frozenset[str] = frozenset()
) -> Iterator[dict[str, Any]]:
    """Entries, with what a link points to in its place: Hugging Face's cache is made of links. `deep`: folders' files, too."""
    for entry in entries:
        if not entry.get("islink"):
            yield entry
            continue
        with contextlib.suppress(FileNotFoundError):
            name, there = entry["name"], filesystem.info(entry["name"])
            target, parent = os.path.realpath(name), os.path.realpath(os.path.dirname(name))
            if there["type"] != "directory":
                yield there
            elif deep and target not in seen and not f"{parent}/".startswith(f"{target}/"):  # links may go round in a circle
                yield from _followed(filesystem, filesystem.find(name, detail=True).values(), deep, seen | {target})


def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """The content of a file, or bytes start..stop of it (fewer where it ends before). Raises StorageError."""
    with _errors(url):
        filesystem, path = _resolve(url)
        if not isinstance(filesystem, LocalFileSystem):
            try:
                return _read_by_arrow(path, start, stop)
            except OSError as error:
                if "curlCode" in str(error):  # no answer, or too late: s3fs would wait as long again
                    raise TimeoutError from None
                # s3fs says more clearly what is wrong, and knows credentials that Arrow does not.
        return filesystem.cat_file(path, start=start, end=stop)


def read_small(url: str, most: int = SMALL_BYTES) -> bytes:
    """The content of a file that describes others. Raises DataError for one of more than `most` bytes, StorageError."""
    content = read_bytes(url, 0, most + 1)
    if len(content) > most:
        raise DataError(f"{url}: has more than {most:,} bytes, which no such file has; write it again")
    return content


def read_json(url: str) -> dict[str, Any]:
    """The object in a small JSON file. Raises DataError where there is none, StorageError."""
    try:
        found = json.loads(read_small(url))
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}")
    except (ValueError, RecursionError) as error:
        raise DataError(f"{url}: is no JSON object ({one_line(error)}); write it again, or remove it") from None
    return found


def read_buffer(url: str) -> pa.Buffer:
    """As `read_bytes`, a whole file, in memory of Arrow's pool: what was freed comes back without new pages to be zeroed."""
    with _errors(url):
        filesystem, path = _resolve(url)
        if isinstance(filesystem, LocalFileSystem):
            with pa.OSFile(path) as file:
                return file.read_buffer()
    return pa.py_buffer(read_bytes(url))


def _read_by_arrow(path: str, start: int | None, stop: int | None) -> bytes:
    """Twice to three times as fast as s3fs, at less than half of its CPU time (tests/benchmarks/s3_reads.py)."""
    variables = tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
    with _arrow_filesystem(variables, path.partition("/")[0]).open_input_file(path) as file:
        if start is None and stop is None:
            return file.read()
        size, start = file.size(), start or 0
        return file.read_at(max(0, min(size if stop is None else stop, size) - start), start)


@functools.lru_cache(maxsize=8)
def _arrow_filesystem(variables: tuple[tuple[str, str], ...], bucket: str) -> S3FileSystem:
    """`variables` are those that Arrow's SDK reads: with others, it is another file system."""
    endpoint = _own_endpoint()
    scheme, _, host = endpoint.rpartition("://") if endpoint else ("https", "", None)
    region = botocore.session.get_session().get_config_variable("region")
    if not region:
        region = "us-east-1" if endpoint else resolve_s3_region(bucket)
    return S3FileSystem(
        endpoint_override=host, scheme=scheme or "https", region=region, connect_timeout=5, request_timeout=READ_TIMEOUT_S,
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=2),
    )  # fmt: skip


def read_many(urls: Sequence[str]) -> dict[str, bytes]:
    """The contents of many small files, fetched side by side. One that cannot be read is left out."""
    if not urls:
        return {}
    with _errors(urls[0]):
        filesystem, _ = _resolve(urls[0])
        by_path = {_resolve(url)[1]: url for url in urls}
        found = filesystem.cat(list(by_path), on_error="omit")
        return {by_path[path]: content for path, content in found.items()}


@contextmanager
def open_read(url: str) -> Iterator[IO[bytes]]:
    """A seekable binary file; on S3, ranges are fetched as they are read. Raises DataError, in the block too."""
    with _errors(url):
        filesystem, path = _resolve(url)
        with filesystem.open(path, "rb") as file:
            yield file


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole file; a reader sees either the old content or the new one. Raises DataError."""
    with _errors(url):
        filesystem, path = _resolve(url)
        if not isinstance(filesystem, LocalFileSystem):
            filesystem.pipe_file(path, data)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # a machine that goes down must not leave a name without its content
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)


def delete(url: str) -> None:
    """Remove a file, or a folder with all that is below it. What is not there is no error. Raises DataError."""
    with _errors(url), contextlib.suppress(FileNotFoundError):
        filesystem, path = _resolve(url)
        filesystem.rm(path, recursive=True)


def put_folder(folder: Path, url: str) -> None:
    """Copy every file below the local `folder` to below `url`, keeping relative names. Raises DataError."""
    sources = sorted(path for path in folder.rglob("*") if path.is_file())
    if not sources:
        raise DataError(f"{folder}: cannot copy it to {url}: there are no files in it")
    with _errors(url):
        filesystem, path = _resolve(url)
        targets = [f"{path}/{source.relative_to(folder).as_posix()}" for source in sources]
        filesystem.put([str(source) for source in sources], targets)


def get_folder(url: str, folder: Path) -> None:
    """Copy every file below `url`, or the one that it is, to below the local `folder`, keeping names. Raises DataError."""
    with _errors(url):
        filesystem, path = _resolve(url)
        sources = [source for source in filesystem.find(path) if not source.endswith("/")]
        if not sources:
            raise FileNotFoundError(path)
        top = os.path.dirname(path) if sources == [path] else path
        names = [source.removeprefix(f"{top}/") for source in sources]
        targets = [folder / check_below(name, url) for name in names]
        for target in targets:
            target.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get(sources, [str(target) for target in targets])


def cached_folder(url: str) -> str:
    """A folder of this machine with what is below an s3:// URL, fetched once by whoever asks first; any other path as it is.

    Of a single file, its copy. What changed there is fetched anew. Raises DataError.
    """
    if not url.startswith("s3://"):
        return url
    with _errors(url):
        filesystem, path = _resolve(url)
        entries = filesystem.find(path, detail=True)
        if not entries:
            raise FileNotFoundError(path)
    listing = [(name, entry["size"], entry.get("ETag", "")) for name, entry in sorted(entries.items())]
    name = hashlib.sha256(repr((url, listing)).encode()).hexdigest()[:24]
    cache = Path(tempfile.gettempdir()) / f"diffdis-cache-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    if not stat.S_ISDIR((it := cache.lstat()).st_mode) or it.st_uid != os.getuid() or it.st_mode & 0o022:
        raise DataError(f"{cache}: is a link, or others may write to it, so that models in it could be theirs; remove it")
    with filelock.FileLock(cache / f"{name}.lock"):
        folder = cache / name
        if not folder.exists():
            unfinished = cache / f".{name}.{uuid.uuid4().hex}"
            get_folder(url, unfinished)
            unfinished.replace(folder)
    return str(folder / os.path.basename(path) if list(entries) == [path] else folder)


def with_cached_folders(build: Callable[..., T], *arguments: Any) -> T:
    """`build(*arguments)`, with every s3:// URL in arguments that are dataclasses replaced by its `cached_folder`."""
    return build(*(_localized(argument) for argument in arguments))


def _localized(value: Any) -> Any:
    if isinstance(value, str):
        return cached_folder(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _localized(getattr(value, f.name)) for f in dataclasses.fields(value)})
    return value


def exists(url: str) -> bool:
    """Whether a file or folder is there. Raises DataError when that cannot be told (wrong credentials, no endpoint)."""
    with _errors(url):
        filesystem, path = _resolve(url)
        return filesystem.exists(path)


def join(url: str, *parts: str) -> str:
    """`url` and `parts` joined by single slashes."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


def _resolve(url: str) -> tuple[Any, str]:
    """The file system of a URL and the path inside it. Local paths become absolute: workers have another folder."""
    if "\0" in url:
        raise DataError(f"{url!r}: a name cannot hold the character 0; correct it")
    scheme, separator, rest = url.partition("://")
    if not separator:
        return LocalFileSystem(auto_mkdir=True), os.path.abspath(os.path.expanduser(url))
    if scheme == "file":
        return LocalFileSystem(auto_mkdir=True), os.path.abspath(rest)
    if scheme != "s3":
        raise DataError(f"{url}: cannot read {scheme}://; give a folder or an s3:// URL")
    if not rest.strip("/"):
        raise DataError(f"{url}: names no bucket; write s3://bucket/folder")
    if "@" in rest.partition("/")[0]:
        raise DataError(
            f"{url}: holds credentials (before an @); leave them out, and set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    client: dict[str, Any] = dict(_S3_CLIENT)
    if _own_endpoint():
        # An own S3 server seldom has a DNS name per bucket.
        client["s3"] = {"addressing_style": "path"}
    # What other processes write must be seen: no cached listings.
    return fsspec.filesystem("s3", use_listings_cache=False, config_kwargs=client), rest.rstrip("/")


def _own_endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _stored_file(filesystem: Any, entry: dict[str, Any]) -> StoredFile:
    name = entry["name"]
    return StoredFile(name if isinstance(filesystem, LocalFileSystem) else f"s3://{name}", int(entry["size"]))


def _list_expanded(filesystem: Any, pattern: str) -> tuple[StoredFile, ...]:
    """The files that a brace pattern names, each of which must be there. One listing a folder, not a request a file."""
    wanted = expand_braces(pattern)
    folders = sorted({path.rpartition("/")[0] for path in wanted})
    entries = chain.from_iterable(filesystem.ls(folder, detail=True) for folder in folders)
    there = {entry["name"]: entry for entry in entries if entry["type"] == "file"}
    missing = [path for path in wanted if path not in there]
    if missing:
        raise DataError(
            f"{pattern}: {len(missing)} of its {len(wanted)} files are not there, the first is {missing[0]}; "
            "correct the range or write the missing files"
        )
    return tuple(_stored_file(filesystem, there[path]) for path in sorted(wanted))


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn what fsspec, s3fs and botocore raise into one line that says what to do."""
    try:
        yield
    except FileNotFoundError as error:
        if "bucket does not exist" in str(error):
            raise StorageError(f"{url}: its bucket does not exist; correct the name or create it", "missing") from None
        raise StorageError(f"{url}: no such file or folder; correct the path", "missing") from None
    except PermissionError:
        if url.startswith("s3://"):
            raise StorageError(
                f"{url}: refused (403): the credentials are wrong or lack the right; "
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy",
                "forbidden",
            ) from None
        raise StorageError(f"{url}: permission denied; correct the owner or the mode of the file", "forbidden") from None
    except (NoCredentialsError, PartialCredentialsError):
        raise StorageError(
            f"{url}: found no S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role", "forbidden"
        ) from None
    except (BotoCoreError, TimeoutError, ConnectionError) as error:
        endpoint = _own_endpoint() or "AWS's own"
        raise StorageError(
            f"{url}: cannot reach the S3 endpoint ({endpoint.rpartition('@')[2]}; {type(error).__name__}); "
            "check AWS_ENDPOINT_URL and the network",
            "unavailable",
        ) from None
    except OSError as error:
        raise StorageError(f"{url}: {one_line(error)}; check that it can be read and written there", "unavailable") from None
