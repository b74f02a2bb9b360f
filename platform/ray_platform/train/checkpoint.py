"""Which checkpoint a worker starts from, and when one counts as complete.

A checkpoint is `<output_dir>/checkpoints/<launch>/step_<n>` with every rank's part of the engine and its `rank_<r>.json`.
`complete.json` is written last, after every rank's upload: without it the folder does not exist for us.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.data.ledger import Ledger

COMPLETE = "complete.json"


@dataclass(frozen=True)
class Manifest:
    """What must be equal, or known, for a run to go on from a checkpoint."""

    step: int
    world_size: int
    zero_stage: int
    micro_batch_size: int
    seed: int
    source_digest: str  # of the data's catalog


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoints_dir(output_dir: str) -> str:
    return storage.join(output_dir, "checkpoints")


def newest(output_dir: str, launch: str = "") -> str | None:
    """The complete checkpoint with the most steps in a run's folder, or in one launch of it; None where there is none."""
    folder = storage.join(checkpoints_dir(output_dir), launch) if launch else checkpoints_dir(output_dir)
    if not storage.exists(folder):
        return None
    pattern = storage.join(folder, "step_*" if launch else "*/step_*", COMPLETE)
    found = [file.url.rsplit("/", 1)[0] for file in storage.list_files(pattern)]
    # Two launches may hold the same step; the later launch's is the newer (launches are named by time).
    return max(found, key=lambda url: (url.rsplit("/", 1)[1], url), default=None)


def choose(resume: str, output_dir: str, launch: str) -> str | None:
    """The one place that decides where a worker starts, in this order:

    1. a worker that was restarted goes on from this launch's newest checkpoint;
    2. `resume` = a path: that checkpoint;
    3. `resume` = auto: the newest one in the run's folder;
    4. from the beginning.
    """
    if restarted := newest(output_dir, launch):
        return restarted
    if resume == "none":
        return None
    if resume == "auto":
        return newest(output_dir)
    if not storage.exists(storage.join(resume, COMPLETE)):
        raise ConfigError(f"train.resume: {resume} is no complete checkpoint (it has no {COMPLETE}); give a step_* folder")
    return resume.rstrip("/")


def read_manifest(url: str) -> Manifest:
    return Manifest(**json.loads(storage.read_bytes(storage.join(url, COMPLETE))))


def write_manifest(url: str, manifest: Manifest) -> None:
    """Declare a checkpoint complete: call it after every rank's part was uploaded."""
    storage.write_bytes(storage.join(url, COMPLETE), json.dumps(asdict(manifest), indent=2).encode())


def check_fits(url: str, saved: Manifest, now: Manifest) -> None:
    """Raise ConfigError when a run with `now`'s settings cannot go on from `saved`."""
    for field in ("world_size", "zero_stage", "micro_batch_size", "seed"):
        if getattr(saved, field) != getattr(now, field):
            name = "num_workers" if field == "world_size" else field
            raise ConfigError(
                f"train.{name}: {getattr(now, field)}, but the checkpoint {url} was written with {getattr(saved, field)}; "
                "go on with that, or begin anew with --train.resume none and another output_dir"
            )
    if saved.source_digest != now.source_digest:
        raise ConfigError(
            f"data.sources: the shards differ from those that the checkpoint {url} was trained on; "
            "restore them, or begin anew with --train.resume none and another output_dir"
        )


@dataclass(frozen=True)
class RankState:
    """What one rank knows besides the engine."""

    skipped: dict[str, int]

    def save(self, folder: Path, rank: int) -> None:
        (folder / f"rank_{rank}.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path, rank: int) -> "RankState":
        return cls(**json.loads((folder / f"rank_{rank}.json").read_text()))


def save_ledgers(folder: Path, base: Ledger, consumed: Ledger) -> None:
    """What the plan of all ranks began with, and what has been consumed since; one rank writes them."""
    (folder / "base.json").write_bytes(base.to_bytes())
    (folder / "consumed.json").write_bytes(consumed.to_bytes())


def load_ledgers(folder: Path) -> tuple[Ledger, Ledger]:
    """(base, consumed)."""
    return Ledger.from_bytes((folder / "base.json").read_bytes()), Ledger.from_bytes((folder / "consumed.json").read_bytes())


@contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """The checkpoint as a folder of this machine."""
    with tempfile.TemporaryDirectory(prefix="checkpoint_") as folder:
        storage.get_folder(url, Path(folder))
        yield Path(folder)
