"""Sets in Hugging Face's parquet files: `data/test-00000-of-00002.parquet`, images as bytes, labels by `ClassLabel`."""

import json
import posixpath
import re
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_platform import storage
from ray_platform.contracts import DataError, one_line
from ray_platform.data.causes import RejectedSample
from ray_platform.evaluate.classes import (
    CLASSES,
    DEFAULT_TEMPLATES,
    TEMPLATES,
    classification,
    published_names,
    read_lines,
    template_list,
)
from ray_platform.evaluate.sets import REGISTRY, EvaluationSet, make_set
from ray_platform.evaluate.slices import IMAGES_A_SLICE, RawSample, Slice
from ray_platform.storage import StoredFile

_FOLDERS = ("", "data", "default", "plain_text")
_SPLITS = ("test", "validation", "valid", "val")
_LABELS = ("label", "fine_label", "labels")  # tried in this order where the schema names no classes


@dataclass(frozen=True)
class RowsSlice(Slice):
    """Row groups start..stop of a parquet file."""

    url: str
    file: str  # its name in the set
    start: int
    stop: int
    first_row: int
    image: str  # columns
    label: str

    def read(self) -> list[RawSample | RejectedSample]:
        try:
            table = self._table()
        except (pa.ArrowException, KeyError):
            return [RejectedSample(f"{self.name}/", "shard_unreadable")]
        images = table.column(self.image)
        contents = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
        rows = zip(contents, table.column(self.label), strict=True)
        return [self._sample(f"{self.file}/{self.first_row + row}", *values) for row, values in enumerate(rows)]

    def _table(self) -> pa.Table:
        with storage.open_read(self.url) as file:
            return pq.ParquetFile(file).read_row_groups(list(range(self.start, self.stop)), columns=[self.image, self.label])

    def _sample(self, key: str, content: pa.Scalar, scalar: pa.Scalar) -> RawSample | RejectedSample:
        label = scalar.as_py()
        if not content.is_valid:
            return RejectedSample(key, "image_missing")
        if label is None:
            return RejectedSample(key, "label_missing")
        if not isinstance(label, int):
            return RejectedSample(key, "label_invalid")
        return RawSample(key, memoryview(content.as_buffer()), label)


@dataclass(frozen=True)
class Schema:
    """Which columns hold what, and the classes that the file itself names; `label` is "" where nothing tells."""

    image: str
    label: str
    classes: tuple[str, ...]


def open_parquet(set_name: str, url: str) -> EvaluationSet | None:
    """The test or, without one, the validation split of a Hugging Face dataset; None where there is none.

    Class names are those that published scores go by where the file's are in the same order, else the file's own, or those
    of a `classnames.txt` beside it.

    Raises DataError for missing files, columns or class names.
    """
    files = _split(set_name, url)
    if not files:
        return None
    folder = files[0].url.rpartition("/")[0]
    beside = {posixpath.basename(file.url): file.url for file in storage.list_files(url)}
    headers = [_header(set_name, file.url) for file in files]
    columns = headers[0].schema.to_arrow_schema()
    schema = _schema(columns, set_name)
    if not schema.image or not schema.label:
        raise DataError(
            f"{set_name}: {files[0].url} has the columns {', '.join(columns.names)}; it needs one of encoded images and one of "
            "whole-number labels"
        )
    info = REGISTRY.get(set_name)
    if CLASSES in beside:
        classes, classes_from = read_lines(beside[CLASSES]), beside[CLASSES]
    elif schema.classes:
        classes, classes_from = published_names(set_name, schema.classes, files[0].url), files[0].url
    else:
        raise DataError(
            f"{set_name}: {files[0].url} does not name its classes; write a {CLASSES} in {url}, a class a line in label order"
        )
    wanted = classification(set_name, classes, classes_from)
    templates = template_list(set_name, beside.get(TEMPLATES)) if info or TEMPLATES in beside else DEFAULT_TEMPLATES
    slices: list[RowsSlice] = []
    for file, header in zip(files, headers, strict=True):
        name = posixpath.basename(file.url)
        for start, stop, first_row, num_rows in _cuts(header):
            label = f"{name}[{first_row}:{first_row + num_rows}]"
            slices.append(
                RowsSlice(
                    wanted, len(slices), label, num_rows, file.url, name, start, stop, first_row, schema.image, schema.label
                )
            )
    named = [(posixpath.basename(file.url), file.size) for file in files]
    return make_set(wanted, folder, "parquet", (classes, templates), named, slices, sum(header.num_rows for header in headers))


def _split(set_name: str, url: str) -> list[StoredFile]:
    """The files of the split to evaluate on, in order."""
    # ImageNet's test images have no labels.
    splits = _SPLITS[1:] if set_name == "imagenet1k" else _SPLITS
    for inside in (*_FOLDERS, set_name.rpartition("/")[2]):
        folder = storage.join(url, inside).rstrip("/")
        if inside and not storage.exists(folder):
            continue
        there = [file for file in storage.list_files(folder) if file.url.endswith(".parquet")]
        for split in splits:
            pattern = re.compile(rf"{split}(-\d+-of-(\d+).*)?\.parquet")
            found = {file: match for file in there if (match := pattern.fullmatch(posixpath.basename(file.url)))}
            if found:
                _check_files(set_name, folder, split, found)
                return sorted(found, key=lambda file: file.url)
    return []


def _check_files(set_name: str, folder: str, split: str, found: dict[StoredFile, re.Match[str]]) -> None:
    """Whether there are as many files as their names speak of."""
    expected = {int(match[2]) if match[2] else 1 for match in found.values()}
    if expected != {len(found)}:
        counts = " and ".join(str(count) for count in sorted(expected))
        raise DataError(
            f"{set_name}: {folder} has {len(found)} {split} files, of {counts} by their names, such as "
            f"{posixpath.basename(min(file.url for file in found))}; fetch the set again"
        )


def _header(set_name: str, url: str) -> pq.FileMetaData:
    try:
        with storage.open_read(url) as file:
            return pq.ParquetFile(file).metadata
    except pa.ArrowException as error:
        raise DataError(f"{set_name}: {url} is no parquet file ({one_line(error)}); fetch the set again") from None


def _schema(schema: pa.Schema, set_name: str) -> Schema:
    """By the features that Hugging Face writes into the schema, else by the columns' names and types."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {name: tuple(value["names"]) for name, value in features.items() if value.get("_type") == "ClassLabel"}
        images = [name for name, value in features.items() if value.get("_type") == "Image"]
    except (KeyError, TypeError, AttributeError, ValueError):
        named, images = {}, []
    images += [field.name for field in schema if _holds_images(field.type)]
    info = REGISTRY.get(set_name)
    # Several levels of classes may be there: fine and coarse ones, variants and makers.
    fitting = [name for name, classes in named.items() if info is None or len(classes) == info.num_classes]
    labels = [name for name in schema.names if name in _LABELS and pa.types.is_integer(schema.field(name).type)]
    preferred = [name for name in _LABELS if name in fitting] + fitting + list(named) + sorted(labels, key=_LABELS.index)
    label = preferred[0] if preferred else ""
    return Schema(images[0] if images else "", label, named.get(label, ()))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cuts(header: pq.FileMetaData) -> list[tuple[int, int, int, int]]:
    """(start, stop) of row groups of about as many rows as a slice has, their first row and how many they are."""
    cuts: list[tuple[int, int, int, int]] = []
    start = first = rows = 0
    for group in range(header.num_row_groups):
        rows += header.row_group(group).num_rows
        if rows >= IMAGES_A_SLICE or group == header.num_row_groups - 1:
            cuts.append((start, group + 1, first, rows))
            start, first, rows = group + 1, first + rows, 0
    return [cut for cut in cuts if cut[3]]
