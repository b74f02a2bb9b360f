"""Where a run stands in its steps and its data, and how that and the engine's state come back from a checkpoint."""

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.data.catalog import Catalog
from ray_platform.data.ledger import Ledger
from ray_platform.retry import RETRY_SECONDS
from ray_platform.train import checkpointing
from ray_platform.train.checkpointing import CorruptCheckpoint, Manifest
from ray_platform.train.config import TrainConfig
from ray_platform.train.engine import Engine
from ray_platform.train.guard import History

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """A checkpoint all of whose files are as they were written."""

    url: str
    manifest: Manifest
    share: dict[str, torch.Tensor]  # this rank's of the tensors, on the CPU
    ledgers: tuple[Ledger, Ledger] | None  # None: it was trained on other shards
    first: dict[str, Any]  # the state of rank 0
    states: list[dict[str, Any]]  # those of the ranks whose place this rank takes

    @classmethod
    def read(cls, url: str, source_digest: str) -> "Found":
        """This rank's part. Raises CorruptCheckpoint."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        manifest = checkpointing.read_manifest(url)
        states = {r: checkpointing.load_rank_state(url, manifest, r) for r in {0, *range(rank, manifest.world_size, world_size)}}
        for number, state in states.items():
            _check_state(url, number, state)
        return cls(
            url,
            manifest,
            checkpointing.tensors(url, manifest, checkpointing.tensor_files(manifest)[rank::world_size]),
            checkpointing.load_ledgers(url, manifest) if manifest.source_digest == source_digest else None,
            states[0],
            [states[r] for r in range(rank, manifest.world_size, world_size)],
        )

    def into(self, engine: Engine) -> None:
        """Give weights, moments and EMA to an engine of any number of ranks and any ZeRO stage. Every rank must call it."""
        engine.scale.load(self.manifest.loss_scale)
        lacking = engine.load_state(self.manifest.num_updates, checkpointing.shared_reader(self.share, engine.device))
        if lacking and dist.get_rank() == 0:
            logger.warning("%s lacks %d tensors, which stay as built, such as %s", self.url, len(lacking), lacking[0])

    def history(self, output_dir: str, params: Mapping[str, Any]) -> History:
        """Of the losses so far, where they are this run's and of this objective: others say nothing about what is usual here."""
        folder = storage.join(checkpointing.checkpoints_dir(output_dir), "")
        here, there = (json.dumps(config.get("objective"), sort_keys=True) for config in (params, self.manifest.config))
        return History(**self.first["history"]) if self.url.startswith(folder) and here == there else History()


def find(resume: str, output_dir: str, launch: str, source_digest: str) -> Found | None:
    """The best of `candidates` that is not damaged; None where there is none to go on from. Every rank must call it.

    Raises CorruptCheckpoint, on all ranks, when all of them are damaged.
    """
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        with storage.retrying_for(RETRY_SECONDS):
            said = [checkpointing.candidates(resume, output_dir, launch)]
    dist.broadcast_object_list(said)
    damages: list[Any] = [""] * dist.get_world_size()
    for url in said[0]:
        found, damage = None, ""
        try:
            found = Found.read(url, source_digest)
        except CorruptCheckpoint as error:
            damage = str(error)
        dist.all_gather_object(damages, damage)
        if not any(damages):
            return found
        if dist.get_rank() == 0:
            logger.warning("%s", next(filter(None, damages)))
    if any(damages):
        raise CorruptCheckpoint(next(filter(None, damages)))
    return None


@dataclass(frozen=True)
class Position:
    """As this rank knows it. The ledgers are all ranks'."""

    step: int
    samples_seen: int
    global_batch_size: int
    base: Ledger  # the plan of all ranks begins with what it leaves
    consumed: Ledger  # of the plan, by all ranks, as of the last checkpoint
    skipped: dict[str, int] = field(default_factory=dict)  # by this rank, in the runs that this one goes on from
    url: str = ""  # of the checkpoint

    @classmethod
    def start(cls, catalog: Catalog, train: TrainConfig) -> "Position":
        nothing = Ledger(catalog.num_units)
        global_batch_size = train.global_batch_size or train.max_workers * train.micro_batch_size
        return cls(0, 0, global_batch_size, nothing, nothing.copy())

    def of(self, found: Found, train: TrainConfig) -> "Position":
        """Where the checkpoint stands, for ranks that may be others than those that wrote it.

        The same number of ranks goes on in its plan, sample for sample. Another one shares out anew what is left of it. Other
        shards, of a run that starts from another run's checkpoint, are read from their beginning.
        """
        url, manifest, same_ranks = found.url, found.manifest, found.manifest.world_size == dist.get_world_size()
        check_seed(url, manifest, train)
        base, consumed = self.base, self.consumed
        if found.ledgers is not None:
            base, consumed = found.ledgers
            if not same_ranks:
                base = consumed.copy()
        elif dist.get_rank() == 0:
            logger.warning("%s was trained on other shards: the data are read from their beginning", url)
        if same_ranks:
            torch.set_rng_state(_to_tensor(found.states[0]["rng"]))
        skipped: dict[str, int] = {}
        for state in found.states:  # whatever the rank's number, what was skipped is counted once
            skipped = {cause: skipped.get(cause, 0) + state["skipped"].get(cause, 0) for cause in skipped | state["skipped"]}
        return replace(
            self,
            step=manifest.step,
            samples_seen=manifest.samples_seen,
            global_batch_size=train.global_batch_size or manifest.global_batch_size,
            base=base,
            consumed=consumed,
            skipped=skipped,
            url=url,
        )


def rank_state(skipped: dict[str, int], history: History) -> dict[str, Any]:
    """What one rank knows besides the engine's state and the ledgers."""
    rng = base64.b64encode(bytes(torch.get_rng_state().tolist())).decode()
    return {"skipped": skipped, "history": asdict(history), "rng": rng}


def _check_state(url: str, rank: int, state: Any) -> None:
    """Raises CorruptCheckpoint for what is none of `rank_state`'s."""
    try:
        History(**state["history"])
        counts = [state["skipped"][cause] for cause in state["skipped"]]
        good = all(isinstance(count, int) for count in counts) and _to_tensor(state["rng"]).shape == torch.get_rng_state().shape
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        good = False
    if not good:
        raise CorruptCheckpoint(f"{url}: the state of rank {rank} is damaged; go on from another checkpoint by --resume PATH")


def _to_tensor(rng: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(rng)), dtype=torch.uint8)


def check_seed(url: str, manifest: Manifest, train: TrainConfig) -> None:
    """Raises ConfigError: the ledger counts a shard's samples in the order that the seed gives them."""
    if manifest.seed != train.seed:
        raise ConfigError(f"train.seed: {train.seed}, but the checkpoint {url} was written with {manifest.seed}; go on with that")
