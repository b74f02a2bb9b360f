import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ray_platform import object_store, retry, storage
from ray_platform.contracts import ConfigError, UserError
from ray_platform.data.causes import lost_cause
from ray_platform.object_store import open_store
from ray_platform.storage_config import StorageConfig
from tests.support.relay import Relay, write_certificates
from tests.support.s3_server import ACCESS_KEY, PUBLIC_BUCKET, SECRET_KEY


@pytest.fixture
def aws(monkeypatch, tmp_path) -> pytest.MonkeyPatch:
    """Environment without any configuration of AWS except credentials, and with one attempt per operation."""
    for name in ("PROFILE", "SESSION_TOKEN", "ENDPOINT_URL", "ENDPOINT_URL_S3", "CA_BUNDLE", "DEFAULT_REGION", "REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(retry, "QUERY_SECONDS", 0.0)
    return monkeypatch


@pytest.fixture
def arrow_reads(monkeypatch) -> list[str]:
    """Paths that Arrow's client returned."""
    paths: list[str] = []
    read = storage._read_by_arrow

    def record(filesystem, path, start, stop):
        content = read(filesystem, path, start, stop)
        paths.append(path)
        return content

    monkeypatch.setattr(storage, "_read_by_arrow", record)
    return paths


@contextmanager
def serving(answer: Callable[[BaseHTTPRequestHandler], tuple[int, bytes]]) -> Iterator[str]:
    """Run a server on loopback that answers every request by `answer`, as (status, body); yield its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self)
            self.send_response(status)
            for name, value in (
                ("Content-Length", len(body)),
                ("ETag", '"a"'),
                ("Last-Modified", "Tue, 24 Nov 2026 09:00:00 GMT"),
            ):
                self.send_header(name, str(value))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def errors_of(url: str) -> list[UserError]:
    """Return the errors of reading, listing and writing."""
    errors = []
    for access in (storage.read_bytes, storage.list_files, lambda url: storage.write_bytes(url, b"x")):
        with pytest.raises(UserError) as raised:
            access(url)
        assert "\n" not in str(raised.value)
        errors.append(raised.value)
    return errors


ANSWERS = {  # code -> status, kind of error, a word of the line
    "ExpiredToken": (400, "configuration", "expired"),
    "InvalidAccessKeyId": (403, "configuration", "AWS_ACCESS_KEY_ID"),
    "RequestTimeTooSkewed": (403, "configuration", "clock"),
    "PermanentRedirect": (301, "configuration", "region"),
    "AuthorizationHeaderMalformed": (400, "configuration", "region"),
    "InvalidBucketName": (400, "configuration", "name"),
    "InvalidObjectState": (403, "archived", "Glacier"),
    "AccessDenied": (403, "forbidden", "denied"),
    "NoSuchBucket": (404, "missing", "bucket does not exist"),
}


def test_the_answer_of_the_server_is_the_error(aws):
    """The server answers with the code that the bucket's name says, like AWS without a text to HEAD."""

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        code = next(code for code in ANSWERS if code.lower() == request.path.split("/")[1].partition("?")[0])
        return ANSWERS[code][0], f"<Error><Code>{code}</Code><Message>text</Message></Error>".encode()

    with serving(answer) as url:
        aws.setenv("AWS_ENDPOINT_URL", url)
        for code, (_, kind, word) in ANSWERS.items():
            for error in errors_of(f"s3://{code.lower()}/folder/file"):
                assert (error.kind, word in str(error)) == (kind, True), error
                if kind == "configuration":  # concerns every file, so it ends a run
                    with pytest.raises(storage.StorageError):
                        lost_cause(error)
                else:
                    assert lost_cause(error).startswith("shard_")


def test_a_configuration_that_cannot_work_is_one_line(aws, tmp_path):
    for variables, word in (
        ({"AWS_ENDPOINT_URL": "minio:9000"}, "AWS_ENDPOINT_URL: minio:9000 is not a URL; write http://minio:9000"),
        ({"AWS_ENDPOINT_URL_S3": "minio"}, "AWS_ENDPOINT_URL_S3"),
        ({"AWS_PROFILE": "nope"}, "nope"),
        ({"AWS_CA_BUNDLE": str(tmp_path / "nothing.pem")}, "nothing.pem does not exist"),
        ({"AWS_CA_BUNDLE": __file__}, "not a file of certificates"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "no S3 credentials"),
    ):
        with aws.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            for name, value in variables.items():
                patch.setenv(name, value)
            assert all(word in str(error) for error in errors_of("s3://bucket/file")), word
    for url in ("s3://od*/", "s3://", "s3://a[b]/x", "s3://Od d/x"):
        assert all("names no bucket" in str(error) for error in errors_of(url))


def test_a_server_that_is_not_reached_is_named_with_the_reason(aws):
    aws.setenv("http_proxy", "")
    for url, words in (
        ("http://127.0.0.1:9", "connection refused"),
        ("http://no-such-host.invalid:9000", "name cannot be resolved"),
    ):
        aws.setenv("AWS_ENDPOINT_URL", url)
        for error in errors_of("s3://bucket/file"):
            assert (error.kind, url in str(error), words in str(error)) == ("unavailable", True, True), error
    aws.setenv("http_proxy", "http://me:the-password@127.0.0.1:9")
    for error in errors_of("s3://bucket/file"):
        assert "cannot reach the proxy" in str(error)
        assert "the-password" not in str(error)


@pytest.mark.s3
def test_a_public_bucket_needs_no_credentials(s3_url, s3_server, aws, arrow_reads):
    for name, value in s3_server.environment.items():
        aws.setenv(name, value)
    url = f"s3://{PUBLIC_BUCKET}/folder/file"
    open_store(url)[0].mkdir(PUBLIC_BUCKET)
    storage.write_bytes(url, b"content")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws.delenv(name)
    assert all("storage.public_buckets" in str(error) for error in errors_of(url))
    aws.setenv("DIFFDIS_PUBLIC_BUCKETS", "")  # restored after the test
    StorageConfig(public_buckets=(PUBLIC_BUCKET,)).set_variables()
    assert storage.list_files(f"s3://{PUBLIC_BUCKET}/folder") == (storage.StoredFile(url, 7),)
    assert storage.read_bytes(url) == storage.read_many([url])[url] == b"content"
    assert arrow_reads == [f"{PUBLIC_BUCKET}/folder/file"]
    assert "no S3 credentials" in str(errors_of(f"{s3_url}/ready")[0])  # of any other bucket


def test_the_requester_pays(aws):
    """A server that denies every request without the header."""
    aws.setenv("DIFFDIS_REQUESTER_PAYS_BUCKETS", "")
    with serving(lambda request: (200, b"content") if request.headers.get("x-amz-request-payer") else (403, b"")) as url:
        aws.setenv("AWS_ENDPOINT_URL", url)
        assert {error.kind for error in errors_of("s3://bucket/file")} == {"forbidden"}
        StorageConfig(requester_pays_buckets=("bucket",)).set_variables()
        assert storage.read_bytes("s3://bucket/file") == b"content"
        assert storage.list_files("s3://bucket/file")[0].size == 7
        assert {error.kind for error in errors_of("s3://another/file")} == {"forbidden"}


def test_buckets_are_named_without_a_scheme():
    for buckets in (("s3://bucket",), ("bucket/folder",), "bucket"):
        with pytest.raises(ConfigError, match=r"storage\.public_buckets"):
            StorageConfig(public_buckets=buckets)


@pytest.mark.parametrize("supports_ranges", [True, False])
def test_a_web_server_is_read_by_its_urls(aws, supports_ranges):
    content = b"0123456789"

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        if "denied" in request.path:
            return 403, b""
        if "missing" in request.path:
            return 404, b""
        start, _, stop = request.headers.get("Range", "").removeprefix("bytes=").partition("-")
        return (206, content[int(start) : int(stop) + 1]) if supports_ranges and stop else (200, content)

    with serving(answer) as url:
        shards = tuple(storage.StoredFile(f"{url}/{number}.tar", 10) for number in range(3))
        assert storage.list_files(f"{url}/{{0..2}}.tar") == shards
        assert storage.read_bytes(shards[0].url) == content
        assert storage.read_bytes(shards[0].url, 2, 5) == b"234"
        for name, kind in (("missing", "missing"), ("denied", "forbidden")):
            with pytest.raises(storage.StorageError, match=name) as raised:
                storage.read_bytes(f"{url}/{name}")
            assert raised.value.kind == kind


@pytest.mark.s3
def test_a_private_authority(s3_url, s3_server, tmp_path, aws, arrow_reads):
    for name, value in s3_server.environment.items():
        aws.setenv(name, value)
    authority, tls = write_certificates(tmp_path)
    with Relay(s3_server.ports[3], tls) as front:
        aws.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{front.port}")
        for error in errors_of(f"{s3_url}/ready"):
            assert (error.kind, "certificate" in str(error), "AWS_CA_BUNDLE" in str(error)) == ("configuration", True, True)
        aws.setenv("AWS_CA_BUNDLE", str(authority))
        assert storage.list_files(f"{s3_url}/ready")[0].size == 3
        assert storage.read_bytes(f"{s3_url}/ready") == b"yes"
    assert arrow_reads == ["tests/ready"]


@pytest.mark.s3
def test_a_proxy_and_its_exceptions(s3_url, s3_server, aws, arrow_reads):
    for name, value in s3_server.environment.items():
        aws.setenv(name, value)
    with Relay(s3_server.ports[3]) as proxy:
        aws.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        aws.setenv("no_proxy", "")
        aws.setenv("AWS_ENDPOINT_URL", "http://storage.example:8333")  # only the proxy knows this name
        assert storage.read_bytes(f"{s3_url}/ready") == b"yes"
        assert storage.list_files(f"{s3_url}/ready")[0].size == 3
        assert arrow_reads == ["tests/ready"]
        assert proxy.connections >= 2
        aws.setenv("AWS_ENDPOINT_URL", s3_server.endpoint)
        aws.setenv("no_proxy", "127.0.0.1")
        connections = proxy.connections
        assert storage.read_bytes(f"{s3_url}/ready") == b"yes"
        assert storage.list_files(f"{s3_url}/ready")[0].size == 3
        assert proxy.connections == connections


def write_profile(folder: Path, endpoint: str, secret: str, **more: str) -> None:
    lines = [f"{name} = {value}" for name, value in more.items()]
    (folder / "config").write_text(
        "\n".join(["[profile work]", "services = storage", "region = eu-west-1", *lines, "[services storage]", "s3 ="])
        + f"\n    endpoint_url = {endpoint}\n"
    )
    keys = f"aws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {secret}\n"
    (folder / "credentials").write_text("" if more else f"[work]\n{keys}")


@pytest.mark.s3
def test_a_profile_is_followed_and_its_changes_are_noticed(s3_url, s3_server, tmp_path, aws, arrow_reads):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
        aws.delenv(name, raising=False)
    aws.setenv("AWS_PROFILE", "work")
    for secret, is_right in ((SECRET_KEY, True), ("another", False), (SECRET_KEY, True)):
        write_profile(tmp_path, s3_server.endpoint, secret)
        if is_right:
            assert storage.read_bytes(f"{s3_url}/ready") == b"yes"
            assert storage.list_files(f"{s3_url}/ready")[0].size == 3
        else:
            assert {error.kind for error in errors_of(f"{s3_url}/ready")} == {"configuration"}
    assert len(arrow_reads) == 2
    # Settings that Arrow's client does not support are left to s3fs.
    write_profile(tmp_path, s3_server.endpoint, SECRET_KEY)
    aws.setenv("AWS_USE_DUALSTACK_ENDPOINT", "true")
    assert object_store.arrow_filesystem("tests") is None


@pytest.mark.s3
def test_credentials_that_are_renewed(s3_url, s3_server, tmp_path, aws, arrow_reads):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        aws.delenv(name, raising=False)
    aws.setenv("AWS_PROFILE", "work")
    write_profile(tmp_path, s3_server.endpoint, "", credential_process=f"cat {tmp_path / 'issued'}")
    for secret in (SECRET_KEY, "another", SECRET_KEY):
        # They expire so soon that botocore renews them before each request.
        expiration = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
        issued = {"Version": 1, "AccessKeyId": ACCESS_KEY, "SecretAccessKey": secret, "Expiration": expiration}
        (tmp_path / "issued").write_text(json.dumps(issued))
        if secret == SECRET_KEY:
            assert storage.read_bytes(f"{s3_url}/ready") == b"yes"
        else:
            with pytest.raises(storage.StorageError, match="credentials"):
                storage.read_bytes(f"{s3_url}/ready")
    assert len(arrow_reads) == 2
