"""Where the sets are: below the user's roots, in any of the layouts that people have."""

import os
import posixpath
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.layouts.files import open_image_files, open_image_folder
from ray_platform.evaluate.layouts.parquet import open_parquet
from ray_platform.evaluate.layouts.tars import SPLIT, open_export, tar_set
from ray_platform.evaluate.layouts.torchvision import open_torchvision
from ray_platform.evaluate.sets import REGISTRY, EvaluationSet
from ray_platform.evaluate.slices import SampleSchema
from ray_platform.terminal import render_table
from ray_platform.units import size_text

_LOOKS_AT_ONCE = 16


class NotFoundError(ConfigError):
    """No root has the set."""


def find_sets(roots: Sequence[str], names: Sequence[str]) -> dict[str, EvaluationSet]:
    """The sets of these names, wherever they are below the roots.

    Raises ConfigError for those that are nowhere, all in one line, and DataError for one that is there but not usable.
    """
    found: dict[str, EvaluationSet] = {}
    errors: dict[str, NotFoundError] = {}
    for name in names:
        try:
            found[name] = find_set(roots, name)
        except NotFoundError as error:
            errors[name] = error
    if len(errors) > 1:
        raise ConfigError(
            f"{', '.join(errors)}: not found below {', '.join(roots)}; the first one was looked for as "
            f"{', '.join(_folders(next(iter(errors))))}; correct the roots, or leave these sets out"
        )
    if errors:
        raise next(iter(errors.values()))
    return found


def find_set(roots: Sequence[str], name: str) -> EvaluationSet:
    """The set of that name in the first root that has it, there in the first of the folders where it may be.

    A name that is none of the registry's is a set of the user's own: the name of its folder, with or without `wds_`.

    Raises ConfigError where it is not found, or only in a layout without the split, DataError where it is not usable.
    """
    if not roots:
        raise ConfigError(f"{name}: there is no folder to look in; name the folder or s3:// URL that has the sets")
    without_split: ConfigError | None = None
    for url in _there(roots, name):
        try:
            if (found := _opened(name, url, given=False)) is not None:
                return found
        except ConfigError as error:
            without_split = error
    if without_split:
        raise without_split
    raise NotFoundError(
        f"{name}: not found below {', '.join(roots)}; looked for {', '.join(_folders(name))}; correct the roots, or leave "
        "the set out"
    )


def open_set(name: str, url: str) -> EvaluationSet:
    """The set in the folder `url`, in whatever layout it is. Raises ConfigError or DataError."""
    url = _absolute(url)
    if not storage.exists(url):
        raise ConfigError(f"{name}: {url}: no such folder; correct the path")
    found = _opened(name, url, given=True)
    if found is None:
        raise ConfigError(
            f"{name}: {url} has no layout that is known: {SPLIT}/*.tar as CLIP_benchmark exports them, torchvision's folders, "
            f"{SPLIT}-*.parquet, or a subfolder of images a class; {_what_is_there(url)}"
        )
    return found


def open_images(url: str) -> EvaluationSet:
    """All images of a folder, of what is below it, or of the tars in it or that a pattern names, without labels.

    For a CLIP_benchmark export, those of its test split. Raises ConfigError, and DataError for an empty tar.
    """
    url = _absolute(url)
    name = posixpath.basename(url)
    wanted = SampleSchema(name, "images")
    for place in (url, storage.join(url, SPLIT)):
        if not _is_pattern(place) and not storage.exists(place):
            continue
        if tars := [file for file in storage.list_files(place) if file.url.endswith(".tar")]:
            return tar_set(wanted, url, "tars", ((), ()), tars)
    found = None if _is_pattern(url) or not storage.exists(url) else open_image_files(name, url)
    if found is None:
        raise ConfigError(f"{url}: holds no images: neither tars nor image files; {_what_is_there(url)}")
    return found


def listing(roots: Sequence[str]) -> str:
    """A table of the registry's sets, where each was found, and what was."""
    rows = [("set", "where", "layout", "files", "size", "classes", "images", "metric")]
    notes = []
    for name, info in REGISTRY.items():
        where, layout, files, size = "not found", "", "", ""
        try:
            found = find_set(roots, name)
            where, layout, files, size = found.url, found.layout, f"{found.num_files:,}", size_text(found.num_bytes)
        except NotFoundError:
            pass
        except (ConfigError, DataError) as error:
            where = "refused"
            notes.append(str(error))
        rows.append((name, where, layout, files, size, str(info.num_classes or ""), f"{info.num_images:,}", info.main_metric))
    return "\n".join([render_table(rows)] + [f"refused: {note}" for note in notes])


def _folders(name: str) -> tuple[str, ...]:
    """Below a root, the folders where a set may be, the likeliest first."""
    dashed = name.replace("/", "-")
    exported = (f"wds_{dashed}", f"wds_{dashed}_test")
    return (*exported, *(REGISTRY[name].folders if name in REGISTRY else dict.fromkeys((name, dashed))))


def _there(roots: Sequence[str], name: str) -> list[str]:
    """Those of the folders that exist. Raises ConfigError for a root that does not."""
    roots = [_absolute(root) for root in roots]
    urls = [storage.join(root, folder) for root in roots for folder in _folders(name)]
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        for root, exists in zip(roots, pool.map(storage.exists, roots), strict=True):
            if not exists:
                raise ConfigError(f"{root}: no such folder; name the folder or s3:// URL that has the sets")
        return [url for url, exists in zip(urls, pool.map(storage.exists, urls), strict=True) if exists]


Open = Callable[[str, str], EvaluationSet | None]


def _layouts(name: str, *, given: bool) -> tuple[Open, ...]:
    """Those that a set may have: in a folder that the user has `given` for it, or in one that was found below a root."""
    info = REGISTRY.get(name)
    if info and info.task == "zeroshot_retrieval":
        return (open_export,)
    known: tuple[Open, ...] = (open_export, open_torchvision, open_parquet)  # no other folder looks like one of these
    if info and info.class_folders:
        known = (*known, _open_validation_folder)
    return (*known, open_image_folder) if given or info is None else known


def _open_validation_folder(name: str, url: str) -> EvaluationSet | None:
    """ImageNet's validation images, in a subfolder a class."""
    for inside in ("val", "validation", ""):
        folder = storage.join(url, inside).rstrip("/")
        if storage.exists(storage.join(folder, REGISTRY[name].class_folders[0])):
            return open_image_folder(name, folder)
    return None


def _opened(name: str, url: str, *, given: bool) -> EvaluationSet | None:
    return next((found for layout in _layouts(name, given=given) if (found := layout(name, url)) is not None), None)


def _absolute(url: str) -> str:
    if url.startswith("file://"):
        url = url.removeprefix("file://")
    return url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))


def _is_pattern(url: str) -> bool:
    return any(char in url for char in "*?[{")


def _what_is_there(url: str) -> str:
    if not _is_pattern(url) and not storage.exists(url):
        return "there is no such folder"
    files = storage.list_files(url)
    return (
        f"there are {len(files)} other files in it, such as {posixpath.basename(files[0].url)}"
        if files
        else "there are no files in it"
    )
