"""Sets in shards: webdataset-style tars, as CLIP_benchmark and DataComp export them, and Hugging Face's parquet files.

Tars are written with `webdataset` (the demo's sets and those of the tests), but read by `ray_platform.data.tar`. Webdataset reads
no byte ranges, so that several replicas could not share one tar; it groups adjacent members only; and a damaged or truncated tar
raises an exception or silently ends, while an evaluation must count every image that could not be read.
"""

import functools
import json
import math
import posixpath
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ray_platform import storage
from ray_platform.contracts import DataError, one_line
from ray_platform.data.captions import MAX_CAPTION_BYTES
from ray_platform.data.catalog import NOMINAL_BYTES
from ray_platform.data.causes import RejectedSample, is_filtered
from ray_platform.data.tar import ALL_IMAGE_SUFFIXES, Record, count_images, read_tar_slice
from ray_platform.evaluate import sets
from ray_platform.evaluate.sets import ClassTexts, DatasetSlice, EvaluationSet, EvaluationTask, RawSample, Samples, SlicePart
from ray_platform.storage import StoredFile
from ray_platform.units import plural

SPLIT = "test"
_TYPE_FILE, _NUM_SHARDS_FILE = "dataset_type.txt", "nshards.txt"
_SUFFIXES = (*ALL_IMAGE_SUFFIXES, "cls", "txt")  # of the members of a sample with a label or captions
_READS_AT_ONCE = 16
_MIN_SAMPLE_BYTES = 4 * tarfile.BLOCKSIZE  # two members, each with a header and at least one block
_INTEGER = re.compile(rb"\s*[+-]?\d{1,9}\s*")

# --- Tars: CLIP_benchmark's exports, `wds_<name>/`, and DataComp's copies, `wds_<name>_test/` -----------------------------------


def open_wds(set_name: str, url: str, overrides: Mapping[str, str]) -> EvaluationSet | None:
    """Return the set that CLIP_benchmark exported to a folder; None when the folder has another layout.

    `overrides` are files that are used in place of those next to the data, by their names.

    Raises DataError if a shard is missing, the class list cannot be used, or the set is for a task that is not evaluated.
    """
    folder = storage.join(url, SPLIT)
    if not storage.exists(folder):
        return None
    files = storage.list_files(folder)
    tars = [file for file in files if file.url.endswith(".tar")]
    counts = [file.url for file in files if posixpath.basename(file.url) == _NUM_SHARDS_FILE]
    if not tars and not counts:
        return None
    for url_of_count in counts:
        _check_shards(set_name, url_of_count, tars)
    sidecars = sets.list_sidecars(url, overrides)
    task = _read_task(set_name, sidecars.get(_TYPE_FILE))
    if task == "zeroshot_retrieval":
        return open_tars(set_name, task, url, "wds", tars)
    if sets.CLASSES_FILE not in sidecars:
        raise DataError(
            f"{set_name}: {url} has {SPLIT}/*.tar but no {sets.CLASSES_FILE}; write one class per line, in label order"
        )
    source = sidecars[sets.CLASSES_FILE]
    return open_tars(set_name, task, url, "wds", tars, sets.class_texts(set_name, sets.read_lines(source), source, sidecars))


def open_tars(
    set_name: str,
    task: EvaluationTask,
    url: str,
    layout: str,
    tars: Sequence[StoredFile],
    texts: ClassTexts = ClassTexts(),  # noqa: B008  (immutable)
) -> EvaluationSet:
    """Return the set of these tars; large ones have several slices. Raises DataError for an empty file.

    The images of a known set in local tars are counted; those of another set are estimated by counting the first local tar.
    """
    if empty := [file.url for file in tars if not file.size]:
        raise DataError(f"{set_name}: {empty[0]} is empty (0 bytes); download the set again")
    # Names are those below the deepest folder that all tars share: the file names, for tars in one folder.
    paths = [file.url.replace("://", ":/") for file in tars]
    shared = posixpath.commonpath([posixpath.dirname(path) for path in paths])
    names = [posixpath.relpath(path, shared) for path in paths]
    ordered = sorted(zip(names, tars, strict=True), key=lambda item: _sort_key(item[0]))
    known = sets.KNOWN_SETS.get(set_name)
    bytes_per_image, num_images = float(NOMINAL_BYTES), None
    if known and known.task == task:
        num_images = _count_images(tars)
        bytes_per_image = max(sum(file.size for file in tars) / known.num_images, _MIN_SAMPLE_BYTES)
        images_per_byte = 1 / bytes_per_image
    else:
        first = ordered[0][1]
        images_per_byte = (_count_images([first]) or 0) / first.size or 1 / bytes_per_image
    parts = []
    for name, file in ordered:
        for start, stop in _cut(file.size, sets.IMAGES_PER_SLICE * bytes_per_image):
            label = name if stop - start == file.size else f"{name}[{start}:{stop}]"
            read = functools.partial(_read_tar, file, name, start, stop)
            parts.append(SlicePart(label, (stop - start) * images_per_byte, read))
    return sets.build_set(set_name, task, url, layout, dict(ordered), parts, texts, num_images)


def _count_images(tars: Sequence[StoredFile]) -> int | None:
    """Return the number of images by the headers of the tars; None in an object store, where each header is a request."""
    if any("://" in file.url for file in tars):
        return None

    def count(file: StoredFile) -> int:
        try:
            with storage.open_read(file.url) as content:
                return count_images(content, file.size, _SUFFIXES)
        except storage.StorageError:  # its samples are lost with this cause when they are read
            return 0

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return sum(pool.map(count, tars))


def _cut(size: int, bytes_per_slice: float) -> list[tuple[int, int]]:
    """Return the borders of slices of about equal size, in whole blocks. They depend on the set alone."""
    count = max(1, round(size / bytes_per_slice))
    step = math.ceil(size / count / tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return [(start, min(start + step, size)) for start in range(0, size, step)]


def _sort_key(name: str) -> tuple[str, int, str]:
    """Sort tars as they were written: 10.tar after 9.tar."""
    folder, base = posixpath.split(name)
    stem = base.removesuffix(".tar")
    return folder, int(stem) if stem.isdecimal() else -1, name


def _check_shards(set_name: str, num_shards_url: str, tars: Sequence[StoredFile]) -> None:
    """Check that the tars are those that nshards.txt counts, no fewer and no more."""
    text = storage.read_small(num_shards_url).strip()
    if not text.isdigit() or not 0 < int(text[:9]) == int(text[:20]):
        content = text[:40].decode(errors="replace")
        raise DataError(
            f"{set_name}: {num_shards_url} is {content!r} instead of the number of shards; correct it, or download the set again"
        )
    expected = {f"{number}.tar" for number in range(int(text))}
    existing = {posixpath.basename(file.url) for file in tars}
    folder, counts = posixpath.dirname(num_shards_url), f"{set_name}: {num_shards_url} counts {plural(len(expected), 'shard')}"
    if missing := sorted(expected - existing, key=_sort_key):
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise DataError(f"{counts}, but {folder}/{missing[0]}{more} missing; download the set again")
    if extra := sorted(existing - expected, key=_sort_key):
        raise DataError(
            f"{counts} (0.tar to {len(expected) - 1}.tar), but there is also {folder}/{extra[0]}; remove it, or correct the count"
        )


def _read_task(set_name: str, type_url: str | None) -> EvaluationTask:
    """Return the task that dataset_type.txt names in CLIP_benchmark's words, which must be the known set's task."""
    kind = storage.read_small(type_url).decode(errors="replace").strip().lower() if type_url else ""
    tasks: dict[str, EvaluationTask] = {
        "": "zeroshot_classification",
        "classification": "zeroshot_classification",
        "retrieval": "zeroshot_retrieval",
    }
    if kind not in tasks:
        raise DataError(f"{set_name}: {type_url} is {kind!r}; only classification and retrieval sets can be evaluated")
    known = sets.KNOWN_SETS.get(set_name)
    if known and known.task != tasks[kind]:
        reason = f"{type_url} is {kind!r}" if type_url else f"there is no {_TYPE_FILE} that names the type"
        raise DataError(f"{set_name}: is a set for {known.task}, but {reason}; download the set again")
    return tasks[kind]


def _read_tar(file: StoredFile, name: str, start: int, stop: int, part: DatasetSlice) -> Samples:
    """Read the samples that begin in bytes start..stop of a tar; their keys begin with its name in the set."""
    suffixes = ALL_IMAGE_SUFFIXES if part.schema.task == "images" else _SUFFIXES
    records = read_tar_slice(file.url, name, file.size, start, stop, suffixes)
    if records == [RejectedSample(f"{name}/", "shard_empty")]:
        if stop - start == file.size:
            raise DataError(f"{part.schema.set_name}: {file.url} has no samples; download the set again")
        return []  # the slice is inside a very large member
    samples = (r if isinstance(r, RejectedSample) else _tar_sample(r, part.schema.task) for r in records)
    return [sample for sample in samples if isinstance(sample, RawSample) or not is_filtered(sample.cause)]


def _tar_sample(record: Record, task: EvaluationTask) -> RawSample | RejectedSample:
    members = record.members
    image = next((members[suffix] for suffix in ALL_IMAGE_SUFFIXES if suffix in members), None)
    if record.cause:
        return RejectedSample(record.key, record.cause)
    if image is None:
        return RejectedSample(record.key, "image_missing")
    if task == "images":
        return RawSample(record.key, image)
    if task == "zeroshot_classification":
        if "cls" not in members:
            return RejectedSample(record.key, "label_missing")
        if not _INTEGER.fullmatch(members["cls"]):
            return RejectedSample(record.key, "label_invalid")
        return RawSample(record.key, image, int(bytes(members["cls"])))
    text = bytes(members.get("txt", b""))
    if len(text) > MAX_CAPTION_BYTES:
        return RejectedSample(record.key, "caption_too_long")
    try:
        lines = text.decode().split("\n")
    except UnicodeDecodeError:
        return RejectedSample(record.key, "caption_not_utf8")
    # The exporter writes a line break within a caption as "\n".
    return RawSample(record.key, image, captions=tuple(line.strip().replace(r"\n", "\n") for line in lines if line.strip()))


# --- Hugging Face's parquet files, such as `data/test-00000-of-00002.parquet`: images as bytes, labels as `ClassLabel` ---------

_FOLDERS = ("", "data", "default", "plain_text")
_SPLITS = ("test", "validation", "valid", "val")
_LABELS = ("label", "fine_label", "labels")  # tried in this order when the schema names no classes


def open_parquet(set_name: str, url: str, overrides: Mapping[str, str]) -> EvaluationSet | None:
    """Return the test split, or else the validation split, of a Hugging Face dataset; None when there is neither.

    Class names are those of a `classnames.txt` next to the files, or else the published ones if the file's names are in the same
    order, or else the file's own. `overrides` are files that are used in place of those next to the data, by their names.

    Raises DataError if files, columns or class names are missing.
    """
    files = _list_split(set_name, url)
    if not files:
        return None
    source, sidecars = files[0].url, sets.list_sidecars(url, overrides)
    headers = [_read_header(set_name, file.url) for file in files]
    image, label, classes = _find_columns(headers[0].schema.to_arrow_schema(), set_name, source)
    if sets.CLASSES_FILE in sidecars:
        source = sidecars[sets.CLASSES_FILE]
        classes = sets.read_lines(source)
    elif classes:
        classes = sets.to_published_names(set_name, classes, source)
    else:
        raise DataError(
            f"{set_name}: {source} does not name its classes; write {url}/{sets.CLASSES_FILE}, one class per line in label order"
        )
    texts = sets.class_texts(set_name, classes, source, sidecars)
    parts = [part for file, header in zip(files, headers, strict=True) for part in _cut_parquet(file.url, header, image, label)]
    count = sum(header.num_rows for header in headers)
    folder = posixpath.dirname(files[0].url)
    named = {posixpath.basename(file.url): file for file in files}
    return sets.build_set(set_name, "zeroshot_classification", folder, "parquet", named, parts, texts, known_images=count)


def _list_split(set_name: str, url: str) -> list[StoredFile]:
    """Return the files of the split to evaluate on, in order."""
    # ImageNet's test images have no labels.
    splits = _SPLITS[1:] if set_name == "imagenet1k" else _SPLITS
    for inside in (*_FOLDERS, set_name.rpartition("/")[2]):
        folder = storage.join(url, inside).rstrip("/")
        files = storage.list_files(folder) if not inside or storage.exists(folder) else ()
        for split in splits:
            pattern = re.compile(rf"{split}(-\d+-of-(\d+).*)?\.parquet")
            matches = {file: match for file in files if (match := pattern.fullmatch(posixpath.basename(file.url)))}
            counts = {int(match[2] or 1) for match in matches.values()}
            if matches and counts != {len(matches)}:
                raise DataError(
                    f"{set_name}: {folder} has {len(matches)} {split} files instead of {' and '.join(map(str, sorted(counts)))}, "
                    f"the number in their names, such as {posixpath.basename(next(iter(matches)).url)}; download the set again"
                )
            if matches:
                return list(matches)  # the listing is sorted
    return []


def _read_header(set_name: str, url: str) -> pq.FileMetaData:
    try:
        with storage.open_read(url) as file:
            return pq.ParquetFile(file).metadata
    except pa.ArrowException as error:
        raise DataError(f"{set_name}: {url} is not a parquet file ({one_line(error)}); download the set again") from None


def _find_columns(schema: pa.Schema, set_name: str, url: str) -> tuple[str, str, tuple[str, ...]]:
    """Return the columns with images and labels, and the class names that the schema has.

    They are found by the features that Hugging Face writes into the schema, or else by their names and types.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {name: tuple(value["names"]) for name, value in features.items() if value.get("_type") == "ClassLabel"}
        images = [name for name, value in features.items() if value.get("_type") == "Image"]
    except (KeyError, TypeError, AttributeError, ValueError):
        named, images = {}, []
    images += [field.name for field in schema if _holds_images(field.type)]
    known = sets.KNOWN_SETS.get(set_name)
    # There may be several levels of classes: fine and coarse ones, or variants and makers.
    fitting = [name for name, classes in named.items() if known is None or len(classes) == known.num_classes]
    labels = [name for name in _LABELS if name in schema.names and pa.types.is_integer(schema.field(name).type)]
    preferred = [name for name in _LABELS if name in fitting] + fitting + list(named) + labels
    if not images or not preferred:
        raise DataError(
            f"{set_name}: {url} has the columns {', '.join(schema.names)}; it needs one of encoded images and one of "
            "integer labels"
        )
    return images[0], preferred[0], named.get(preferred[0], ())


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _cut_parquet(url: str, header: pq.FileMetaData, image: str, label: str) -> Iterator[SlicePart]:
    """Yield slices of about sets.IMAGES_PER_SLICE rows, in whole row groups."""
    name, start, first_row, rows = posixpath.basename(url), 0, 0, 0
    for group in range(header.num_row_groups):
        rows += header.row_group(group).num_rows
        if rows >= sets.IMAGES_PER_SLICE or (rows and group == header.num_row_groups - 1):
            read = functools.partial(_read_parquet, url, list(range(start, group + 1)), first_row, image, label)
            yield SlicePart(f"{name}[{first_row}:{first_row + rows}]", rows, read)
            start, first_row, rows = group + 1, first_row + rows, 0


def _read_parquet(url: str, groups: list[int], first_row: int, image: str, label: str, part: DatasetSlice) -> Samples:
    """Read the row groups `groups`, which begin at row `first_row`, of a parquet file."""
    name = posixpath.basename(url)
    try:
        with storage.open_read(url) as file:
            table = pq.ParquetFile(file).read_row_groups(groups, columns=[image, label])
        images, labels = table.column(image), table.column(label).to_pylist()
    except (pa.ArrowException, KeyError):
        return [RejectedSample(f"{part.name}/", "shard_unreadable")]
    contents = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
    samples: Samples = []
    for row, (content, value) in enumerate(zip(contents, labels, strict=True), start=first_row):
        key = f"{name}/{row}"
        if not content.is_valid:
            samples.append(RejectedSample(key, "image_missing"))
        elif not isinstance(value, int):
            samples.append(RejectedSample(key, "label_missing" if value is None else "label_invalid"))
        else:
            samples.append(RawSample(key, memoryview(content.as_buffer()), value))
    return samples
