"""A server that lists names which lead out of the folder that is fetched, as an S3 server may: AWS itself takes such keys."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import fsspec

from ray_platform import storage
from ray_platform.contracts import DataError
from tests.safety.cases import Case, line_of

CONTENT = b"escaped"


@contextmanager
def server_with(keys: list[str]) -> Iterator[dict[str, str]]:
    """Answers every listing with `keys`, and every read; the environment that a client needs."""
    entries = "".join(
        f'<Contents><Key>{key}</Key><Size>{len(CONTENT)}</Size><ETag>"e"</ETag>'
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
        for key in keys
    )
    about = f"<Name>b</Name><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>"
    listing = f"<ListBucketResult>{about}{entries}</ListBucketResult>"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = listing.encode() if "list-type" in self.path else CONTENT
            self.send_response(200)
            for name, value in (("Content-Length", str(len(body))), ("ETag", '"e"'), ("Content-Type", "application/xml")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_address[1]}",
            "AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing-at-all", "AWS_DEFAULT_REGION": "us-east-1",
        }  # fmt: skip
    finally:
        server.shutdown()
        server.server_close()


def fetched(*keys: str):
    """What comes of a model's folder that has these keys."""

    def feed(folder: Path) -> str:
        with server_with(["model/config.json", *keys]) as environment, mock.patch.dict("os.environ", environment):
            fsspec.get_filesystem_class("s3").clear_instance_cache()
            try:
                return line_of(lambda: storage.get_folder("s3://b/model", folder / "copy"), DataError)
            finally:
                fsspec.get_filesystem_class("s3").clear_instance_cache()

    return feed


def planted(folder: Path) -> str:
    """The folder for copies of models, made by somebody else before."""
    cache = folder / f"diffdis-cache-{os.getuid()}"
    cache.mkdir()
    cache.chmod(0o777)
    with (
        server_with(["model/config.json"]) as environment,
        mock.patch.dict("os.environ", environment),
        mock.patch("tempfile.gettempdir", return_value=str(folder)),
    ):
        return line_of(lambda: storage.cached_folder("s3://b/model"), DataError)


MODEL = "a model or checkpoint at an s3:// URL"
STORES = [
    Case(
        "a key `model/../../outside/escaped` in a bucket",
        MODEL,
        "s3://b/model…../../outside/escaped",
        fetched("model/../../outside/escaped"),
    ),
    Case("a key with an absolute path in it", MODEL, "s3://b/model…/tmp/escaped", fetched("model//tmp/escaped")),
    Case("a folder for copies that others can write to, found in the temporary folder", MODEL, "diffdis-cache-", planted),
    Case(
        "credentials in an s3:// URL",
        "any URL",
        "s3://***@b/x…credentials",
        lambda folder: line_of(lambda: storage.read_bytes("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@b/x"), DataError),
    ),
]
