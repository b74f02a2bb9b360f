"""S3 server whose listings contain keys that point outside the downloaded folder. AWS accepts such keys."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import fsspec

from ray_platform import storage
from ray_platform.cached_folders import cached_folder
from ray_platform.contracts import DataError
from tests.safety.cases import Feed, line_of

CONTENT = b"escaped"


@contextmanager
def server_with(keys: list[str]) -> Iterator[None]:
    """Start a server for this process's clients that answers every listing with `keys` and every read with data."""
    entries = "".join(
        f'<Contents><Key>{key}</Key><Size>{len(CONTENT)}</Size><ETag>"e"</ETag>'
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
        for key in keys
    )
    about = f"<Name>b</Name><KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>"
    listing = f"<ListBucketResult>{about}{entries}</ListBucketResult>"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer(200, listing.encode() if "list-type" in self.path else CONTENT)

        def do_HEAD(self) -> None:
            self.answer(404)

        def answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            for name, value in {"Content-Length": len(body), "ETag": '"e"', "Content-Type": "application/xml"}.items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Suppress the server's log output."""

    environment = {"AWS_ACCESS_KEY_ID": "nobody", "AWS_SECRET_ACCESS_KEY": "nothing-at-all", "AWS_DEFAULT_REGION": "us-east-1"}
    s3 = fsspec.get_filesystem_class("s3")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_address[1]}"
        s3.clear_instance_cache()
        try:
            with mock.patch.dict("os.environ", environment):
                yield
        finally:
            s3.clear_instance_cache()
            server.shutdown()


def fetched(key: str) -> Feed:
    """Return a case that copies a model folder containing this key."""

    def feed(folder: Path) -> str:
        with server_with(["model/config.json", key]):
            return line_of(lambda: storage.get_folder("s3://b/model", folder / "copy"), DataError)

    return feed


def planted_cache(folder: Path) -> str:
    """Use a cache folder for models that another user could have created and can write to."""
    cache = folder / f"diffdis-cache-{os.getuid()}"
    cache.mkdir()
    cache.chmod(0o777)
    with server_with(["model/config.json"]), mock.patch("tempfile.gettempdir", return_value=str(folder)):
        return line_of(lambda: cached_folder("s3://b/model"), DataError)


def credentials_in_url(folder: Path) -> str:
    return line_of(lambda: storage.read_bytes("s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI@b/x"), DataError)


STORES = {
    "a key `model/../../outside/escaped` in a bucket": fetched("model/../../outside/escaped"),
    "a key with an absolute path in it": fetched("model//tmp/escaped"),
    "a folder for copies that others can write to, found in the temporary folder": planted_cache,
    "credentials in an s3:// URL": credentials_in_url,
}
