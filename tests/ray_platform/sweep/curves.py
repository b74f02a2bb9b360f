"""A simulated trial runner that does not train, so that a sweep takes only seconds."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from ray_platform.contracts import DataError
from ray_platform.sweep.sweep import SegmentResult

BUDGET = 64  # steps


@dataclass(frozen=True)
class Curves:
    """Simulated trials: accuracy grows with the budget and with x; loss falls with y. Every call writes a file to `notes`."""

    notes: str
    fails: tuple[float, ...] = ()  # values of x that always fail after the first milestone
    fails_once: tuple[float, ...] = ()  # values of x that fail once
    seconds: float = 0.0  # per segment

    def __call__(self, segment):
        x, y, fraction = segment.values["x"], segment.values.get("y", 0.0), segment.budget_fraction
        step = round(BUDGET * fraction)
        self._note("train", segment, step)
        time.sleep(self.seconds)
        has_failed = any(note["what"] == "failed" and note["trial"] == segment.trial for note in read_notes(self.notes))
        if fraction > 0.3 and (x in self.fails or (x in self.fails_once and not has_failed)):
            self._note("failed", segment, step)
            raise DataError("data.sources: the shard is damaged")
        checkpoint = Path(segment.folder, f"step_{step}")
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text("")
        assert not segment.origin or Path(segment.origin).exists()
        return SegmentResult(str(checkpoint), step, step * 10, {"accuracy": x * fraction, "loss": 1 - y + 0.1 * x})

    def _note(self, what, segment, step):
        note = {"what": what, "trial": segment.trial, "step": step, "values": dict(segment.values), "origin": segment.origin}
        name = f"{time.monotonic_ns()}_{os.getpid()}.json"
        Path(self.notes, f".{name}").write_text(json.dumps(note))
        os.rename(Path(self.notes, f".{name}"), Path(self.notes, name))


def read_notes(folder):
    """Return all notes so far, oldest first."""
    return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("[0-9]*.json"))]
