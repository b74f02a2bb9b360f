"""Sets in folders of image files: one subfolder per class, or images without labels."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import LOST, RejectedSample
from ray_platform.evaluate.classes import (
    CLASSES_FILE,
    DEFAULT_TEMPLATES,
    classification_schema,
    list_sidecars,
    load_templates,
    read_lines,
    to_published_names,
)  # fmt: skip
from ray_platform.evaluate.samples import IMAGES_PER_SLICE, DatasetSlice, RawSample, SampleSchema
from ray_platform.evaluate.sets import KNOWN_SETS, ClassTexts, EvaluationSet, build_set
from ray_platform.names import check_below

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_READS_AT_ONCE = 16
_MAX_IMAGE_BYTES = 2**28  # no more is read of a file, so that a larger image cannot be decoded


@dataclass(frozen=True)
class ImageFilesSlice(DatasetSlice):
    """Image files below `folder`, each with its label."""

    folder: str
    files: tuple[tuple[str, int], ...]

    def read(self) -> list[RawSample | RejectedSample]:
        """Read the files concurrently. A file that cannot be read becomes a RejectedSample."""
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            contents = list(pool.map(self._read_file, [name for name, _ in self.files]))
        return [
            RawSample(name, content, label) if isinstance(content, bytes) else RejectedSample(name, LOST[content.kind])
            for (name, label), content in zip(self.files, contents, strict=True)
        ]

    def _read_file(self, name: str) -> bytes | storage.StorageError:
        try:
            return storage.read_bytes(storage.join(self.folder, name), 0, _MAX_IMAGE_BYTES)
        except storage.StorageError as error:
            return error


def build_files_set(
    schema: SampleSchema,
    url: str,
    layout: str,
    texts: ClassTexts,
    samples: Sequence[tuple[str, int]],
    sizes: Mapping[str, int],
) -> EvaluationSet:
    """Return a set of image files: (name below `url`, label) in order, and the sizes of the files that exist.

    Raises:
        DataError: A name leads out of `url`.
    """
    for name, _ in samples:  # an index that was downloaded may name any file of this machine
        check_below(name, url)
    slices: list[DatasetSlice] = []
    for start in range(0, len(samples), IMAGES_PER_SLICE):
        part = tuple(samples[start : start + IMAGES_PER_SLICE])
        name = part[0][0] if len(part) == 1 else f"{part[0][0]} to {part[-1][0]}"
        slices.append(ImageFilesSlice(schema, len(slices), name, len(part), url, part))
    num_existing = sum(name in sizes for name, _ in samples)
    files = [(name, sizes.get(name, -1)) for name, _ in samples]
    return build_set(schema, url, layout, texts, files, slices, num_existing)


def open_image_folder(set_name: str, url: str) -> EvaluationSet | None:
    """Return the set of a folder with one subfolder per class; None when there are none.

    Classes are in the order of the subfolders' names. `classnames.txt`, with names in that order, and
    `zeroshot_classification_templates.txt` may lie next to the subfolders.

    Raises:
        DataError: The class list has another length than there are subfolders, or than the known set has classes.
    """
    sizes = image_sizes(url)
    folders = sorted({name.partition("/")[0] for name in sizes if "/" in name})
    if not folders:
        return None
    sidecars = list_sidecars(url)
    classes, source = tuple(folders), f"{url} (one subfolder per class)"
    known = KNOWN_SETS.get(set_name)
    if CLASSES_FILE in sidecars:
        classes, source = read_lines(sidecars[CLASSES_FILE]), sidecars[CLASSES_FILE]
        if len(classes) != len(folders):
            raise DataError(
                f"{set_name}: {source} names {len(classes)} classes, but there are {len(folders)} subfolders; "
                "write one name per subfolder, in the order of their names"
            )
    elif known and known.class_folders:
        _check_class_folders(set_name, url, folders, known.class_folders)
        classes = known.classes
    else:
        classes = to_published_names(set_name, classes, source)
    schema = classification_schema(set_name, classes, source)
    templates = load_templates(set_name, sidecars, DEFAULT_TEMPLATES)
    labels = {folder: label for label, folder in enumerate(folders)}
    samples = [(name, labels[name.partition("/")[0]]) for name in sorted(sizes) if "/" in name]
    return build_files_set(schema, url, "image folder", ClassTexts(classes, templates), samples, sizes)


def open_image_files(set_name: str, url: str) -> EvaluationSet | None:
    """Return the set of all image files below a folder, without labels; None when there are none."""
    sizes = image_sizes(url)
    samples = [(name, -1) for name in sorted(sizes)]
    schema = SampleSchema(set_name, "images")
    return build_files_set(schema, url, "image files", ClassTexts(), samples, sizes) if samples else None


def image_sizes(url: str, pattern: str = "**") -> dict[str, int]:
    """Return name -> bytes of the images that match a pattern below a folder, without hidden files and folders."""
    sizes = {}
    for file in storage.list_files(storage.join(url, pattern)):
        name = file.url.removeprefix(f"{url}/")
        if name.lower().endswith(IMAGE_ENDINGS) and not any(part.startswith(".") for part in name.split("/")):
            sizes[name] = file.size
    return sizes


def _check_class_folders(set_name: str, url: str, folders: Sequence[str], expected: Sequence[str]) -> None:
    """Check the subfolders of a set whose subfolders have fixed names."""
    missing, extra = sorted(set(expected) - set(folders)), sorted(set(folders) - set(expected))
    if missing or extra:
        difference = f"{missing[0]} is missing" if missing else f"there is also {extra[0]}"
        raise DataError(
            f"{set_name}: {url} must have the {len(expected)} subfolders {expected[0]} to {expected[-1]}, but {difference}; "
            "sort the images into them"
        )
