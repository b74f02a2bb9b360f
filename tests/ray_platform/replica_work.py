"""Units of work for replicas: they record where they ran, kill their replica, or fail."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ray_platform.contracts import DataError


@dataclass(frozen=True)
class Square:
    """Computes the square of a number.

    Every run writes a file, and waits until `wait_for` processes have done so. The first `deaths` runs kill their replica.
    """

    number: int
    notes: str = ""
    wait_for: int = 0
    deaths: int = 0

    def run(self, replica):
        if self.notes:
            runs = len(list(Path(self.notes).glob(f"{self.number}-*")))
            (Path(self.notes) / f"{self.number}-{os.getpid()}-{time.time_ns()}").touch()
            if runs < self.deaths:
                os.kill(os.getpid(), signal.SIGKILL)
            while len({note.name.split("-")[1] for note in Path(self.notes).iterdir()}) < self.wait_for:
                time.sleep(0.01)
        return {"squares": np.array([self.number**2])}


@dataclass(frozen=True)
class Fail:
    message: str  # message of a DataError; empty: raise another error

    def run(self, replica):
        if self.message:
            raise DataError(self.message)
        return {"squares": np.array([1 // 0])}


def no_replica(device):
    return None
