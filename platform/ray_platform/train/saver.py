"""Checkpoints that are uploaded while training goes on.

Each rank takes a copy of its share of the state, and a thread uploads it. A checkpoint is complete when every rank's thread
is through, which the ranks tell each other at their steps; then rank 0 writes the manifest, and removes what is not to be kept.
"""

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import safetensors.torch
import torch

from ray_platform import storage
from ray_platform.contracts import one_line
from ray_platform.train import checkpointing
from ray_platform.train.checkpointing import Keep, Manifest, json_name

logger = logging.getLogger(__name__)

FILE_BYTES = 2**30  # at most, unless a single tensor is larger: so much is held twice while it is uploaded


class Saver:
    """One rank's uploads, one checkpoint at a time. No method raises for what storage does: a checkpoint fails, not the run."""

    def __init__(self, folder: str, rank: int, token: str, moved: Callable[[], None]):
        """`folder` is the launch's. `token`, the same on all ranks, is new for every start of the workers: what a rank that
        was thought dead still uploads cannot get into a later checkpoint. `moved` is called after every file, from a thread."""
        self.folder, self.rank, self.token, self.moved = folder, rank, token, moved
        self.url = ""  # of the checkpoint under way; empty: none is
        self.failure = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None
        self._completion: Future[None] | None = None

    @property
    def uploading(self) -> bool:
        return self._upload is not None and not self._upload.done()

    def begin(self, step: int, share: Mapping[str, torch.Tensor], files: Mapping[str, bytes], state: Mapping[str, Any]) -> None:
        """Upload this rank's `share` of the tensors (on the CPU; nobody else may change them), JSON `files` by
        their names, and `state`, which only this rank will read."""
        self.url, self.failure = storage.join(self.folder, checkpointing.checkpoint_name(step)), ""
        self._upload = self._thread.submit(self._run, dict(share), dict(files), dict(state))

    def end(self, manifest: Manifest | None, keep: Keep) -> None:
        """All ranks are through. Rank 0 gives the manifest of a checkpoint that none has failed in: it completes it."""
        url, self.url, self._upload = self.url, "", None
        if manifest is not None:
            self._completion = self._thread.submit(self._complete, url, manifest, keep)

    def abandon(self) -> None:
        """Some rank has failed: make room for the next one."""
        url, self.url, self._upload = self.url, "", None
        self._completion = self._thread.submit(self._remove, url)

    def _remove(self, url: str) -> None:
        with contextlib.suppress(storage.StorageError):
            for file in storage.list_files(storage.join(url, f"*.{self.token}.*")):
                storage.delete(file.url)

    def wait(self) -> None:
        """Until nothing is under way on this rank any more."""
        for future in (self._upload, self._completion):
            if future is not None:
                future.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def _run(self, share: dict[str, torch.Tensor], files: dict[str, bytes], state: dict[str, Any]) -> None:
        try:
            begun = time.monotonic()
            written = {}
            for number, names in enumerate(list(_packed(share))):
                name = f"{checkpointing.rank_name(self.rank)}_{number:03d}.{self.token}{checkpointing.TENSORS}"
                written[name] = self._put(name, safetensors.torch.save({key: share.pop(key) for key in names}))
            rank_name = checkpointing.rank_name(self.rank)
            for plain, data in (*files.items(), (rank_name, json.dumps(state).encode())):
                name = json_name(plain, self.token)
                written[name] = self._put(name, data)
            self._put(json_name(f"{rank_name}_files", self.token), json.dumps(written).encode())
            logger.debug("rank %d uploaded its share in %.1f s", self.rank, time.monotonic() - begun)
        except Exception as error:
            self.failure = one_line(error)
            logger.warning("the checkpoint %s failed on rank %d; training goes on: %s", self.url, self.rank, self.failure)

    def _put(self, name: str, data: bytes) -> tuple[int, str]:
        storage.write_bytes(storage.join(self.url, name), data)
        self.moved()
        return len(data), hashlib.sha256(data).hexdigest()

    def _complete(self, url: str, manifest: Manifest, keep: Keep) -> None:
        try:
            names = [json_name(f"{checkpointing.rank_name(rank)}_files", self.token) for rank in range(manifest.world_size)]
            lists = [storage.join(url, name) for name in names]
            files: dict[str, tuple[int, str]] = {}
            for file_list in lists:
                files |= json.loads(storage.read_bytes(file_list))
            whole = replace(manifest, files=files).to_bytes()
            storage.write_bytes(storage.join(url, checkpointing.COMPLETE), whole)
            logger.info("checkpoint %s is complete", url)
        except Exception as error:
            self.failure = one_line(error)
            logger.warning("the checkpoint %s was not completed; training goes on: %s", url, self.failure)
            return
        try:
            keep.prune(url)
        except Exception as error:
            logger.warning("older checkpoints than %s could not be removed; the next one tries again: %s", url, one_line(error))


def _packed(share: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """The names of `share`, in groups of about `FILE_BYTES`. At least one, so that every rank has a file."""
    names: list[str] = []
    size = 0
    for name, tensor in share.items():
        if names and size + tensor.nbytes > FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    yield names


class Shares:
    """Which rank writes which tensor: always the one that has the fewest bytes so far."""

    def __init__(self, world_size: int):
        self.num_bytes = [0] * world_size

    def owner(self, tensor: torch.Tensor) -> int:
        rank = self.num_bytes.index(min(self.num_bytes))
        self.num_bytes[rank] += tensor.nbytes
        return rank
