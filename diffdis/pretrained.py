"""Opening pretrained components in the layouts in which people keep them.

A component (`unet`, `vae`, `text_encoder`, ...) is a subfolder of a pipeline, a folder of its own, or a repository of the hub.
Its weights are `.safetensors` or `.bin` files, whole or sharded with an index, in any precision, with or without a variant such
as `fp16`.
"""

import contextlib
import functools
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import torch
from huggingface_hub.errors import CachedRepoTreeNotFoundError, IncompleteSnapshotError
from safetensors import SafetensorError, safe_open

from diffdis.model_folder import check_diffusers_model, check_model_folder, read_json

_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?(?:\.(?P<old_variant>\w+))?"
    r"\.(?:safetensors|bin)"
)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_COMPONENTS = ("", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "alignment")  # of a repository that are downloaded
SINGLE_FILES = (".safetensors", ".ckpt")
# dtypes of weights by their names in .safetensors and in torch.
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_FLOATS |= {f"torch.{name}": name for name in _FLOATS.values()}


@contextlib.contextmanager
def named_field(field: str) -> Iterator[None]:
    """Add the name of a configuration's field to errors about its path."""
    try:
        yield
    except (FileNotFoundError, ValueError) as error:
        if str(error).startswith("model."):
            raise
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"{field}: {error}") from None


def component_folder(path: str, component: str) -> Path:
    """Return the local folder of a component of `path`, or `path` itself if it is the component's folder.

    Raises:
        FileNotFoundError: `path` is no folder, contains no such component, or is a repository that cannot be downloaded.
        ValueError: `path` is a checkpoint in a single file.
    """
    root = local_folder(path)
    if (root / component / "config.json").is_file():
        return root / component
    if not (root / "config.json").is_file():
        raise FileNotFoundError(f"{path}: no config.json in it or in {component}/; give a model in diffusers' layout")
    return root


def local_folder(path: str) -> Path:
    """Return `path` if it exists or is absolute, else the folder of the hub's repository of that name, which is downloaded."""
    if Path(path).is_file() and path.endswith(SINGLE_FILES):
        raise ValueError(
            f'{path}: a checkpoint in a single file; convert it to a folder: python -c "from diffusers import '
            f"StableDiffusionPipeline as P; P.from_single_file('{path}').save_pretrained('{Path(path).with_suffix('')}')\""
        )
    return Path(path) if Path(path).exists() or Path(path).is_absolute() else Path(_download(path))


@functools.cache
def _download(repository: str) -> str:
    """Download the configurations and the best weights of each component, and return the local folder."""
    try:
        files = huggingface_hub.HfApi().list_repo_files(repository)
        return huggingface_hub.snapshot_download(repository, allow_patterns=_needed_files(files))
    except Exception as error:  # of any layer of the client: offline, no such repository, a proxy
        try:
            return huggingface_hub.snapshot_download(
                repository, allow_patterns=_cached_needed_files(repository), local_files_only=True
            )
        except Exception as offline_error:
            is_incomplete = isinstance(offline_error, IncompleteSnapshotError)
            what = "its download is incomplete" if is_incomplete else "no such folder, and the hub has no such repository"
            reason = " ".join(str(error).split())[:200]
            raise FileNotFoundError(f"{repository}: {what}, or the hub cannot be reached ({reason})") from None


def _needed_files(files: list[str]) -> list[str]:
    """Return those files of a repository that are configurations or the best weights of a component."""
    needed = [file for file in files if file.endswith((".json", ".txt")) and file.rpartition("/")[0] in _COMPONENTS]
    for component in _COMPONENTS:
        names = [file.rpartition("/")[2] for file in files if file.rpartition("/")[0] == component]
        needed += [f"{component}/{name}".lstrip("/") for name in weight_files(names)]
    return needed


def _cached_needed_files(repository: str) -> list[str] | None:
    """Return the needed files of a downloaded repository; None if the cache has no list of its files (older clients)."""
    try:
        return _needed_files([file.path for file in huggingface_hub.get_cached_repo_tree(repository)])
    except CachedRepoTreeNotFoundError:
        return None


def weight_files(names: list[str], wanted_variant: str | None = None) -> list[str]:
    """Return those names of weight files that together are the preferred weights, or an empty list.

    `.safetensors` are preferred to `.bin`, and files without a variant to `fp16` and others. With `wanted_variant`, no others
    count.
    """
    groups: dict[tuple[bool, str], list[str]] = {}
    for name in sorted(names):
        if _WEIGHTS.fullmatch(name) and wanted_variant in (None, _variant(name)):
            groups.setdefault((name.endswith(".bin"), _variant(name)), []).append(name)
    return groups[min(groups, key=lambda key: (key[0], key[1] != "", key[1] != "fp16", key[1]))] if groups else []


def _variant(name: str) -> str:
    match = _WEIGHTS.fullmatch(name)
    return (match["variant"] or match["old_variant"] or "") if match else ""


def load_component(
    kind: Any, folder: Path, *, optional: tuple[str, ...] = (), variant: str | None = None, **settings: Any
) -> Any:
    """Return the model of a folder in float32, with `kind.from_pretrained`.

    Args:
        kind: a model class of diffusers or transformers.
        folder: the component's folder.
        optional: patterns of tensors in the files that the model may do without.
        variant: of the weight files; by default the preferred one.
        settings: more arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: the folder contains more than tensors, or its tensors are not exactly those of the model.
    """
    files = _find_weights(folder, variant)
    # By name, because importing ModelMixin takes seconds, which feature networks do not need.
    if any(base.__module__.startswith("diffusers.") for base in kind.__mro__):
        check_diffusers_model(kind, folder)
        settings["low_cpu_mem_usage"] = False  # needs accelerate, and logs a paragraph without it
    try:
        with without_progress_bars():
            model, report = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                variant=_variant(files[0]) or None,
                use_safetensors=not files[0].endswith(".bin"),
                output_loading_info=True,
                **settings,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError, KeyError, EOFError) as error:
        raise ValueError(
            f"{folder}: {files[0]} cannot be loaded ({' '.join(str(error).split())[:300]}); download or export it again"
        ) from None
    missing = [name for name in sorted(report["missing_keys"]) if not name.endswith("position_ids")]
    unexpected = [
        name
        for name in sorted(report["unexpected_keys"])
        if not any(re.search(pattern, name) for pattern in (*optional, r"position_ids$"))
    ]
    if missing or unexpected:
        what = f"lacks the tensor {missing[0]}" if missing else f"has a tensor {unexpected[0]} that the model does not have"
        raise ValueError(f"{folder}: {files[0]} {what}; its config.json must describe the weights next to it")
    return model


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers, which shows one for each file, however small."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _find_weights(folder: Path, variant: str | None = None) -> list[str]:
    """Return the names of a component's weight files, which contain only tensors. Raises FileNotFoundError and ValueError."""
    check_model_folder(folder)
    files = weight_files([file.name for file in folder.iterdir()], variant)
    if not files:
        others = [file.name for file in folder.iterdir() if file.suffix in _PICKLES]
        if others:
            raise ValueError(f"{folder}: the weights are in {others[0]}, which can run code; save them as .safetensors")
        what = f"weights of the variant {variant}" if variant else "weights"
        raise FileNotFoundError(f"{folder}: no {what} in it (model.safetensors or another of its names); download them, too")
    for file in files:
        check_pickle(folder / file)
    return files


class WeightsDescription(NamedTuple):
    """The tensors in a component's weight files, without their values."""

    path: str
    files: list[str]
    dtypes: list[str]
    shapes: dict[str, tuple[int, ...]]  # by name

    def summary(self) -> dict[str, Any]:
        """Return what a dry run reports."""
        parameters = sum(math.prod(shape) for shape in self.shapes.values())
        return {"path": self.path, "files": self.files, "dtypes": self.dtypes, "parameters": parameters}


def describe_weights(folder: Path) -> WeightsDescription:
    """Open a component's weight files and describe their tensors, without reading their values.

    Raises:
        FileNotFoundError: the folder has no weights.
        ValueError: a file is damaged, contains more than tensors, or its weights are not floating-point numbers.
    """
    files = _find_weights(folder)
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}  # name -> shape and dtype
    for file in files:
        if file.endswith(".bin"):
            loaded = torch.load(folder / file, map_location="meta", weights_only=True)
            tensors |= {name: (tuple(tensor.shape), str(tensor.dtype)) for name, tensor in loaded.items()}
            continue
        try:
            with safe_open(folder / file, "pt") as opened:
                parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a dictionary
                tensors |= {name: (tuple(part.get_shape()), str(part.get_dtype())) for name, part in parts.items()}
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{folder}: {file} cannot be opened ({error}); download or export it again") from None
    for name, (_, dtype) in tensors.items():
        if name.endswith("weight") and dtype not in _FLOATS:
            raise ValueError(
                f"{folder}: {name} has the dtype {dtype.removeprefix('torch.')}; give weights in float32, float16 or bfloat16"
            )
    dtypes = sorted({_FLOATS[dtype] for _, dtype in tensors.values() if dtype in _FLOATS})
    return WeightsDescription(str(folder), files, dtypes, {name: shape for name, (shape, _) in tensors.items()})


def check_pickle(file: Path) -> None:
    """Raise ValueError for a `.bin` that is not plain tensors. Other files pass.

    Both libraries open them with torch's restricted unpickler, which runs no code; compressed ones could still fill the memory.
    """
    if file.suffix != ".bin":
        return
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError(f"{file}: compressed, as torch never saves weights; save them as .safetensors")
    try:
        torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{file}: not a file of plain tensors ({' '.join(str(error).split())[:120]}); save them as .safetensors"
        ) from None


def read_tensor(folder: Path, name: str) -> torch.Tensor | None:
    """Return one tensor of a folder's weights in float32, or None if they do not have it."""
    for file in weight_files([file.name for file in folder.iterdir()]):
        if file.endswith(".bin"):
            check_pickle(folder / file)
            tensors = torch.load(folder / file, map_location="cpu", weights_only=True)
            if name in tensors:
                return tensors[name].float()
        else:
            with safe_open(folder / file, "pt") as opened:
                if name in opened.keys():  # noqa: SIM118 - not a dictionary
                    return opened.get_tensor(name).float()
    return None


def read_config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Return a configuration file of a folder; empty if there is none. Raises ValueError if it is not a JSON object."""
    if not (folder / name).is_file():
        return {}
    values = read_json(folder / name)
    if not isinstance(values, dict):
        raise ValueError(f"{folder / name}: not a JSON object; download the file again")
    return values
