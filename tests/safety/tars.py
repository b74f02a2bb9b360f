"""Hostile tars, images and captions, by what an inspection (and so a training) counts of their shard."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import inspect_unit
from tests.ray_platform.conftest import png, samples_of, tar_of
from tests.safety.cases import Case

DOOR = "`data.sources`, a shard"
GOOD = samples_of(0, 2)


def counted(folder: Path, *shards: bytes, **fields) -> str:
    """What is used and rejected of shards."""
    for number, content in enumerate(shards):
        (folder / f"{number:05d}.tar").write_bytes(content)
    catalog = build_catalog(DataConfig(sources=(str(folder),), image_size=16, **fields))
    found = [inspect_unit(unit, DataConfig(image_size=16, **fields)) for pool in catalog.pools for unit in pool]
    rejects: dict[str, int] = {}
    for part in found:
        for cause, count in (part.rejected + part.lost_units).items():
            rejects[cause] = rejects.get(cause, 0) + count
    return ", ".join([f"{sum(part.used for part in found)} used", *(f"{c} × {cause}" for cause, c in sorted(rejects.items()))])


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None) -> bytes:
    """A member with whatever size its header shall have, also below zero."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))[-512:]
    wanted = len(content) if size is None else size
    header[124:136] = b"%011o\0" % wanted if 0 <= wanted < 8**11 else b"\xff" + (wanted & (2**88 - 1)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + b"\0" * (-len(content) % 512)


def pax(fields: list[tuple[str, str]], kind: bytes = tarfile.XHDTYPE) -> bytes:
    """An extended header, for the next member or for all."""
    content = b""
    for name, value in fields:
        length = len(name) + len(value) + 3
        while len(str(length)) + len(name) + len(value) + 3 != length:
            length = len(str(length)) + len(name) + len(value) + 3
        content += f"{length} {name}={value}\n".encode()
    return member("pax", content, kind)


END = b"\0" * 1024


SHARDS: list[tuple[Callable[[], bytes], str]] = []  # what builds each, and the answer that it gets


def tar_case(what: str, answer: str, build: Callable[[], bytes]) -> Case:
    SHARDS.append((build, answer))
    return Case(what, DOOR, answer, lambda folder: counted(folder, build()))


def samples() -> bytes:
    """Two good ones, without the tar's end."""
    return b"".join(member(name, content) for name, content in GOOD)


def picture(content: bytes, suffix: str = "png", caption: bytes = b"a caption") -> bytes:
    return tar_of([*GOOD, (f"x.{suffix}", content), ("x.txt", caption)])


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG that says it is so large, of a line of zeros."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks, (b"IDAT", zlib.compress(b"\0" * 100))]
    parts.append((b"IEND", b""))
    chunk = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk)


def encoded(kind: str, size: tuple[int, int], **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB" if kind == "WEBP" else "L", size).save(buffer, kind, **options)
    return buffer.getvalue()


def scanned_again(times: int) -> bytes:
    """A progressive JPEG whose last scan comes so often."""
    content = encoded("JPEG", (8000, 8000), progressive=True)
    at = content.rfind(b"\xff\xda")
    return content[:at] + content[at:-2] * times + b"\xff\xd9"


def jpeg_of(width: int, height: int) -> bytes:
    """A small JPEG that says it is so large."""
    content = bytearray(encoded("JPEG", (8, 8)))
    at = content.find(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def webp_of(width: int, height: int) -> bytes:
    """A small lossless WebP that says it is so large: two times 14 bits behind a mark."""
    content = bytearray(encoded("WEBP", (8, 8), lossless=True))
    at = content.find(b"VP8L") + 9
    rest = int.from_bytes(content[at : at + 4], "little") >> 28 << 28
    content[at : at + 4] = (rest | (height - 1) << 14 | (width - 1)).to_bytes(4, "little")
    return bytes(content)


def unpacking_to(size: int) -> bytes:
    packer = zlib.compressobj()
    return b"".join([*(packer.compress(b"\0" * 2**20) for _ in range(size // 2**20)), packer.flush()])


def many_small(count: int) -> bytes:
    """A header for all, of many fields, and many empty members: each would get a copy of the fields."""
    fields = pax([(f"field{i}", "x") for i in range(50_000)], tarfile.XGLTYPE)
    return samples() + fields + member("a.json", b"{}") * count + END


TARS = [
    tar_case(
        "a tar whose member is named `../../../escaped.png`",
        "3 used",
        lambda: samples() + member("../../../escaped.png", png(7)) + member("../../../escaped.txt", b"c") + END,
    ),
    tar_case(
        "a member with an absolute name",
        "3 used",
        lambda: samples() + member("/escaped.png", png(7)) + member("/escaped.txt", b"c") + END,
    ),
    tar_case(
        "links to `/etc/passwd`, device nodes and a pipe under a sample's names",
        "2 used",
        lambda: (
            samples()
            + member("l.txt", kind=tarfile.SYMTYPE, link="/etc/passwd")
            + member("l.png", kind=tarfile.LNKTYPE, link="/etc/passwd")
            + member("d.png", kind=tarfile.CHRTYPE)
            + member("b.png", kind=tarfile.BLKTYPE)
            + member("p.png", kind=tarfile.FIFOTYPE)
            + END
        ),
    ),
    tar_case(
        "a member of 8 exabytes by its header", "2 used, 1 × tar_truncated", lambda: samples() + member("x.png", size=2**63) + END
    ),
    tar_case(
        "a member of -512 bytes, at which Python's tarfile reads the same header for ever",
        "2 used, 1 × tar_truncated",
        lambda: samples() + member("x.png", size=-512) + END,
    ),
    tar_case(
        "a PAX header that gives a size below zero",
        "2 used, 1 × tar_truncated",
        lambda: samples() + pax([("size", "-1536")]) + member("x.png") + END,
    ),
    tar_case(
        "a sparse member of a terabyte",
        "2 used, 1 × tar_truncated",
        lambda: (
            samples()
            + pax(
                [
                    ("GNU.sparse.major", "1"),
                    ("GNU.sparse.minor", "0"),
                    ("GNU.sparse.realsize", str(2**40)),
                    ("GNU.sparse.name", "x.png"),
                ]
            )
            + member("s.png", b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512)
            + END
        ),
    ),
    tar_case(
        "50,000 fields for all members, and 20,000 members, each of which gets a copy",
        "2 used, 1 × tar_truncated",
        lambda: many_small(20_000),
    ),
    tar_case(
        "20,000 long-name headers, one in the other",
        "2 used, 1 × tar_truncated",
        lambda: samples() + member("././@LongLink", b"x", tarfile.GNUTYPE_LONGNAME) * 20_000 + END,
    ),
    tar_case(
        "a name of a megabyte",
        "2 used, 2 × name_too_long",
        lambda: (
            samples()
            + pax([("path", "n" * 2**20 + ".png")])
            + member("n.png", png(7))
            + pax([("path", "n" * 2**20 + ".txt")])
            + member("n.txt", b"c")
            + END
        ),
    ),
    tar_case("a gzipped tar under the name .tar", "0 used, 1 × tar_truncated", lambda: zlib.compress(tar_of(GOOD), wbits=31)),
]

IMAGES = [
    tar_case(
        "a PNG of 100,000 × 100,000 pixels in 200 bytes", "2 used, 1 × image_too_large", lambda: picture(png_of(100_000, 100_000))
    ),
    tar_case(
        "a JPEG of 65,000 × 65,000 pixels in 700 bytes",
        "2 used, 1 × image_too_large",
        lambda: picture(jpeg_of(65_000, 65_000), "jpg"),
    ),
    tar_case(
        "a WebP of 16,000 × 16,000 pixels in 50 bytes",
        "2 used, 1 × image_too_large",
        lambda: picture(webp_of(16_000, 16_000), "webp"),
    ),
    tar_case(
        "a progressive JPEG of 64 megapixels whose last scan comes 20,000 times (hours of decoding)",
        "2 used, 1 × image_too_large",
        lambda: picture(scanned_again(20_000), "jpg"),
    ),
    tar_case(
        "a PNG with a comment that unpacks to 512 MB",
        "2 used, 1 × image_undecodable",
        lambda: picture(png_of(1, 1, (b"zTXt", b"Comment\0\0" + unpacking_to(2**29)))),
    ),
    tar_case(
        "an EPS file, which Pillow would give to Ghostscript, under the name .png",
        "2 used, 1 × image_undecodable",
        lambda: picture(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\n"),
    ),
    tar_case(
        "an SVG with an external entity under the name .png",
        "2 used, 1 × image_undecodable",
        lambda: picture(
            b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg xmlns="http://www.w3.org/2000/svg">&e;</svg>'
        ),
    ),
    tar_case("a caption of 5 MB", "2 used, 1 × caption_too_long", lambda: picture(png(7), caption=b"word " * 2**20)),
    tar_case("a caption that is no UTF-8", "2 used, 1 × caption_not_utf8", lambda: picture(png(7), caption=b"\xff\xfe\x00")),
    Case(
        "a .json of 100,000 nested lists",
        DOOR,
        "2 used, 1 × json_invalid",
        lambda folder: counted(folder, tar_of([*GOOD, ("x.png", png(7)), ("x.json", b"[" * 100_000)])),
    ),
    Case(
        "a .json of 20 MB",
        DOOR,
        "2 used, 1 × json_too_large",
        lambda folder: counted(
            folder, tar_of([*GOOD, ("x.png", png(7)), ("x.json", b'{"caption": "' + b"x" * 20_000_000 + b'"}')])
        ),
    ),
    Case(
        "a .json with a number of a million digits",
        DOOR,
        "2 used, 1 × json_invalid",
        lambda folder: counted(folder, tar_of([*GOOD, ("x.png", png(7)), ("x.json", b'{"caption": ' + b"9" * 1_000_000 + b"}")])),
    ),
]
