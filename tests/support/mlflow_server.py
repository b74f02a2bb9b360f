"""A real MLflow server on a free port of loopback."""

import contextlib
import os
import shlex
import signal
import subprocess
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from ray_platform.tracking.mlflow_tracker import ui_command
from tests.support.processes import free_ports, wait_until_ready


class MlflowServer:
    """MLflow server for a store, running for the duration of a `with` block."""

    def __init__(self, folder: Path, store: str, *arguments: str, environment: Mapping[str, str] | None = None) -> None:
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = folder / "mlflow_server.log"
        self._command = [*shlex.split(ui_command(store, self.port)), *arguments]
        self._environment = {**os.environ, **(environment or {})}

    def __enter__(self) -> "MlflowServer":
        with self._log.open("wb") as log:
            # A new session, so that the server's child processes can be ended together with it.
            self._process = subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until_ready(
                self._process, self._log, lambda: urllib.request.urlopen(f"{self.url}/health", timeout=5).close(), 600
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self._process.pid, number)
                self._process.wait(timeout=30)
