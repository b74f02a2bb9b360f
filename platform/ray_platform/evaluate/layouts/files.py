"""Sets in folders of image files: one subfolder a class, or any images."""

import posixpath
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import LOST, RejectedSample
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
from ray_platform.evaluate.slices import IMAGES_A_SLICE, RawSample, SampleSchema, Slice
from ray_platform.names import check_below

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_READS_AT_ONCE = 16
_LARGEST_IMAGE = 2**28  # bytes; of a larger file this is read, which is not the whole picture


@dataclass(frozen=True)
class FilesSlice(Slice):
    """Image files below `folder`, each with its label."""

    folder: str
    files: tuple[tuple[str, int], ...]

    def read(self) -> list[RawSample | RejectedSample]:
        """Read the files concurrently. A file that cannot be read becomes a RejectedSample."""
        with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
            contents = list(pool.map(self._content, [name for name, _ in self.files]))
        return [
            RawSample(name, content, label) if isinstance(content, bytes) else RejectedSample(name, LOST[content.kind])
            for (name, label), content in zip(self.files, contents, strict=True)
        ]

    def _content(self, name: str) -> bytes | storage.StorageError:
        try:
            return storage.read_bytes(storage.join(self.folder, name), 0, _LARGEST_IMAGE)
        except storage.StorageError as error:
            return error


def files_set(
    wanted: SampleSchema,
    url: str,
    layout: str,
    words: tuple[Sequence[str], Sequence[str]],
    samples: Sequence[tuple[str, int]],
    sizes: Mapping[str, int],
) -> EvaluationSet:
    """A set of image files: their names below `url` with labels, in order, and the sizes of those that are there.

    Raises DataError for a name that leads out of `url`.
    """
    for name, _ in samples:  # an index from somewhere may name any file of this machine
        check_below(name, url)
    slices: list[Slice] = []
    for start in range(0, len(samples), IMAGES_A_SLICE):
        part = tuple(samples[start : start + IMAGES_A_SLICE])
        name = part[0][0] if len(part) == 1 else f"{part[0][0]} to {part[-1][0]}"
        slices.append(FilesSlice(wanted, len(slices), name, len(part), url, part))
    there = sum(name in sizes for name, _ in samples)
    return make_set(wanted, url, layout, words, [(name, sizes.get(name, -1)) for name, _ in samples], slices, there)


def open_image_folder(set_name: str, url: str) -> EvaluationSet | None:
    """A folder with a subfolder for each class, its classes in the order of their names; None where there is none.

    `classnames.txt` and `zeroshot_classification_templates.txt` may lie in it: class names in the order of the subfolders.

    Raises DataError for a class list of another length than there are subfolders, or than the published set has.
    """
    sizes = image_sizes(url)
    folders = sorted({name.partition("/")[0] for name in sizes if "/" in name})
    if not folders:
        return None
    beside = {posixpath.basename(file.url): file.url for file in storage.list_files(url)}
    classes, classes_from = tuple(folders), f"{url} (a subfolder a class)"
    info = REGISTRY.get(set_name)
    if CLASSES in beside:
        classes, classes_from = read_lines(beside[CLASSES]), beside[CLASSES]
        if len(classes) != len(folders):
            raise DataError(
                f"{set_name}: {classes_from} names {len(classes)} classes, but there are {len(folders)} subfolders; "
                "write one name a subfolder, in the order of their names"
            )
    elif info and info.class_folders:
        classes = _by_fixed_folders(set_name, url, folders, info.class_folders, info.classes)
    else:
        classes = published_names(set_name, classes, classes_from)
    wanted = classification(set_name, classes, classes_from)
    templates = template_list(set_name, beside.get(TEMPLATES)) if info or TEMPLATES in beside else DEFAULT_TEMPLATES
    labels = {folder: label for label, folder in enumerate(folders)}
    samples = [(name, labels[name.partition("/")[0]]) for name in sorted(sizes) if "/" in name]
    return files_set(wanted, url, "image folder", (classes, templates), samples, sizes)


def open_image_files(set_name: str, url: str) -> EvaluationSet | None:
    """All image files below a folder, without labels; None where there are none."""
    sizes = image_sizes(url)
    samples = [(name, -1) for name in sorted(sizes)]
    return files_set(SampleSchema(set_name, "images"), url, "image files", ((), ()), samples, sizes) if samples else None


def image_sizes(url: str, pattern: str = "**") -> dict[str, int]:
    """The images that a pattern finds below a folder: names below it, and sizes. Hidden files and folders do not count."""
    found = {}
    for file in storage.list_files(storage.join(url, pattern)):
        name = file.url.removeprefix(f"{url}/")
        if name.lower().endswith(IMAGE_ENDINGS) and not any(part.startswith(".") for part in name.split("/")):
            found[name] = file.size
    return found


def _by_fixed_folders(
    set_name: str, url: str, folders: Sequence[str], expected: Sequence[str], classes: tuple[str, ...]
) -> tuple[str, ...]:
    """The classes of a set whose subfolders have fixed names."""
    missing, extra = sorted(set(expected) - set(folders)), sorted(set(folders) - set(expected))
    if missing or extra:
        one = f"{missing[0]} is missing" if missing else f"{extra[0]} is none of them"
        raise DataError(
            f"{set_name}: {url} must have the {len(expected)} subfolders {expected[0]} to {expected[-1]}, but {one}; "
            "sort the images into them"
        )
    return classes
