"""Precomputed shards: Arrow files with one row per sample, which holds what the encoders returned, its key and its caption."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TypedDict

import numpy as np
import pyarrow as pa

from ray_platform.contracts import DataError
from ray_platform.data.config import DataConfig
from ray_platform.json_values import JsonObject


class PrecomputedManifest(TypedDict, total=False):
    """manifest.json of a folder of precomputed shards. The last three fields are written when it is complete."""

    encoders: JsonObject
    settings: JsonObject
    source: str  # the catalog's digest
    complete: bool
    samples: int
    rejected: dict[str, int]  # cause -> samples
    shards: dict[str, int]  # file -> samples


# Fields of DataConfig that are fixed when the shards are written.
SETTINGS = ("aspect_ratios", "crop", "decoder", "caption_field", "clean_captions", "filters")


def to_arrow(keys: Sequence[str], captions: Sequence[str], tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the content of a shard of N samples. `tensors`: [N, …] each, in half precision."""
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
    """Return the keys, captions and tensors of a shard. The arrays are views of `data`.

    Raises pa.ArrowInvalid, KeyError or ValueError if `data` is not the content of a shard.
    """
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    table.validate(full=True)  # a damaged offset could point anywhere in memory
    table = table.combine_chunks()
    shapes = json.loads((table.schema.metadata or {})[b"shapes"])
    tensors = {}
    for name, shape in shapes.items():
        column = table[name].chunk(0) if table.num_rows else table[name].combine_chunks()
        tensors[name] = column.values.to_numpy(zero_copy_only=True).reshape(table.num_rows, *shape)
    return table["key"].to_pylist(), table["caption"].to_pylist(), tensors


def check_encoders(manifest: PrecomputedManifest, encoders: JsonObject) -> None:
    """Raise DataError if the shards were written with other encoders than the model's."""
    stored = manifest["encoders"]
    for name in sorted(stored.keys() | encoders.keys()):
        if stored.get(name) != encoders.get(name):
            raise DataError(
                f"data.sources: precomputed with {name} = {json.dumps(stored.get(name))}, but the model has "
                f"{json.dumps(encoders.get(name))}; run jobs/precompute.py with this model, or use the encoders of the manifest"
            )


def check_settings(manifest: PrecomputedManifest, config: DataConfig) -> None:
    """Raise DataError for a setting that is neither the default nor the one that the shards were written with."""
    default, stored = asdict(DataConfig()), manifest["settings"]
    for name in SETTINGS:
        value = json.loads(json.dumps(asdict(config)[name]))
        written = stored[name]
        if isinstance(written, dict):  # by an earlier release, which lacked some fields
            written = json.loads(json.dumps(default[name])) | written
        if value not in (written, json.loads(json.dumps(default[name]))):
            raise DataError(
                f"data.{name}: {json.dumps(value)}, but the precomputed shards were written with {json.dumps(stored[name])}; "
                "leave it out, or run jobs/precompute.py with it"
            )
