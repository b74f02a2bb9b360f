"""From the bytes of a tar to undecoded samples. Plain Python: no Ray, no storage.

The layout is LAION's, as img2dataset writes it: `00012.jpg`, `00012.txt` and `00012.json` make one sample, their key is
what precedes the first dot. Nothing in a tar can raise: what cannot be used becomes a `RejectedSample`.
"""

import io
import posixpath
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ray_platform.data.causes import RejectedSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
TEXT_SUFFIXES = ("txt", "json")
_SUFFIXES = IMAGE_SUFFIXES + TEXT_SUFFIXES
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_HEADER = 2**16  # bytes, with the long names and dates that may precede it
_LONGEST_NAME = 1024  # characters
_MOST_FIELDS = 100  # that a header gives to all members, each of which is looked through for all
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")  # what could write elsewhere in a log


@dataclass
class Record:
    """The undecoded members of one key. They are views: the tar's bytes are not copied."""

    key: str
    members: dict[str, memoryview] = field(default_factory=dict)  # suffix -> content
    repeated: bool = False


def read_tar(data: bytes, shard_name: str, suffixes: Sequence[str] = _SUFFIXES) -> list[Record | RejectedSample]:
    """Group the members of a tar that have one of `suffixes` by key, in the order in which keys first appear.

    The list is never empty: it ends with a `tar_truncated` reject when the tar does not end as a tar does, and a tar
    without samples gives `shard_empty`.
    """
    members, ending = _members(data, 0)
    return _grouped(members, ending != "whole", shard_name, suffixes)


def read_part(
    data: bytes, shard_name: str, length: int, *, first: bool, last: bool, suffixes: Sequence[str] = _SUFFIXES
) -> list[Record | RejectedSample] | None:
    """The samples of one part of a tar too large to be held whole.

    `data` begins with the part and may go on behind its `length` bytes; `last` says that it goes on to the tar's end. A
    sample belongs to the part in which it begins, a sample's beginning being the first member whose key differs from that
    of the first member at or behind the border: so both neighbours of a border agree. Members of a key must stand
    together, and none be a tar itself: its headers would be taken for the shard's.

    Returns None when `data` ends before the part's last sample does: call again with more. A part in which no sample
    begins, as within a very large member, gives `shard_empty`: its neighbours have what there is.
    """
    begin = 0 if first else _first_header(data, length)
    if begin is None:
        return _grouped([], False, shard_name, suffixes)
    members, ending = _members(data, begin)
    behind = _behind_border(data, members, length)
    if not behind and ending == "cut" and not last:
        return None
    stop = behind[0][2] if behind else len(data)
    own = members if first else _behind_border(data, members, 0)
    return _grouped([member for member in own if member[2] < stop], not behind and ending != "whole", shard_name, suffixes)


Member = tuple[str, memoryview, int]  # name, content, offset in the data of the header that directly precedes it
Ending = Literal["whole", "cut", "garbage"]  # as a tar ends; where the data ends; before it


def _behind_border(data: bytes, members: list[Member], border: int) -> list[Member]:
    """The members from the first new key behind the first header at or behind `border` on."""
    behind = [member for member in members if member[2] >= border]
    # By the name in the header itself: a longer one stands before it, which the border may have cut off.
    keys = (_key(tarfile.TarInfo.frombuf(data[at : at + _BLOCK], "utf-8", "surrogateescape").name) for _, _, at in behind)
    before = next(keys, None)
    begins = (number for number, key in enumerate(keys, 1) if key != before)
    return behind[next(begins, len(behind)) :]


def _grouped(members: list[Member], truncated: bool, shard_name: str, suffixes: Sequence[str]) -> list[Record | RejectedSample]:
    records: dict[str, Record] = {}
    too_long: list[Record | RejectedSample] = []
    for name, content, _ in members:
        suffix = posixpath.basename(name).partition(".")[2].lower()
        if suffix not in suffixes:
            continue
        if len(name) > _LONGEST_NAME:
            too_long.append(RejectedSample(f"{shard_name}/{printable(name[:50])}…", "name_too_long"))
            continue
        key = printable(posixpath.join(shard_name, _key(name)))
        record = records.setdefault(key, Record(key))
        record.repeated |= suffix in record.members
        record.members[suffix] = content
    found: list[Record | RejectedSample] = [*records.values(), *too_long]
    if truncated:
        found.append(RejectedSample(f"{shard_name}/", "tar_truncated"))
    return found or [RejectedSample(f"{shard_name}/", "shard_empty")]


def printable(name: str) -> str:
    """A name of a file, which may hold anything, as one line that Arrow takes: no lone surrogates, no control characters.

    It is a label: nothing is ever written, or read, by a name in a tar.
    """
    name = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", name)
    return name.encode("utf-8", "backslashreplace").decode()


def _key(name: str) -> str:
    folder, base = posixpath.split(posixpath.normpath(name).lstrip("/"))
    return posixpath.join(folder, base.partition(".")[0])


def _first_header(data: bytes, length: int) -> int | None:
    """The offset of the first tar header in the first `length` bytes; None where there is none."""
    for offset in range(0, min(length, len(data) - _BLOCK + 1), _BLOCK):
        if data[offset + 257 : offset + 262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(data[offset : offset + _BLOCK], "utf-8", "surrogateescape")
                return offset
            except tarfile.HeaderError:
                continue
    return None


def _members(data: bytes, begin: int) -> tuple[list[Member], Ending]:
    """The regular files of a tar, and how it ends."""
    view = memoryview(data)
    found: list[Member] = []
    at = begin
    try:
        file = io.BytesIO(data)
        file.seek(begin)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # it keeps them all, each with all its headers
                if member.size < 0 or member.offset_data <= at or len(tar.pax_headers) > _MOST_FIELDS:
                    return found, "garbage"  # of a size below zero, tarfile goes round in a circle
                at = end = member.offset_data + member.size
                if end > len(data):
                    return found, "cut"
                if member.isreg() and not member.issparse():
                    found.append((member.name, view[member.offset_data : end], member.offset_data - _BLOCK))
            # tarfile takes a broken header after the first for the end, and a hole in the file too. The true end is
            # at least a block of zeros, and nothing else.
            left = len(data) - tar.offset
            if left < _BLOCK:
                return found, "cut"
            return found, "whole" if data.count(0, tar.offset) == left else "garbage"
    except Exception:
        # Garbage makes tarfile raise far more than its own errors (ValueError, UnicodeError, RecursionError, …).
        return found, "cut" if len(data) - at < _LONGEST_HEADER else "garbage"
