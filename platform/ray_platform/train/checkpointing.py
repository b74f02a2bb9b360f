"""What a checkpoint is, which one a run goes on from, and how it is read.

A checkpoint is the folder `<output_dir>/checkpoints/<launch>/step_<n>`: files of whole tensors in safetensors' format (weights,
moments, EMA, each by its parameter's name, shared out among the ranks that wrote them), one JSON file a rank, the two ledgers,
and `complete.json`. That one is written last and lists the others with sizes and digests: without it, there is no checkpoint.
Nothing in it depends on the number of ranks or the ZeRO stage, so any other number and stage can take it.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_origin, get_type_hints

import safetensors.torch
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, one_line
from ray_platform.data.ledger import Ledger
from ray_platform.names import check_below

COMPLETE = "complete.json"
BASE, CONSUMED = "base", "consumed"  # the two ledgers
TENSORS = ".safetensors"


class CorruptCheckpoint(DataError):
    """A checkpoint whose files are not what was written: damaged, or removed meanwhile."""


@dataclass(frozen=True)
class Manifest:
    """What is in a checkpoint, and what it was made by."""

    token: str  # in the names of its files
    step: int
    num_updates: int  # steps that changed the weights
    samples_seen: int
    loss_scale: dict[str, float]  # of fp16, else empty
    world_size: int
    zero_stage: int
    global_batch_size: int
    seed: int
    source_digest: str  # of the data's catalog
    metrics: dict[str, float]  # that were logged at its step
    code_version: str
    config: dict[str, Any]
    files: dict[str, tuple[int, str]]  # name -> (bytes, SHA-256)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> "Manifest":
        """The inverse of `to_bytes`, for whatever may be in a bucket. Raises ValueError, TypeError, AttributeError, DataError."""
        values = json.loads(data)
        hints = get_type_hints(cls)
        for name in values.keys() & hints.keys():
            kind = get_origin(hints[name]) or hints[name]
            if not isinstance(values[name], kind) or isinstance(values[name], bool):
                raise ValueError(f"{name} is {str(values[name])[:50]!r}")
        for name, (size, digest) in values["files"].items():
            if "/" in check_below(name, url) or not isinstance(size, int) or not isinstance(digest, str):
                raise ValueError(f"{name[:100]!r} is no file of a checkpoint")
        if not 1 <= values["world_size"] <= len(values["files"]):
            raise ValueError(f"world_size is {values['world_size']}, but every rank wrote a file")
        values["files"] = {name: tuple(entry) for name, entry in values["files"].items()}
        return cls(**values)


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoints_dir(output_dir: str) -> str:
    return storage.join(output_dir, "checkpoints")


def list_checkpoints(output_dir: str, launch: str = "*") -> list[str]:
    """The complete checkpoints of a run's folder, or of one launch of it, the newest first.

    Those of a later launch (launches are named by time) come before all of an earlier one, whatever their steps: it may have
    gone on from before those, which nobody wants back then.
    """
    folder = storage.join(checkpoints_dir(output_dir), launch)
    if not storage.exists(folder.removesuffix("/*")):
        return []
    found = [file.url.rsplit("/", 1)[0] for file in storage.list_files(storage.join(folder, "step_*", COMPLETE))]
    return sorted(found, key=_age, reverse=True)


def _age(url: str) -> list[str]:
    """[launch, step]: sorts from old to new."""
    return url.rsplit("/", 2)[1:]


def candidates(resume: str, output_dir: str, launch: str) -> list[str]:
    """Where a group of workers may start from, the best first. The one place that decides, in this order:

    1. workers that were restarted, or whose number changed: from this launch's newest checkpoint;
    2. `resume` = auto: from the newest one in the run's folder; `resume` = a path: from that checkpoint, of whatever run;
    3. none of these: from the Task as it was built, which has the weights of its own warm start, if any, or fresh ones.

    The older ones follow, for the case that a newer one is damaged.
    """
    own = list_checkpoints(output_dir, launch)
    if resume == "none":
        return own
    if resume == "auto":
        return own + [url for url in list_checkpoints(output_dir) if url not in own]
    if storage.exists(storage.join(resume, COMPLETE)):
        return [*own, resume.rstrip("/")]
    if own:  # in the same folder, it may have gone since
        return own
    raise ConfigError(f"train.resume: {resume} is no complete checkpoint (it has no {COMPLETE}); give a step_* folder")


def read_manifest(url: str) -> Manifest:
    """Raises CorruptCheckpoint when it is not there (any more), or no manifest."""
    with _whole(url, COMPLETE):
        data = storage.read_small(storage.join(url, COMPLETE))
        return Manifest.from_bytes(data, url)


@contextlib.contextmanager
def _whole(url: str, name: str) -> Iterator[None]:
    """Around the reading of a file: whatever it cannot be read for makes a CorruptCheckpoint, but for storage that is away."""
    advice = "go on from another checkpoint by --resume PATH"
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


def read_file(url: str, manifest: Manifest, name: str) -> bytes:
    """Raises CorruptCheckpoint when the file is missing, or is not what was written."""
    with _whole(url, name):
        size, digest = manifest.files[name]
        data = storage.read_bytes(storage.join(url, name), 0, size + 1)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{len(data)} bytes of {size}")
        return data


def tensor_files(manifest: Manifest) -> list[str]:
    return sorted(name for name in manifest.files if name.endswith(TENSORS))


def tensors(url: str, manifest: Manifest, names: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of the files `names`, on the CPU."""
    found: dict[str, torch.Tensor] = {}
    for name in names:
        with _whole(url, name):
            found |= safetensors.torch.load(read_file(url, manifest, name))
    return found


def weights_of(url: str, which: str) -> Iterator[tuple[str, torch.Tensor]]:
    """(parameter, tensor) of a checkpoint: `which` is weights or ema. Without Ray or ranks; a file at a time.

    What has no EMA (frozen parameters, buffers) comes from the weights. Raises ConfigError where nothing has one.
    """
    manifest = read_manifest(url)
    averaged: set[str] = set()
    plain: dict[str, torch.Tensor] = {}
    for name in tensor_files(manifest):
        for key, tensor in tensors(url, manifest, [name]).items():
            state, _, parameter = key.partition("/")
            if state == which:
                averaged.add(parameter)
                yield parameter, tensor
            elif state == "weights":
                plain[parameter] = tensor
    if not averaged:
        raise ConfigError(f"{url} has no {which}: it was trained with train.ema_decay 0; take weights")
    yield from ((parameter, tensor) for parameter, tensor in plain.items() if parameter not in averaged)


def shared_reader(mine: Mapping[str, torch.Tensor], device: torch.device) -> Callable[[str, torch.Size], torch.Tensor | None]:
    """For `Engine.load_state`: every rank holds some of the tensors, and gives each to all when its turn comes.

    Every rank must make it, and ask for the same names in the same order. Raises ConfigError for a tensor of another shape.
    """
    rank = dist.get_rank()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in mine.items()})
    owners = {name: owner for owner, part in enumerate(parts) for name in part}

    def get(name: str, shape: torch.Size) -> torch.Tensor | None:
        if name not in owners:
            return None
        saved_shape, dtype = parts[owners[name]][name]
        if tuple(shape) != saved_shape:
            raise ConfigError(
                f"model: {name.partition('/')[2]} is {tuple(shape)}, but {saved_shape} in the checkpoint; "
                "give the model that it was trained with"
            )
        own = owners[name] == rank
        tensor = mine[name].to(device) if own else torch.empty(saved_shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=owners[name])
        return tensor

    return get


def load_ledgers(url: str, manifest: Manifest) -> tuple[Ledger, Ledger]:
    """(what the plan of all ranks began with, what was consumed by then). Raises CorruptCheckpoint."""
    with _whole(url, f"{BASE} or {CONSUMED}"):
        read = (Ledger.from_bytes(read_file(url, manifest, json_name(name, manifest.token))) for name in (BASE, CONSUMED))
        base, consumed = read
        return base, consumed


def load_rank_state(url: str, manifest: Manifest, rank: int) -> dict[str, Any]:
    """Raises CorruptCheckpoint."""
    name = json_name(rank_name(rank), manifest.token)
    with _whole(url, name):
        return json.loads(read_file(url, manifest, name))


def rank_name(rank: int) -> str:
    return f"rank_{rank:05d}"


def json_name(name: str, token: str) -> str:
    return f"{name}.{token}.json"


@dataclass(frozen=True)
class Keep:
    """Which checkpoints of a run stay: the newest ones, and the best one by a metric."""

    output_dir: str
    num_newest: int
    best_metric: str = ""  # empty: none
    best_mode: Literal["max", "min"] = "max"

    def prune(self, newest: str) -> None:
        """Remove the others, and what never became complete. To be called after `newest` did, and before another begins.

        What is newer than `newest` is not touched: whoever made it, or still does, knows better.
        """
        ordered = list_checkpoints(self.output_dir)
        kept = {newest, *ordered[: self.num_newest], *self._best(ordered)}
        for url in _folders(self.output_dir):
            if _age(url) < _age(newest) and url not in kept:
                # First of all it must no longer be taken for a whole one.
                storage.delete(storage.join(url, COMPLETE))
                storage.delete(url)

    def _best(self, ordered: list[str]) -> list[str]:
        """The one with the best value, the oldest of equal ones; none where none has a value."""
        scores: dict[str, float] = {}
        for url in reversed(ordered) if self.best_metric else ():
            with contextlib.suppress(CorruptCheckpoint):  # a damaged one has none
                scores[url] = read_manifest(url).metrics.get(self.best_metric, math.nan)
        scores = {url: value for url, value in scores.items() if not math.isnan(value)}
        return [(max if self.best_mode == "max" else min)(scores, key=lambda url: scores[url])] if scores else []


def _folders(output_dir: str) -> list[str]:
    """All checkpoints, complete or not."""
    files = storage.list_files(storage.join(checkpoints_dir(output_dir), "*", "step_*", "*"))
    return sorted({file.url.rsplit("/", 1)[0] for file in files})
