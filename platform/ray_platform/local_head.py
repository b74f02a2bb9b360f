"""A temporary Ray head on this machine, isolated from other clusters, and the submission of jobs to it."""

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from ray_platform.contracts import UserError, one_line
from ray_platform.terminal import show_output
from ray_platform.tracking.run_metadata import GIT_VARIABLE, git_state

LOG = "job.log"  # in the output folder: all messages of a command, also those of Ray and DeepSpeed
MARKER = "DIFFDIS_LOCAL_HEAD"  # environment variable of every process of a head; its value identifies the head

_HOST = "127.0.0.1"
_START_TIMEOUT_S = 90.0
_GRACE_S = 2.0
# Below the kernel's range for outgoing connections, so that a port chosen here is still free when Ray binds it, seconds later.
_PORTS = range(20_000, 32_000)
# Variables that would direct the head or its clients to another cluster or token.
_FOREIGN = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN_PATH", "RAY_JOB_HEADERS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
# If this process is killed before it can clean up, the kernel sends the head a SIGTERM (Linux only). The setting survives exec.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""
_RAY = ("-m", "ray.scripts.scripts")
_PORT_OPTIONS = (
    *("port", "dashboard-port", "ray-client-server-port", "node-manager-port", "object-manager-port", "metrics-export-port"),
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
)
_PORT_VARIABLES = ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")  # these have no command-line options
# Ray waits 30 s for its own processes, which a busy machine may take longer to start; the second time they are in its file cache.
_RAY_GAVE_UP = "timed out during startup"


class HeadError(UserError):
    """The head did not start. The message names the file with its output."""


class LocalHead:
    """A Ray head on loopback for the length of a `with` block.

    It has its own ports, temporary folder and token, so it does not disturb other clusters, and only clients with the token can
    use it. When the block ends, also by Ctrl-C or SIGTERM, all processes of the head and its jobs, and those started with `env`,
    are ended. Enter it from the main thread: the kernel ends the head with the thread that started it. If this process is killed
    with SIGKILL, they end as well (on Linux, within a minute), but the temporary folder stays.
    """

    def __init__(self, num_cpus: int | None = None) -> None:
        """`num_cpus`: CPUs that the head offers; all of the machine's by default."""
        self._num_cpus = num_cpus
        self._marker = uuid.uuid4().hex
        names = _PORT_OPTIONS + _PORT_VARIABLES
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        self._folder: Path
        self._handler: Any = signal.SIG_DFL
        self.address = f"http://{_HOST}:{self._ports['dashboard-port']}"
        self.gcs_address = f"{_HOST}:{self._ports['port']}"
        self.env = self._environment()

    def __enter__(self) -> "LocalHead":
        """Start the head and wait until it accepts jobs. Raises HeadError if it exits early or is not ready in time."""
        # Ray puts unix sockets below, whose paths have at most 107 bytes: the system's default folder may be too long.
        self._folder = Path(tempfile.mkdtemp(prefix="ddhead-", dir="/tmp"))
        if _in_main_thread():
            self._handler = signal.signal(signal.SIGTERM, _exit_on_signal) or signal.SIG_DFL
        try:
            if not self._start():
                self._end_processes()
                self._start(is_last=True)
        except BaseException:
            self._clean_up()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End all processes of the head and remove its files."""
        self._clean_up()

    def _environment(self) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
        no_proxy = ",".join(filter(None, (env.get("no_proxy") or env.get("NO_PROXY"), _HOST, "localhost")))
        return env | {
            MARKER: self._marker,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{env.get('PATH', '')}",  # so that `python` is this interpreter
            "no_proxy": no_proxy,
            "NO_PROXY": no_proxy,
            "RAY_API_SERVER_ADDRESS": self.address,  # for `ray job …`
            "RAY_ADDRESS": self.gcs_address,  # for drivers; Ray sets it for submitted jobs
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Despite its name: without it Ray replaces 127.0.0.1 by the machine's address and listens on the network.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            # Ray would start a worker per CPU that nothing uses: it lacks the runtime environment of our drivers.
            "RAY_prestart_worker_first_driver": "0",
            # Otherwise Ray's process titles overwrite the environment, including the marker.
            "SPT_NOENV": "1",
        }

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-S", "-c", _DIE_WITH_PARENT, *_RAY, "start", "--head", "--block"),
            *(f"--{name}={self._ports[name]}" for name in _PORT_OPTIONS),
            f"--node-ip-address={_HOST}",
            f"--dashboard-host={_HOST}",
            *("--min-worker-port=0", "--max-worker-port=0"),  # the kernel chooses
            f"--temp-dir={self._folder}",
            "--disable-usage-stats",
            *([] if self._num_cpus is None else [f"--num-cpus={self._num_cpus}"]),
        ]

    def _start(self, is_last: bool = False) -> bool:
        """Return whether the head is ready; not, if Ray gave up waiting.

        Raises:
            HeadError: the head does not start for another reason or, with `is_last`, because Ray gave up.
        """
        # The head must not see a RAY_ADDRESS.
        env = {name: value for name, value in self.env.items() if name not in _FOREIGN}
        env |= {name: str(self._ports[name]) for name in _PORT_VARIABLES}
        log = self._folder / "start.log"
        with log.open("wb") as stream:
            head = subprocess.Popen(
                self._command(),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the terminal goes to this process only, which then ends the head
            )
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not self._ready():
            code = head.poll()
            if code is not None or time.monotonic() > deadline:
                problem = (
                    f"was not ready after {_START_TIMEOUT_S:.0f} s" if code is None else f"exited with code {code} at its start"
                )
                output = log.read_text(errors="replace")
                if _RAY_GAVE_UP in output and not is_last:
                    return False
                with tempfile.NamedTemporaryFile("w", prefix="ray-head-", suffix=".log", delete=False) as kept:
                    kept.write(output)
                raise HeadError(f"the Ray head {problem}; its output is in {kept.name}: {_last_error(output)}")
            time.sleep(0.05)
        return True

    def _ready(self) -> bool:
        """Return whether the dashboard answers and lists a node that is alive."""
        request = urllib.request.Request(  # noqa: S310
            f"{self.address}/api/v0/nodes", headers={"Authorization": f"Bearer {self.env['RAY_AUTH_TOKEN']}"}
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=5) as reply:
                nodes = json.load(reply)["data"]["result"]["result"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        return any(node["state"] == "ALIVE" for node in nodes)

    def _clean_up(self) -> None:
        main = _in_main_thread()
        if main:
            # Ignore a second Ctrl-C during these seconds, which would leave processes behind.
            on_interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN) or signal.SIG_DFL
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            self._end_processes()
            shutil.rmtree(self._folder, ignore_errors=True)
        finally:
            if main:
                signal.signal(signal.SIGINT, on_interrupt)
                signal.signal(signal.SIGTERM, self._handler)

    def _end_processes(self) -> None:
        # Several rounds: a process may have started another one meanwhile.
        for end in (psutil.Process.terminate, psutil.Process.kill, psutil.Process.kill):
            processes = marked_processes(self._marker)
            for process in processes:
                with contextlib.suppress(psutil.Error):
                    end(process)
            psutil.wait_procs(processes, timeout=_GRACE_S)


def marked_processes(marker: str) -> list[psutil.Process]:
    """Return the running processes of the head with this marker."""
    processes = psutil.process_iter(["environ"])  # None for a process of another user
    return [process for process in processes if (process.info["environ"] or {}).get(MARKER) == marker]


def ensure_cluster(output_dir: str) -> None:
    """Without RAY_ADDRESS, run the same command again with a temporary local head, and exit with its status.

    A child process is needed because the head's token must be in the environment before Ray is imported. Its output is shown by
    `show_output`; all of it is in job.log in `output_dir` or, if that is not a local folder, in a temporary one.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    with LocalHead() as head:
        spec = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m module`
        script = ["-m", spec.name] if spec else [sys.argv[0]]
        log = (Path(tempfile.mkdtemp(prefix="diffdis-")) if "://" in output_dir else Path(output_dir).expanduser()) / LOG
        status = run_filtered([sys.executable, *script, *sys.argv[1:]], head.env, log)
    if status:
        print(f"all messages of this command are in {log}", file=sys.stderr)
    sys.exit(status)


def run_filtered(command: Sequence[str], env: Mapping[str, str], log: Path) -> int:
    """Run a command with its output shown by `show_output` and added to `log`; return its status.

    On Ctrl-C, which the command receives as well, and on SIGTERM, which it is sent, wait until it has ended by itself.
    """
    process = subprocess.Popen(
        command,
        env={**env, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    log.parent.mkdir(parents=True, exist_ok=True)
    with process, log.open("a") as file:
        try:
            show_output(process.stdout or (), file)
        except KeyboardInterrupt:
            show_output(process.stdout or (), file)
        except SystemExit:
            process.terminate()
            show_output(process.stdout or (), file)
            raise
    return process.returncode


def submit(head: LocalHead, entrypoint: Sequence[str], working_dir: Path, env_vars: Mapping[str, str], log: Path) -> int:
    """Run a job on `head` with its output in this terminal; return 0 if it succeeded. An interrupt stops the job.

    `show_output` describes what is shown.

    Args:
        head: a started head.
        entrypoint: the command, as `["python", "jobs/pretrain.py"]`; `python` is this interpreter.
        working_dir: the folder in which the command runs; Ray copies it, except for what its `.gitignore` lists.
        env_vars: added to the environment of the driver and the workers.
        log: file for the whole output, with the lines of Ray and other libraries.
    """
    job = f"diffdis-{uuid.uuid4().hex[:12]}"
    env_vars = {GIT_VARIABLE: git_state(), **env_vars}  # the copy of the folder has no .git
    client = subprocess.Popen(
        [
            *(sys.executable, *_RAY, "--logging-level=error", "job", "submit"),  # or it lists the files that it does not upload
            f"--address={head.address}",
            f"--submission-id={job}",
            f"--working-dir={working_dir}",
            f"--runtime-env-json={json.dumps({'env_vars': dict(env_vars)})}",
            *("--", *entrypoint),
        ],
        env=head.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # on Ctrl-C it keeps printing the output of the job, which is stopped below
    )
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            show_output(client.stdout or (), file)
        return client.wait()
    except BaseException:
        stop = [sys.executable, *_RAY, "job", "stop", f"--address={head.address}", job]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(stop, env=head.env, timeout=20, start_new_session=True, check=False)
        client.terminate()
        client.communicate()
        raise


def _last_error(output: str) -> str:
    """Return the last line of a process's output that reads like an error, or else the last one."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["(empty)"]
    return one_line(next((line for line in reversed(lines) if re.search("error|fail|timed out", line, re.I)), lines[-1]), 300)


def _free_ports(count: int) -> list[int]:
    free: list[int] = []
    for port in random.SystemRandom().sample(_PORTS, len(_PORTS)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((_HOST, port))
            free.append(port)
        if len(free) == count:
            return free
    raise HeadError(f"fewer than {count} free ports from {_PORTS.start} to {_PORTS.stop}; close other servers")


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
