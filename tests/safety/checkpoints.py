"""Hostile checkpoints, passed to jobs/export.py and to a resume."""

import hashlib
import json
import pickle
import struct
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from diffdis_platform.config.export import ExportConfig
from diffdis_platform.exporting import export
from diffdis_platform.recipes.demo import demo
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data.ledger import Ledger
from ray_platform.train import checkpoint_format
from ray_platform.train.checkpoint_format import Manifest
from tests.safety.cases import Evil, Feed, line_of

TOKEN = "0123abcd"


def write_checkpoint(folder: Path, weights: bytes | None = None, base: bytes | None = None, **changes: Any) -> Path:
    """Write a checkpoint with correct digests for any content, because an attacker would also compute correct digests."""
    step = folder / "step_00000001"
    step.mkdir()
    ledger = Ledger([8]).to_bytes()
    files = {
        f"rank_00000.0000.{TOKEN}.safetensors": weights or safetensors.torch.save({"weights/a": torch.zeros(2)}),
        checkpoint_format.json_name("base", TOKEN): base or ledger,
        checkpoint_format.json_name("consumed", TOKEN): ledger,
        checkpoint_format.json_name("rank_00000", TOKEN): b"{}",
    }
    for name, content in files.items():
        (step / name).write_bytes(content)
    entries = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    manifest = asdict(Manifest(TOKEN, 1, 1, 1, {}, 1, 1, 8, 0, "d", {}, "code", asdict(demo()), entries)) | changes
    manifest["files"] = entries | changes.get("files", {})
    (step / "complete.json").write_text(json.dumps(manifest))
    return step


def export_line(step: Path) -> str:
    return line_of(lambda: export(ExportConfig(str(step), str(step.parent / "model"))), ConfigError, DataError)


def exported(**changes: Any) -> Feed:
    return lambda folder: export_line(write_checkpoint(folder, **changes))


def exported_model(**fields: Any) -> Feed:
    config = asdict(demo())
    return exported(config=config | {"model": config["model"] | fields})


def pickled_weights(folder: Path) -> str:
    return export_line(write_checkpoint(folder, weights=pickle.dumps(Evil(folder))))


def changed(pattern: str, content: bytes = b"", size: int = 0) -> Feed:
    """Return a case: a checkpoint with one file modified later, to other content or by a sparse extension up to `size` bytes."""

    def feed(folder: Path) -> str:
        step = write_checkpoint(folder)
        with next(step.glob(pattern)).open("wb" if content else "ab") as file:
            file.write(content)
            file.truncate(size or len(content))
        return export_line(step)

    return feed


def ledger(content: bytes) -> Feed:
    def feed(folder: Path) -> str:
        url = str(write_checkpoint(folder, base=content))
        return line_of(lambda: checkpoint_format.read_ledgers(url, checkpoint_format.read_manifest(url)), DataError)

    return feed


def header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", length or len(text)) + text.encode()


TERABYTE = '{"weights/a": {"dtype": "F32", "shape": [274877906944], "data_offsets": [0, 1099511627776]}}'
MANY_UNITS = {"num_units": [10**15], "first_epoch": [0], "epochs": [{"pool": 0, "epoch": 0, "complete": "AA==", "begun": {}}]}
CHECKPOINTS = {
    "a pickle that runs a command, under the name of a tensor file": pickled_weights,
    "a tensor file whose header claims 2^63 bytes": exported(weights=header("{}", 2**63)),
    "a tensor file whose header claims a terabyte of data": exported(weights=header(TERABYTE)),
    "a tensor file that grew by 3 GB": changed("*.safetensors", size=3 * 2**30),
    "tensors of another model": exported(),
    "a file named `../../outside/secret.safetensors` in its list": exported(
        files={"../../outside/secret.safetensors": (1, "0" * 64)}
    ),
    "an absolute name in its list": exported(files={"/etc/passwd": (1, "0" * 64)}),
    "a manifest that speaks of 10^15 ranks": exported(world_size=10**15),
    "a manifest whose step is a text": exported(step="1; rm -rf"),
    "a manifest of 100,000 nested lists": changed("complete.json", b"[" * 100_000),
    "a manifest of 3 GB": changed("complete.json", size=3 * 2**30),
    "a manifest that is a list": changed("complete.json", b"[]"),
    "a model for images of 10^9 pixels across": exported_model(image_size=10**9),
    "a model whose width is a text": exported_model(image_size="x"),
    "a configuration without a model": exported(config={}),
    "a ledger of 10^15 units": ledger(json.dumps(MANY_UNITS).encode()),
    "a ledger that is a pickle": ledger(pickle.dumps({"num_units": [1]})),
}
