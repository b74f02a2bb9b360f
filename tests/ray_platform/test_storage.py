import errno
import http.server
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from botocore.exceptions import NoCredentialsError
from fsspec.implementations.local import LocalFileSystem
from pyarrow.fs import AwsStandardS3RetryStrategy

from ray_platform import object_store, retry, storage
from ray_platform.cached_folders import cached_folder
from ray_platform.contracts import DataError
from ray_platform.names import expand_braces
from tests.support.messages import check_message


@pytest.fixture(params=["folder", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def base(request, tmp_path, monkeypatch) -> str:
    """Empty location to write to: a folder, an S3 prefix, and one of another store of fsspec, which is in memory."""
    if request.param == "folder":
        return str(tmp_path / "base")
    if request.param == "memory":
        monkeypatch.setitem(object_store.PACKAGES, "memory", ("fsspec", "fsspec"))
        return f"memory://{tmp_path}"
    return storage.join(request.getfixturevalue("s3_url"), request.node.name.replace("[", "-").rstrip("]"))


def fill(base: str, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        storage.write_bytes(f"{base}/{name}", content)


def names(source: str) -> list[str]:
    return ["/".join(file.url.split("/")[-2:]) for file in storage.list_files(source)]


def test_files_are_written_listed_read_and_deleted(base):
    fill(base, {"00000.tar": b"0123456789", "notes/a.txt": b"below a subfolder", "notes/b.txt": b"", "00001.tar": b"old"})
    fill(base, {"00001.tar": b"newer"})
    files = storage.list_files(base)
    assert [(file.url, file.size) for file in files] == [(f"{base}/00000.tar", 10), (f"{base}/00001.tar", 5)]
    assert storage.list_files(f"{base}/") == files
    assert storage.read_bytes(f"{base}/00001.tar") == b"newer"
    for start, stop, part in ((2, 5, b"234"), (None, 3, b"012"), (8, 99, b"89"), (3, 3, b""), (10, 12, b"")):
        assert storage.read_bytes(f"{base}/00000.tar", start, stop) == part
    with storage.open_read(f"{base}/00000.tar") as file:
        file.seek(4)
        assert file.read(3) == b"456"
    existing = ("", "/notes", "/notes/a.txt", "/00001.tar")
    assert [storage.exists(base + name) for name in (*existing, "/nothing")] == [True] * 4 + [False]
    for name in ("00001.tar", "notes", "notes"):  # deleting a missing file is not an error
        storage.delete(f"{base}/{name}")
    assert [storage.exists(base + name) for name in existing] == [True] + [False] * 3


@pytest.mark.parametrize("name", ["run[1]", "{a}", "q?x", "a%20b", "a b", "ü#", "*"], ids=list("0123456"))
def test_the_name_of_a_folder_is_not_a_pattern(base, name):
    folder = f"{base}/{name}"
    fill(folder, {"00.json": b"0", "a/step_1/00.json": b"1", "a/step_1/01.json": b"2", "a/other/00.json": b"3"})
    fill(base, {"run1/00.json": b"4", "qax/00.json": b"5"})
    top, below = f"{folder}/00.json", f"{folder}/a/step_1/00.json"
    assert [file.url for file in storage.list_folder(folder)] == [top]
    assert [file.url for file in storage.list_folder(f"{folder}/", "*/step_*/00.*")] == [below]
    assert storage.read_many([top, below, f"{folder}/none"]) == {top: b"0", below: b"1"}
    storage.delete(f"{folder}/a/step_1")
    assert [file.url for file in storage.list_folder(folder, "*/*/*")] == [f"{folder}/a/other/00.json"]
    storage.delete(folder)
    assert [storage.exists(url) for url in (folder, f"{base}/run1/00.json", f"{base}/qax/00.json")] == [False, True, True]
    with pytest.raises(DataError, match="no such file or folder"):
        storage.list_folder(folder)


def test_a_file_with_a_name_is_found_without_listing_its_folder(tmp_path, monkeypatch):
    """A checkpoint of 1,024 ranks has 3,000 files."""
    fill(tmp_path, {f"a/step_{step}/{name}": b"" for step in range(3) for name in ("complete.json", "rank.json")})
    listed, ls = [], LocalFileSystem.ls
    monkeypatch.setattr(LocalFileSystem, "ls", lambda self, path, **options: listed.append(path) or ls(self, path, **options))
    assert len(storage.list_folder(str(tmp_path), "*/step_*/complete.json")) == 3
    assert listed == [str(tmp_path), f"{tmp_path}/a"]


def test_the_name_of_an_existing_source_is_not_a_pattern(base):
    fill(base, {"run[1]/{a}.tar": b"0", "run1/b.tar": b"1"})
    assert names(f"{base}/run[1]") == names(f"{base}/run[1]/{{a}}.tar") == ["run[1]/{a}.tar"]
    assert names(f"{base}/run[0-9]/*.tar") == ["run1/b.tar"]


def test_a_file_that_is_rewritten_has_another_version(base):
    fill(base, {"0.tar": b"old", "1.tar": b"same"})
    before = storage.list_files(base)
    assert all(file.version for file in before) or base.startswith("memory:")  # the store in memory has none
    time.sleep(0.01)  # the clock of a file system has ticks of 4 ms
    fill(base, {"0.tar": b"new"})
    for after in (storage.list_files(base), storage.list_folder(base, "**"), storage.list_files(f"{base}/*.tar")):
        assert [a == b for a, b in zip(before, after, strict=True)] == [base.startswith("memory:"), True]


def test_a_file_is_created_once(base):
    assert [storage.create_bytes(f"{base}/lease", content) for content in (b"first", b"second")] == [True, False]
    assert storage.read_bytes(f"{base}/lease") == b"first"
    storage.delete(f"{base}/lease")
    assert storage.create_bytes(f"{base}/lease", b"third")


@pytest.mark.s3
def test_what_arrow_cannot_read_is_read_by_s3fs(s3_url, monkeypatch):
    storage.write_bytes(f"{s3_url}/fallback", b"content")

    def fail(*_):
        raise OSError("AWS Error ACCESS_DENIED during HeadObject operation")

    monkeypatch.setattr(storage, "_read_by_arrow", fail)
    assert storage.read_bytes(f"{s3_url}/fallback", 0, 4) == b"cont"


def test_sources_are_files_globs_and_braces(base):
    fill(base, dict.fromkeys(("a/000.tar", "a/001.tar", "a/000.json", "b/000.tar"), b"x"))
    assert names(f"{base}/a/000.tar") == ["a/000.tar"]
    assert names(f"{base}/*/*.tar") == ["a/000.tar", "a/001.tar", "b/000.tar"]
    assert names(f"{base}/a/{{000..001}}.tar") == ["a/000.tar", "a/001.tar"]
    assert names(f"{base}/{{a,b}}/000.tar") == ["a/000.tar", "b/000.tar"]
    assert names(f"{base}/a/*.parquet") == []


def test_folders_are_copied_both_ways(base, tmp_path):
    files = {"config.json": b"{}", "unet/weights": b"\0" * 100_000}
    fill(str(tmp_path / "source"), files)
    storage.put_folder(tmp_path / "source", f"{base}/model")
    storage.get_folder(f"{base}/model", tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in files} == files
    with pytest.raises(DataError, match="there are no files in it"):
        storage.put_folder(tmp_path / "nothing", f"{base}/nothing")


def test_what_is_missing_is_named(base, tmp_path):
    nowhere = f"{base}/nowhere"
    for read in (storage.list_files, storage.read_bytes, lambda url: storage.get_folder(url, tmp_path / "back")):
        with pytest.raises(DataError, match="nowhere: no such file or folder"):
            read(nowhere)
    with pytest.raises(DataError, match="no such file or folder"):
        storage.list_files(f"{nowhere}/*.tar")
    fill(base, {"000.tar": b"x"})
    with pytest.raises(DataError, match=r"2 of its 3 files are missing, the first is .*001\.tar"):
        storage.list_files(f"{base}/{{000..002}}.tar")


def test_braces():
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("{08..10}.tar") == ["08.tar", "09.tar", "10.tar"]
    assert expand_braces("{0..1}/{a,b}") == ["0/a", "0/b", "1/a", "1/b"]
    for pattern in ("{3..1}", "{1..", "{a}", "{a..c}", "{a,{b,c}}"):
        with pytest.raises(DataError, match="its braces are not valid"):
            expand_braces(pattern)


def test_folders_and_files_are_cached_until_they_change(base, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    folder, file = f"{base}/model", f"{base}/model/unet/config.json"
    # The first file's name is a prefix of the second one's.
    fill(base, {"model/unet/config.json": b"one", "model/unet/config.json.txt": b"other"})
    cached, single = Path(cached_folder(folder)), Path(cached_folder(file))
    assert (cached / "unet" / "config.json").read_bytes() == b"one"
    assert (single.name, single.read_bytes()) == ("config.json", b"one")
    assert Path(cached_folder(folder)) == cached
    assert "://" in base or str(cached) == folder
    storage.write_bytes(file, b"another")
    assert (Path(cached_folder(folder)) / "unet" / "config.json").read_bytes() == b"another"
    if "://" in base:
        with pytest.raises(DataError, match="none: no such file or folder"):
            cached_folder(f"{base}/none")


@pytest.mark.parametrize(
    ("url", "fault"), [("foo://a/b", "a store that is not supported"), ("gs://a/b", "a store whose package is not installed")]
)
def test_urls_that_cannot_be_read(url, fault):
    with pytest.raises(DataError, match=url) as raised:
        storage.list_files(url)
    check_message(fault, raised.value, URL=url)


def test_a_failed_write_names_the_file_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for target in ("file/below", "folder"):
        with pytest.raises(DataError, match=target):
            storage.write_bytes(str(tmp_path / target), b"")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.s3
def test_a_missing_bucket_is_named(s3_url):
    for url in ("s3://no-such-bucket/folder", "s3://no-such-bucket/*.tar", "s3://no-such-bucket/{0..3}.tar"):
        with pytest.raises(DataError, match="its bucket does not exist"):
            storage.list_files(url)


@pytest.mark.s3
def test_wrong_credentials_are_rejected_and_not_shown(s3_url, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    for access in (storage.read_bytes, storage.list_files, storage.exists, lambda url: storage.write_bytes(url, b"x")):
        with pytest.raises(DataError, match="s3://tests/ready: the server rejects the credentials") as caught:
            access("s3://tests/ready")
        assert "a-wrong-secret" not in str(caught.value)
        assert caught.value.__suppress_context__


@pytest.fixture
def endpoint(monkeypatch):
    """Return endpoint(url), which sets the S3 endpoint and disables retries."""

    def use(url: str) -> None:
        variables = {
            "ENDPOINT_URL": url,
            "ACCESS_KEY_ID": "somebody",
            "SECRET_ACCESS_KEY": "a-secret",
            "DEFAULT_REGION": "us-east-1",
        }
        for name, value in variables.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)

    return use


@pytest.mark.parametrize(
    ("behavior", "fault"),
    [
        ("answers 503", "S3: the server is overloaded"),
        ("never answers", "S3: the server does not answer"),
        ("stops in the middle", ""),
    ],
)
def test_a_server_in_trouble_is_unavailable(monkeypatch, endpoint, behavior, fault):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if behavior == "never answers":
                time.sleep(1)
                return
            self.send_response(503 if behavior == "answers 503" else 200)
            for name, value in (("Content-Length", "1000"), ("ETag", '"a"'), ("Last-Modified", "Tue, 24 Nov 2026 09:00:00 GMT")):
                self.send_header(name, value)
            self.end_headers()
            if behavior == "stops in the middle" and self.command == "GET":
                self.wfile.write(b"x" * 10)
                self.wfile.flush()
                time.sleep(1)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    one_attempt = AwsStandardS3RetryStrategy(max_attempts=1)
    monkeypatch.setattr(object_store, "AwsStandardS3RetryStrategy", lambda max_attempts: one_attempt)
    monkeypatch.setattr(fsspec.get_filesystem_class("s3"), "retries", 1)
    monkeypatch.setattr(object_store, "READ_TIMEOUT_S", 1)  # Arrow's minimum
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.block_on_close = False
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        endpoint(f"http://127.0.0.1:{server.server_port}")
        try:
            with pytest.raises(storage.StorageError, match=r"cannot reach the S3 endpoint|the server is overloaded") as raised:
                storage.read_bytes("s3://bucket/file")
        finally:
            server.shutdown()
    assert raised.value.kind == "unavailable"
    assert "a-secret" not in str(raised.value)
    if fault:
        check_message(fault, raised.value, URL="s3://bucket/file", ENDPOINT=f"http://127.0.0.1:{server.server_port}")


def test_an_endpoint_that_never_answers_is_reported_after_one_attempt(monkeypatch, endpoint):
    monkeypatch.setattr(object_store, "READ_TIMEOUT_S", 0.5)
    monkeypatch.setattr(retry, "QUERY_SECONDS", 0.4)
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint(f"http://127.0.0.1:{server.getsockname()[1]}")
        with pytest.raises(storage.StorageError, match="no answer within"):
            storage.exists("s3://bucket/file")
        server.setblocking(False)
        server.accept()[0].close()
        with pytest.raises(BlockingIOError):
            server.accept()


class Outage:
    """Storage that fails the first `failures` requests."""

    def __init__(self, monkeypatch, failures: int, error: Exception | type[Exception] = TimeoutError):
        self.calls, resolve = 0, storage._resolve

        def unavailable(url):
            self.calls += 1
            if self.calls <= failures:
                raise error
            return resolve(url)

        monkeypatch.setattr(storage, "_resolve", unavailable)
        monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.001)


TRANSFERS = {
    "write_bytes": lambda url: storage.write_bytes(url, b"x"),
    "read_bytes": storage.read_bytes,
    "read_buffer": storage.read_buffer,
    "put_folder": lambda url: storage.put_folder(Path(url).parent, f"{url}-copy"),
    "get_folder": lambda url: storage.get_folder(url, Path(f"{url}-copy")),
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_transfers_survive_an_outage_and_fail_when_it_lasts(tmp_path, monkeypatch, name):
    url = str(tmp_path / "folder" / "file")
    storage.write_bytes(url, b"x")
    outage = Outage(monkeypatch, failures=3)
    TRANSFERS[name](url)
    assert outage.calls == 4
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.01)
    Outage(monkeypatch, failures=10**9)
    with pytest.raises(storage.StorageError, match="TimeoutError") as raised:
        TRANSFERS[name](url)
    assert raised.value.kind == "unavailable"


def test_a_transfer_is_retried_for_a_time_after_its_first_failure(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: None))

    def slow(url):
        calls.append(url)
        clock[0] += (2.0 if len(calls) == 1 else 0.9) * retry.RETRY_SECONDS
        raise TimeoutError

    monkeypatch.setattr(storage, "_resolve", slow)
    with pytest.raises(storage.StorageError):
        storage.write_bytes("s3://bucket/file", b"x")
    assert len(calls) == 3


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), PermissionError(), NoCredentialsError(), IsADirectoryError(errno.EISDIR, "Is a directory")]
)
def test_what_a_retry_cannot_fix_fails_at_once(monkeypatch, error):
    outage = Outage(monkeypatch, 10**9, error)
    with pytest.raises(storage.StorageError):
        storage.read_bytes("s3://bucket/file")
    assert outage.calls == 1


def test_queries_are_retried_for_a_shorter_time(tmp_path, monkeypatch):
    for query in (storage.exists, storage.list_files, storage.delete):
        outage = Outage(monkeypatch, failures=2)
        query(str(tmp_path))
        assert outage.calls == 3
        monkeypatch.setattr(retry, "QUERY_SECONDS", 0.0)
        Outage(monkeypatch, failures=1)
        with pytest.raises(storage.StorageError):
            query(str(tmp_path))
        monkeypatch.undo()
    outage = Outage(monkeypatch, failures=10**9)
    with storage.retrying_for(0), pytest.raises(storage.StorageError):
        storage.read_bytes(str(tmp_path / "file"))
    assert outage.calls == 1
