"""Find evaluation sets below the user's folders, in any of the known layouts."""

import os
import posixpath
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.evaluate.image_files import open_image_files, open_image_folder
from ray_platform.evaluate.sets import KNOWN_SETS, NO_OVERRIDES, EvaluationSet
from ray_platform.evaluate.shards import SPLIT, open_parquet, open_tars, open_wds
from ray_platform.evaluate.torchvision_folders import open_torchvision
from ray_platform.names import is_pattern
from ray_platform.terminal import render_table
from ray_platform.units import size_text

_REQUESTS_AT_ONCE = 16
# CLIP_benchmark's copies of the sets.
_COPIES = "hf download clip-benchmark/wds_{name} --repo-type dataset --local-dir {root}/wds_{name}"


class SetNotFoundError(ConfigError):
    """No root has the set."""


def find_evaluation_set(roots: Sequence[str], name: str, overrides: Mapping[str, str] = NO_OVERRIDES) -> EvaluationSet:
    """Return the set of that name from the first root that has it.

    A name that is not in KNOWN_SETS is the name of a folder with a set of the user's own, with or without the prefix `wds_`.
    `overrides` are the URLs of files of class names (CLASSES_FILE) and templates (TEMPLATES_FILE) that replace the set's own.

    Raises:
        SetNotFoundError: No root has it.
        ConfigError: It is only there in a layout without the split that is evaluated.
        DataError: The set that was found cannot be used.
    """
    if not roots:
        raise ConfigError(f"{name}: no data_roots; give the folder or s3:// URL that has the sets")
    without_split: ConfigError | None = None
    for url in _existing_folders(roots, name):
        try:
            if (data := _open_any_layout(name, url, overrides, is_named_by_user=False)) is not None:
                return data
        except ConfigError as error:
            without_split = error
    raise without_split or SetNotFoundError(
        f"{name}: not found below {', '.join(roots)}; looked for {', '.join(_folder_names(name))}; correct data_roots, or leave "
        "the set out"
    )


def open_evaluation_set(name: str, url: str, overrides: Mapping[str, str] = NO_OVERRIDES) -> EvaluationSet:
    """Return the set in the folder `url`, in whatever layout it is. Raises ConfigError and DataError.

    `overrides` are those of `find_evaluation_set`.
    """
    url = _absolute(url)
    if not storage.exists(url):
        raise ConfigError(f"{name}: {url}: no such folder; correct the path")
    data = _open_any_layout(name, url, overrides, is_named_by_user=True)
    if data is None:
        raise ConfigError(
            f"{name}: {url} has no known layout ({_describe_content(url)}); give a folder with {SPLIT}/*.tar as CLIP_benchmark "
            f"exports them, torchvision's files, {SPLIT}-*.parquet, or one subfolder of images per class"
        )
    return data


def open_image_set(url: str) -> EvaluationSet:
    """Return all images, without labels, of a folder and the folders below it, or of the tars in it or that a pattern names.

    Of a webdataset-style set these are the images of its test split. Raises ConfigError, and DataError for an empty tar.
    """
    url = _absolute(url)
    name = posixpath.basename(url)
    for folder in (url, storage.join(url, SPLIT)):
        files = storage.list_files(folder) if is_pattern(folder) or storage.exists(folder) else ()
        if tars := [file for file in files if file.url.endswith(".tar")]:
            return open_tars(name, "images", url, "tars", tars)
    data = None if is_pattern(url) or not storage.exists(url) else open_image_files(name, url)
    if data is None:
        raise ConfigError(f"{url}: has no images ({_describe_content(url)}); give a folder with tars or image files")
    return data


def render_listing(roots: Sequence[str], sets: Mapping[str, str]) -> str:
    """Return a table of sets and what each has, and for each that is not found where it was looked for and how to get it.

    `sets` are names of sets with their folders; "" stands for a set below the roots.
    """
    rows = [("set", "where", "layout", "files", "size", "classes", "images", "metric")]
    notes = []
    for name, url in sets.items():
        known = KNOWN_SETS.get(name)
        described = ("not found", "", "", "")
        try:
            data = open_evaluation_set(name, url) if url else find_evaluation_set(roots, name)
            described = (data.url, data.layout, f"{data.num_files:,}", size_text(data.num_bytes))
            notes += [f"warning: {warning}" for warning in data.warnings]
        except SetNotFoundError as error:
            source = _COPIES.format(name=name.replace("/", "-"), root=roots[0])
            notes.append(f"not found: {error}" + f"; or get it: {source}" * bool(known))
        except (ConfigError, DataError) as error:
            described = ("rejected", "", "", "")
            notes.append(f"rejected: {error}")
        expected = (str(known.num_classes or ""), f"{known.num_images:,}", known.main_metric) if known else ("", "", "")
        rows.append((name, *described, *expected))
    return "\n".join([render_table(rows), *notes])


def _folder_names(name: str) -> tuple[str, ...]:
    """Return the folders below a root in which a set may be, the most likely first."""
    dashed = name.replace("/", "-")
    others = KNOWN_SETS[name].folders if name in KNOWN_SETS else dict.fromkeys((name, dashed))
    return (f"wds_{dashed}", f"wds_{dashed}_test", *others)


def _existing_folders(roots: Sequence[str], name: str) -> list[str]:
    """Return the folders that exist, of those in which the set may be. Raises ConfigError for a missing root."""
    roots = [_absolute(root) for root in roots]
    urls = [storage.join(root, folder) for root in roots for folder in _folder_names(name)]
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        for root, exists in zip(roots, pool.map(storage.exists, roots), strict=True):
            if not exists:
                raise ConfigError(f"data_roots: {root}: no such folder; give the folder or s3:// URL that has the sets")
        return [url for url, exists in zip(urls, pool.map(storage.exists, urls), strict=True) if exists]


def _open_any_layout(name: str, url: str, overrides: Mapping[str, str], *, is_named_by_user: bool) -> EvaluationSet | None:
    """Return the set in a folder that the user named for it, or in one below a root; None if it has no layout of the set."""
    known = KNOWN_SETS.get(name)
    layouts: list[Callable[[str, str, Mapping[str, str]], EvaluationSet | None]] = [open_wds]
    if known is None or known.task != "zeroshot_retrieval":
        layouts += [open_torchvision, open_parquet]  # no other folder looks like one of these
        layouts += [_open_validation_folder] * bool(known and known.class_folders)
        layouts += [open_image_folder] * (is_named_by_user or known is None)
    return next((data for open_layout in layouts if (data := open_layout(name, url, overrides)) is not None), None)


def _open_validation_folder(name: str, url: str, overrides: Mapping[str, str]) -> EvaluationSet | None:
    """Open ImageNet's validation images, one subfolder per class."""
    for inside in ("val", "validation", ""):
        folder = storage.join(url, inside).rstrip("/")
        if storage.exists(storage.join(folder, KNOWN_SETS[name].class_folders[0])):
            return open_image_folder(name, folder, overrides)
    return None


def _absolute(url: str) -> str:
    url = url.removeprefix("file://")
    return url.rstrip("/") if "://" in url else os.path.abspath(os.path.expanduser(url))


def _describe_content(url: str) -> str:
    if not is_pattern(url) and not storage.exists(url):
        return "no such folder"
    files = storage.list_files(url)
    return f"{len(files)} other files, such as {posixpath.basename(files[0].url)}" if files else "no files"
