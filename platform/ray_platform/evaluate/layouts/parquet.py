"""Sets in Hugging Face's parquet files, such as `data/test-00000-of-00002.parquet`: images as bytes, labels as `ClassLabel`."""

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
    CLASSES_FILE,
    DEFAULT_TEMPLATES,
    classification_schema,
    list_sidecars,
    load_templates,
    read_lines,
    to_published_names,
)  # fmt: skip
from ray_platform.evaluate.samples import IMAGES_PER_SLICE, DatasetSlice, RawSample
from ray_platform.evaluate.sets import KNOWN_SETS, ClassTexts, EvaluationSet, build_set
from ray_platform.storage import StoredFile

_FOLDERS = ("", "data", "default", "plain_text")
_SPLITS = ("test", "validation", "valid", "val")
_LABELS = ("label", "fine_label", "labels")  # tried in this order when the schema names no classes


@dataclass(frozen=True)
class ParquetSlice(DatasetSlice):
    """Row groups start..stop of a parquet file."""

    url: str
    file: str  # the name of the file in the set
    start: int
    stop: int
    first_row: int
    image: str  # name of the column
    label: str  # name of the column

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
class ParquetColumns:
    """The columns with images and labels ("" when there is none), and the class names in the file's schema."""

    image: str
    label: str
    classes: tuple[str, ...]


def open_parquet(set_name: str, url: str) -> EvaluationSet | None:
    """Return the test split, or else the validation split, of a Hugging Face dataset; None when there is neither.

    Class names are those of a `classnames.txt` next to the files, or else the published ones if the file's names are in the same
    order, or else the file's own.

    Raises:
        DataError: Files, columns or class names are missing.
    """
    files = _list_split(set_name, url)
    if not files:
        return None
    first_url = files[0].url
    sidecars = list_sidecars(url)
    headers = [_read_header(set_name, file.url) for file in files]
    schema = headers[0].schema.to_arrow_schema()
    columns = _find_columns(schema, set_name)
    if not columns.image or not columns.label:
        raise DataError(
            f"{set_name}: {first_url} has the columns {', '.join(schema.names)}; it needs one of encoded images and one of "
            "integer labels"
        )
    if CLASSES_FILE in sidecars:
        classes, source = read_lines(sidecars[CLASSES_FILE]), sidecars[CLASSES_FILE]
    elif columns.classes:
        classes, source = to_published_names(set_name, columns.classes, first_url), first_url
    else:
        raise DataError(
            f"{set_name}: {first_url} does not name its classes; write {url}/{CLASSES_FILE}, one class per line in label order"
        )
    sample_schema = classification_schema(set_name, classes, source)
    slices: list[ParquetSlice] = []
    for file, header in zip(files, headers, strict=True):
        name = posixpath.basename(file.url)
        for start, stop, first_row, num_rows in _cut(header):
            label = f"{name}[{first_row}:{first_row + num_rows}]"
            position = (file.url, name, start, stop, first_row, columns.image, columns.label)
            slices.append(ParquetSlice(sample_schema, len(slices), label, num_rows, *position))
    texts = ClassTexts(classes, load_templates(set_name, sidecars, DEFAULT_TEMPLATES))
    sizes = [(posixpath.basename(file.url), file.size) for file in files]
    num_images = sum(header.num_rows for header in headers)
    return build_set(sample_schema, first_url.rpartition("/")[0], "parquet", texts, sizes, slices, num_images)


def _list_split(set_name: str, url: str) -> list[StoredFile]:
    """Return the files of the split to evaluate on, in order."""
    # ImageNet's test images have no labels.
    splits = _SPLITS[1:] if set_name == "imagenet1k" else _SPLITS
    for inside in (*_FOLDERS, set_name.rpartition("/")[2]):
        folder = storage.join(url, inside).rstrip("/")
        if inside and not storage.exists(folder):
            continue
        parquet_files = [file for file in storage.list_files(folder) if file.url.endswith(".parquet")]
        for split in splits:
            pattern = re.compile(rf"{split}(-\d+-of-(\d+).*)?\.parquet")
            matches = {file: match for file in parquet_files if (match := pattern.fullmatch(posixpath.basename(file.url)))}
            if matches:
                _check_files(set_name, folder, split, matches)
                return sorted(matches, key=lambda file: file.url)
    return []


def _check_files(set_name: str, folder: str, split: str, matches: dict[StoredFile, re.Match[str]]) -> None:
    """Check that there are as many files as their names say."""
    expected = {int(match[2]) if match[2] else 1 for match in matches.values()}
    if expected != {len(matches)}:
        counts = " and ".join(str(count) for count in sorted(expected))
        raise DataError(
            f"{set_name}: {folder} has {len(matches)} {split} files instead of {counts}, the number in their names, such as "
            f"{posixpath.basename(min(file.url for file in matches))}; download the set again"
        )


def _read_header(set_name: str, url: str) -> pq.FileMetaData:
    try:
        with storage.open_read(url) as file:
            return pq.ParquetFile(file).metadata
    except pa.ArrowException as error:
        raise DataError(f"{set_name}: {url} is not a parquet file ({one_line(error)}); download the set again") from None


def _find_columns(schema: pa.Schema, set_name: str) -> ParquetColumns:
    """Find columns by the features that Hugging Face writes into the schema, or else by their names and types."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {name: tuple(value["names"]) for name, value in features.items() if value.get("_type") == "ClassLabel"}
        images = [name for name, value in features.items() if value.get("_type") == "Image"]
    except (KeyError, TypeError, AttributeError, ValueError):
        named, images = {}, []
    images += [field.name for field in schema if _holds_images(field.type)]
    known = KNOWN_SETS.get(set_name)
    # There may be several levels of classes: fine and coarse ones, or variants and makers.
    fitting = [name for name, classes in named.items() if known is None or len(classes) == known.num_classes]
    labels = [name for name in schema.names if name in _LABELS and pa.types.is_integer(schema.field(name).type)]
    preferred = [name for name in _LABELS if name in fitting] + fitting + list(named) + sorted(labels, key=_LABELS.index)
    label = preferred[0] if preferred else ""
    return ParquetColumns(images[0] if images else "", label, named.get(label, ()))


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cut(header: pq.FileMetaData) -> list[tuple[int, int, int, int]]:
    """Return slices of about IMAGES_PER_SLICE rows: first and last row group (exclusive), first row, number of rows."""
    cuts: list[tuple[int, int, int, int]] = []
    start = first = rows = 0
    for group in range(header.num_row_groups):
        rows += header.row_group(group).num_rows
        if rows >= IMAGES_PER_SLICE or group == header.num_row_groups - 1:
            cuts.append((start, group + 1, first, rows))
            start, first, rows = group + 1, first + rows, 0
    return [cut for cut in cuts if cut[3]]
