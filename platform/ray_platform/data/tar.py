"""Reading webdataset-style tars: the bytes of a tar, or of a slice of one, become undecoded samples.

The layout is LAION's, as img2dataset writes it: `00012.jpg`, `00012.txt` and `00012.json` are one sample, and its key is
everything before the first dot. No content of a tar raises an exception: what cannot be used becomes a `RejectedSample`.
"""

import io
import posixpath
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import RejectedSample

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json")
_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 2**16  # including the long names and dates that may precede it
_MAX_NAME_LENGTH = 1024  # characters
_MAX_GLOBAL_FIELDS = 100  # PAX fields that a header sets for all members; each is looked up for every member
_READ_AHEAD_BYTES = 2**20  # read past the end of a slice, for its last sample
_MAX_SAMPLE_BYTES = 2**29  # a sample that continues further past the end of its slice is cut off
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")  # could forge or overwrite lines of a log

Member = tuple[str, memoryview, int]  # name, content, offset in the data of the header directly before it
Ending = Literal["whole", "cut", "garbage"]  # a valid end of a tar; the end of the data; something else


@dataclass
class Record:
    """The undecoded members of one key, as views of the tar's bytes."""

    key: str
    members: dict[str, memoryview] = field(default_factory=dict)  # suffix -> content
    repeated: bool = False  # two members have the same suffix


def read_tar_slice(
    url: str, shard_name: str, size: int, start: int, stop: int, suffixes: Sequence[str] = _SUFFIXES
) -> list[Record | RejectedSample]:
    """Read the samples that begin in bytes start..stop of a tar in storage.

    Consecutive slices of a tar together contain each of its samples once. A slice in which no sample begins gives `shard_empty`.
    Raises DataError if the tar has another size than `size`; StorageError.

    Args:
        url: the tar.
        shard_name: the first part of the samples' keys.
        size: bytes that the tar had when it was listed.
        start, stop: the slice, in multiples of 512 bytes; (0, size) is the whole tar.
        suffixes: the file name extensions of the members to read.
    """
    if stop - start == size:
        data = storage.read_bytes(url)
        check_size(url, len(data), size)
        return read_tar(data, shard_name, suffixes)
    data, ahead = b"", _READ_AHEAD_BYTES
    while True:
        end = min(stop + ahead, size)
        data += storage.read_bytes(url, start + len(data), end)
        check_size(url, start + len(data), end)
        is_last = end == size or ahead > _MAX_SAMPLE_BYTES
        records = read_part(data, shard_name, stop - start, first=start == 0, last=is_last, suffixes=suffixes)
        if records is not None:
            return records
        ahead *= 8


def check_size(url: str, num_bytes: int, expected: int) -> None:
    """Raise DataError if a shard does not have the size with which it was listed."""
    if num_bytes != expected:
        raise DataError(
            f"{url}: changed since it was listed ({num_bytes} bytes instead of {expected}); "
            "a shard must not change while it is used: write changed shards to another folder, or start over"
        )


def read_tar(data: bytes, shard_name: str, suffixes: Sequence[str] = _SUFFIXES) -> list[Record | RejectedSample]:
    """Group the members of a tar that have one of `suffixes` by key, in the order in which keys first appear.

    The list is never empty: it ends with a `tar_truncated` rejection if the tar has no valid end, and a tar without samples
    gives `shard_empty`.
    """
    members, ending = _members(data, 0)
    return _grouped(members, ending != "whole", shard_name, suffixes)


def read_part(
    data: bytes, shard_name: str, length: int, *, first: bool, last: bool, suffixes: Sequence[str] = _SUFFIXES
) -> list[Record | RejectedSample] | None:
    """Return the samples that begin in the first `length` bytes of `data`, which begins at a part of a tar.

    A sample begins at the first member whose key differs from the key of the first member at or after a border, so both
    neighbors of a border agree on it. The members of a key must be adjacent, and no member may be a tar itself: its headers
    would be taken for the shard's.

    `first` and `last` say whether `data` begins at the start of the tar, and extends to its end. Returns None if `data` ends
    before the last sample of the part does: call again with more data.
    """
    begin = 0 if first else _first_header(data, length)
    if begin is None:
        return _grouped([], False, shard_name, suffixes)
    members, ending = _members(data, begin)
    following = _members_after(data, members, length)
    if not following and ending == "cut" and not last:
        return None
    stop = following[0][2] if following else len(data)
    in_part = members if first else _members_after(data, members, 0)
    return _grouped([member for member in in_part if member[2] < stop], not following and ending != "whole", shard_name, suffixes)


def _members_after(data: bytes, members: list[Member], border: int) -> list[Member]:
    """Return the members from the first sample that begins after `border` on."""
    after = [member for member in members if member[2] >= border]
    # By the name in the header itself: a longer name precedes the header and may lie before the border.
    keys = (_key(tarfile.TarInfo.frombuf(data[at : at + _BLOCK], "utf-8", "surrogateescape").name) for _, _, at in after)
    previous = next(keys, None)
    begins = (number for number, key in enumerate(keys, 1) if key != previous)
    return after[next(begins, len(after)) :]


def _grouped(members: list[Member], truncated: bool, shard_name: str, suffixes: Sequence[str]) -> list[Record | RejectedSample]:
    records: dict[str, Record] = {}
    rejected: list[RejectedSample] = []
    for name, content, _ in members:
        suffix = posixpath.basename(name).partition(".")[2].lower()
        if suffix not in suffixes:
            continue
        if len(name) > _MAX_NAME_LENGTH:
            rejected.append(RejectedSample(f"{shard_name}/{_printable(name[:50])}…", "name_too_long"))
            continue
        key = _printable(posixpath.join(shard_name, _key(name)))
        record = records.setdefault(key, Record(key))
        record.repeated |= suffix in record.members
        record.members[suffix] = content
    if truncated:
        rejected.append(RejectedSample(f"{shard_name}/", "tar_truncated"))
    return [*records.values(), *rejected] or [RejectedSample(f"{shard_name}/", "shard_empty")]


def _printable(name: str) -> str:
    """Return a file name as one line that Arrow accepts, without lone surrogates and control characters, for use as a label."""
    name = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", name)
    return name.encode("utf-8", "backslashreplace").decode()


def _key(name: str) -> str:
    folder, base = posixpath.split(posixpath.normpath(name).lstrip("/"))
    return posixpath.join(folder, base.partition(".")[0])


def _first_header(data: bytes, length: int) -> int | None:
    """Return the offset of the first tar header in the first `length` bytes, or None."""
    for offset in range(0, min(length, len(data) - _BLOCK + 1), _BLOCK):
        if data[offset + 257 : offset + 262] == b"ustar":
            try:
                tarfile.TarInfo.frombuf(data[offset : offset + _BLOCK], "utf-8", "surrogateescape")
                return offset
            except tarfile.HeaderError:
                continue
    return None


def _members(data: bytes, begin: int) -> tuple[list[Member], Ending]:
    """Return the regular files of a tar, and how it ends."""
    view = memoryview(data)
    members: list[Member] = []
    at = begin
    try:
        file = io.BytesIO(data)
        file.seek(begin)
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member with all its headers
                if member.size < 0 or member.offset_data <= at or len(tar.pax_headers) > _MAX_GLOBAL_FIELDS:
                    return members, "garbage"  # a negative size would make tarfile loop forever
                at = end = member.offset_data + member.size
                if end > len(data):
                    return members, "cut"
                if member.isreg() and not member.issparse():
                    members.append((member.name, view[member.offset_data : end], member.offset_data - _BLOCK))
            # tarfile also stops at a broken header and at a hole in the file. A valid end is one block of zeros or more.
            left = len(data) - tar.offset
            if left < _BLOCK:
                return members, "cut"
            return members, "whole" if data.count(0, tar.offset) == left else "garbage"
    except Exception:
        # On garbage, tarfile raises far more than its own errors (ValueError, UnicodeError, RecursionError, …).
        return members, "cut" if len(data) - at < _MAX_HEADER_BYTES else "garbage"
