"""Hostile checkpoints, by what jobs/export.py and a resume make of them."""

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
from tests.safety.cases import Case, Evil, line_of

EXPORT, RESUME = "`jobs/export.py --checkpoint`", "`--resume`"
TOKEN = "0123abcd"


def written(folder: Path, weights: bytes | None = None, base: bytes | None = None, **changes: Any) -> Path:
    """A checkpoint whose digests are right, whatever is in it: who makes one up gets them right."""
    step = folder / "step_00000001"
    step.mkdir()
    ledger = Ledger([8]).to_bytes()
    files = {
        f"rank_00000.0000.{TOKEN}.safetensors": safetensors.torch.save({"weights/a": torch.zeros(2)})
        if weights is None
        else weights,
        checkpoint_format.json_name("base", TOKEN): ledger if base is None else base,
        checkpoint_format.json_name("consumed", TOKEN): ledger,
        checkpoint_format.json_name("rank_00000", TOKEN): b"{}",
    }
    for name, content in files.items():
        (step / name).write_bytes(content)
    entries = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
    config = json.loads(json.dumps(asdict(demo())))
    whole = asdict(Manifest(TOKEN, 1, 1, 1, {}, 1, 1, 8, 0, "d", {}, "code", config, entries)) | changes
    if extra := changes.get("files"):
        whole["files"] = entries | extra
    (step / "complete.json").write_text(json.dumps(whole))
    return step


def exported(**changes: Any):
    def feed(folder: Path) -> str:
        url = str(written(folder, **{name: value(folder) if callable(value) else value for name, value in changes.items()}))
        wanted = ExportConfig(url, str(folder / "model"))
        return line_of(lambda: export(wanted), ConfigError, DataError)

    return feed


def manifest(content: bytes):
    def feed(folder: Path) -> str:
        (folder / "step_00000001").mkdir()
        (folder / "step_00000001" / "complete.json").write_bytes(content)
        return line_of(lambda: checkpoint_format.read_manifest(str(folder / "step_00000001")), DataError)

    return feed


def ledger(content: bytes):
    def feed(folder: Path) -> str:
        url = str(written(folder, base=content))
        return line_of(lambda: checkpoint_format.read_ledgers(url, checkpoint_format.read_manifest(url)), DataError)

    return feed


def longer(folder: Path) -> str:
    """A file that grew by 3 GB (a hole) behind what the manifest has."""
    step = written(folder)
    file = next(step.glob("*.safetensors"))
    with file.open("ab") as opened:
        opened.truncate(3 * 2**30)
    return line_of(lambda: export(ExportConfig(str(step), str(folder / "m"))), DataError)


def huge(folder: Path) -> str:
    (folder / "step_00000001").mkdir()
    with (folder / "step_00000001" / "complete.json").open("wb") as file:
        file.truncate(3 * 2**30)
    return line_of(lambda: checkpoint_format.read_manifest(str(folder / "step_00000001")), DataError)


def model_of(**changes: Any) -> dict[str, Any]:
    config = json.loads(json.dumps(asdict(demo())))
    config["model"] |= changes
    return config


def header(text: str, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text.encode()


def bomb(num_units: int) -> bytes:
    epochs = [{"pool": 0, "epoch": 0, "complete": "AA==", "begun": {}}]
    return json.dumps({"num_units": [num_units], "first_epoch": [0], "epochs": epochs}).encode()


CHECKPOINTS = [
    Case(
        "a pickle that runs a command, under the name of a tensor file",
        EXPORT,
        ".safetensors…damaged",
        exported(weights=lambda folder: pickle.dumps(Evil(folder))),
    ),
    Case("a tensor file whose header claims 2^63 bytes", EXPORT, ".safetensors…damaged", exported(weights=header("{}", 2**63))),
    Case(
        "a tensor file whose header claims a terabyte of data",
        EXPORT,
        ".safetensors…damaged",
        exported(weights=header('{"weights/a": {"dtype": "F32", "shape": [274877906944], "data_offsets": [0, 1099511627776]}}')),
    ),
    Case("a tensor file that grew by 3 GB", EXPORT, ".safetensors…damaged…bytes", longer),
    Case("tensors of another model", EXPORT, "step_00000001…tensors", exported()),
    Case(
        "a file named `../../outside/secret.safetensors` in its list",
        EXPORT,
        "complete.json…damaged…secret.safetensors",
        exported(files={"../../outside/secret.safetensors": (1, "0" * 64)}),
    ),
    Case(
        "an absolute name in its list",
        EXPORT,
        "complete.json…damaged…/etc/passwd",
        exported(files={"/etc/passwd": (1, "0" * 64)}),
    ),
    Case("a manifest that speaks of 10^15 ranks", EXPORT, "complete.json…damaged…world_size", exported(world_size=10**15)),
    Case("a manifest whose step is a text", EXPORT, "complete.json…damaged…step", exported(step="1; rm -rf")),
    Case("a manifest of 100,000 nested lists", EXPORT, "complete.json…damaged…nested", manifest(b"[" * 100_000)),
    Case("a manifest of 3 GB", EXPORT, "complete.json…damaged…bytes", huge),
    Case("a manifest that is a list", EXPORT, "complete.json…damaged", manifest(b"[]")),
    Case(
        "a model for images of 10^9 pixels across",
        EXPORT,
        "step_00000001…model…ValueError",
        exported(config=model_of(image_size=10**9)),
    ),
    Case("a model whose width is a text", EXPORT, "step_00000001…model…image_size", exported(config=model_of(image_size="x"))),
    Case("a configuration without a model", EXPORT, "step_00000001…model…train", exported(config={})),
    Case("a ledger of 10^15 units", RESUME, "consumed…damaged…1000000000000000", ledger(bomb(10**15))),
    Case("a ledger that is a pickle", RESUME, "consumed…damaged", ledger(pickle.dumps({"num_units": [1]}))),
]
