"""A real S3 server (seaweedfs) on free ports, for tests and benchmarks."""

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import fsspec

from tests.support.processes import free_ports, wait_until_ready

ACCESS_KEY, SECRET_KEY = "diffdis-tests", "the-secret-of-the-tests"
PUBLIC_BUCKET = "public"  # everybody may read it


class S3Server:
    """S3 server that can be started and stopped repeatedly. Its data stay in `folder`, and its port does not change."""

    def __init__(self, folder: Path, address: str = "127.0.0.1", prefix: Sequence[str] = ()) -> None:
        """Configure the server.

        Args:
            folder: Folder of its data.
            address: Address to listen on.
            prefix: Prefix of its command that runs it on the host with `address`, with `folder` as the working directory.
        """
        self.folder, self.address, self.prefix = folder, address, prefix
        (folder / "data").mkdir(parents=True, exist_ok=True)
        identity = {"name": "tests", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]}
        identity["actions"] = ["Admin", "Read", "Write", "List", "Tagging"]
        anonymous = {"name": "anonymous", "actions": [f"Read:{PUBLIC_BUCKET}", f"List:{PUBLIC_BUCKET}"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity, anonymous]}))
        self.ports = free_ports(8)
        self.endpoint = f"http://{address}:{self.ports[3]}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        master, volume, filer, s3, *grpc = self.ports
        command = [
            *self.prefix, str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "server",
            "-dir=data", f"-ip={self.address}", f"-ip.bind={self.address}",
            f"-master.port={master}", f"-volume.port={volume}", "-filer", f"-filer.port={filer}",
            "-s3", f"-s3.port={s3}", "-s3.config=s3.json", "-s3.port.iceberg=0", "-s3.port.lance=0",
            f"-master.port.grpc={grpc[0]}", f"-volume.port.grpc={grpc[1]}", f"-filer.port.grpc={grpc[2]}",
            f"-s3.port.grpc={grpc[3]}",
            "-master.volumeSizeLimitMB=128", "-volume.max=0", "-volume.preStopSeconds=0",
            "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms", "-master.telemetry=false",
        ]  # fmt: skip
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log)
        wait_until_ready(self.process, self.folder / "log", self._write)

    def stop(self) -> None:
        """Kill the server, because a graceful stop is slow. Written data is kept."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment variables that a client needs."""
        credentials = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        return credentials | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}

    def _write(self) -> None:
        """Write an object. The S3 port responds seconds before the first write succeeds."""
        filesystem = fsspec.filesystem(
            "s3", key=ACCESS_KEY, secret=SECRET_KEY, endpoint_url=self.endpoint, skip_instance_cache=True,
            config_kwargs={"retries": {"total_max_attempts": 1}, "s3": {"addressing_style": "path"}},
            client_kwargs={"region_name": "us-east-1"},
        )  # fmt: skip
        filesystem.mkdirs("tests", exist_ok=True)
        filesystem.pipe_file("tests/ready", b"yes")
