"""Measure images per second of the platform's stream, WebDataset, MDS and the bare decoder, on all cores of this machine.

    python tests/benchmarks/loader.py [--rounds 5] [--mds_python PATH]

Every contender is a persistent process that is paused (SIGSTOP) while the others are measured. The last line is one JSON object.
MDS is skipped unless `--mds_python` names the interpreter of an environment with mosaicml-streaming, torch and Pillow.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import psutil
from loader_data import build
from measuring import in_turns, medians, ratio

ROOT = Path(__file__).resolve().parents[2]
IMAGES, WARM_UP = 4000, 1000  # per round


class Contender:
    """A process of loader_contenders.py. The process and its children are paused between its rounds."""

    def __init__(self, name: str, folder: Path | str, python: str = sys.executable, **environment: str):
        environment = os.environ | {"PYTHONPATH": str(ROOT / "platform"), "RAY_USAGE_STATS_ENABLED": "0"} | environment
        command = [python, str(Path(__file__).with_name("loader_contenders.py")), name, str(folder), str(WARM_UP)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self._answer()
        self._signal(signal.SIGSTOP)

    def images_per_second(self, images: int) -> float:
        self._signal(signal.SIGCONT)
        self.process.stdin.write(f"{images}\n")  # type: ignore[union-attr]
        self.process.stdin.flush()  # type: ignore[union-attr]
        speed = float(self._answer())
        self._signal(signal.SIGSTOP)
        return speed

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _answer(self) -> str:
        line = self.process.stdout.readline().strip()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))}: ended without an answer")  # type: ignore[arg-type]
        return line

    def _signal(self, number: int) -> None:
        root = psutil.Process(self.process.pid)
        for process in [*root.children(recursive=True), root]:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mds_python", default="")
    parser.add_argument("--folder", type=Path, default=ROOT / "data/benchmarks/loader")
    arguments = parser.parse_args()
    data = build(arguments.folder)
    names = {"ray_platform_exact": "ray:exact", "ray_platform_fast": "ray:fast"}
    names |= {name: name for name in ("webdataset", "decode_limit")}
    with ExitStack() as stack:
        contenders = {name: Contender(kind, arguments.folder) for name, kind in names.items()}
        if arguments.mds_python:
            contenders["mds"] = Contender("mds", arguments.folder, arguments.mds_python)
        for contender in contenders.values():
            stack.callback(contender.close)
        calls = {name: partial(contender.images_per_second, IMAGES) for name, contender in contenders.items()}
        speeds = in_turns(calls, arguments.rounds)
    result = {
        "images_per_second": medians(speeds, 1),
        "ratio_exact": ratio(speeds, "ray_platform_exact", "webdataset"),
        "ratio_fast": ratio(speeds, "ray_platform_fast", "webdataset"),
        "ratio_to_limit": ratio(speeds, "ray_platform_exact", "decode_limit"),
        "ratio_exact_mds": ratio(speeds, "ray_platform_exact", "mds") if "mds" in speeds else None,
        "images": data["images"],
        "mean_bytes": round(data["mean_bytes"]),
        "cores": os.cpu_count(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
