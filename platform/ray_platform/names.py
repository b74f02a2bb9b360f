"""Names of files in storage: patterns, and rejecting names that lead out of a folder."""

import re

from ray_platform.contracts import DataError

MAX_EXPANDED = 1_000_000  # files per pattern


def check_below(name: str, where: str) -> str:
    """Return `name`, which a file in storage gives to a file below `where`. Raises DataError if it leads out of `where`."""
    if not name or name.startswith("/") or "\0" in name or any(part in ("..", ".", "") for part in name.split("/")):
        raise DataError(f"{where}: names a file {name[:200]!r}, which is not below it; remove it, or correct the name")
    return name


def is_pattern(url: str) -> bool:
    """Return whether a URL or a part of it has a character of a glob or brace pattern."""
    return bool(set("*?[{") & set(url))


def expand_braces(pattern: str) -> list[str]:
    """Expand `{08..10}` to 08, 09, 10 (padded like its first number) and `{a,b}` to a, b. Several braces multiply.

    Raises DataError for any other use of braces.
    """
    head, opened, rest = pattern.partition("{")
    if not opened:
        return [pattern]
    inner, closed, tail = rest.partition("}")
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if bounds and max(len(bounds[1]), len(bounds[2])) < 12 and int(bounds[1]) <= int(bounds[2]):
        if int(bounds[2]) - int(bounds[1]) >= MAX_EXPANDED:
            raise _too_many(pattern)
        middles = [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    elif closed and "," in inner and "{" not in inner:
        middles = inner.split(",")
    else:
        raise DataError(f"{pattern}: its braces are not valid; write a range as {{00000..00009}} or a list as {{a,b}}")
    tails = expand_braces(tail)
    if len(middles) * len(tails) > MAX_EXPANDED:
        raise _too_many(pattern)
    return [f"{head}{middle}{end}" for middle in middles for end in tails]


def _too_many(pattern: str) -> DataError:
    return DataError(f"{pattern[:200]}: its braces name more than {MAX_EXPANDED:,} files; give several patterns, or a glob")
