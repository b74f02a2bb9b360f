"""Pages from templates: jinja2 with autoescape, and the filters that write texts and numbers.

Captions, keys and class names come from the web. Autoescape keeps them from being read as markup, `isolated` keeps the direction
of their writing from turning the text around them. A page is one file that loads nothing.
"""

import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ray_platform.json_values import flat_fields
from ray_platform.metric_registry import describe_metric
from ray_platform.report.records import NestedFields
from ray_platform.units import NO_VALUE, duration_text, is_number, number_text, percent_text, plural, size_text

_LONGEST_TEXT = 600  # characters of a text that are displayed
NUM_COLORS = 6  # of models and arms: the stylesheet's classes m0 to m5
TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **context: Any) -> str:
    """Return the page. Half a surrogate pair, which no file can hold, becomes `?`."""
    page = _environment().get_template(template).render(context)
    return page.encode("utf-8", "replace").decode()


def clipped(value: str) -> str:
    """Return a text from the web, no longer than a reader would read."""
    return value if len(value) <= _LONGEST_TEXT else f"{value[:_LONGEST_TEXT]}…"


def isolated(name: str) -> Markup:
    """Return a name for use inside other text: whatever its direction of writing, it does not turn the text around it."""
    return Markup("<bdi>{}</bdi>").format(clipped(name))


def choice_text(value: Any) -> str:
    """Return the value of a field, as short as it can be."""
    if isinstance(value, float):
        return f"{float(f'{value:.4g}'):,.6g}".replace("-", "−")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def signed_points(difference: float) -> str:
    """Return +1.2 or −1.2 for a difference of fractions."""
    return f"{round(100 * difference, 1) + 0.0:+.1f}".replace("-", "−")


def field_texts(values: NestedFields) -> Iterator[tuple[str, str]]:
    """Yield nested fields by their dotted names, with their values as text."""
    for field, value in flat_fields(values):
        yield field, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def grouped(records: Iterable[Any], *fields: str) -> dict[Any, list[Any]]:
    """Return the records by one field, or by a tuple of several, in the order in which they come."""
    groups: dict[Any, list[Any]] = {}
    for record in records:
        groups.setdefault(itemgetter(*fields)(record), []).append(record)
    return groups


def color_class(names: Sequence[str], name: str) -> str:
    """Return the CSS class that sets the color `--c` of a model or an arm by its place; unknown names come after all others."""
    return f"m{(names.index(name) if name in names else len(names)) % NUM_COLORS}"


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "clipped": clipped,
        "isolated": isolated,
        "percent": percent_text,
        "number": number_text,
        "points": signed_points,
        "choice_text": choice_text,
        "duration": duration_text,
        "size": size_text,
        "plural": plural,
        "commas": lambda value: f"{value:,.0f}",
        "fixed": lambda value, decimals=2: f"{value:.{decimals}f}",
        "g": lambda value: f"{value:g}",
        "flat": field_texts,
        "ceil": math.ceil,
        "grouped": grouped,
    }
    environment.tests["number_value"] = is_number
    environment.globals |= {
        "stylesheet": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),  # noqa: S704
        "metric": describe_metric,
        "NO_VALUE": NO_VALUE,
        "color_class": color_class,
    }
    return environment
