"""Checkpointing: how a run is restored from a checkpoint, and how new ones are saved while training continues.

The format on storage, its readers, and which checkpoints a run may resume from are in `checkpoint_format.py`, and which ones are
kept in `retention.py`.
"""

import contextlib
import hashlib
import heapq
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain

import safetensors.torch
import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import ConfigError, ConsumedRange, MixtureState, one_line
from ray_platform.data.catalog import Catalog
from ray_platform.data.ledger import Ledger, merge_ranges
from ray_platform.retry import RETRY_SECONDS
from ray_platform.train.checkpoint_format import (
    ADVICE,
    BASE,
    COMPLETE,
    CONSUMED,
    TENSORS,
    CorruptCheckpoint,
    Lineage,
    LossHistory,
    Manifest,
    RankState,
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
from ray_platform.train.collective import collective, gather_objects
from ray_platform.train.config import TrainConfig
from ray_platform.train.engine import Engine
from ray_platform.train.hang_detector import HeartbeatThread
from ray_platform.train.optimizer import MOMENTS, WEIGHTS
from ray_platform.train.resuming import other_shards
from ray_platform.train.retention import RetentionPolicy
from ray_platform.train.tensor_parts import ReadTensors

logger = logging.getLogger(__name__)

FILE_BYTES = 2**30  # maximum size of a tensor file with several tensors; this much is held twice during an upload


# --- restoring -----------------------------------------------------------------------------------------------------------


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
        states = {r: read_rank_state(url, manifest, r) for r in {0, *replaced}}
        tensors = read_tensors(url, manifest, tensor_files(manifest)[rank::world_size])
        ledgers = read_ledgers(url, manifest) if manifest.source_digest == source_digest else None
        return cls(url, manifest, tensors, ledgers, states[0], [states[r] for r in replaced])

    def loss_history(self, output_dir: str, config: Mapping[str, object]) -> LossHistory:
        """Return the saved history when it is of this run and this objective; otherwise an empty one, as losses would differ."""
        folder = storage.join(checkpoints_dir(output_dir), "")
        current, saved = (json.dumps(c.get("objective"), sort_keys=True) for c in (config, self.manifest.config))
        return self.rank_0.history if self.url.startswith(folder) and current == saved else LossHistory()


@collective
def find_checkpoint(resume: str, output_dir: str, launch: str, source_digest: str) -> LoadedCheckpoint | None:
    """Load the best of `candidates` that no rank finds damaged; None when there is no candidate.

    Raises CorruptCheckpoint on all ranks when every candidate is damaged.
    """
    urls: list[str] = []
    damage = ""
    if dist.get_rank() == 0:
        with storage.retrying_for(RETRY_SECONDS):
            urls = candidates(resume, output_dir, launch)
    for url in gather_objects(urls)[0]:
        loaded, local_damage = None, ""
        try:
            loaded = LoadedCheckpoint.read(url, source_digest)
        except CorruptCheckpoint as error:
            local_damage = str(error)
        damage = next(filter(None, gather_objects(local_damage)), "")
        if not damage:
            return loaded
        if dist.get_rank() == 0:
            logger.warning("%s; skipping this checkpoint", damage.removesuffix(f"; {ADVICE}"))
    if damage:
        raise CorruptCheckpoint(damage)
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
    mixture: MixtureState = field(default_factory=MixtureState)  # of this rank

    @classmethod
    def initial(cls, catalog: Catalog, train: TrainConfig) -> "TrainState":
        empty = Ledger(catalog.num_units)
        return cls(0, 0, train.global_batch_size or train.max_workers * train.micro_batch_size, empty, empty.copy())

    @classmethod
    def from_checkpoint(cls, loaded: LoadedCheckpoint, catalog: Catalog, train: TrainConfig) -> "TrainState":
        """Return the state in which the checkpoint was saved, for any number of ranks.

        The same number of ranks continues its plan, sample by sample. Another number plans the remaining samples anew. Raises
        ConfigError for another seed, as the ledger counts a shard's samples in the order that the seed determines, and DataError
        for other shards.
        """
        url, manifest = loaded.url, loaded.manifest
        if manifest.seed != train.seed:
            raise ConfigError(
                f"train.seed: {train.seed}, but the checkpoint {url} was written with {manifest.seed}; resume with that seed"
            )
        if loaded.ledgers is None:
            raise other_shards(url)
        base, consumed = loaded.ledgers
        mixture = MixtureState()
        if manifest.world_size == dist.get_world_size():
            mixture = loaded.rank_states[0].mixture
        else:
            base = consumed.copy()
        skipped = add_counts(*(state.skipped for state in loaded.rank_states))
        batch_size = train.global_batch_size or manifest.global_batch_size
        return cls(manifest.step, manifest.samples_seen, batch_size, base, consumed, skipped, url, mixture)


def add_counts(*counts: Mapping[str, int]) -> dict[str, int]:
    """Return the sum of several counts by cause."""
    causes = sorted({cause for count in counts for cause in count})
    return {cause: sum(count.get(cause, 0) for count in counts) for cause in causes}


@collective
def restore(loaded: LoadedCheckpoint, engine: Engine, weights_only: bool = False) -> None:
    """Load weights, moments, EMA and loss scale into an engine of any number of ranks and any ZeRO stage, or only the weights.

    torch's generator on the CPU is restored, too, when the number of ranks is the same. Raises ConfigError for another model.
    """
    saved, num_updates = loaded.tensors, loaded.manifest.num_updates
    if weights_only:
        saved, num_updates = {key: tensor for key, tensor in saved.items() if key.startswith(f"{WEIGHTS}/")}, 0
    tensors = ReadTensors(saved, engine.device)
    missing = engine.load_state(num_updates, tensors.join)
    new = [name.partition("/")[2] for name in missing if name.startswith(f"{WEIGHTS}/")]
    _check_parameters(loaded.url, engine.task.module, new, tensors.parameters(WEIGHTS))
    untrained = [name.partition("/")[2] for name in missing if name.startswith(f"{MOMENTS[0]}/") and not weights_only]
    if untrained and dist.get_rank() == 0:
        message = "%d parameters are newly trained, such as %s; their moments and step counts start at 0"
        logger.warning(message, len(untrained), untrained[0])
    if weights_only:
        return
    engine.loss_scale.load(loaded.manifest.loss_scale)
    if loaded.manifest.world_size == dist.get_world_size():
        torch.set_rng_state(loaded.rank_states[0].rng_tensor())


def _check_parameters(url: str, module: torch.nn.Module, new: Sequence[str], saved: Set[str]) -> None:
    """Warn of parameters that the checkpoint lacks (`new`), or has in addition to those of the module.

    Raises ConfigError when new ones are frozen, so that nothing would ever train them, and when there are both: parameters with
    other names, as after low-rank adapters were added, would be replaced by those of the module as it was built.
    """
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    frozen, others = [name for name in new if name not in trained], sorted(saved - module.state_dict().keys())
    lacks = f"{url} lacks {len(new)} parameters of the model, such as {(frozen or new)[0]}" if new else ""
    has = f"{len(others)} that the model does not use, such as {others[0]}" if others else ""
    if frozen or (new and others):
        raise ConfigError(
            f"model: {lacks}{has and f', and has {has}'}; use the model that it was trained with, or export the checkpoint and "
            "give the export as model.warm_start"
        )
    if dist.get_rank() == 0:
        for line in filter(None, (lacks and f"{lacks}; they stay as built", has and f"{url} has {has}")):
            logger.warning("%s", line)


# --- saving --------------------------------------------------------------------------------------------------------------


class CheckpointManager:
    """Checkpoints of a run, as one of its ranks saves them, one at a time.

    `save` copies the tensors and starts the upload. Training continues, and at every step the ranks agree on whether any of them
    still uploads (`fault_tolerance.sync_step_status`). If none does, `finalize_checkpoint` has rank 0 write the manifest and
    prune, also in the background. `wait` returns when all that is done.
    """

    def __init__(
        self, lineage: Lineage, engine: Engine, state: TrainState, retention: RetentionPolicy, heartbeat: HeartbeatThread
    ):
        """`lineage`: read by rank 0, which alone writes manifests. `state.consumed` is updated by every `save`."""
        self.engine, self.state, self.retention, self.heartbeat = engine, state, retention, heartbeat
        self.lineage = lineage
        launch_dir = storage.join(checkpoints_dir(retention.output_dir), lineage.launch)
        self.rank = dist.get_rank()
        self._is_finalized = True  # of the checkpoint that was saved last, if any
        token = gather_objects(secrets.token_hex(4))[0]
        self.uploader = AsyncUploader(launch_dir, self.rank, token, heartbeat.count_progress)
        self._manifest: Manifest
        self._warned_of_metric = False

    @collective
    def save(self, manifest: Manifest, consumed: Sequence[ConsumedRange], rank_state: RankState) -> None:
        """Copy this rank's part of the engine's state, and start to upload it in the background. Only ranges are communicated.

        Token, lineage and files of the manifest are filled in here. `consumed` is what this rank consumed since the last call.
        """
        self.wait()  # for the checkpoint before
        self.heartbeat.set_phase("saving a checkpoint")
        self._warn_of_missing_metric(manifest)
        self._manifest = self.lineage.place(replace(manifest, token=self.uploader.token))
        assignment, tensors, ledgers = TensorAssignment(dist.get_world_size()), {}, {}
        with self.heartbeat.waiting_for_ranks():
            self.state.consumed.add(chain.from_iterable(gather_objects(merge_ranges(consumed))))
        for key, tensor, is_replicated in self.engine.local_state():
            if not is_replicated or assignment.owner(tensor) == self.rank:
                tensors[key] = contiguous_on_cpu(tensor)
        if self.rank == 0:
            ledgers = {BASE: self.state.base.to_bytes(), CONSUMED: self.state.consumed.to_bytes()}
        self._is_finalized = False
        self.uploader.upload(manifest.step, tensors, ledgers, rank_state)

    def finalize_checkpoint(self, any_uploading: bool, any_failed: bool) -> None:
        """Complete the checkpoint once no rank uploads any more, or remove its files if the upload of any rank failed.

        Every rank passes the same values, which are about all ranks.
        """
        if self._is_finalized or any_uploading:
            return
        self._is_finalized = True
        if self.rank == 0:
            self.uploader.finalize(None if any_failed else self._manifest, self.retention, self.lineage)
        if not any_failed:
            self.lineage = self.lineage.after(checkpoint_name(self._manifest.step))

    @collective
    def wait(self) -> str:
        """Wait until the current checkpoint, if any, is finalized. Return the reason why it failed, or an empty string."""
        if not self._is_finalized:
            self.heartbeat.set_phase("waiting for a checkpoint's upload", is_slow=True)
            self.uploader.wait()
            self.finalize_checkpoint(any_uploading=False, any_failed=bool(self._any_failure()))
        self.uploader.wait()
        return self._any_failure()

    @collective
    def _any_failure(self) -> str:
        with self.heartbeat.waiting_for_ranks():
            return next(filter(None, gather_objects(self.uploader.failure)), "")

    def _warn_of_missing_metric(self, manifest: Manifest) -> None:
        metric = self.retention.best_metric
        if self.rank == 0 and metric and metric not in manifest.metrics and not self._warned_of_metric:
            self._warned_of_metric = True
            logger.warning(
                "train.keep_best: %s was not logged at step %d, so this checkpoint cannot be the best (logged once); metrics are "
                "logged every train.log_every, scores every train.heldout_every steps, checkpoints every train.checkpoint_every",
                *(metric, manifest.step),
            )


class TensorAssignment:
    """Assigns every tensor that all ranks hold to the one that writes it: the one with the fewest bytes so far."""

    def __init__(self, world_size: int):
        self._ranks = [(0, rank) for rank in range(world_size)]  # a heap of (bytes, rank)

    def owner(self, tensor: torch.Tensor) -> int:
        num_bytes, rank = self._ranks[0]
        heapq.heapreplace(self._ranks, (num_bytes + tensor.nbytes, rank))
        return rank


class AsyncUploader:
    """Background uploads of one rank, one checkpoint at a time. A storage error fails the checkpoint, not the run."""

    def __init__(self, launch_dir: str, rank: int, token: str, on_progress: Callable[[], None]):
        """`launch_dir`: folder of this launch's checkpoints. `on_progress` is called after every file, from the upload thread."""
        self.launch_dir, self.rank, self.on_progress = launch_dir, rank, on_progress
        # The same on all ranks and new for every start of the workers, so that the files of a rank that was declared dead and
        # still uploads are not part of a later checkpoint.
        self.token = token
        self.url = ""  # of the current checkpoint
        self.failure = ""  # why the current checkpoint failed on this rank
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None  # the executor ends its tasks in the order of their submission

    @property
    def is_uploading(self) -> bool:
        return self._last is not None and not self._last.done()

    def upload(self, step: int, tensors: Mapping[str, torch.Tensor], ledgers: Mapping[str, bytes], rank_state: RankState) -> None:
        """Start to upload this rank's tensors (on the CPU; they must not change), its state, and on rank 0 the ledgers."""
        self.url, self.failure = storage.join(self.launch_dir, checkpoint_name(step)), ""
        self._last = self._executor.submit(self._upload, self.url, dict(tensors), dict(ledgers), rank_state)

    def finalize(self, manifest: Manifest | None, retention: RetentionPolicy, lineage: Lineage) -> None:
        """Start to write the manifest and to prune older checkpoints, on rank 0. None: remove a failed checkpoint's files."""
        task = (self._remove_files, self.url) if manifest is None else (self._complete, self.url, manifest, retention, lineage)
        self._last = self._executor.submit(*task)

    def wait(self) -> None:
        if self._last is not None:
            self._last.result()

    def _upload(self, url: str, tensors: dict[str, torch.Tensor], ledgers: dict[str, bytes], rank_state: RankState) -> None:
        try:
            name, files = rank_name(self.rank), {}
            for number, keys in enumerate(list(_group_by_size(tensors))):
                file = f"{name}_{number:03d}.{self.token}{TENSORS}"
                files[file] = self._write(url, file, safetensors.torch.save({key: tensors.pop(key) for key in keys}))
            for plain, data in (*ledgers.items(), (name, rank_state.to_bytes())):
                files[json_name(plain, self.token)] = self._write(url, json_name(plain, self.token), data)
            self._write(url, json_name(f"{name}_files", self.token), json.dumps(files).encode())
        except Exception as error:
            self.failure = one_line(error)
            logger.warning("checkpoint %s failed on rank %d; training continues: %s", url, self.rank, self.failure)

    def _write(self, url: str, name: str, data: bytes) -> tuple[int, str]:
        storage.write_bytes(storage.join(url, name), data)
        self.on_progress()
        return len(data), hashlib.sha256(data).hexdigest()

    def _complete(self, url: str, manifest: Manifest, retention: RetentionPolicy, lineage: Lineage) -> None:
        try:
            files: dict[str, tuple[int, str]] = {}
            names = [json_name(f"{rank_name(rank)}_files", self.token) for rank in range(manifest.world_size)]
            lists = [storage.join(url, name) for name in names]
            contents = storage.read_many(lists)
            for file in lists:  # one that `read_many` left out is read again, with retries
                files |= json.loads(contents[file] if file in contents else storage.read_bytes(file))
            storage.write_bytes(storage.join(url, COMPLETE), replace(manifest, files=files).to_bytes())
            logger.info("checkpoint %s is complete", url)
        except Exception as error:
            self.failure = one_line(error)
            logger.warning("checkpoint %s was not completed; training continues: %s", url, self.failure)
            return
        try:
            retention.prune(url, lineage)
        except Exception as error:
            logger.warning("checkpoints older than %s could not be removed; the next one retries: %s", url, one_line(error))

    def _remove_files(self, url: str) -> None:
        with contextlib.suppress(storage.StorageError):
            for file in storage.list_folder(url, f"*.{self.token}.*"):
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
