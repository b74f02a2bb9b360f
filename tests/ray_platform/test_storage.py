import errno
import http.server
import threading
import time
from pathlib import Path

import pytest
from botocore.exceptions import NoCredentialsError

from ray_platform import retry, storage
from ray_platform.contracts import DataError


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def base(request, tmp_path) -> str:
    """An empty place to write to, in a folder and in S3."""
    if request.param == "folder":
        return str(tmp_path / "base")
    return storage.join(request.getfixturevalue("s3_url"), request.node.name.replace("[", "-").rstrip("]"))


def names(files) -> list[str]:
    return [file.url.rpartition("/")[2] for file in files]


def test_what_was_written_is_listed_and_read(base):
    storage.write_bytes(storage.join(base, "00000.tar"), b"0123456789")
    storage.write_bytes(storage.join(base, "notes", "a.txt"), b"below a subfolder")
    storage.write_bytes(storage.join(base, "00001.tar"), b"old")
    storage.write_bytes(storage.join(base, "00001.tar"), b"newer")

    assert storage.list_files(base) == (
        storage.StoredFile(storage.join(base, "00000.tar"), 10),
        storage.StoredFile(storage.join(base, "00001.tar"), 5),
    )
    assert storage.list_files(f"{base}/") == storage.list_files(base)
    assert storage.read_bytes(storage.join(base, "00001.tar")) == b"newer"
    with storage.open_read(storage.join(base, "00000.tar")) as file:
        file.seek(4)
        assert file.read(3) == b"456"
    assert storage.exists(base)
    assert storage.exists(storage.join(base, "notes/a.txt"))
    assert not storage.exists(storage.join(base, "nothing"))


@pytest.mark.parametrize(
    ("start", "stop", "found"), [(2, 5, b"234"), (None, 3, b"012"), (8, 99, b"89"), (3, 3, b""), (10, 12, b"")]
)
def test_parts_of_files(base, start, stop, found):
    url = storage.join(base, "digits")
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url, start, stop) == found


@pytest.mark.s3
def test_what_arrow_refuses_is_read_by_s3fs(s3_url, monkeypatch):
    storage.write_bytes(f"{s3_url}/fallback", b"content")

    def refuse(*_):
        raise OSError("AWS Error ACCESS_DENIED during HeadObject operation")

    monkeypatch.setattr(storage, "_read_by_arrow", refuse)
    assert storage.read_bytes(f"{s3_url}/fallback", 0, 4) == b"cont"


def test_sources_are_files_globs_and_braces(base):
    for name in ("a/000.tar", "a/001.tar", "a/000.json", "b/000.tar"):
        storage.write_bytes(storage.join(base, name), b"x")
    assert names(storage.list_files(storage.join(base, "a/000.tar"))) == ["000.tar"]
    assert names(storage.list_files(storage.join(base, "*/*.tar"))) == ["000.tar", "001.tar", "000.tar"]
    assert names(storage.list_files(storage.join(base, "a/{000..001}.tar"))) == ["000.tar", "001.tar"]
    assert len(storage.list_files(storage.join(base, "{a,b}/000.tar"))) == 2
    assert storage.list_files(storage.join(base, "a/*.parquet")) == ()


def test_folders_go_there_and_back(base, tmp_path):
    source = tmp_path / "source"
    (source / "unet").mkdir(parents=True)
    (source / "config.json").write_bytes(b"{}")
    (source / "unet" / "weights").write_bytes(b"\0" * 100_000)
    storage.put_folder(source, storage.join(base, "model"))
    storage.get_folder(storage.join(base, "model"), tmp_path / "back")
    assert (tmp_path / "back/config.json").read_bytes() == b"{}"
    assert (tmp_path / "back/unet/weights").read_bytes() == b"\0" * 100_000
    with pytest.raises(DataError, match="there are no files in it"):
        storage.put_folder(tmp_path / "nothing", storage.join(base, "nothing"))


@pytest.mark.parametrize("read", [storage.list_files, storage.read_bytes])
def test_what_is_missing_is_named(base, read):
    with pytest.raises(DataError, match=r"nowhere: no such file or folder"):
        read(storage.join(base, "nowhere"))


def test_missing_folders_of_patterns_are_named(base, tmp_path):
    storage.write_bytes(storage.join(base, "000.tar"), b"x")
    with pytest.raises(DataError, match=r"2 of its 3 files are missing, the first is .*001\.tar"):
        storage.list_files(storage.join(base, "{000..002}.tar"))
    with pytest.raises(DataError, match="no such file or folder"):
        storage.get_folder(storage.join(base, "nowhere"), tmp_path / "back")
    with pytest.raises(DataError, match="no such file or folder"):
        storage.list_files(storage.join(base, "nowhere/*.tar"))


@pytest.mark.parametrize(
    ("pattern", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..10}.tar", ["08.tar", "09.tar", "10.tar"]),
        ("{0..1}/{a,b}", ["0/a", "0/b", "1/a", "1/b"]),
    ],
)
def test_braces(pattern, expanded):
    assert storage.expand_braces(pattern) == expanded


@pytest.mark.parametrize("pattern", ["{3..1}", "{1..", "{a}", "{a..c}", "{a,{b,c}}"])
def test_braces_that_mean_nothing(pattern):
    with pytest.raises(DataError, match="its braces are not valid"):
        storage.expand_braces(pattern)


def test_a_folder_is_fetched_once_and_anew_when_it_changed(base, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    storage.write_bytes(storage.join(base, "model/unet/config.json"), b"one")
    folder = storage.cached_folder(storage.join(base, "model"))
    assert (Path(folder) / "unet" / "config.json").read_bytes() == b"one"
    if not base.startswith("s3://"):
        assert folder == storage.join(base, "model")
        return
    assert storage.cached_folder(storage.join(base, "model")) == folder
    storage.write_bytes(storage.join(base, "model/unet/config.json"), b"another")
    assert (Path(storage.cached_folder(storage.join(base, "model"))) / "unet" / "config.json").read_bytes() == b"another"
    with pytest.raises(DataError, match="none: no such file or folder"):
        storage.cached_folder(storage.join(base, "none"))


def test_a_single_file_is_fetched_as_itself(base, tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    url = storage.join(base, "networks/inception.pth")
    storage.write_bytes(url, b"weights")
    storage.write_bytes(url + ".txt", b"about them")  # has the other one's name as a prefix
    file = Path(storage.cached_folder(url))
    assert file.name == "inception.pth"
    assert file.read_bytes() == b"weights"


def test_what_is_removed_is_gone_and_may_have_been_gone_before(base):
    for name in ("a", "folder/b", "folder/c"):
        storage.write_bytes(storage.join(base, name), b"x")
    storage.delete(storage.join(base, "a"))
    storage.delete(storage.join(base, "folder"))
    storage.delete(storage.join(base, "folder"))
    assert not any(storage.exists(storage.join(base, name)) for name in ("a", "folder/b", "folder/c"))


@pytest.mark.parametrize("url", ["gs://bucket/a", "https://host/a", "s3://"])
def test_urls_of_no_use(url):
    with pytest.raises(DataError, match=url):
        storage.list_files(url)


def test_a_path_that_goes_through_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="file/below"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"")


def test_a_failed_write_leaves_no_rubbish(tmp_path):
    (tmp_path / "target").mkdir()
    with pytest.raises(DataError, match="target"):
        storage.write_bytes(str(tmp_path / "target"), b"a folder is in the way")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.mark.s3
def test_a_missing_bucket_is_named(s3_url):
    for url in ("s3://no-such-bucket/folder", "s3://no-such-bucket/*.tar", "s3://no-such-bucket/{0..3}.tar"):
        with pytest.raises(DataError, match="its bucket does not exist"):
            storage.list_files(url)


@pytest.mark.s3
@pytest.mark.parametrize("access", ["read_bytes", "list_files", "exists"])
def test_wrong_credentials_are_refused_and_not_shown(s3_url, monkeypatch, forget_s3_sessions, access):
    forget_s3_sessions()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    with pytest.raises(DataError, match=r"s3://tests/ready: access denied \(403\)") as caught:
        getattr(storage, access)("s3://tests/ready")
    assert "a-wrong-secret" not in str(caught.value)
    assert caught.value.__suppress_context__
    with pytest.raises(DataError, match="denied"):
        storage.write_bytes("s3://tests/x", b"x")


def test_no_credentials(monkeypatch, forget_s3_sessions, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget_s3_sessions()
    with pytest.raises(DataError, match="no S3 credentials; set AWS_ACCESS_KEY_ID"):
        storage.list_files("s3://bucket/folder")


def test_an_endpoint_that_is_not_there(monkeypatch, forget_s3_sessions):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)
    forget_s3_sessions()
    with pytest.raises(DataError, match=r"cannot reach the S3 endpoint \(http://127.0.0.1:9;") as caught:
        storage.read_bytes("s3://bucket/file")
    assert "a-secret" not in str(caught.value)


@pytest.mark.parametrize("behaviour", ["answers 503", "never answers", "stops in the middle"])
def test_a_server_in_trouble_is_unavailable(monkeypatch, forget_s3_sessions, behaviour):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if behaviour == "never answers":
                time.sleep(3)
                return
            self.send_response(503 if behaviour == "answers 503" else 200)
            for name, value in (("Content-Length", "1000"), ("ETag", '"a"'), ("Last-Modified", "Tue, 24 Nov 2026 09:00:00 GMT")):
                self.send_header(name, value)
            self.end_headers()
            if behaviour == "stops in the middle" and self.command == "GET":
                self.wfile.write(b"x" * 10)
                self.wfile.flush()
                time.sleep(3)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(storage, "READ_TIMEOUT_S", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)
    forget_s3_sessions()
    try:
        with pytest.raises(storage.StorageError) as raised:
            storage.read_bytes("s3://bucket/file")
    finally:
        server.shutdown()
        thread.join()
    assert raised.value.kind == "unavailable"
    assert "a-secret" not in str(raised.value)


class Outage:
    """Storage that does not answer the first `failures` times."""

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
    with pytest.raises(storage.StorageError, match="cannot reach") as raised:
        TRANSFERS[name](url)
    assert raised.value.kind == "unavailable"


@pytest.mark.parametrize(
    "error", [FileNotFoundError(), PermissionError(), NoCredentialsError(), IsADirectoryError(errno.EISDIR, "Is a directory")]
)
def test_what_a_retry_cannot_fix_fails_at_once(monkeypatch, error):
    outage = Outage(monkeypatch, 10**9, error)
    with pytest.raises(storage.StorageError):
        storage.read_bytes("s3://bucket/file")
    assert outage.calls == 1


def test_queries_are_retried_on_request_only(tmp_path, monkeypatch):
    for query in (storage.exists, storage.list_files, storage.delete):
        outage = Outage(monkeypatch, failures=2)
        with pytest.raises(storage.StorageError):
            query(str(tmp_path))
        with storage.retrying_for(10.0):
            query(str(tmp_path))
        assert outage.calls == 3
    outage = Outage(monkeypatch, failures=10**9)
    with storage.retrying_for(0), pytest.raises(storage.StorageError):
        storage.read_bytes(str(tmp_path / "file"))
    assert outage.calls == 1
