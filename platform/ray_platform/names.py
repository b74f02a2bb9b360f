"""Names of files in storage: those that a pattern stands for, and those that lead out of a folder."""

import re

from ray_platform.contracts import DataError

MOST_BRACED = 1_000_000  # files that one pattern names


def check_below(name: str, where: str) -> str:
    """`name`, which something in storage gives to a file below `where`. Raises DataError where it leads out of it."""
    if not name or name.startswith("/") or "\0" in name or any(part in ("..", ".", "") for part in name.split("/")):
        raise DataError(f"{where}: names a file {name[:200]!r}, which does not lie below it; remove it, or correct the name")
    return name


def expand_braces(pattern: str) -> list[str]:
    """`{08..10}` to 08, 09, 10 (padded as its first number is) and `{a,b}` to a, b; several braces multiply.

    Raises DataError for any other use of braces.
    """
    head, opened, rest = pattern.partition("{")
    if not opened:
        return [pattern]
    inner, closed, tail = rest.partition("}")
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", inner)
    if bounds and max(len(bounds[1]), len(bounds[2])) < 12 and int(bounds[1]) <= int(bounds[2]):
        if int(bounds[2]) - int(bounds[1]) >= MOST_BRACED:
            raise _too_many(pattern)
        middles = [f"{number:0{len(bounds[1])}d}" for number in range(int(bounds[1]), int(bounds[2]) + 1)]
    elif closed and "," in inner and "{" not in inner:
        middles = inner.split(",")
    else:
        raise DataError(f"{pattern}: cannot read its braces; write a range as {{00000..00009}} or a list as {{a,b}}")
    tails = expand_braces(tail)
    if len(middles) * len(tails) > MOST_BRACED:
        raise _too_many(pattern)
    return [f"{head}{middle}{end}" for middle in middles for end in tails]


def _too_many(pattern: str) -> DataError:
    return DataError(f"{pattern[:200]}: its braces name more than {MOST_BRACED:,} files; give several patterns, or a glob")
