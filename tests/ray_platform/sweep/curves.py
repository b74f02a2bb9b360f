"""A job that trains nothing: a sweep over it takes seconds."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ray_platform.contracts import DataError
from ray_platform.sweep.trial import Reached

BUDGET = 64


@dataclass(frozen=True)
class Curves:
    """Accuracy grows with the budget and with x; the loss falls with y. Every call is noted in `notes`."""

    notes: str
    fail_at: float = -1.0  # the x that cannot be trained beyond the first milestone
    fail_once: bool = False
    seconds: float = 0.0  # of a segment

    def train(self, segment):
        step = round(BUDGET * segment.share)
        self._note("train", segment, step)
        time.sleep(self.seconds)
        if segment.values["x"] == self.fail_at and segment.share > 0.5 and not (self.fail_once and self._seen("failed")):
            self._note("failed", segment, step)
            raise DataError("data.sources: the shard is damaged\nsecond line")
        folder = Path(segment.folder)
        folder.mkdir(parents=True, exist_ok=True)
        url = folder / f"step_{step}"
        url.write_text("")
        assert not segment.origin or Path(segment.origin).exists()
        return Reached(str(url), step, step * 10)

    def evaluate(self, segment, reached):
        x, y = segment.values["x"], segment.values.get("y", 0.0)
        return {"accuracy": x * segment.share, "loss": 1 - y + 0.1 * x}

    def _note(self, what, segment, step):
        entry = {"what": what, "trial": segment.trial, "step": step, "values": dict(segment.values), "origin": segment.origin}
        name = f"{time.monotonic_ns()}_{os.getpid()}.json"
        (Path(self.notes) / f".{name}").write_text(json.dumps(entry))
        os.rename(Path(self.notes) / f".{name}", Path(self.notes) / name)

    def _seen(self, what):
        return any(entry["what"] == what for entry in notes(self.notes))


def notes(folder):
    """All notes so far, the oldest first."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("[0-9]*.json"))]
