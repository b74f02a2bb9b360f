"""From the bytes of a tar to samples. Plain Python: no Ray, no storage.

The layout is LAION's, as img2dataset writes it: `00012.jpg`, `00012.txt` and `00012.json` make one sample, their key is
what precedes the first dot. Nothing in a tar can raise: what cannot be used becomes a `Reject` with one of `CAUSES`.
"""

import io
import json
import posixpath
import tarfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
CAPTION_SUFFIXES = ("txt", "json")

Cause = Literal[
    "image_missing",
    "image_undecodable",
    "image_too_large",  # would take hundreds of megabytes; Pillow calls it a decompression bomb
    "caption_missing",
    "caption_empty",
    "caption_not_utf8",
    "caption_json_invalid",
    "key_repeated",  # the same file name twice in a tar: which caption belongs to which image cannot be told
    "tar_truncated",  # the tar ends early or turns to garbage; what precedes that is used
    "shard_empty",  # a tar in which there are no samples
]
CAUSES: tuple[str, ...] = get_args(Cause)


@dataclass(frozen=True)
class Sample:
    """What training sees."""

    key: str  # "<shard name>/<key in the tar>"
    image: np.ndarray  # [H, W, 3] uint8 RGB, H = W = image_size
    caption: str


@dataclass(frozen=True)
class Reject:
    """A sample, or a part of a shard, that cannot be used."""

    key: str
    cause: Cause


@dataclass
class Record:
    """The undecoded members of one key. They are views: the tar's bytes are not copied."""

    key: str
    members: dict[str, memoryview] = field(default_factory=dict)  # suffix -> content
    repeated: bool = False


class _Unusable(Exception):
    def __init__(self, cause: Cause) -> None:
        super().__init__(cause)
        self.cause: Cause = cause


def read_tar(data: bytes, shard_name: str) -> list[Record | Reject]:
    """Group the members of a tar by key, in the order in which keys first appear.

    The list is never empty: it ends with a `tar_truncated` reject when the tar does not end as a tar does, and a tar
    without samples gives `shard_empty`.
    """
    members, truncated = _members(data)
    records: dict[str, Record] = {}
    for name, content in members:
        folder, base = posixpath.split(posixpath.normpath(name))
        stem, _, suffix = base.partition(".")
        suffix = suffix.lower()
        if suffix not in IMAGE_SUFFIXES + CAPTION_SUFFIXES:
            continue
        # A name that is not UTF-8 holds lone surrogates, which Arrow refuses.
        key = posixpath.join(shard_name, folder, stem).encode("utf-8", "backslashreplace").decode()
        record = records.setdefault(key, Record(key))
        record.repeated |= suffix in record.members
        record.members[suffix] = content
    found: list[Record | Reject] = list(records.values())
    if truncated:
        found.append(Reject(f"{shard_name}/", "tar_truncated"))
    return found or [Reject(f"{shard_name}/", "shard_empty")]


def decode(record: Record | Reject, image_size: int) -> Sample | Reject:
    """Decode a record's image and caption. Never raises for what is in them."""
    if isinstance(record, Reject):
        return record
    try:
        if record.repeated:
            raise _Unusable("key_repeated")
        # The caption first: it costs nothing, an image does.
        caption = _caption(record.members)
        return Sample(record.key, _image(record.members, image_size), caption)
    except _Unusable as unusable:
        return Reject(record.key, unusable.cause)


def fit(image: Image.Image, size: int) -> np.ndarray:
    """Any Pillow image as [size, size, 3] uint8 RGB: upright, on white, shorter side resized (bicubic), centre crop."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        # Pillow's own conversion would clip the 16 bits at 255: a white image.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    # Resizing just the central square does what resizing all and cropping would, and a 1 x 1,000,000 image stays cheap.
    image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image)


def _members(data: bytes) -> tuple[list[tuple[str, memoryview]], bool]:
    """The regular files of a tar, and whether it broke off."""
    view = memoryview(data)
    found: list[tuple[str, memoryview]] = []
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                if end > len(data):
                    return found, True
                if member.isreg() and not member.issparse():
                    found.append((member.name, view[member.offset_data : end]))
            # tarfile takes a broken header after the first for the end. The true end is a block of zeros.
            return found, data[tar.offset : tar.offset + tarfile.BLOCKSIZE] != tarfile.NUL * tarfile.BLOCKSIZE
    except Exception:
        # Garbage makes tarfile raise far more than its own errors (ValueError, UnicodeError, RecursionError, …).
        return found, True


def _image(members: dict[str, memoryview], image_size: int) -> np.ndarray:
    content = _first(members, IMAGE_SUFFIXES)
    if content is None:
        raise _Unusable("image_missing")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # Only these formats: Pillow's others include readers that start programs.
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
                return fit(image, image_size)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise _Unusable("image_too_large") from None
    except Exception:
        # Pillow's plugins raise nearly anything on broken files (OSError, SyntaxError, struct.error, EOFError, …).
        raise _Unusable("image_undecodable") from None


def _caption(members: dict[str, memoryview]) -> str:
    try:
        if "txt" in members:
            caption = bytes(members["txt"]).decode("utf-8-sig")
        elif "json" in members:
            caption = _json_caption(bytes(members["json"]))
        else:
            raise _Unusable("caption_missing")
        caption.encode()  # "\ud800" is valid JSON, but no text: neither Arrow nor a tokenizer takes it
    except UnicodeError:
        raise _Unusable("caption_not_utf8") from None
    caption = caption.strip()
    if not caption:
        raise _Unusable("caption_empty")
    return caption


def _json_caption(content: bytes) -> str:
    text = content.decode("utf-8-sig")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise _Unusable("caption_json_invalid") from None
    if not isinstance(fields, dict):
        raise _Unusable("caption_json_invalid")
    caption = fields.get("caption")
    if caption is None:
        raise _Unusable("caption_missing")
    if not isinstance(caption, str):
        raise _Unusable("caption_json_invalid")
    return caption


def _first(members: dict[str, memoryview], suffixes: Sequence[str]) -> memoryview | None:
    return next((members[suffix] for suffix in suffixes if suffix in members), None)
