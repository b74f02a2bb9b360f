"""Simulated hosts with separate addresses on one machine, whose links can be cut, built from Linux namespaces and a bridge.

All hosts run in a sandbox (`continue_in_sandbox`): when its last process ends, the network, the mounts and all processes on the
hosts end too. The machine's network is not changed, so sandboxes do not affect each other.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
_INSIDE = "DIFFDIS_TESTS_SANDBOX"
_UNSHARE = ["unshare", "--net", "--mount", "--propagation", "private"]
_SANDBOX = [*_UNSHARE, "--pid", "--fork", "--kill-child", "--mount-proc"]
_TRIAL = "ip link add bridge type bridge && ip link add one type veth peer name two && mount -t tmpfs tmpfs /mnt"
_SUBNET = "10.77.0"
# The shell that holds a host's namespaces. Its /tmp is a separate folder, into which project folders below /tmp are mounted.
# As written by Debian's installer, /etc/hosts maps the host's name to a loopback address.
_BOOT = """
set -e
hostname "$1"
ip link set lo up
mount -t tmpfs -o size="$3" tmpfs /dev/shm
printf '127.0.0.1 localhost\\n127.0.1.1 %s\\n' "$1" > "$2/hosts"
mount --bind "$2/hosts" /etc/hosts
for folder in "${@:4}"; do mkdir -p "$2/${folder#/tmp/}"; mount --bind "$folder" "$2/${folder#/tmp/}"; done
mount --rbind "$2" /tmp
echo up
exec sleep infinity
"""


def reason_unavailable() -> str:
    """Return the reason why hosts cannot be created on this machine, or an empty string."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip") if not shutil.which(tool)]:
        return f"needs {' and '.join(missing)} (util-linux, iproute2)"
    done = subprocess.run([*_sandbox(), "sh", "-c", _TRIAL], capture_output=True, text=True)
    return f"namespaces are not permitted: {done.stderr.strip()}" if done.returncode else ""


def continue_in_sandbox() -> None:
    """Replace this process by the same command in a sandbox; returns inside the sandbox. Call this first."""
    if not os.environ.get(_INSIDE):
        if reason := reason_unavailable():
            sys.exit(f"error: no hosts can be built: {reason}")
        os.environ[_INSIDE] = "1"
        os.execvp("unshare", [*_sandbox(), sys.executable, *sys.argv])


def _sandbox() -> list[str]:
    return _SANDBOX if os.geteuid() == 0 else [*_SANDBOX, "--map-root-user"]


class Network:
    """A switch that connects the hosts and the sandbox, which acts as the user's machine, for the duration of a `with` block."""

    def __init__(self, folder: Path) -> None:
        """Create the switch. Each host writes its files to a subfolder of `folder` with its name."""
        self.folder = folder
        self.hosts: list[Host] = []
        for command in ("set lo up", "add switch type bridge", "set switch up"):
            _ip(f"link {command}")
        _ip(f"addr add {_SUBNET}.1/24 dev switch")

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill all processes on the hosts. Orphans are children of the sandbox's first process, which is this one."""
        while processes := [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]:
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=5)

    def host(self, name: str, shared_memory: int = 2**28) -> "Host":
        """Create and connect a new host. `shared_memory` is the size of its /dev/shm in bytes."""
        self.hosts.append(Host(name, f"{_SUBNET}.{len(self.hosts) + 2}", self.folder / name, shared_memory))
        return self.hosts[-1]


class Host:
    """A host with a separate network interface, hostname, /tmp and /dev/shm. It shares the machine's other files."""

    def __init__(self, name: str, address: str, files: Path, shared_memory: int) -> None:
        """Start the host. `files` becomes its /tmp."""
        self.name, self.address, self.files = name, address, files
        files.mkdir(parents=True)
        below_tmp = [str(folder) for folder in (ROOT, Path(sys.prefix)) if folder.is_relative_to("/tmp")]
        boot = ["bash", "-c", _BOOT, "boot", name, str(files), str(shared_memory), *below_tmp]
        holder = subprocess.Popen([*_UNSHARE, "--uts", *boot], stdout=subprocess.PIPE, text=True)
        assert holder.stdout is not None
        if holder.stdout.readline() != "up\n":
            raise RuntimeError(f"the host {name} did not come up")
        # Prefix of a command that runs on the host, in its /tmp.
        self.prefix = ["nsenter", f"--target={holder.pid}", "--net", "--mount", "--uts", "--wdns=/tmp", "--"]
        _ip(f"link add {name} type veth peer name eth0 netns {holder.pid}")
        _ip(f"link set {name} master switch up")
        for command in (f"addr add {address}/24 dev eth0", "link set eth0 up"):
            subprocess.run([*self.prefix, "ip", *command.split()], check=True)

    def start(self, command: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen:
        """Start a command on the host. Its output goes to the file `log` in `files`."""
        with (self.files / "log").open("ab") as log:
            return subprocess.Popen([*self.prefix, *command], env=dict(env), stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def cut(self) -> None:
        """Cut the host's link: no packets arrive any more, and no peer is notified."""
        _ip(f"link set {self.name} down")

    def reconnect(self) -> None:
        _ip(f"link set {self.name} up")


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)
