"""Install this project and the tested versions of its dependencies into a virtual environment: `make setup`.

It runs on the system's Python without any package, and shows what is installed, how much was downloaded, and the time.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

LOG = "install.log"  # pip's whole output, in the environment's folder
_FILE = re.compile(r"\s*(Downloading|Using cached|Processing) (\S*/)?(?P<file>\S+( \((?P<size>[\d.]+) (?P<unit>[kMG]?B)\))?)")
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_TAIL_LINES = 15  # of pip's output, after an error


class Step(NamedTuple):
    """One call of `pip install`."""

    title: str
    arguments: list[str]
    environment: dict[str, str]


def steps(venv: Path, extras: str) -> list[Step]:
    """Return the calls of pip. `extras` are those of pyproject.toml; `dev` also installs libraries that only tests use."""
    # torch comes first: resolving it later could select another build and download its CUDA packages.
    packages = ["torch", "setuptools", "wheel", "ninja", "packaging", "hatchling", "editables"]
    calls = [
        Step("torch and build tools", packages, {}),
        # Without build isolation, because its setup imports torch. DS_BUILD_OPS=0 skips compiling its kernels.
        Step("DeepSpeed", ["--no-build-isolation", "deepspeed"], {"DS_BUILD_OPS": "0"}),
        Step("this project and its dependencies", ["--no-build-isolation", "--editable", f".[{extras}]"], {}),
    ]
    if "dev" in extras.split(","):
        # Without dependencies: torchvision breaks diffusers when it is installed alongside the CPU build of torch.
        peers = ["clip-benchmark", "torch-fidelity", "torchmetrics", "lightning-utilities", "foolbox"]
        calls.append(Step("libraries that tests compare with", ["--no-deps", *peers], {}))
        # In a folder of its own: diffusers imports bitsandbytes wherever it finds it, which takes each process a second.
        apart = ["--no-deps", "--upgrade", "--target", str(venv / "apart"), "bitsandbytes"]
        calls.append(Step("bitsandbytes for its tests", apart, {}))
    return calls


class Display(threading.Thread):
    """One line per step, which is redrawn every half second in a terminal; at the end it has the time and the size."""

    def __init__(self, head: str, packages: Path) -> None:
        super().__init__(daemon=True)
        self.head, self.packages, self.started = head, packages, time.monotonic()
        self.num_bytes, self.file, self.num_to_install, self.num_before = 0, "", 0, 0
        self.ended = threading.Event()
        self.is_terminal = sys.stdout.isatty()
        if not self.is_terminal:
            print(f"{head} …", end="", flush=True)

    def read(self, lines: Iterable[str], log: Path) -> None:
        """Follow pip's output, and append it to `log`."""
        with log.open("a") as stream:
            for line in lines:
                stream.write(line)
                stream.flush()
                if match := _FILE.match(line):
                    self.file = match["file"]
                    if match["size"] and "Downloading" in line:
                        self.num_bytes += int(float(match["size"]) * _BYTES[match["unit"]])
                elif line.startswith("Installing collected packages: "):
                    self.num_before, self.num_to_install = self._num_installed(), line.count(",") + 1

    def text(self) -> str:
        """Return what is being done."""
        if self.num_to_install:
            num_installed = min(self._num_installed() - self.num_before, self.num_to_install)
            return f"installing {num_installed} of {self.num_to_install} packages"
        return f"getting {self.file}" if self.file else "looking for versions"

    def totals(self) -> str:
        """Return the time and the downloaded size."""
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        return f"{minutes}:{seconds:02d}, {self.num_bytes / 1e6:,.0f} MB downloaded"

    def run(self) -> None:
        while self.is_terminal and not self.ended.wait(0.5):
            self._draw(f"{self.head}  {self.totals()}, {self.text()}")

    def end(self) -> None:
        """Show the totals and end the line."""
        self.ended.set()
        self.join()
        if self.is_terminal:
            self._draw(f"{self.head}  {self.totals()}")
            print()
        else:
            print(f" {self.totals()}", flush=True)

    def _draw(self, text: str) -> None:
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]:<{width}}", end="", flush=True)

    def _num_installed(self) -> int:
        return len(list(self.packages.glob("*.dist-info")))


def install(step: Step, head: str, venv: Path) -> int:
    """Run a step and return the status of pip."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off"]
    command += ["--constraint", "constraints.txt", *step.arguments]
    (packages,) = venv.glob("lib/python*/site-packages")
    display = Display(head, packages)
    display.start()
    with subprocess.Popen(
        command, env={**os.environ, **step.environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as pip:
        try:
            display.read(pip.stdout or (), venv / LOG)
        except BaseException:
            pip.terminate()
            raise
        finally:
            display.end()
    return pip.returncode


def main(venv: Path, extras: str) -> int:
    """Create the environment if it does not exist, and install everything into it."""
    if sys.version_info < (3, 11):  # noqa: UP036
        print(
            f"error: Python 3.11 or newer is required, but this is {sys.version.split()[0]}; name another one, such as "
            "make setup SYSTEM_PYTHON=python3.11",
            file=sys.stderr,
        )
        return 1
    if not (venv / "bin" / "pip").exists() and subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode:
        print(f"error: {venv}: the virtual environment could not be created; see the lines above", file=sys.stderr)
        return 1
    (venv / LOG).write_text("")
    calls = steps(venv, extras)
    print(f"installing into {venv}: about 1 GB to download (4 GB with CUDA), 3 to 10 minutes, once")
    for number, step in enumerate(calls, 1):
        if status := install(step, f"step {number} of {len(calls)}: {step.title}", venv):
            tail = "\n".join((venv / LOG).read_text().splitlines()[-_TAIL_LINES:])
            print(
                f"{tail}\nerror: {step.title}: pip ended with status {status}; see {venv / LOG}",
                file=sys.stderr,
            )
            return status
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
    except KeyboardInterrupt:
        sys.exit("stopped; the same command continues")
