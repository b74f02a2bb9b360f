"""Fixtures with shards and with a real S3 server to read them from."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_platform.tracking import delivery
from tests.support.s3_server import S3Server


def png(seed: int, shape: tuple[int, int] = (16, 16)) -> bytes:
    """Return a PNG of noise, [*shape, 3], that is unique to the seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)
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


def write_shards(folder: Path, shards: dict[str, list[tuple[str, bytes]] | bytes]) -> Path:
    """Write shards to a folder: tars with the given members, or files with the given content."""
    folder.mkdir(exist_ok=True)
    for name, content in shards.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else tar_of(content))
    return folder


def samples_of(first: int, count: int, size: int = 16) -> list[tuple[str, bytes]]:
    """Return the members of `count` good samples whose keys and captions are numbered from `first`."""
    return [
        member
        for number in range(first, first + count)
        for member in ((f"{number:05d}.png", png(number, (size, size))), (f"{number:05d}.txt", f"sample {number}".encode()))
    ]


@pytest.fixture(scope="session")
def build_tar():
    """Return build_tar([(name, content), …]), which returns the bytes of a tar."""
    return tar_of


@pytest.fixture(scope="session")
def build_samples():
    """Return build_samples(first, count, size=16), which returns members of good samples for build_tar."""
    return samples_of


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory) -> Path:
    """Five shards of unequal sizes with 60 good samples, whose captions are "sample 0" to "sample 59"."""
    counts = (20, 5, 13, 1, 21)
    shards = {f"{n:05d}.tar": samples_of(sum(counts[:n]), count) for n, count in enumerate(counts)}
    return write_shards(tmp_path_factory.mktemp("shards"), shards)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("seaweedfs"))
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture
def s3_url(s3_server, monkeypatch) -> str:
    """URL of a bucket, with an environment that grants read and write access."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return "s3://tests"


@pytest.fixture(scope="session")
def reference():
    """Losses, weights and EMA of `engine_runs.plain_run`."""
    from tests.ray_platform.engine_runs import plain_run

    return plain_run()


@pytest.fixture
def no_waits(monkeypatch):
    """Let a tracked run end without waiting for a service that does not answer."""
    monkeypatch.setattr(delivery, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(delivery, "_MAX_WAIT_S", 0.01)
    monkeypatch.setattr(delivery, "_END_SECONDS", 0.0)
