"""Helpers for servers that tests start: find free ports on loopback and wait until a server responds."""

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for opened in sockets:
            opened.bind(("127.0.0.1", 0))
        return [opened.getsockname()[1] for opened in sockets]
    finally:
        for opened in sockets:
            opened.close()


def wait_until_ready(process: subprocess.Popen, log: Path, use: Callable[[], object], seconds: float = 120) -> None:
    """Call `use` until it succeeds. Raises RuntimeError with the end of the log if the process exits or exceeds `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            use()
            return
        except Exception as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{process.args} did not start: {log.read_text()[-4000:]}") from error
            time.sleep(0.1)
