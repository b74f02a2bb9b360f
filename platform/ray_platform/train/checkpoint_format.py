"""Format of a checkpoint on storage, its readers, and which checkpoints are used and kept. `checkpointing.py` saves and restores.

A checkpoint is the folder `<output_dir>/checkpoints/<launch>/step_<n>`. It holds whole tensors in safetensors files (weights,
moments and EMA, named `<state>/<parameter>` and distributed over the ranks that wrote them), one JSON file per rank, the two
ledgers, and the manifest `complete.json`, written last, which lists the other files with sizes and digests; a folder without
it is not a checkpoint. Nothing depends on the number of ranks or the ZeRO stage, so any other number and stage can load it.
"""

import base64
import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, one_line
from ray_platform.data.ledger import Ledger
from ray_platform.names import check_below

COMPLETE = "complete.json"
BASE, CONSUMED = "base", "consumed"  # names of the two ledgers
TENSORS = ".safetensors"


class CorruptCheckpoint(DataError):
    """A checkpoint whose files were damaged or removed after they were written."""


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint, and the run that wrote it."""

    token: str  # in the names of its files
    step: int
    num_updates: int  # steps that changed the weights
    samples_seen: int
    loss_scale: dict[str, float]  # of fp16; empty for other precisions
    world_size: int
    zero_stage: int
    global_batch_size: int
    seed: int
    source_digest: str  # of the data's catalog
    metrics: dict[str, float]  # logged at its step
    code_version: str
    config: dict[str, Any]  # resolved configuration of the run
    files: dict[str, tuple[int, str]]  # name -> (bytes, SHA-256)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> "Manifest":
        """Parse what `to_bytes` wrote; `data` may be anything. Raises ValueError, TypeError, AttributeError, DataError."""
        values = json.loads(data)
        hints = get_type_hints(cls)
        for name in values.keys() & hints.keys():
            kind = get_origin(hints[name]) or hints[name]
            if not isinstance(values[name], kind) or isinstance(values[name], bool):
                raise ValueError(f"{name} is {str(values[name])[:50]!r}")
        for name, (size, digest) in values["files"].items():
            if "/" in check_below(name, url) or not isinstance(size, int) or not isinstance(digest, str):
                raise ValueError(f"{name[:100]!r} is not a file of a checkpoint")
        if not 1 <= values["world_size"] <= len(values["files"]):
            raise ValueError(f"world_size is {values['world_size']}, but every rank wrote a file")
        values["files"] = {name: tuple(entry) for name, entry in values["files"].items()}
        return cls(**values)


@dataclass(frozen=True)
class LossHistory:
    """Summary of a run's losses so far (see `fault_tolerance.LossMonitor`)."""

    usual_loss: float = 0.0  # EMA over good steps
    num_good: int = 0
    num_bad: int = 0
    in_a_row: int = 0  # bad steps since the last good one


@dataclass(frozen=True)
class RankState:
    """State of one rank that is neither in the engine nor in the ledgers."""

    skipped: dict[str, int]  # samples skipped by this rank, by cause
    history: LossHistory
    rng: str  # torch's generator on the CPU, base64

    @classmethod
    def capture(cls, skipped: dict[str, int], history: LossHistory) -> "RankState":
        return cls(skipped, history, base64.b64encode(bytes(torch.get_rng_state().tolist())).decode())

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "RankState":
        """Parse what `to_bytes` wrote; `data` may be anything. Raises ValueError, TypeError, KeyError, AttributeError."""
        values = json.loads(data)
        state = cls(dict(values["skipped"]), LossHistory(**values["history"]), values["rng"])
        if not all(isinstance(count, int) for count in state.skipped.values()):
            raise ValueError(f"skipped is {str(state.skipped)[:50]!r}")
        if state.rng_tensor().shape != torch.get_rng_state().shape:
            raise ValueError("rng is not the state of torch's generator")
        return state

    def rng_tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(self.rng)), dtype=torch.uint8)


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoints_dir(output_dir: str) -> str:
    return storage.join(output_dir, "checkpoints")


def rank_name(rank: int) -> str:
    return f"rank_{rank:05d}"


def json_name(name: str, token: str) -> str:
    return f"{name}.{token}.json"


def contiguous_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that safetensors can write: on the CPU and contiguous, also for channels-last weights."""
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


# --- reading -------------------------------------------------------------------------------------------------------------
# Every `read_` function raises CorruptCheckpoint for a file that is missing, damaged or not what the manifest lists, and
# StorageError while storage does not answer.


def read_manifest(url: str) -> Manifest:
    with _corruption_named(url, COMPLETE):
        return Manifest.from_bytes(storage.read_small(storage.join(url, COMPLETE)), url)


def read_file(url: str, manifest: Manifest, name: str) -> bytes:
    with _corruption_named(url, name):
        size, digest = manifest.files[name]
        data = storage.read_bytes(storage.join(url, name), 0, size + 1)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{len(data)} bytes of {size}")
        return data


def tensor_files(manifest: Manifest) -> list[str]:
    return sorted(name for name in manifest.files if name.endswith(TENSORS))


def read_tensors(url: str, manifest: Manifest, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of the files `names`, on the CPU, by `<state>/<parameter>`."""
    tensors: dict[str, torch.Tensor] = {}
    for name in names:
        with _corruption_named(url, name):
            tensors |= safetensors.torch.load(read_file(url, manifest, name))
    return tensors


def read_ledgers(url: str, manifest: Manifest) -> tuple[Ledger, Ledger]:
    """Return the ledger that the plan of all ranks started with, and the samples of that plan consumed until the checkpoint."""
    with _corruption_named(url, f"{BASE} or {CONSUMED}"):
        files = (read_file(url, manifest, json_name(name, manifest.token)) for name in (BASE, CONSUMED))
        base, consumed = map(Ledger.from_bytes, files)
        return base, consumed


def read_rank_state(url: str, manifest: Manifest, rank: int) -> RankState:
    name = json_name(rank_name(rank), manifest.token)
    with _corruption_named(url, name):
        return RankState.from_bytes(read_file(url, manifest, name))


def read_weights(url: str, state: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (parameter, tensor) of the state `weights` or `ema`, reading one file at a time. Needs neither Ray nor ranks.

    Parameters and buffers without an EMA (frozen ones) come from the weights. Raises ConfigError when no parameter has an EMA.
    """
    manifest = read_manifest(url)
    yielded: set[str] = set()
    weights: dict[str, torch.Tensor] = {}
    for name in tensor_files(manifest):
        for key, tensor in read_tensors(url, manifest, [name]).items():
            tensor_state, _, parameter = key.partition("/")
            if tensor_state == state:
                yielded.add(parameter)
                yield parameter, tensor
            elif tensor_state == "weights":
                weights[parameter] = tensor
    if not yielded:
        raise ConfigError(f"{url} has no {state}: it was trained with train.ema_decay 0; use --weights weights")
    yield from ((parameter, tensor) for parameter, tensor in weights.items() if parameter not in yielded)


@contextlib.contextmanager
def _corruption_named(url: str, name: str) -> Iterator[None]:
    """Turn every error in reading the file `name` into a CorruptCheckpoint, except storage that does not answer."""
    advice = "resume from another checkpoint with --resume PATH"
    try:
        yield
    except storage.StorageError as error:
        if error.kind != "missing":
            raise
        raise CorruptCheckpoint(f"{url}: {name} is missing; {advice}") from None
    except CorruptCheckpoint:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, DataError) as error:
        raise CorruptCheckpoint(f"{url}: {name} is damaged ({one_line(error, 300)}); {advice}") from None


# --- which checkpoint ----------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str, launch: str = "*") -> list[str]:
    """Return the URLs of the complete checkpoints of a run, or of one of its launches, newest first.

    Launches are named by time. All checkpoints of a later launch precede those of an earlier one, whatever their steps: it may
    have resumed from before those, which are then an abandoned branch.
    """
    folder = storage.join(checkpoints_dir(output_dir), launch)
    if not storage.exists(folder.removesuffix("/*")):
        return []
    manifests = storage.list_files(storage.join(folder, "step_*", COMPLETE))
    return sorted((file.url.rsplit("/", 1)[0] for file in manifests), key=_lineage, reverse=True)


def _lineage(url: str) -> list[str]:
    """Return [launch, step], which sorts checkpoints from old to new."""
    return url.rsplit("/", 2)[1:]


def candidates(resume: str, output_dir: str, launch: str) -> list[str]:
    """Return the checkpoints that workers may start from, best first; older ones follow in case a newer one is damaged.

    1. Workers that were restarted, or whose number changed: the newest checkpoint of this launch.
    2. `resume` = auto: the newest one in the run's folder. `resume` = a path: that checkpoint, of any run.
    3. Neither: an empty list. Training starts from the Task as it was built, which includes its warm start, if any.
    """
    own = list_checkpoints(output_dir, launch)
    if resume == "none":
        return own
    if resume == "auto":
        return own + [url for url in list_checkpoints(output_dir) if url not in own]
    if storage.exists(storage.join(resume, COMPLETE)):
        return [*own, resume.rstrip("/")]
    if own:  # it was in the same folder, and has been pruned since
        return own
    raise ConfigError(f"train.resume: {resume} is not a complete checkpoint (it has no {COMPLETE}); give a step_* folder")


@dataclass(frozen=True)
class RetentionPolicy:
    """Checkpoints of a run that are kept: the newest ones, and the best one by a metric."""

    output_dir: str
    num_newest: int
    best_metric: str = ""  # empty: none
    best_mode: Literal["max", "min"] = "max"

    def prune(self, newest: str) -> None:
        """Delete the other checkpoints, including incomplete ones, after `newest` was finalized and before the next one starts.

        Checkpoints newer than `newest` stay: another launch may be writing them.
        """
        ordered = list_checkpoints(self.output_dir)
        kept = {newest, *ordered[: self.num_newest], *self._best(ordered)}
        files = storage.list_files(storage.join(checkpoints_dir(self.output_dir), "*", "step_*", "*"))
        for url in sorted({file.url.rsplit("/", 1)[0] for file in files}):
            if _lineage(url) < _lineage(newest) and url not in kept:
                storage.delete(storage.join(url, COMPLETE))  # first, so that it is no longer listed
                storage.delete(url)

    def _best(self, ordered: list[str]) -> list[str]:
        """Return the checkpoint with the best value, the oldest of equal ones; empty when none has a value."""
        scores: dict[str, float] = {}
        for url in reversed(ordered) if self.best_metric else ():
            with contextlib.suppress(CorruptCheckpoint):
                scores[url] = read_manifest(url).metrics.get(self.best_metric, math.nan)
        scores = {url: value for url, value in scores.items() if not math.isnan(value)}
        return [(max if self.best_mode == "max" else min)(scores, key=lambda url: scores[url])] if scores else []
