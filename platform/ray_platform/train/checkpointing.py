"""Checkpointing: how a run is restored from a checkpoint, and how new ones are saved while training continues.

The format on storage, its readers, and which checkpoints a run may resume from are in `checkpoint_format.py`.
"""

import base64
import contextlib
import enum
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import ConfigError, ConsumedRange, one_line
from ray_platform.data.catalog import Catalog
from ray_platform.data.ledger import Ledger, merge_ranges
from ray_platform.retry import RETRY_SECONDS
from ray_platform.train.checkpoint_format import (
    BASE,
    COMPLETE,
    CONSUMED,
    TENSORS,
    CorruptCheckpoint,
    Manifest,
    RetentionPolicy,
    candidates,
    checkpoint_name,
    checkpoints_dir,
    contiguous_on_cpu,
    json_name,
    rank_name,
    read_ledgers,
    read_manifest,
    read_rank_state,
    read_tensors,
    tensor_files,
)
from ray_platform.train.collective import collective
from ray_platform.train.config import TrainConfig
from ray_platform.train.fault_tolerance import LossHistory
from ray_platform.train.hang_detector import HeartbeatThread

if TYPE_CHECKING:  # importing DeepSpeed takes seconds, and the driver does not need it
    from ray_platform.train.engine import Engine

logger = logging.getLogger(__name__)

FILE_BYTES = 2**30  # maximum size of a tensor file with several tensors; this much is held twice during an upload


# --- restoring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RankState:
    """State of one rank that is neither in the engine nor in the ledgers."""

    skipped: dict[str, int]  # samples skipped by this rank, by cause
    history: LossHistory
    rng: str  # torch's generator on the CPU, base64

    @classmethod
    def capture(cls, skipped: dict[str, int], history: LossHistory) -> "RankState":
        return cls(skipped, history, base64.b64encode(bytes(torch.get_rng_state().tolist())).decode())

    @classmethod
    def parse(cls, url: str, rank: int, content: Any) -> "RankState":
        """Parse the JSON of `asdict`. Raises CorruptCheckpoint for anything else."""
        try:
            state = cls(dict(content["skipped"]), LossHistory(**content["history"]), content["rng"])
            valid = all(isinstance(count, int) for count in state.skipped.values())
            valid = valid and state.rng_tensor().shape == torch.get_rng_state().shape
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
            valid = False
        if not valid:
            raise CorruptCheckpoint(
                f"{url}: the state of rank {rank} is damaged; resume from another checkpoint with --resume PATH"
            )
        return state

    def rng_tensor(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(self.rng)), dtype=torch.uint8)


@dataclass(frozen=True)
class LoadedCheckpoint:
    """One rank's part of a checkpoint whose files are all as they were written."""

    url: str
    manifest: Manifest
    tensors: dict[str, torch.Tensor]  # this rank's part of the tensors, on the CPU
    ledgers: tuple[Ledger, Ledger] | None  # base, consumed; None when the run read other shards
    rank_0: RankState
    rank_states: list[RankState]  # of the saved ranks that this rank replaces

    @classmethod
    def read(cls, url: str, source_digest: str) -> "LoadedCheckpoint":
        """Read this rank's part: every `world_size`-th file and rank state. Raises CorruptCheckpoint."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        manifest = read_manifest(url)
        replaced = range(rank, manifest.world_size, world_size)
        states = {r: RankState.parse(url, r, read_rank_state(url, manifest, r)) for r in {0, *replaced}}
        return cls(
            url,
            manifest,
            read_tensors(url, manifest, tensor_files(manifest)[rank::world_size]),
            read_ledgers(url, manifest) if manifest.source_digest == source_digest else None,
            states[0],
            [states[r] for r in replaced],
        )

    def loss_history(self, output_dir: str, config: Mapping[str, Any]) -> LossHistory:
        """Return the saved history when it is of this run and this objective; otherwise an empty one, as losses would differ."""
        folder = storage.join(checkpoints_dir(output_dir), "")
        current, saved = (json.dumps(c.get("objective"), sort_keys=True) for c in (config, self.manifest.config))
        return self.rank_0.history if self.url.startswith(folder) and current == saved else LossHistory()


@collective
def find_checkpoint(resume: str, output_dir: str, launch: str, source_digest: str) -> LoadedCheckpoint | None:
    """Load the best of `candidates` that no rank finds damaged; None when there is no candidate.

    Raises:
        CorruptCheckpoint: on all ranks, when every candidate is damaged.
    """
    urls: list[Any] = [None]
    if dist.get_rank() == 0:
        with storage.retrying_for(RETRY_SECONDS):
            urls = [candidates(resume, output_dir, launch)]
    dist.broadcast_object_list(urls)
    damages: list[Any] = [""] * dist.get_world_size()
    for url in urls[0]:
        loaded, damage = None, ""
        try:
            loaded = LoadedCheckpoint.read(url, source_digest)
        except CorruptCheckpoint as error:
            damage = str(error)
        dist.all_gather_object(damages, damage)
        if not any(damages):
            return loaded
        if dist.get_rank() == 0:
            logger.warning("%s", next(filter(None, damages)))
    if any(damages):
        raise CorruptCheckpoint(next(filter(None, damages)))
    return None


@dataclass(frozen=True)
class TrainState:
    """Position of a run in its steps and data. The ledgers cover all ranks."""

    step: int
    samples_seen: int
    global_batch_size: int
    base: Ledger  # the plan of all ranks covers the samples that it leaves
    consumed: Ledger  # samples of that plan consumed by all ranks until the last checkpoint
    skipped: dict[str, int] = field(default_factory=dict)  # by the ranks that this rank replaces, in the runs before
    url: str = ""  # of the checkpoint

    @classmethod
    def initial(cls, catalog: Catalog, train: TrainConfig) -> "TrainState":
        empty = Ledger(catalog.num_units)
        return cls(0, 0, train.global_batch_size or train.max_workers * train.micro_batch_size, empty, empty.copy())

    @classmethod
    def from_checkpoint(cls, loaded: LoadedCheckpoint, catalog: Catalog, train: TrainConfig) -> "TrainState":
        """Return the state in which the checkpoint was saved, for any number of ranks.

        The same number of ranks continues its plan, sample by sample. Another number plans the remaining samples anew. Other
        shards (of a run that starts from another run's checkpoint) are read from their beginning.

        Raises:
            ConfigError: the seed differs; the ledger counts a shard's samples in the order that the seed determines.
        """
        url, manifest, initial = loaded.url, loaded.manifest, cls.initial(catalog, train)
        if manifest.seed != train.seed:
            raise ConfigError(
                f"train.seed: {train.seed}, but the checkpoint {url} was written with {manifest.seed}; resume with that seed"
            )
        base, consumed = loaded.ledgers or (initial.base, initial.consumed)
        if loaded.ledgers is None and dist.get_rank() == 0:
            logger.warning("%s was trained on other shards: the data are read from their beginning", url)
        if loaded.ledgers is not None and manifest.world_size != dist.get_world_size():
            base = consumed.copy()
        return cls(
            manifest.step,
            manifest.samples_seen,
            train.global_batch_size or manifest.global_batch_size,
            base,
            consumed,
            add_counts(*(state.skipped for state in loaded.rank_states)),
            url,
        )


def add_counts(*counts: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of several counts by cause."""
    causes = sorted({cause for count in counts for cause in count})
    return {cause: sum(count.get(cause, 0) for count in counts) for cause in causes}


@collective
def restore(loaded: LoadedCheckpoint, engine: "Engine") -> None:
    """Load weights, moments, EMA and loss scale into an engine of any number of ranks and any ZeRO stage.

    torch's generator on the CPU is restored, too, when the number of ranks is the same.
    """
    engine.loss_scale.load(loaded.manifest.loss_scale)
    missing = engine.load_state(loaded.manifest.num_updates, broadcast_reader(loaded.tensors, engine.device))
    if missing and dist.get_rank() == 0:
        logger.warning("%s lacks %d tensors, which stay as built, such as %s", loaded.url, len(missing), missing[0])
    if loaded.manifest.world_size == dist.get_world_size():
        torch.set_rng_state(loaded.rank_states[0].rng_tensor())


@collective
def broadcast_reader(
    tensors: Mapping[str, torch.Tensor], device: torch.device
) -> Callable[[str, torch.Size], torch.Tensor | None]:
    """Return `get(name, shape)` for `Engine.load_state`, which broadcasts a tensor from the rank that holds it.

    Every rank must call `get` with the same names in the same order. It raises ConfigError for a tensor of another shape.
    """
    rank = dist.get_rank()
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()})
    owners = {name: owner for owner, part in enumerate(parts) for name in part}

    def get(name: str, shape: torch.Size) -> torch.Tensor | None:
        if name not in owners:
            return None
        saved_shape, dtype = parts[owners[name]][name]
        if tuple(shape) != saved_shape:
            raise ConfigError(
                f"model: {name.partition('/')[2]} is {tuple(shape)}, but {saved_shape} in the checkpoint; "
                "use the model that it was trained with"
            )
        is_owner = owners[name] == rank
        tensor = tensors[name].to(device) if is_owner else torch.empty(saved_shape, dtype=dtype, device=device)
        dist.broadcast(tensor, src=owners[name])
        return tensor

    return get


# --- saving --------------------------------------------------------------------------------------------------------------


class TensorAssignment:
    """Assigns every tensor to the rank that writes it: the one with the fewest bytes so far."""

    def __init__(self, world_size: int):
        self.num_bytes = [0] * world_size

    def owner(self, tensor: torch.Tensor) -> int:
        rank = self.num_bytes.index(min(self.num_bytes))
        self.num_bytes[rank] += tensor.nbytes
        return rank


class Phase(enum.Enum):
    """Phases of the checkpoint that is being saved."""

    IDLE = enum.auto()
    SNAPSHOT = enum.auto()  # training waits while every rank copies its tensors
    UPLOADING = enum.auto()  # in the background, on at least one rank
    FINALIZING = enum.auto()  # rank 0 writes the manifest and prunes, in the background


class CheckpointManager:
    """Checkpoints of a run, as one of its ranks saves them: IDLE -> SNAPSHOT -> UPLOADING -> FINALIZING -> IDLE.

    `save` takes the snapshot and starts the upload. Training continues, and at every step the ranks agree on whether any of them
    still uploads (`fault_tolerance.sync_step_status`); `finalize_checkpoint` acts on that. `wait` returns to IDLE.
    """

    def __init__(
        self, launch_dir: str, engine: "Engine", state: TrainState, retention: RetentionPolicy, heartbeat: HeartbeatThread
    ):
        """`launch_dir`: folder of this launch's checkpoints. `state.consumed` is updated by every `save`."""
        self.engine, self.state, self.retention, self.heartbeat = engine, state, retention, heartbeat
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        token = [secrets.token_hex(4)]
        dist.broadcast_object_list(token)
        self.phase = Phase.IDLE
        self.uploader = AsyncUploader(launch_dir, self.rank, token[0], heartbeat.count_progress)
        self._manifest: Manifest
        self._warned_of_metric = False

    @collective
    def save(self, manifest: Manifest, consumed: Sequence[ConsumedRange], rank_state: RankState) -> None:
        """Copy this rank's part of the engine's state, and start to upload it in the background.

        Args:
            manifest: the checkpoint's content; token and files are filled in here.
            consumed: what this rank consumed since the last call.
            rank_state: state that only this rank has.
        """
        self.wait()  # for the checkpoint before
        self.phase = Phase.SNAPSHOT
        self.heartbeat.set_phase("saving a checkpoint")
        self._warn_of_missing_metric(manifest)
        self._manifest = replace(manifest, token=self.uploader.token)
        assignment, tensors = TensorAssignment(self.world_size), {}
        with self.heartbeat.waiting_for_ranks():
            self._gather_consumed(consumed)
            for name, tensor in self.engine.state():
                if assignment.owner(tensor) == self.rank:
                    tensors[name] = contiguous_on_cpu(tensor)
        ledgers = {}
        if self.rank == 0:
            ledgers = {BASE: self.state.base.to_bytes(), CONSUMED: self.state.consumed.to_bytes()}
        self.phase = Phase.UPLOADING
        self.uploader.upload(manifest.step, tensors, ledgers, rank_state)

    def finalize_checkpoint(self, any_uploading: bool, any_failed: bool) -> None:
        """Once no rank uploads any more: complete the checkpoint, or remove its files when the upload of any rank failed.

        Args:
            any_uploading, any_failed: about the uploads of all ranks; every rank passes the same values.
        """
        if self.phase is not Phase.UPLOADING or any_uploading:
            return
        self.phase = Phase.FINALIZING
        if self.rank == 0:
            self.uploader.finalize(None if any_failed else self._manifest, self.retention)

    @collective
    def wait(self) -> str:
        """Wait until the current checkpoint, if any, is finalized. Return the reason why it failed, or an empty string."""
        if self.phase is Phase.UPLOADING:
            self.heartbeat.set_phase("waiting for a checkpoint's upload", is_slow=True)
        while self.phase is Phase.UPLOADING:
            uploading = self.uploader.is_uploading
            flags = torch.tensor([uploading, bool(self.uploader.failure)], dtype=torch.int32, device=self.engine.device)
            with contextlib.nullcontext() if uploading else self.heartbeat.waiting_for_ranks():
                dist.all_reduce(flags)
                any_uploading, any_failed = (flag > 0 for flag in flags.tolist())
                time.sleep(0.05 if any_uploading else 0)
            self.finalize_checkpoint(any_uploading, any_failed)
        self.uploader.wait()
        self.phase = Phase.IDLE
        failures: list[Any] = [None] * self.world_size
        with self.heartbeat.waiting_for_ranks():
            dist.all_gather_object(failures, self.uploader.failure)
        return next(filter(None, failures), "")

    def _gather_consumed(self, consumed: Sequence[ConsumedRange]) -> None:
        """Add what all ranks consumed to every rank's ledger."""
        parts: list[Any] = [None] * self.world_size
        dist.all_gather_object(parts, merge_ranges(consumed))
        for part in parts:
            self.state.consumed.add(part)

    def _warn_of_missing_metric(self, manifest: Manifest) -> None:
        metric = self.retention.best_metric
        if self.rank == 0 and metric and metric not in manifest.metrics and not self._warned_of_metric:
            self._warned_of_metric = True
            logger.warning(
                "train.keep_best: %s was not logged at step %d, so this checkpoint cannot be the best (logged once); metrics are "
                "logged every train.log_every, scores every train.heldout_every steps, checkpoints every train.checkpoint_every",
                *(metric, manifest.step),
            )


class AsyncUploader:
    """Background uploads of one rank, one checkpoint at a time. A storage error fails the checkpoint, not the run."""

    def __init__(self, launch_dir: str, rank: int, token: str, on_progress: Callable[[], None]):
        """
        Args:
            launch_dir: folder of this launch's checkpoints.
            rank: this rank.
            token: the same on all ranks and new for every start of the workers, so that the files of a rank that was declared
                dead and still uploads are not part of a later checkpoint.
            on_progress: called after every file, from the upload thread.
        """
        self.launch_dir, self.rank, self.token, self.on_progress = launch_dir, rank, token, on_progress
        self.url = ""  # of the current checkpoint
        self.failure = ""  # why the current checkpoint failed on this rank
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._tasks: list[Future[None]] = []

    @property
    def is_uploading(self) -> bool:
        return any(not task.done() for task in self._tasks)

    def upload(self, step: int, tensors: Mapping[str, torch.Tensor], ledgers: Mapping[str, bytes], rank_state: RankState) -> None:
        """Start to upload this rank's tensors (on the CPU; they must not change), its state, and on rank 0 the ledgers."""
        self.url, self.failure = storage.join(self.launch_dir, checkpoint_name(step)), ""
        self._tasks = [self._executor.submit(self._upload, self.url, dict(tensors), dict(ledgers), rank_state)]

    def finalize(self, manifest: Manifest | None, retention: RetentionPolicy) -> None:
        """Start to write the manifest and to prune older checkpoints, on rank 0. None: remove a failed checkpoint's files."""
        if manifest is None:
            self._tasks.append(self._executor.submit(self._remove_files, self.url))
        else:
            self._tasks.append(self._executor.submit(self._complete, self.url, manifest, retention))

    def wait(self) -> None:
        for task in self._tasks:
            task.result()

    def close(self) -> None:
        self._executor.shutdown(wait=True)

    def _upload(self, url: str, tensors: dict[str, torch.Tensor], ledgers: dict[str, bytes], rank_state: RankState) -> None:
        try:
            name, files = rank_name(self.rank), {}
            for number, keys in enumerate(list(_group_by_size(tensors))):
                file = f"{name}_{number:03d}.{self.token}{TENSORS}"
                files[file] = self._write(url, file, safetensors.torch.save({key: tensors.pop(key) for key in keys}))
            for plain, data in (*ledgers.items(), (name, json.dumps(asdict(rank_state)).encode())):
                files[json_name(plain, self.token)] = self._write(url, json_name(plain, self.token), data)
            self._write(url, json_name(f"{name}_files", self.token), json.dumps(files).encode())
        except Exception as error:
            self.failure = one_line(error)
            logger.warning("checkpoint %s failed on rank %d; training continues: %s", url, self.rank, self.failure)

    def _write(self, url: str, name: str, data: bytes) -> tuple[int, str]:
        storage.write_bytes(storage.join(url, name), data)
        self.on_progress()
        return len(data), hashlib.sha256(data).hexdigest()

    def _complete(self, url: str, manifest: Manifest, retention: RetentionPolicy) -> None:
        try:
            names = [json_name(f"{rank_name(rank)}_files", self.token) for rank in range(manifest.world_size)]
            lists = [storage.read_bytes(storage.join(url, name)) for name in names]
            files: dict[str, tuple[int, str]] = {name: entry for content in lists for name, entry in json.loads(content).items()}
            data = replace(manifest, files=files).to_bytes()
            storage.write_bytes(storage.join(url, COMPLETE), data)
            logger.info("checkpoint %s is complete", url)
        except Exception as error:
            self.failure = one_line(error)
            logger.warning("checkpoint %s was not completed; training continues: %s", url, self.failure)
            return
        try:
            retention.prune(url)
        except Exception as error:
            logger.warning("checkpoints older than %s could not be removed; the next one retries: %s", url, one_line(error))

    def _remove_files(self, url: str) -> None:
        with contextlib.suppress(storage.StorageError):
            for file in storage.list_files(storage.join(url, f"*.{self.token}.*")):
                storage.delete(file.url)


def _group_by_size(tensors: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Yield the names in groups of about `FILE_BYTES`. Yield at least one group, so that every rank writes a file."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + tensor.nbytes > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names
