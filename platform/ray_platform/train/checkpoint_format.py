"""Format of a checkpoint on storage, its readers, and which checkpoints are used. `checkpointing.py` saves and restores.

A checkpoint is the folder `<output_dir>/checkpoints/<launch>/step_<n>`. It holds tensors in safetensors files (weights, moments,
EMA and step counts, named `<state>/<parameter>`), one JSON file per rank, the two ledgers, and the manifest `complete.json`,
written last, which lists the other files with sizes and digests; a folder without it is not a checkpoint. Every rank writes the
parts of tensors that it updates, and a fraction of what all ranks hold. The parts are joined by name and position, so any number
of ranks at any ZeRO stage can load them.

Checkpoints form a lineage: a manifest names the checkpoint before it and has a counter above those of all checkpoints that
existed when its launch started. The counters, and no clock, tell which checkpoint is the newest.
"""

import base64
import contextlib
import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, MixtureState, TrainingFacts, one_line
from ray_platform.data.ledger import Ledger
from ray_platform.formats import FileFormat, NewerFormatError
from ray_platform.json_values import JsonObject
from ray_platform.names import check_below
from ray_platform.train.tensor_parts import TensorJoiner

COMPLETE = "complete.json"
BASE, CONSUMED = "base", "consumed"  # names of the two ledgers
TENSORS = ".safetensors"
_FILE = re.compile(r"/checkpoints/[^/]+/step_[^/]+/[^/]+$")
MANIFEST_FORMAT = FileFormat("checkpoint manifest", version=2)  # 2 added the lineage


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
    parent: str = ""  # checkpoint before it, as `Lineage.parent`
    counter: int = 0  # grows along the lineage; 0: written in format 1
    ancestors: list[str] = field(default_factory=list)  # launches from which its launch descends, oldest first
    branched_at: dict[str, int] = field(default_factory=dict)  # as `Lineage.branched_at`
    rewarm: JsonObject = field(default_factory=dict)  # fields of `optimizer.Rewarm`; empty: the schedule never changed
    peaks: dict[str, float] = field(default_factory=dict)  # learning rate of the Task's parameter groups, by name

    def to_bytes(self) -> bytes:
        return json.dumps(MANIFEST_FORMAT.stamp(asdict(self)), indent=1).encode()

    def training_facts(self) -> TrainingFacts:
        """Return what the model card of an export reports."""
        return {
            "recipe": str(self.config.get("recipe", "")),
            "data": ", ".join(self.config.get("data", {}).get("sources", ())),
            "data_digest": self.source_digest,
            "step": self.step,
            "samples_seen": self.samples_seen,
            "scores": {name: value for name, value in self.metrics.items() if name.startswith(("heldout/", "train/loss"))},
        }

    @classmethod
    def from_bytes(cls, data: bytes, url: str) -> "Manifest":
        """Parse what `to_bytes` wrote; `data` may be anything. Raises ValueError, TypeError, AttributeError, DataError."""
        values = MANIFEST_FORMAT.read(json.loads(data), [one.name for one in fields(cls)], url)
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
        # Before this field existed, nothing recorded which steps of an ancestor were abandoned.
        branched_at = values.get("branched_at", dict.fromkeys(values.get("ancestors", ()), sys.maxsize))
        values["branched_at"] = {name: int(step) for name, step in branched_at.items()}
        return cls(**values)


@dataclass(frozen=True)
class LossHistory:
    """Summary of a run's losses so far (see `fault_tolerance.LossMonitor`)."""

    usual_loss: float = 0.0  # EMA of the magnitude over good steps
    num_good: int = 0
    num_bad: int = 0
    in_a_row: int = 0  # bad steps since the last good one


@dataclass(frozen=True)
class RankState:
    """State of one rank that is neither in the engine nor in the ledgers."""

    skipped: dict[str, int]  # samples skipped by this rank, by cause
    history: LossHistory
    rng: str  # torch's generator on the CPU, base64
    mixture: MixtureState

    @classmethod
    def capture(cls, skipped: dict[str, int], history: LossHistory, mixture: MixtureState) -> "RankState":
        return cls(skipped, history, base64.b64encode(bytes(torch.get_rng_state().tolist())).decode(), mixture)

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "RankState":
        """Parse what `to_bytes` wrote; `data` may be anything. Raises ValueError, TypeError, KeyError, AttributeError."""
        values = json.loads(data)
        history = {one.name: values["history"][one.name] for one in fields(LossHistory) if one.name in values["history"]}
        credits, waiting = values.get("mixture", ((), ()))
        mixture = MixtureState(tuple(map(float, credits)), tuple(map(int, waiting)))
        state = cls(dict(values["skipped"]), LossHistory(**history), values["rng"], mixture)
        if not all(isinstance(count, int) for count in state.skipped.values()):
            raise ValueError(f"skipped is {str(state.skipped)[:50]!r}")
        if state.rng_tensor().shape != torch.get_rng_state().shape:
            raise ValueError("rng is not the state of torch's generator")
        return state

    def rng_tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(self.rng)), dtype=torch.uint8)


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def checkpoint_step(name: str) -> int:
    """Return the step of `checkpoint_name`."""
    return int(name.removeprefix("step_"))


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
# Every `read_` function raises CorruptCheckpoint for a file that is missing, damaged or not what the manifest lists,
# NewerFormatError for a checkpoint of a newer version, and StorageError while storage does not answer.


def read_manifest(url: str, content: bytes = b"") -> Manifest:
    """Read the manifest of a checkpoint, or parse its content if that was read already."""
    file = storage.join(url, COMPLETE)
    with _corruption_named(url, COMPLETE):
        return Manifest.from_bytes(content or storage.read_small(file), file)


def read_file(url: str, manifest: Manifest, name: str) -> bytes:
    with _corruption_named(url, name):
        size, digest = manifest.files[name]
        data = storage.read_bytes(storage.join(url, name), 0, size + 1)
        if len(data) != size or hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{len(data)} bytes of {size}" if len(data) != size else "its digest differs")
        return data


def tensor_files(manifest: Manifest) -> list[str]:
    return sorted(name for name in manifest.files if name.endswith(TENSORS))


def read_tensors(url: str, manifest: Manifest, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the tensors of the files `names`, on the CPU, by the keys of `tensor_parts.part_key`."""
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
    """Yield (parameter, tensor) of the state `weights` or an EMA, reading one file at a time. Needs neither Ray nor ranks.

    Parameters and buffers without an EMA (frozen ones) come from the weights. Raises ConfigError when no parameter has an EMA.
    """
    manifest, joiner = read_manifest(url), TensorJoiner()
    yielded: set[str] = set()
    weights: dict[str, torch.Tensor] = {}
    for file in tensor_files(manifest):
        for key, part in read_tensors(url, manifest, [file]).items():
            tensor_state = key.partition("/")[0]
            with _corruption_named(url, file):
                joined = joiner.add(key, part) if tensor_state in ("weights", state) else None
            if joined is None:
                continue
            parameter = joined[0].partition("/")[2]
            if tensor_state == state:
                yielded.add(parameter)
                yield parameter, joined[1]
            else:
                weights[parameter] = joined[1]
    with _corruption_named(url, COMPLETE):
        joiner.check_complete()
    if not yielded:
        raise ConfigError(f"{url} has no {state}: train.ema_decay, ema_decays and ema_widths add EMAs; use --weights weights")
    yield from ((parameter, tensor) for parameter, tensor in weights.items() if parameter not in yielded)


ADVICE = "resume from another checkpoint with --resume PATH"


@contextlib.contextmanager
def _corruption_named(url: str, name: str) -> Iterator[None]:
    """Turn every error in reading the file `name` into a CorruptCheckpoint, except storage that does not answer."""
    try:
        yield
    except storage.StorageError as error:
        if error.kind != "missing":
            raise
        raise CorruptCheckpoint(f"{url}: {name} is missing; {ADVICE}") from None
    except (CorruptCheckpoint, NewerFormatError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError, DataError) as error:
        raise CorruptCheckpoint(f"{url}: {name} is damaged ({one_line(error, 300)}); {ADVICE}") from None


# --- which checkpoint ----------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str, launch: str = "*") -> list[str]:
    """Return the URLs of the complete checkpoints of a run, or of one of its launches, newest first.

    Checkpoints of format 1 have no counter. They precede all others in age, and are ordered by the names of their launches, which
    sort by time, and their steps. A checkpoint with a damaged manifest comes after the one before it in its launch.
    """
    return list(CheckpointListing.read(output_dir, f"{launch}/step_*/{COMPLETE}").counters)


class CheckpointListing(NamedTuple):
    """The checkpoints of a run, by their URLs."""

    counters: dict[str, int]  # of the complete ones, newest first
    manifests: dict[str, bytes]  # contents of those that could be read
    folders: list[str]  # including incomplete ones

    @classmethod
    def read(cls, output_dir: str, pattern: str = "**") -> "CheckpointListing":
        """List the checkpoints with a file that matches `pattern`: by default all, in one request per 1,000 files on S3."""
        folder, counters = checkpoints_dir(output_dir), dict[str, int]()
        listed = storage.list_folder(folder, pattern) if storage.exists(folder) else ()
        files = [(file.url.rpartition("/")[0], file) for file in listed if _FILE.search(file.url)]
        complete = {url: file for url, file in files if file.url.endswith(f"/{COMPLETE}")}
        contents = storage.read_many([file.url for file in complete.values() if file.size <= storage.SMALL_BYTES])
        last: dict[str, int] = {}  # by launch
        for url in sorted(complete):
            launch, _ = split_url(url)
            with contextlib.suppress(KeyError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
                last[launch] = int(json.loads(contents[complete[url].url]).get("counter", 0))
            counters[url] = last.get(launch, 0)
        ordered = sorted(counters, key=lambda url: (counters[url], *split_url(url)), reverse=True)
        manifests = {url: contents[file.url] for url, file in complete.items() if file.url in contents}
        return cls({url: counters[url] for url in ordered}, manifests, sorted({url for url, _ in files}))


def split_url(url: str) -> tuple[str, str]:
    """Return (launch, name) of a checkpoint."""
    _, launch, name = url.rsplit("/", 2)
    return launch, name


@dataclass(frozen=True)
class Lineage:
    """Place of a launch among the checkpoints in `output_dir`, where no other launch writes at the same time (see `lease.py`)."""

    launch: str
    parent: str = ""  # checkpoint before the next one, as <launch>/<name>, or its URL if it is elsewhere; empty: none
    ancestors: tuple[str, ...] = ()  # launches in output_dir from which this launch descends, oldest first
    earlier: tuple[str, ...] = ()  # all launches that were in output_dir when this launch started
    counter: int = 0  # of the last checkpoint; before the first one, the highest in output_dir
    # Last step of each ancestor on the way to this launch, oldest first; an ancestor elsewhere is named by its folder's URL.
    branched_at: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(
        cls, output_dir: str, launch: str, loaded: str = "", manifest: Manifest | None = None, weights_only: bool = False
    ) -> "Lineage":
        """Return the lineage of a launch that starts from the checkpoint `loaded` with this manifest, or from the beginning.

        A launch that takes only the weights has no steps before its own.
        """
        folder, listing = f"{checkpoints_dir(output_dir)}/", CheckpointListing.read(output_dir)
        earlier = sorted({split_url(url)[0] for url in listing.folders} - {launch})
        ancestors: list[str] = []
        if manifest and loaded.startswith(folder):
            origin, _ = split_url(loaded)
            # In format 1, a launch descended from all launches before it.
            before = manifest.ancestors if manifest.counter else [name for name in earlier if name < origin]
            ancestors = [name for name in (*before, origin) if name != launch]
        branched_at: dict[str, int] = {}
        if manifest and not weights_only:
            elsewhere = "" if loaded.startswith(folder) else f"{loaded.rsplit('/', 2)[0]}/"
            steps = manifest.branched_at | {split_url(loaded)[0]: manifest.step}
            branched_at = {name if "/" in name else f"{elsewhere}{name}": step for name, step in steps.items()}
            branched_at.pop(launch, None)
        counter = max(listing.counters.values(), default=0)
        return cls(launch, loaded.removeprefix(folder), tuple(ancestors), tuple(earlier), counter, branched_at)

    def includes(self, url: str) -> bool:
        """Return whether training passed through the checkpoint `url` in output_dir on its way to this launch, or in it."""
        launch, name = split_url(url)
        return launch == self.launch or checkpoint_step(name) <= self.branched_at.get(launch, -1)

    def place(self, manifest: Manifest) -> Manifest:
        """Return the manifest of the next checkpoint with its place in this lineage."""
        ancestors, branched_at = list(self.ancestors), dict(self.branched_at)
        return replace(manifest, parent=self.parent, counter=self.counter + 1, ancestors=ancestors, branched_at=branched_at)

    def after(self, name: str) -> "Lineage":
        """Return the lineage after the checkpoint `name` was written."""
        return replace(self, parent=f"{self.launch}/{name}", counter=self.counter + 1)


def _abandoned_last(ordered: list[str], manifests: Mapping[str, bytes]) -> list[str]:
    """Move the checkpoints that training did not pass through on its way to the first one behind the others."""
    with contextlib.suppress(CorruptCheckpoint, IndexError):
        newest = read_manifest(ordered[0], manifests.get(ordered[0], b""))
        lineage = Lineage(split_url(ordered[0])[0], branched_at=newest.branched_at)
        return sorted(ordered, key=lambda url: not lineage.includes(url))
    return ordered


def candidates(resume: str, output_dir: str, launch: str) -> list[str]:
    """Return the checkpoints that workers may start from, best first; older ones follow in case a newer one is damaged.

    Those that were abandoned, because training branched off before them, come last.

    1. Workers that were restarted, or whose number changed: the newest checkpoint of this launch.
    2. `resume` = auto: the newest one in the run's folder.
    3. `resume` = a path: that checkpoint, of any run. If it is not in the run's folder, the newest one there comes first, because
       a job that is started again runs the same command.
    4. Neither: an empty list. Training starts from the Task as it was built, which includes its warm start, if any.
    """
    listing = CheckpointListing.read(output_dir, f"*/step_*/{COMPLETE}")
    existing = _abandoned_last(list(listing.counters), listing.manifests)
    own = [url for url in existing if split_url(url)[0] == launch]
    if resume == "auto" or (resume != "none" and not resume.startswith(f"{checkpoints_dir(output_dir)}/")):
        own += [url for url in existing if url not in own]
    if resume in ("none", "auto"):
        return own
    if storage.exists(storage.join(resume, COMPLETE)):
        return [*own, resume.rstrip("/")]
    if own:  # it has been removed since the run started from it
        return own
    raise ConfigError(f"train.resume: {resume} is not a complete checkpoint (no {COMPLETE}); give a step_* folder, or auto")
