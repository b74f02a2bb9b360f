"""A folder with somebody's model, before transformers and diffusers open it: it may hold tensors, and nothing that runs.

Their own loaders go further: `auto_map` names code beside the weights, an attention "implementation" may be a repository of
compiled kernels, weights may be pickles. And a configuration of a line can ask for a model of terabytes.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

# For every `from_pretrained` of transformers; diffusers' know the second one only.
NO_PICKLES: dict[str, Any] = {"use_safetensors": True}
NO_CODE: dict[str, Any] = {"trust_remote_code": False}

_LARGEST_JSON, _LARGEST_VOCABULARY = 2**20, 2**26  # bytes
_MOST_LAYERS = 1000  # and entries of a list
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_VOCABULARIES = ("tokenizer.json", "vocab.json")


def check_model_folder(folder: str | Path) -> None:
    """Raises ValueError for what is refused in a component's folder; a hub's name, which is no folder, passes."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    if (folder / "adapter_config.json").exists():
        raise ValueError(f"{folder}: adapter_config.json names another model to be fetched; give a folder with a whole one")
    for file in sorted(folder.glob("*.json")):
        values = read_json(file, _LARGEST_VOCABULARY if file.name in _VOCABULARIES else _LARGEST_JSON)
        if file.name not in _VOCABULARIES and isinstance(values, dict):
            check_values(file, values)
    files = {file.suffix: file.name for file in folder.iterdir()}
    pickles = [files[suffix] for suffix in _PICKLES if suffix in files]
    if pickles and ".safetensors" not in files:
        raise ValueError(
            f"{folder}: has its weights as a pickle only ({pickles[0]}), which can run code; save them as .safetensors"
        )


def read_json(file: Path, most: int = _LARGEST_JSON) -> Any:
    """Raises ValueError for a file of more than `most` bytes, or that is no JSON."""
    if file.stat().st_size > most:
        raise ValueError(f"{file}: has more than {most:,} bytes, which no such file has")
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is no JSON ({type(error).__name__})") from None


def check_values(file: Path, values: Any) -> None:
    """Raises ValueError for a value of a configuration that would have code fetched or run, or has no end."""
    for name, value in _named_values(values):
        if name == "auto_map":
            raise ValueError(
                f"{file}: auto_map names code to be run, which is refused; give a model that transformers itself knows"
            )
        if name == "quantization_config":
            raise ValueError(f"{file}: quantization_config asks for other code; give a model with plain weights")
        if name.endswith("_implementation") and isinstance(value, str) and "/" in value:
            raise ValueError(f"{file}: {name} is {value[:100]!r}, a repository of compiled code; remove the line")
        if isinstance(value, list) and len(value) > _MOST_LAYERS:
            raise ValueError(f"{file}: {name} has {len(value):,} entries, which no such model has")
        if "layer" in name and isinstance(value, int) and value > _MOST_LAYERS:
            raise ValueError(f"{file}: {name} is {value:,}, which no such model has")


def check_declared(folder: Path, build: Callable[[], nn.Module]) -> None:
    """Raises ValueError where what a configuration declares is larger than the weights in its folder, before it takes memory."""
    with torch.device("meta"):
        declared = sum(parameter.numel() for parameter in build().parameters())
    stored = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    if declared > stored:  # of the smallest floats, each takes a byte
        raise ValueError(f"{folder}: declares {declared:,} parameters, but its .safetensors have {stored:,} bytes")


def check_diffusers_model(kind: Any, folder: str) -> None:
    """Both for the folder of one of diffusers' models; a hub's name passes. Raises ValueError."""
    check_model_folder(folder)
    config = Path(folder) / "config.json"
    if config.is_file():
        values = read_json(config)
        try:
            check_declared(Path(folder), lambda: kind.from_config(values))
        except (TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, RuntimeError) as error:
            raise ValueError(f"{config}: describes no {kind.__name__} ({' '.join(str(error).split())[:200]})") from None


def _named_values(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _named_values(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _named_values(inner, name)
