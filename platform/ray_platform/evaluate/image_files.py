"""Sets of image files: one subfolder per class, and images without labels."""

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import RejectedSample, lost_cause
from ray_platform.data.tar import ALL_IMAGE_SUFFIXES
from ray_platform.evaluate import sets
from ray_platform.evaluate.sets import ClassTexts, DatasetSlice, EvaluationSet, EvaluationTask, RawSample, Samples, SlicePart
from ray_platform.names import check_below
from ray_platform.storage import StoredFile

_IMAGE_ENDINGS = tuple(f".{suffix}" for suffix in ALL_IMAGE_SUFFIXES)
# Of images that are not read: Pillow does not know some of these formats, and reads others by starting a program.
_OTHER_IMAGE_ENDINGS = (".eps", ".heic", ".heif", ".j2k", ".jp2", ".jxl", ".pgm", ".ppm", ".psd", ".svg", ".tga")
_SPLITS, _TRAINING_SPLITS = ("test", "val", "valid", "validation"), ("train", "training", "trainval")  # the first is used
_MAX_NAMED = 5  # subfolders in a message
_READS_AT_ONCE = 16
MAX_FILE_BYTES = 2**28  # no more is read of a file, so that a larger image cannot be decoded

LabeledNames = list[tuple[str, int]]  # (name below the set's folder, label) of images


def open_image_folder(set_name: str, url: str, overrides: Mapping[str, str]) -> EvaluationSet | None:
    """Return the set of a folder with one subfolder per class, or with such folders as splits; None when there are none.

    Of `train/<class>` and `val/<class>`, or `test/<class>`, the split to evaluate on is used. Classes are in the order of the
    subfolders' names, or in the published order for a known set. `classnames.txt`, with names in the order of the subfolders'
    names, and `zeroshot_classification_templates.txt` may lie next to the subfolders or the splits. `overrides` are files to
    use in their place, by their names.

    Raises:
        DataError: The class list has another length than there are subfolders, or other classes than the known set; or only a
            split to train on has classes.
    """
    files, top = _list_visible(url, "**"), url
    images, others = _with_ending(files, _IMAGE_ENDINGS), _with_ending(files, _OTHER_IMAGE_ENDINGS)
    if split := _find_split(set_name, url, images):
        url = storage.join(url, split)
        images = {name.partition("/")[2]: file for name, file in images.items() if name.startswith(f"{split}/")}
    folders = sorted({name.partition("/")[0] for name in images if "/" in name})
    if not folders:
        return None
    sidecars, known = sets.list_sidecars(top) | sets.list_sidecars(url, overrides), sets.KNOWN_SETS.get(set_name)
    source = sidecars.get(sets.CLASSES_FILE, f"{url} (one subfolder per class)")
    if sets.CLASSES_FILE in sidecars:
        classes = sets.read_lines(source)
        if len(classes) != len(folders):
            raise DataError(
                f"{set_name}: {source} names {len(classes)} classes, but there are {len(folders)} subfolders; "
                "write one name per subfolder, in the order of their names"
            )
    elif known and known.class_folders:
        _check_class_folders(set_name, url, folders, known.class_folders)
        classes = known.classes
    else:
        folders = sets.in_published_order(set_name, folders)
        classes = sets.to_published_names(set_name, folders, source)
    texts = sets.class_texts(set_name, classes, source, sidecars)
    if empty := _list_local_subfolders(url) - set(folders):
        names = ", ".join(sorted(empty)[:_MAX_NAMED]) + f" and {len(empty) - _MAX_NAMED} more" * (len(empty) > _MAX_NAMED)
        warning = f"{set_name}: {url} has subfolders without images, which are not classes of the set: {names}"
        texts = texts._replace(warnings=(*texts.warnings, warning))
    if others:
        warning = (
            f"{set_name}: {top} has {len(others):,} images in formats that are not read, such as {min(others)}; convert them to "
            f"PNG (read are {', '.join(_IMAGE_ENDINGS)})"
        )
        texts = texts._replace(warnings=(*texts.warnings, warning))
    labels = {folder: label for label, folder in enumerate(folders)}
    samples = [(name, labels[name.partition("/")[0]]) for name in sorted(images) if "/" in name]
    return build_image_set(set_name, url, "image folder", texts, samples, images)


def _list_local_subfolders(url: str) -> set[str]:
    """Return the names of subfolders that are not hidden. Object stores have no empty folders."""
    if "://" in url:
        return set()
    with os.scandir(url) as entries:
        return {entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")}


def _find_split(set_name: str, url: str, images: Collection[str]) -> str:
    """Return the subfolder with the split to evaluate on, of images by name; "" if the subfolders are not splits."""
    folders = {name.partition("/")[0] for name in images if "/" in name}
    if not folders or not {folder.lower() for folder in folders} <= {*_SPLITS, *_TRAINING_SPLITS}:
        return ""
    with_classes = {folder.lower(): folder for name in images if name.count("/") > 1 for folder in [name.partition("/")[0]]}
    split = next((with_classes[name] for name in _SPLITS if name in with_classes), "")
    if not split:
        raise DataError(
            f"{set_name}: {url} has the folders {', '.join(sorted(folders))}, which are splits and not classes, but none of "
            f"{', '.join(_SPLITS)} has one subfolder per class; sort the images to evaluate on into such subfolders"
        )
    return split


def _check_class_folders(set_name: str, url: str, folders: Sequence[str], expected: Sequence[str]) -> None:
    missing, extra = sorted(set(expected) - set(folders)), sorted(set(folders) - set(expected))
    if missing or extra:
        difference = f"{missing[0]} is missing" if missing else f"there is also {extra[0]}"
        raise DataError(
            f"{set_name}: {url} must have the {len(expected)} subfolders {expected[0]} to {expected[-1]}, but {difference}; "
            "sort the images into them"
        )


def open_image_files(set_name: str, url: str) -> EvaluationSet | None:
    """Return the set of all image files below a folder, without labels; None when there are none."""
    images = list_images(url)
    samples = [(name, -1) for name in sorted(images)]
    return build_image_set(set_name, url, "image files", ClassTexts(), samples, images) if samples else None


def list_images(url: str, pattern: str = "**") -> dict[str, StoredFile]:
    """Return the images that match a pattern below a folder, by name, without hidden files and folders."""
    return _with_ending(_list_visible(url, pattern), _IMAGE_ENDINGS)


def _list_visible(url: str, pattern: str) -> dict[str, StoredFile]:
    files = {file.url.removeprefix(f"{url}/"): file for file in storage.list_folder(url, pattern)}
    return {name: file for name, file in files.items() if "/." not in f"/{name}"}


def _with_ending(files: Mapping[str, StoredFile], endings: tuple[str, ...]) -> dict[str, StoredFile]:
    return {name: file for name, file in files.items() if name.lower().endswith(endings)}


def build_image_set(
    set_name: str, url: str, layout: str, texts: ClassTexts, samples: LabeledNames, images: Mapping[str, StoredFile]
) -> EvaluationSet:
    """Return the set of `samples`, in order; `images` has the files that exist. Raises DataError if a name leads out of `url`."""
    for name, _ in samples:  # an index that was downloaded may name any file of this machine
        check_below(name, url)
    parts = []
    for start in range(0, len(samples), sets.IMAGES_PER_SLICE):
        part = samples[start : start + sets.IMAGES_PER_SLICE]
        name = part[0][0] if len(part) == 1 else f"{part[0][0]} to {part[-1][0]}"
        parts.append(SlicePart(name, len(part), functools.partial(_read_files, url, part)))
    files = {name: images.get(name) for name, _ in samples}
    num_existing = sum(name in images for name, _ in samples)
    task: EvaluationTask = "zeroshot_classification" if texts.classes else "images"
    labels = [label for _, label in samples]
    return sets.build_set(set_name, task, url, layout, files, parts, texts, num_existing, labels)


def _read_files(folder: str, files: LabeledNames, part: DatasetSlice) -> Samples:
    """Read the files concurrently. A file that cannot be read becomes a RejectedSample."""

    def read(name: str, label: int) -> RawSample | RejectedSample:
        try:
            return RawSample(name, storage.read_bytes(storage.join(folder, name), 0, MAX_FILE_BYTES), label)
        except storage.StorageError as error:
            return RejectedSample(name, lost_cause(error))

    with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        return list(pool.map(read, *zip(*files, strict=True)))
