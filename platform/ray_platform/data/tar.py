"""Reading webdataset-style tars: the bytes of a tar, or of a slice of one, become undecoded samples.

The layout is LAION's, as img2dataset writes it: `00012.jpg`, `00012.txt` and `00012.json` are one sample, and its key is
everything before the first dot. In `v1.5_007.jpg`, what follows the first dot is not a known extension: the key ends at the last
dot, unless the tar has a sample with the shorter key, of which `00012.seg.png` is then a side file.

No content of a tar raises an exception, and no file is passed over in silence: it is part of a `Record`, a side file of one, or
has a `RejectedSample`.
"""

import functools
import io
import logging
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO, Literal, NamedTuple

from ray_platform import storage
from ray_platform.contracts import DataError
from ray_platform.data.causes import RejectedSample

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
# All usual endings of the formats that `decode` reads. Evaluation sets, which come from many places, have them; in training tars,
# a .gif or .tif next to the image is a side file.
ALL_IMAGE_SUFFIXES = (*IMAGE_SUFFIXES, "apng", "avif", "avifs", "bmp", "gif", "jfif", "jpe", "tif", "tiff")
_SUFFIXES = (*IMAGE_SUFFIXES, "txt", "json")
_BLOCK = tarfile.BLOCKSIZE
_MAX_HEADER_BYTES = 2**16  # including the long names and dates that may precede it
_MAX_NAME_LENGTH = 1024  # characters
_MAX_GLOBAL_FIELDS = 100  # PAX fields that a header sets for all members; each is looked up for every member
_READ_AHEAD_BYTES = 2**20  # read past the end of a slice, for its last sample
_MAX_SAMPLE_BYTES = 2**29  # a sample that continues further past the end of its slice is cut off
_MAX_HALVES = 0.1  # of the samples of a slice may lack their image or text before the rest of the tar is read for them
_MIN_STEP_BYTES = 2**24  # read at once for that
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")  # could forge or overwrite lines of a log

# What some downloads and disks hold under the name of a tar, by its first bytes.
_OTHER_FORMATS = {
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
    b"version https://git-lfs": "a git-lfs pointer",
    b"<": "HTML or XML",
    b"{": "JSON",
}

Ending = Literal["complete", "cut", "garbage"]  # a valid end of a tar; the end of the data; something else


class Member(NamedTuple):
    """A file in a tar."""

    name: str
    content: memoryview | None  # None: a link, a device or a sparse file
    header: int  # offset of the header directly before the content


@dataclass
class Record:
    """The undecoded members of one key, as views of the tar's bytes."""

    key: str
    members: dict[str, memoryview] = field(default_factory=dict)  # suffix -> content
    cause: str = ""  # why it cannot be used, when that does not depend on the content

    @property
    def has_image(self) -> bool:
        return any(suffix in self.members for suffix in ALL_IMAGE_SUFFIXES)

    @property
    def is_half(self) -> bool:
        """Return whether there is either an image or a text."""
        return self.has_image != ("txt" in self.members or "json" in self.members)

    def add(self, suffix: str, content: memoryview | None) -> None:
        if content is None:
            self.cause = "file_not_stored"
            return
        if suffix in self.members:
            self.cause = self.cause or "key_repeated"
        self.members[suffix] = content


def read_tar_slice(
    url: str, shard_name: str, size: int, start: int, stop: int, suffixes: Sequence[str] = _SUFFIXES
) -> list[Record | RejectedSample]:
    """Read the samples that begin in bytes start..stop of a tar in storage.

    Consecutive slices of a tar together contain each of its samples once. A slice in which no sample begins gives `ignored_part`.
    If many samples of a slice lack their image or their text, the files of a sample are not adjacent in this tar: then the rest
    of the tar is read for them. The slice that has the image has the sample, so memory is bounded by the images of two slices.
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
    records = _read_slice(url, shard_name, size, start, stop, suffixes)
    samples = {record.key: record for record in records if isinstance(record, Record)}
    if suffixes == _SUFFIXES and sum(record.is_half for record in samples.values()) > _MAX_HALVES * len(samples):
        _warn_of_apart_files(url)
        step = max(stop - start, _MIN_STEP_BYTES)
        for begin, end in ((0, start), (stop, size)):
            for at in range(begin, end, step):
                _join(samples, _read_slice(url, shard_name, size, at, min(at + step, end), suffixes))
        records = [record for record in records if not isinstance(record, Record) or record.key in samples]
    return records or [RejectedSample(f"{shard_name}/", "ignored_part")]


@functools.cache  # once per shard and process: a line for every part and epoch would fill the log
def _warn_of_apart_files(url: str) -> None:
    logger.warning(
        "%s: the image and the text of its samples are not next to each other, so each part reads the whole tar; write it with "
        "GNU tar's --sort=name, or raise data.max_read_mb above its size",
        url,
    )


def _join(samples: dict[str, Record], others: Sequence[Record | RejectedSample]) -> None:
    """Add the texts of another slice to the samples with images, and remove the samples whose images it has."""
    for other in others:
        if isinstance(other, Record) and (sample := samples.get(other.key)):
            if not sample.has_image:
                if other.has_image:
                    del samples[other.key]
                continue
            for suffix in other.members.keys() - sample.members.keys() - set(IMAGE_SUFFIXES):
                sample.members[suffix] = memoryview(bytes(other.members[suffix]))  # does not keep the slice in memory


def _read_slice(
    url: str, shard_name: str, size: int, start: int, stop: int, suffixes: Sequence[str]
) -> list[Record | RejectedSample]:
    """Return the samples that begin in a slice, and of these the files that are adjacent."""
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

    The list is never empty: it ends with a `tar_truncated` rejection if the tar has no valid end, and a tar without samples gives
    `shard_empty`. Another kind of file gives `shard_not_a_tar`.
    """
    members, ending = _members(data, 0)
    if not members and (rejected := _reject_other_format(data, shard_name)):
        return [rejected]
    return _grouped(members, ending != "complete" and data != b"", shard_name, suffixes)


def count_images(file: IO[bytes], size: int, suffixes: Sequence[str]) -> int:
    """Return the number of samples with an image in a tar of `size` bytes, from its headers: contents are skipped by seeking.

    Members of samples have one of `suffixes`. Of a tar that is damaged, the samples before the damage are counted.
    """
    members: list[Member] = []
    with suppress(Exception), tarfile.open(fileobj=file, mode="r:") as tar:  # as in `_members`: garbage raises anything
        at = 0
        while (entry := tar.next()) and at < entry.offset_data <= size - entry.size:  # negative sizes lead back
            at = entry.offset_data
            tar.members = []  # type: ignore[attr-defined]
            if entry.isreg() and not entry.issparse():
                members.append(Member(entry.name, memoryview(b""), at - _BLOCK))
    return sum(isinstance(record, Record) and record.has_image for record in _grouped(members, False, "", suffixes))


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
        # The zeros at the end of a tar, or garbage.
        return _grouped([], False, shard_name, suffixes, is_part=data.count(0, 0, length) == min(length, len(data)))
    members, ending = _members(data, begin)
    if first and not members and (rejected := _reject_other_format(data, shard_name)):
        return [rejected]
    stop = _next_sample(data, members, length)
    if stop is None and ending == "cut" and not last:
        return None
    start = 0 if first else _next_sample(data, members, 0)
    in_part = [m for m in members if start is not None and start <= m.header < (len(data) if stop is None else stop)]
    return _grouped(in_part, stop is None and ending != "complete", shard_name, suffixes, is_part=not first)


def _reject_other_format(data: bytes, shard_name: str) -> RejectedSample | None:
    """Return a rejection if `data` does not begin like a tar. Its key names the format if that is a common mistake."""
    if _parse_header(data, 0) or not any(data[:_BLOCK]):
        return None
    kind = next((f" ({kind})" for start, kind in _OTHER_FORMATS.items() if data[:256].lstrip().startswith(start)), "")
    return RejectedSample(f"{shard_name}/{kind}", "shard_not_a_tar")


def _next_sample(data: bytes, members: list[Member], border: int) -> int | None:
    """Return the offset of the first sample that begins after `border`; None if there is none."""
    previous = None
    for member in members:
        if member.header < border:
            continue
        # By the name in the header itself: a longer name precedes the header and may lie before the border.
        header = _parse_header(data, member.header)
        name = header.name if header else member.name  # a sparse file has its map between header and content
        keys = _key(name), _long_key(name, _SUFFIXES)
        if previous and (keys[0] != previous[0] or (keys[1] and previous[1] and keys[1] != previous[1])):
            return member.header
        previous = keys
    return None


def _grouped(
    members: list[Member], truncated: bool, shard_name: str, suffixes: Sequence[str], is_part: bool = False
) -> list[Record | RejectedSample]:
    records: dict[str, Record] = {}
    rejected: list[RejectedSample] = []
    others: list[Member] = []  # without a known extension after the first dot
    for member in members:
        name = member.name
        suffix = posixpath.basename(name).partition(".")[2].lower()
        if len(name) > _MAX_NAME_LENGTH:
            rejected.append(RejectedSample(f"{shard_name}/{_printable(name[:50])}…", "name_too_long"))
        elif suffix in suffixes:
            key = _printable(posixpath.join(shard_name, _key(name)))
            if (record := records.get(key)) is None:
                record = records[key] = Record(key)
            record.add(suffix, member.content)
        else:
            others.append(member)
    if others:
        rejected += _sort_out(others, records, shard_name, suffixes)
    if truncated:
        rejected.append(RejectedSample(f"{shard_name}/", "tar_truncated"))
    if not records and all(sample.cause == "ignored_file" for sample in rejected):
        return [RejectedSample(f"{shard_name}/", "ignored_part" if is_part else "shard_empty")]
    return [*records.values(), *rejected]


def _sort_out(
    others: list[Member], records: dict[str, Record], shard_name: str, suffixes: Sequence[str]
) -> Iterator[RejectedSample]:
    """Add the samples with dots in their names to `records`. Yield the files that belong to no sample."""
    dotted: dict[str, Record] = {}
    short_keys: dict[str, str] = {}  # of each dotted record
    strays: list[tuple[str, str]] = []  # (short key, name)
    for member in others:
        short = _printable(posixpath.join(shard_name, _key(member.name)))
        if long := _long_key(member.name, suffixes):
            key = _printable(posixpath.join(shard_name, long))
            dotted.setdefault(key, Record(key)).add(member.name.rpartition(".")[2].lower(), member.content)
            short_keys[key] = short
        else:
            strays.append((short, _printable(posixpath.join(shard_name, member.name))))
    for key, record in dotted.items():
        is_sample = len(record.members) > 1 and record.has_image
        if short_keys[key] in records and is_sample:
            record.cause = "name_ambiguous"
        elif short_keys[key] in records:
            del short_keys[key]  # a side file
    known = {*records, *short_keys.values()}
    records |= {key: dotted[key] for key in short_keys}
    return (RejectedSample(name, "ignored_file") for short, name in strays if short not in known)


def _printable(name: str) -> str:
    """Return a file name as one line that Arrow accepts, without lone surrogates and control characters, for use as a label."""
    name = _CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", name)
    return name.encode("utf-8", "backslashreplace").decode()


def _key(name: str) -> str:
    folder, base = posixpath.split(posixpath.normpath(name).lstrip("/"))
    return posixpath.join(folder, base.partition(".")[0])


def _long_key(name: str, suffixes: Sequence[str]) -> str:
    """Return the name up to its last dot if that is not the first one and a known extension follows; else an empty string."""
    folder, base = posixpath.split(posixpath.normpath(name).lstrip("/"))
    stem, _, extension = base.rpartition(".")
    is_dotted = "." in stem.lstrip(".") and not base.startswith(".")  # `._7.jpg` is what macOS stores next to 7.jpg
    return posixpath.join(folder, stem) if is_dotted and extension.lower() in suffixes else ""


def _first_header(data: bytes, length: int) -> int | None:
    """Return the offset of the first tar header in the first `length` bytes, or None."""
    offsets = range(0, min(length, len(data) - _BLOCK + 1), _BLOCK)
    return next((at for at in offsets if data[at + 257 : at + 262] == b"ustar" and _parse_header(data, at)), None)


def _parse_header(data: bytes, offset: int) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(data[offset : offset + _BLOCK], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def _members(data: bytes, begin: int) -> tuple[list[Member], Ending]:
    """Return the files of a tar, without its folders, and how it ends."""
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
                is_sparse = member.issparse()  # it has fewer bytes in the tar than on a disk
                at = end = tar.offset if is_sparse else member.offset_data + member.size
                if end > len(data):
                    return members, "cut"
                if member.isreg() and not is_sparse:
                    members.append(Member(member.name, view[member.offset_data : end], member.offset_data - _BLOCK))
                elif not member.isdir():
                    members.append(Member(member.name, None, member.offset_data - _BLOCK))
            # tarfile also stops at a broken header and at a hole in the file. A valid end is one block of zeros or more.
            left = len(data) - tar.offset
            if left < _BLOCK:
                return members, "cut"
            return members, "complete" if data.count(0, tar.offset) == left else "garbage"
    except Exception:
        # On garbage, tarfile raises far more than its own errors (ValueError, UnicodeError, RecursionError, …).
        return members, "cut" if len(data) - at < _MAX_HEADER_BYTES else "garbage"
