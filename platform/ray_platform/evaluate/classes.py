"""Class names and templates: from the texts beside the data, or those that ship with the project."""

import re
from collections.abc import Sequence

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.evaluate.sets import REGISTRY
from ray_platform.evaluate.slices import SampleSchema

CLASSES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATES = ("a photo of a {c}.",)
# Their own class names write "_" and "/" for a space.
_SPACED = ("food101", "sun397")
_SAME_ORDER = 0.6  # of the classes must share a word; of two orders of one list, some 0.1 (shifted) to 0.34 (Caltech-101) do


def read_lines(url: str) -> tuple[str, ...]:
    """The lines of a text file, stripped, without the empty ones at its end. Raises DataError."""
    try:
        lines = [line.strip() for line in storage.read_small(url).decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise DataError(f"{url}: is not UTF-8; write it again as UTF-8") from None
    while lines and not lines[-1]:
        lines.pop()
    return tuple(lines)


def classification(set_name: str, classes: Sequence[str], classes_from: str) -> SampleSchema:
    """What samples of a set with these classes must have. Raises DataError for a list that cannot be the set's."""
    info = REGISTRY.get(set_name)
    if not classes:
        raise DataError(f"{set_name}: {classes_from} names no class; it must have a class a line, in label order")
    if "" in classes:
        raise DataError(f"{set_name}: {classes_from} has an empty name for class {classes.index('')}; name it")
    if info and len(classes) != info.num_classes:
        raise DataError(
            f"{set_name}: {classes_from} names {len(classes)} classes, but the set has {info.num_classes}; "
            "correct the list, or fetch the set again"
        )
    return SampleSchema(set_name, "zeroshot_classification", len(classes), classes_from)


def published_names(set_name: str, own: Sequence[str], classes_from: str) -> tuple[str, ...]:
    """The class names that published scores go by, for data whose `own` names are in label order.

    Raises DataError where the two lists are not in the same order: labels would mean other classes.
    """
    info = REGISTRY.get(set_name)
    if info is None or not info.classes or len(own) != len(info.classes):
        return tuple(re.sub("[_/]", " ", name) if set_name in _SPACED else name for name in own)
    strange = [(mine, theirs) for mine, theirs in zip(own, info.classes, strict=True) if not _words(mine) & _words(theirs)]
    if len(strange) > (1 - _SAME_ORDER) * len(own):
        mine, theirs = strange[0]
        raise DataError(
            f"{set_name}: {classes_from} has its classes in another order than the published set, such as {mine!r} for "
            f"{theirs!r}, and {len(strange)} in all; use CLIP_benchmark's copy of the set"
        )
    return info.classes


def template_list(set_name: str, url: str | None) -> tuple[str, ...]:
    """The templates in the file `url`; without one, those that ship with the project. Raises DataError for none."""
    if url is None:
        info = REGISTRY.get(set_name)
        if info is None:
            raise DataError(
                f"{set_name}: there is no {TEMPLATES} beside its {CLASSES}, and the set is none that the project knows; "
                'write one, such as "a photo of a {c}."'
            )
        return info.templates
    templates = read_lines(url)
    if not templates:
        raise DataError(f'{set_name}: {url} has no templates; write one a line, such as "a photo of a {{c}}."')
    if lacking := [template for template in templates if "{c}" not in template]:
        raise DataError(f'{set_name}: {url} has a template without "{{c}}", which stands for the class: {lacking[0]!r}')
    return templates


def _words(name: str) -> set[str]:
    return set(re.findall("[a-z]{2,}", re.sub("([a-z])([A-Z])", r"\1 \2", name).lower()))
