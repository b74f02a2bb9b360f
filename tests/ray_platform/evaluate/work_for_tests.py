"""Units of work that workers find by import: they note where they ran, die, or fail as they are told."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_platform.contracts import DataError


@dataclass(frozen=True)
class Square:
    """The square of a number; `seconds` long. Every time that it is done leaves a file."""

    number: int
    notes: str = ""
    seconds: float = 0.0

    def run(self, parts):
        if self.notes:
            (Path(self.notes) / f"{self.number}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(self.seconds)
        return {"squares": np.array([self.number**2])}


@dataclass(frozen=True)
class DieOnce:
    """Its worker is killed in the midst of it, the first `times` times."""

    number: int
    notes: str
    times: int = 1

    def run(self, parts):
        before = list(Path(self.notes).glob(f"died-{self.number}-*"))
        if len(before) < self.times:
            (Path(self.notes) / f"died-{self.number}-{len(before)}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"squares": np.array([self.number**2])}


@dataclass(frozen=True)
class Fail:
    message: str

    def run(self, parts):
        raise DataError(self.message)


@dataclass(frozen=True)
class Divide:
    def run(self, parts):
        return {"squares": np.array([1 // 0])}


def no_parts(device):
    return None
