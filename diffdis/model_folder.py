"""Checks of a model folder before transformers and diffusers open it: it may contain tensors, but nothing that runs.

Their loaders accept more: `auto_map` names code next to the weights, an attention "implementation" may be a repository of
compiled kernels, weights may be pickles, and one line of a configuration can ask for a model of terabytes.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

# Argument of every `from_pretrained` of transformers.
NO_CODE: dict[str, Any] = {"trust_remote_code": False}

_MAX_JSON, _MAX_VOCABULARY = 2**20, 2**26  # bytes
_MAX_LAYERS = 1000  # also the maximum length of a list
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def check_model_folder(folder: str | Path) -> None:
    """Raise ValueError if the configuration of a component needs more than tensors. A path that is not a folder passes."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: adapter_config.json names another model to download; give a folder with a complete model")
    for file in sorted(folder.glob("*.json")):
        values = read_json(file, _MAX_VOCABULARY if file.name in _VOCABULARIES else _MAX_JSON)
        if file.name not in _VOCABULARIES and isinstance(values, dict):
            check_values(file, values)


def read_json(file: Path, max_bytes: int = _MAX_JSON) -> Any:
    """Read a JSON file. Raises ValueError for a file of more than `max_bytes` bytes, or that is not JSON."""
    if file.stat().st_size > max_bytes:
        raise ValueError(f"{file}: larger than {max_bytes:,} bytes; give the file of a model")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is not JSON ({type(error).__name__}); export the model again") from None


def check_values(file: Path, values: Any) -> None:
    """Raise ValueError for a value of a configuration that downloads or runs code, or is too large."""
    for name, value in _named_values(values):
        if name == "auto_map":
            raise ValueError(
                f"{file}: auto_map names code to run, which is not allowed; give a model that transformers implements"
            )
        if name == "quantization_config":
            raise ValueError(f"{file}: quantization_config needs other code; give a model with plain weights")
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{file}: {name} is {value[:100]!r}, a repository of compiled code; remove the line")
        if isinstance(value, list) and len(value) > _MAX_LAYERS:
            raise ValueError(f"{file}: {name} has {len(value):,} entries; a model has at most {_MAX_LAYERS:,}")
        if "layer" in name and isinstance(value, int) and value > _MAX_LAYERS:
            raise ValueError(f"{file}: {name} is {value:,}; a model has at most {_MAX_LAYERS:,}")


def check_declared(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Raise ValueError if a configuration declares more parameters than its folder has weights, before they take memory."""
    with torch.device("meta"):
        declared = sum(parameter.numel() for parameter in build().parameters())
    stored = sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in (".safetensors", ".bin"))
    if declared > stored:  # the smallest floats take one byte each
        raise ValueError(f"{folder}: declares {declared:,} parameters, but its weights have {stored:,} bytes")


def check_diffusers_model(kind: Any, folder: Path) -> None:
    """Check the folder of a diffusers model of class `kind`; a hub name passes. Raises ValueError."""
    check_model_folder(folder)
    config = folder / "config.json"
    if config.is_file():
        values = read_json(config)
        try:
            check_declared(folder, lambda: kind.from_config(values))
        except (TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"{config}: does not describe a {kind.__name__} ({' '.join(str(error).split())[:200]})") from None


def _named_values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _named_values(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_values(inner, name)


def digest_of_folder(folder: Path) -> str:
    """Return a digest (16 hex digits) of the configuration, vocabulary and weights in a model folder."""
    hashed = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors", ".bin", ".txt")):
        hashed.update(f"{file.relative_to(folder)} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            hashed.update(hashlib.file_digest(opened, "sha256").digest())
    return hashed.hexdigest()[:16]
