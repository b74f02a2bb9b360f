import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

from diffdis_platform.commands.pretrain import parse_arguments
from ray_platform import object_store, retry, storage
from ray_platform.contracts import ConfigError, UserError
from ray_platform.data.causes import lost_cause
from ray_platform.object_store import open_store
from ray_platform.storage_config import StorageConfig
from ray_platform.train.preflight import check_writable
from tests.support.messages import check_message
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


ANSWERS = {  # code -> status, kind of error, fault in docs/operations.md
    "ExpiredToken": (400, "configuration", "S3: the credentials have expired"),
    "InvalidAccessKeyId": (403, "configuration", "S3: the server rejects the credentials"),
    "RequestTimeTooSkewed": (403, "configuration", "S3: the clocks differ"),
    "PermanentRedirect": (301, "configuration", "S3: the bucket is in another region"),
    "AuthorizationHeaderMalformed": (400, "configuration", "S3: the region is wrong"),
    "InvalidBucketName": (400, "configuration", "S3: the server rejects the name of the bucket"),
    "InvalidObjectState": (403, "archived", "S3: an object is in an archive"),
    "AccessDenied": (403, "forbidden", "S3: access is denied"),
    "NoSuchBucket": (404, "missing", "S3: the bucket does not exist"),
}


def test_the_answer_of_the_server_is_the_error(aws):
    """The server answers with the code that the bucket's name says, like AWS without a text to HEAD."""

    def answer(request: BaseHTTPRequestHandler) -> tuple[int, bytes]:
        code = next(code for code in ANSWERS if code.lower() == request.path.split("/")[1].partition("?")[0])
        return ANSWERS[code][0], f"<Error><Code>{code}</Code><Message>text</Message></Error>".encode()

    with serving(answer) as url:
        aws.setenv("AWS_ENDPOINT_URL", url)
        for code, (_, kind, fault) in ANSWERS.items():
            file = f"s3://{code.lower()}/folder/file"
            for error in errors_of(file):
                assert error.kind == kind
                check_message(fault, error, URL=file)
                if kind == "configuration":  # concerns every file, so it ends a run
                    with pytest.raises(storage.StorageError):
                        lost_cause(error)
                else:
                    assert lost_cause(error).startswith("shard_")


def test_a_configuration_that_cannot_work_is_one_line(aws, tmp_path):
    missing = str(tmp_path / "nothing.pem")
    for variables, fault in (
        ({"AWS_ENDPOINT_URL": "minio:9000"}, "S3: an endpoint without http://"),
        ({"AWS_PROFILE": "nope"}, "S3: an unknown profile"),
        ({"AWS_CA_BUNDLE": missing}, "S3: the file of AWS_CA_BUNDLE does not exist"),
        ({"AWS_CA_BUNDLE": __file__}, "S3: the file of AWS_CA_BUNDLE has no certificates"),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "S3: there are no credentials"),
    ):
        with aws.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
            for name, value in variables.items():
                patch.setenv(name, value)
            for error in errors_of("s3://bucket/file"):
                check_message(fault, error, URL="s3://bucket/file", FILE=variables.get("AWS_CA_BUNDLE", "FILE"))
    for url in ("s3://od*/", "s3://", "s3://a[b]/x", "s3://Od d/x"):
        for error in errors_of(url):
            check_message("S3: a pattern instead of a bucket", str(error).replace(url, "URL", 1))


def test_a_server_that_is_not_reached_is_named_with_the_reason(aws):
    aws.setenv("http_proxy", "")
    for url, fault in (
        ("http://127.0.0.1:9", "S3: the endpoint refuses connections"),
        ("http://no-such-host.invalid:9000", "S3: the name of the endpoint is unknown"),
    ):
        aws.setenv("AWS_ENDPOINT_URL", url)
        for error in errors_of("s3://bucket/file"):
            assert error.kind == "unavailable"
            check_message(fault, error, URL="s3://bucket/file", ENDPOINT=url)
    aws.setenv("http_proxy", "http://me:the-password@127.0.0.1:9")
    for error in errors_of("s3://bucket/file"):
        assert "the-password" not in str(error)
        check_message("S3: the proxy does not answer", error, URL="s3://bucket/file", PROXY="http://***@127.0.0.1:9")


@pytest.mark.s3
def test_a_public_bucket_needs_no_credentials(s3_url, s3_server, aws, arrow_reads):
    for name, value in s3_server.environment.items():
        aws.setenv(name, value)
    url = f"s3://{PUBLIC_BUCKET}/folder/file"
    open_store(url)[0].mkdir(PUBLIC_BUCKET)
    storage.write_bytes(url, b"content")
    storage.write_bytes(f"s3://{PUBLIC_BUCKET}/config.yaml", b"train: {num_steps: 7}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        aws.delenv(name)
    assert all("storage.public_buckets" in str(error) for error in errors_of(url))
    aws.setenv("DIFFDIS_PUBLIC_BUCKETS", "")  # restored after the test
    arguments = ["--config", f"s3://{PUBLIC_BUCKET}/config.yaml", "--storage.public_buckets", "other", PUBLIC_BUCKET]
    assert parse_arguments(arguments).config.train.num_steps == 7
    assert [(file.url, file.size) for file in storage.list_files(f"s3://{PUBLIC_BUCKET}/folder")] == [(url, 7)]
    assert storage.read_bytes(url) == storage.read_many([url])[url] == b"content"
    assert arrow_reads == [f"{PUBLIC_BUCKET}/{name}" for name in ("config.yaml", "folder/file", "folder/file")]
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
        with pytest.raises(
            ConfigError, match=r"^output_dir: s3://another/run cannot be written to .access denied .403.; "
        ) as raised:
            check_writable("s3://another/run")
        assert "public_buckets" not in str(raised.value), "which are read"


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
        if "missing" in request.path or "{" in unquote(request.path):
            return 404, b""
        start, _, stop = request.headers.get("Range", "").removeprefix("bytes=").partition("-")
        return (206, content[int(start) : int(stop) + 1]) if supports_ranges and stop else (200, content)

    with serving(answer) as url:
        shards = tuple(storage.StoredFile(f"{url}/{number}.tar", 10, '"a"') for number in range(3))
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
            assert error.kind == "configuration"
            endpoint = f"https://127.0.0.1:{front.port}"
            check_message("S3: the certificate is not trusted", error, URL=f"{s3_url}/ready", ENDPOINT=endpoint)
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
