"""Checks of a training run before it takes a GPU, the cheapest first, and the description that a dry run prints.

Torch and Ray take seconds to import, so they are imported only once everything else is correct.
"""

import logging
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError, Task, UserError, named_field, one_line, root_cause
from ray_platform.data import precomputed
from ray_platform.data.catalog import Catalog, build_catalog, difference
from ray_platform.data.config import DataConfig
from ray_platform.data.plan import check_cpus, check_world_size
from ray_platform.json_values import JsonObject
from ray_platform.placement import is_connected
from ray_platform.tracking import ModelPackage, TrackingConfig, tracking_uri
from ray_platform.tracking.delivery import check_trackers
from ray_platform.train.config import TrainConfig

logger = logging.getLogger(__name__)

CATALOG = "catalog.json"  # in output_dir: the shards with which the run started
INSPECTED_SAMPLES = 64
_SERVER_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class RunPlan:
    """Everything that a training run uses, and the checks of it. `launch.Run` executes it."""

    build_task: Callable[[], Task]
    data: DataConfig
    train: TrainConfig
    tracking: TrackingConfig
    output_dir: str  # absolute, or s3://
    params: dict[str, Any]  # the resolved configuration, for the tracker and the checkpoints
    # Returns what identifies the model's frozen encoders, to compare with precomputed shards; called only for those.
    describe_encoders: Callable[[], JsonObject]
    # Returns what the captions of the first samples show about the configuration; for a dry run.
    describe_captions: Callable[[Sequence[str]], JsonObject] = lambda captions: {}
    package: ModelPackage | None = None  # how the exported model is packaged for MLflow; None: stored as plain files
    command: str = ""  # command line that started it
    # Opens the weights that the run starts from, without loading them, and returns what they are. Raises ConfigError.
    describe_weights: Callable[[], JsonObject] = dict

    def check(self) -> Catalog:
        """Run every check that needs no cluster, and return the data's catalog. Raises ConfigError or DataError."""
        if not self.output_dir:
            raise ConfigError("output_dir: give the folder (absolute) or s3:// URL that the run's results go to")
        if "://" not in self.output_dir and not os.path.isabs(self.output_dir):
            raise ConfigError(
                f"output_dir: {self.output_dir} is relative, and a submitted job runs in a temporary copy of its folder; "
                "give an absolute path or an s3:// URL"
            )
        tracking_uri(self.tracking, self.output_dir)
        if self.train.elastic and self.data.placement and not self.train.placement:
            raise ConfigError(
                "train.placement: the workers of an elastic run would take the CPUs of data.placement, which its reads need; "
                "give the workers other nodes, as {pool: gpu}"
            )
        check_writable(self.output_dir)
        self.check_packages()
        catalog = self._catalog()
        check_world_size(catalog, self.train.max_workers)
        catalogs = [catalog, *([heldout] if (heldout := self._heldout_catalog()) else [])]
        self.check_capacity()
        check_trackers(self.tracking, self.output_dir)
        self._check_resume(catalog)
        for manifest in filter(None, (each.manifest for each in catalogs)):
            precomputed.check_encoders(manifest, self.describe_encoders())
        self.describe_weights()
        return catalog

    def check_packages(self) -> None:
        """Raise ConfigError if a package that the configuration needs is not installed."""
        if self.train.optimizer == "adamw_8bit":
            from ray_platform.train import adamw_8bit  # noqa: F401 - raises ConfigError

    def _catalog(self) -> Catalog:
        """Return the source's catalog after comparing it with that of the resumed run."""
        url = storage.join(self.output_dir, CATALOG)
        saved = storage.read_small(url, storage.LISTING_BYTES) if storage.exists(url) else None
        with named_field("data.sources"):
            catalog = build_catalog(self.data, saved)
        if saved and self.train.resume == "auto" and (changes := difference(saved, catalog)):
            raise DataError(
                f"data.sources: changed since this run started: {changes}; restore the shards, "
                "or start anew with another output_dir"
            )
        if catalog.manifest is not None:
            precomputed.check_settings(catalog.manifest, self.data)
        return catalog

    def _heldout_catalog(self) -> Catalog | None:
        if not self.train.heldout_sources:
            return None
        with named_field("train.heldout_sources"):
            return build_catalog(replace(self.data, sources=self.train.heldout_sources, weights=()))

    def _check_resume(self, catalog: Catalog) -> None:
        from ray_platform.train.checkpoint_format import list_checkpoints
        from ray_platform.train.resuming import Resumption, other_shards

        path, resumed = self.train.resume.rstrip("/"), Resumption.find(self.train, self.output_dir)
        existing = list_checkpoints(self.output_dir) if path == "none" else []
        if resumed and path not in ("auto", resumed.url) and resumed.started_from != path:
            existing = [resumed.url]
        if existing:
            raise ConfigError(
                f"output_dir: {self.output_dir} already holds a run (up to {existing[0].rsplit('/', 1)[1]}); "
                "continue it with --resume auto, or give another output_dir"
            )
        if path == "auto" and self.train.resume_weights_only and not resumed:
            raise ConfigError(
                f"train.resume_weights_only: {self.output_dir} has no checkpoint yet; name the one whose weights to take with "
                "--resume PATH"
            )
        if resumed and resumed.manifest.source_digest != catalog.digest:
            raise other_shards(resumed.url)

    def check_capacity(self) -> None:
        """Raise ConfigError if the fewest workers and their reads do not fit: Ray would wait for more nodes without an end.

        They must fit on the connected cluster. Without one, they must fit on this machine, which has no labels, unless
        RAY_ADDRESS names another cluster, to which `fit` connects.
        """
        train, data = self.train, self.data
        if not is_connected() and (os.environ.get("RAY_ADDRESS") or train.placement or data.placement):
            return
        train.worker_request.check_fits(train.min_workers, "train.")
        # Nodes of the workers may read, too, if they have all labels of data.placement.
        shares_nodes = data.placement.items() <= train.placement.items()
        check_cpus(data, train.min_workers, train.cpus_per_worker if shares_nodes else 0.0)

    def dry_run(self) -> JsonObject:
        """Return a description of what would run, after reading the first samples. Raises the errors of `check`, and
        ConfigError for a cluster or a tracking server that does not answer."""
        check_tracking_server(tracking_uri(self.tracking, self.output_dir))
        catalog, train = self.check(), self.train
        from ray_platform.connect import connect
        from ray_platform.data.inspection import inspect_first_samples
        from ray_platform.train.resuming import Resumption

        if os.environ.get("RAY_ADDRESS"):
            connect()
            self.check_capacity()
        if heldout := self._heldout_catalog():
            with named_field("train.heldout_sources"):
                inspect_first_samples(heldout, self.data, INSPECTED_SAMPLES)
        samples = inspect_first_samples(catalog, self.data, INSPECTED_SAMPLES)
        resumed = Resumption.find(train, self.output_dir)
        saved = resumed.manifest if resumed else None
        default_batch = saved.global_batch_size if saved else train.max_workers * train.micro_batch_size
        global_batch = train.global_batch_size or default_batch
        num_steps = max(0, train.last_step - (saved.step if saved else 0))
        return {
            "shards": len(catalog.shards),
            "bytes": catalog.num_bytes,
            "samples_in_source": catalog.num_samples,
            "first_samples": {
                "shards": samples.num_shards,
                "good": samples.good,
                "rejected": dict(samples.rejected),
                "example": {"key": samples.example.key, "caption": samples.example.caption},
            },
            "precomputed": catalog.manifest is not None,
            "workers": train.num_workers,
            "zero_stage": train.zero_stage,
            "steps": train.last_step,
            "global_batch_size": global_batch,
            "samples_to_train_on": num_steps * global_batch,
            "epochs_to_train_on": round(num_steps * global_batch / catalog.num_samples, 3) if catalog.num_samples else None,
            "checkpoints_to_write": -(-num_steps // train.checkpoint_every),
            "checkpoints_kept": train.max_checkpoints,
            "starts_from": resumed.url if resumed else "the beginning",
            "changed_settings": [*resumed.changes(self.params), *resumed.warnings(train)] if resumed else [],
            "output_dir": self.output_dir,
            "weights": self.describe_weights(),
        } | self.describe_captions(samples.captions)


def check_writable(output_dir: str) -> None:
    """Raise ConfigError if a file cannot be written below `output_dir` and deleted again. Nothing is left behind."""
    probe = storage.join(output_dir, f".write_probe_{uuid.uuid4().hex}")
    try:
        if "://" in output_dir:
            with storage.retrying_for(0):
                storage.write_bytes(probe, b"")
                storage.delete(probe)
            return
        # The folder itself must not appear: a dry run changes nothing.
        existing = next(path for path in (Path(output_dir), *Path(output_dir).parents) if path.exists())
        with tempfile.TemporaryDirectory(prefix=".write_probe_", dir=existing) as folder:
            (Path(folder) / "file").write_bytes(b"1")
    except UserError as error:
        reason = str(error).removeprefix(f"{probe}: ").partition(", or name the bucket")[0]  # as public, which helps to read
        raise ConfigError(f"output_dir: {output_dir} cannot be written to ({reason})") from error
    except OSError as error:
        raise ConfigError(
            f"output_dir: {output_dir} cannot be written to ({error.strerror or one_line(error)}); give another folder"
        ) from None


def check_tracking_server(uri: str) -> None:
    """Raise ConfigError if an MLflow server does not answer. Databases and an empty `uri` pass."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    server = os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH") or os.environ.get("MLFLOW_TRACKING_INSECURE_TLS") != "true"
    try:
        answer = requests.get(uri.rstrip("/") + "/health", timeout=_SERVER_TIMEOUT_S, verify=server)
    except requests.RequestException as error:
        reason = one_line(root_cause(error), max_length=200)
    else:
        if answer.status_code < 500:  # a proxy may reject this address, and accept those of MLflow's client
            return
        reason = f"status {answer.status_code}"
    raise ConfigError(f"tracking.uri: {uri} does not answer ({reason}); start the MLflow server, or correct the address")
