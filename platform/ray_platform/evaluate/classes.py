"""Class names and templates: from the text files next to the data, or those that ship with the project."""

import posixpath
import re
from collections.abc import Mapping, Sequence

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.evaluate.samples import SampleSchema
from ray_platform.evaluate.sets import KNOWN_SETS

CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES = ("a photo of a {c}.",)
_SETS_WITH_JOINED_NAMES = ("food101", "sun397")  # their class names have "_" and "/" in the place of spaces
# The fraction of classes that must share a word with the published name. Two orders of one list share 0.1 (shifted by one) to
# 0.34 (Caltech-101).
_SAME_ORDER = 0.6


def list_sidecars(url: str) -> dict[str, str]:
    """Return the URLs of the files directly in a folder, by their names."""
    return {posixpath.basename(file.url): file.url for file in storage.list_files(url)}


def read_lines(url: str) -> tuple[str, ...]:
    """Return the lines of a text file, stripped, without empty ones at the end. Raises DataError if it is not UTF-8."""
    try:
        lines = [line.strip() for line in storage.read_small(url).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise DataError(f"{url}: is not UTF-8; convert it to UTF-8") from None
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def classification_schema(set_name: str, classes: Sequence[str], source: str) -> SampleSchema:
    """Return the schema of a set with these classes.

    Raises:
        DataError: The list, which comes from `source`, is empty, lacks a name, or has another length than the known set.
    """
    known = KNOWN_SETS.get(set_name)
    if not classes:
        raise DataError(f"{set_name}: {source} has no class names; write one class per line, in label order")
    if "" in classes:
        raise DataError(f"{set_name}: {source} has an empty name for class {classes.index('')}; write its name")
    if known and len(classes) != known.num_classes:
        raise DataError(
            f"{set_name}: {source} names {len(classes)} classes, but the set has {known.num_classes}; "
            "correct the list, or download the set again"
        )
    return SampleSchema(set_name, "zeroshot_classification", len(classes), source)


def to_published_names(set_name: str, classes: Sequence[str], source: str) -> tuple[str, ...]:
    """Return the class names with which published scores were measured, for data whose `classes` are in label order.

    Raises:
        DataError: The two lists are in different orders, so that labels would stand for other classes.
    """
    known = KNOWN_SETS.get(set_name)
    if known is None or not known.classes or len(classes) != len(known.classes):
        return tuple(re.sub("[_/]", " ", name) if set_name in _SETS_WITH_JOINED_NAMES else name for name in classes)
    pairs = zip(classes, known.classes, strict=True)
    differing = [(name, published) for name, published in pairs if not _words(name) & _words(published)]
    if len(differing) > (1 - _SAME_ORDER) * len(classes):
        name, published = differing[0]
        raise DataError(
            f"{set_name}: {source} has its classes in another order than the published set, such as {name!r} for "
            f"{published!r}, and {len(differing)} in all; use CLIP_benchmark's copy of the set"
        )
    return known.classes


def load_templates(set_name: str, sidecars: Mapping[str, str], default: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the templates from the file next to the data, else those of the known set, else `default`.

    Raises:
        DataError: There are none, or one lacks "{c}".
    """
    url, known = sidecars.get(TEMPLATES_FILE), KNOWN_SETS.get(set_name)
    if url is None:
        if known is None and not default:
            raise DataError(
                f"{set_name}: no {TEMPLATES_FILE} next to its {CLASSES_FILE}, and the set is not a known one; "
                'write the file, such as "a photo of a {c}."'
            )
        return known.templates if known else default
    templates = read_lines(url)
    if not templates:
        raise DataError(f'{set_name}: {url} has no templates; write one per line, such as "a photo of a {{c}}."')
    if incomplete := [template for template in templates if "{c}" not in template]:
        raise DataError(f'{set_name}: {url} has a template without "{{c}}", the class ({incomplete[0]!r}); add it')
    return templates


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]{2,}", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()))
