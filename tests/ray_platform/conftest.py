"""Shards to read and a real S3 server to read them from."""

import io
import json
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

ACCESS_KEY, SECRET_KEY = "diffdis-tests", "the-secret-of-the-tests"


def png(seed: int, size: int = 16) -> bytes:
    """A PNG of noise, [size, size, 3], that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(members: Iterable[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def samples_of(first: int, count: int, size: int = 16) -> list[tuple[str, bytes]]:
    """The members of `count` good samples with keys and captions from `first` on."""
    return [
        member
        for number in range(first, first + count)
        for member in ((f"{number:05d}.png", png(number, size)), (f"{number:05d}.txt", f"sample {number}".encode()))
    ]


@pytest.fixture(scope="session")
def build_tar():
    """build_tar([(name, content), …]) -> the bytes of a tar."""
    return tar_of


@pytest.fixture(scope="session")
def build_samples():
    """build_samples(first, count, size=16) -> members of good samples, for build_tar."""
    return samples_of


@pytest.fixture(scope="session")
def build_png():
    """build_png(seed, size=16) -> the bytes of a PNG."""
    return png


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory) -> Path:
    """Five shards of unequal sizes, 60 good samples with the captions "sample 0" to "sample 59"."""
    folder = tmp_path_factory.mktemp("shards")
    first = 0
    for number, count in enumerate((20, 5, 13, 1, 21)):
        (folder / f"{number:05d}.tar").write_bytes(tar_of(samples_of(first, count)))
        first += count
    return folder


@pytest.fixture(scope="session")
def s3_endpoint(tmp_path_factory):
    """The URL of a real S3 server, seaweedfs, on free ports of loopback."""
    folder = tmp_path_factory.mktemp("seaweedfs")
    (folder / "data").mkdir()
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identities = [{"name": "tests", "credentials": credentials, "actions": actions}]
    (folder / "s3.json").write_text(json.dumps({"identities": identities}))
    master, volume, filer, s3, *grpc = _free_ports(8)
    command = [
        str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server", "-dir=data",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
        f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
        "-s3", f"-s3.port={s3}", "-s3.config=s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
        f"-master.port.grpc={grpc[0]}", f"-volume.port.grpc={grpc[1]}", f"-filer.port.grpc={grpc[2]}",
        f"-s3.port.grpc={grpc[3]}",
        "-master.volumeSizeLimitMB=128", "-volume.max=0", "-volume.preStopSeconds=0",
        "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms", "-master.telemetry=false",
    ]  # fmt: skip
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    try:
        endpoint = f"http://127.0.0.1:{s3}"
        _wait_until_it_stores(endpoint, process, folder / "log")
        yield endpoint
    finally:
        # It takes its time to stop politely, and its data go with the folder.
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def s3_url(s3_endpoint, monkeypatch) -> str:
    """A bucket's URL, with the environment set so that it can be read and written."""
    for name, value in _environment(s3_endpoint).items():
        monkeypatch.setenv(name, value)
    return "s3://tests"


@pytest.fixture
def forget_s3_sessions():
    """Call it after changing AWS_… variables: s3fs keeps its sessions, and with them the old credentials."""
    forget = fsspec.get_filesystem_class("s3").clear_instance_cache
    yield forget
    forget()


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def _wait_until_it_stores(endpoint: str, process: subprocess.Popen, log: Path) -> None:
    """Its S3 port answers seconds before the first write succeeds, so that is what counts."""
    filesystem = fsspec.filesystem(
        "s3", key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=endpoint, skip_instance_cache=True,
        config_kwargs={"retries": {"total_max_attempts": 1}, "s3": {"addressing_style": "path"}},
        client_kwargs={"region_name": "us-east-1"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while True:
        try:
            filesystem.mkdirs("tests", exist_ok=True)
            filesystem.pipe_file("tests/ready", b"yes")
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"seaweedfs did not start: {log.read_text()[-2000:]}") from error
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()
