"""Shards of what the encoders made: Arrow files with one row a sample, in half precision, beside its key and caption."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from ray_platform.contracts import DataError
from ray_platform.data.causes import RejectedSample
from ray_platform.data.config import DataConfig

# Fields of DataConfig that were decided when the shards were made.
SETTINGS = ("aspect_ratios", "crop", "decoder", "caption_field", "clean_captions", "filters")


def to_arrow(keys: Sequence[str], captions: Sequence[str], tensors: Mapping[str, np.ndarray]) -> bytes:
    """tensors: [N, …] each."""
    columns: dict[str, pa.Array] = {"key": pa.array(keys, pa.string()), "caption": pa.array(captions, pa.string())}
    for name, array in tensors.items():
        flat = pa.array(np.ascontiguousarray(array).reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(array.shape[1:])))
    shapes = {name: list(array.shape[1:]) for name, array in tensors.items()}
    table = pa.table(columns).replace_schema_metadata({"shapes": json.dumps(shapes)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_arrow(data: bytes | pa.Buffer) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """The inverse of `to_arrow`; the arrays are views of `data`. Other files raise pa.ArrowInvalid, KeyError or ValueError."""
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    table.validate(full=True)  # a damaged offset would be followed to anywhere in memory
    table = table.combine_chunks()
    shapes = json.loads((table.schema.metadata or {})[b"shapes"])
    tensors = {}
    for name, shape in shapes.items():
        column = table[name].chunk(0) if table.num_rows else table[name].combine_chunks()
        tensors[name] = column.values.to_numpy(zero_copy_only=True).reshape(table.num_rows, *shape)
    return table["key"].to_pylist(), table["caption"].to_pylist(), tensors


def check_encoders(manifest: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise DataError when the shards were made by other encoders than the model's `own`."""
    made = manifest["encoders"]
    for name in sorted(made.keys() | own.keys()):
        if made.get(name) != own.get(name):
            raise DataError(
                f"data.sources: precomputed with {name} = {json.dumps(made.get(name))}, but the model has "
                f"{json.dumps(own.get(name))}; run jobs/precompute.py with this model, or take the encoders of the manifest"
            )


def check_settings(manifest: Mapping[str, Any], config: DataConfig) -> None:
    """Raise DataError for a setting that was given, but differs from what the shards were made with."""
    default, made = asdict(DataConfig()), manifest["settings"]
    for name in SETTINGS:
        own = json.loads(json.dumps(asdict(config)[name]))
        if own not in (made[name], json.loads(json.dumps(default[name]))):
            raise DataError(
                f"data.{name}: {json.dumps(own)}, but the precomputed shards were made with {json.dumps(made[name])}; "
                "leave it out, or run jobs/precompute.py with it"
            )


class PrecomputedSamples:
    """The samples of one such file."""

    def __init__(self, contents: tuple[list[str], list[str], dict[str, np.ndarray]], build: Callable[..., Any]):
        self.keys, self.captions, self.tensors = contents
        self.build = build

    @classmethod
    def open(cls, data: pa.Buffer, name: str, build: Callable[..., Any]) -> Any:
        try:
            opened = cls(from_arrow(data), build)
        except (pa.ArrowInvalid, KeyError, ValueError, TypeError):
            return _Single(RejectedSample(f"{name}/", "shard_unreadable"))
        return opened if opened.keys else _Single(RejectedSample(f"{name}/", "shard_empty"))

    def __len__(self) -> int:
        return len(self.keys)

    def sample(self, place: int) -> Any:
        return self.build(self.keys[place], self.captions[place], {name: array[place] for name, array in self.tensors.items()})


class _Single:
    def __init__(self, reject: RejectedSample):
        self.reject = reject

    def __len__(self) -> int:
        return 1

    def sample(self, place: int) -> RejectedSample:
        return self.reject
