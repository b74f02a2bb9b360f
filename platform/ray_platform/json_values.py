"""Write JSON values strictly and compare saved ones, such as configurations and measuring protocols."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

JsonObject = dict[str, Any]  # of JSON values


def to_json(value: Any) -> bytes:
    """Return strict JSON: NaN and infinities, which only Python reads, become null."""
    return (json.dumps(to_plain(value), indent=1, allow_nan=False) + "\n").encode()


def to_plain(value: Any) -> Any:
    """Return a JSON value with None in the place of NaN and infinities, and lists in the place of tuples."""
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differences(a: Any, b: Any, field: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield each field in which two JSON values differ, in the order of `a`, and both its values, shortened."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys([*a, *b]):
            inner = f"{field}.{key}" if field else key
            if key in a and key in b:
                yield from differences(a[key], b[key], inner)
            else:
                yield inner, *(_shorten(value[key]) if key in value else "absent" for value in (a, b))  # type: ignore[misc]
    elif a != b:
        yield field, _shorten(a), _shorten(b)


def first_difference(a: Any, b: Any) -> tuple[str, str, str] | None:
    """Return the first of `differences`."""
    return next(differences(a, b), None)


def with_defaults(saved: JsonObject, defaults: JsonObject) -> JsonObject:
    """Return a configuration that was saved earlier, with the default of every field that the code has gained since then."""
    filled = saved | {name: default for name, default in defaults.items() if name not in saved}
    for name in defaults.keys() & saved.keys():
        if isinstance(saved[name], dict) and isinstance(defaults[name], dict):
            filled[name] = with_defaults(saved[name], defaults[name])
    return filled


def flat_fields(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat_fields(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def num_values(values: JsonObject) -> int:
    """Return the number of values in a JSON object and in the objects below it."""
    return sum(1 for _ in flat_fields(values))


def _shorten(value: Any) -> str:
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= 80 else f"{line[:79]}…"
