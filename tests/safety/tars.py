"""Hostile tars, images and captions, passed to an inspection, which counts samples in the same way as training."""

import io
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.data.inspection import inspect_unit
from tests.ray_platform.conftest import png, samples_of, tar_of
from tests.safety.cases import Feed

GOOD = samples_of(0, 2)
END = b"\0" * 1024


def shard(build: Callable[[], bytes]) -> Feed:
    """Return a case that counts the used and rejected samples of a shard."""

    def feed(folder: Path) -> str:
        (folder / "00000.tar").write_bytes(build())
        (pool,) = build_catalog(DataConfig(sources=(str(folder),), image_size=16)).pools
        inspections = [inspect_unit(unit, DataConfig(image_size=16)) for unit in pool]
        rejects = sum((Counter(part.rejected) + Counter(part.lost_units) for part in inspections), Counter())
        counts = [f"{count} × {cause}" for cause, count in sorted(rejects.items())]
        return ", ".join([f"{sum(part.used for part in inspections)} used", *counts])

    return feed


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "", size: int | None = None) -> bytes:
    """Return a member whose header claims `size`, which may be negative."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, 0
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT, errors="surrogateescape"))[-512:]
    size = len(content) if size is None else size
    header[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else b"\xff" + (size & (2**88 - 1)).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + b"\0" * (-len(content) % 512)


def pax(kind: bytes = tarfile.XHDTYPE, **fields: str) -> bytes:
    """Return an extended header, for the next member or for all members."""
    content = b""
    for name, value in fields.items():
        length = len(name) + len(value) + 3
        while len(str(length)) + len(name) + len(value) + 3 != length:
            length = len(str(length)) + len(name) + len(value) + 3
        content += f"{length} {name}={value}\n".encode()
    return member("pax", content, kind)


def broken_tar(*members: bytes) -> bytes:
    """Return a tar of two good samples followed by the given members."""
    return b"".join([*(member(name, content) for name, content in GOOD), *members, END])


def links() -> bytes:
    """Return a tar in which sample members are links to a system file, devices and a pipe."""
    kinds = {"l.txt": tarfile.SYMTYPE, "l.png": tarfile.LNKTYPE}
    kinds |= {"d.png": tarfile.CHRTYPE, "b.png": tarfile.BLKTYPE, "p.png": tarfile.FIFOTYPE}
    return broken_tar(*(member(name, kind=kind, link="/etc/passwd") for name, kind in kinds.items()))


def sparse() -> bytes:
    fields = {"major": "1", "minor": "0", "realsize": str(2**40), "name": "x.png"}
    header = pax(**{f"GNU.sparse.{name}": value for name, value in fields.items()})
    return broken_tar(header, member("s.png", b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512))


def sample(content: bytes, suffix: str = "png", **texts: bytes) -> bytes:
    """Return a tar of two good samples and one with this image and a caption, or with the given texts by suffix."""
    others = texts or {"txt": b"a caption"}
    return tar_of([*GOOD, (f"x.{suffix}", content), *((f"x.{name}", text) for name, text in others.items())])


def png_of(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Return a PNG whose header claims a size but whose data is 100 zeros."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks, (b"IDAT", zlib.compress(b"\0" * 100))]
    parts.append((b"IEND", b""))
    chunk = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk)


def jpeg(size: int, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (size, size)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def repeated_scan(times: int) -> bytes:
    """Return a progressive JPEG whose last scan is repeated."""
    content = jpeg(1024, progressive=True)
    at = content.rfind(b"\xff\xda")
    return content[:at] + content[at:-2] * times + b"\xff\xd9"


def jpeg_of(width: int, height: int) -> bytes:
    """Return a small JPEG whose header claims a size."""
    content = bytearray(jpeg(8))
    at = content.find(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def unpacking_to(megabytes: int) -> bytes:
    packer = zlib.compressobj()
    first, later = (packer.compress(b"\0" * 2**20) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + later * (megabytes - 1) + packer.flush()


SHARDS: dict[str, Callable[[], bytes]] = {
    "members named `../../../escaped.png` and `/escaped.png`": lambda: broken_tar(
        *(member(f"{key}.png", png(7)) + member(f"{key}.txt", b"a caption") for key in ("../../../escaped", "/escaped"))
    ),
    "links to `/etc/passwd`, device nodes and a pipe under a sample's names": links,
    "a member of 8 exabytes by its header": lambda: broken_tar(member("x.png", size=2**63)),
    "a member of -512 bytes, at which Python's tarfile reads the same header for ever": lambda: broken_tar(
        member("x.png", size=-512)
    ),
    "a PAX header that gives a size below zero": lambda: broken_tar(pax(size="-1536"), member("x.png")),
    "a sparse member of a terabyte": sparse,
    "50,000 fields for all members, and 20,000 members, each of which gets a copy": lambda: broken_tar(
        pax(tarfile.XGLTYPE, **{f"field{i}": "x" for i in range(50_000)}), member("a.json", b"{}") * 20_000
    ),
    "20,000 long-name headers, one in the other": lambda: broken_tar(
        member("././@LongLink", b"x", tarfile.GNUTYPE_LONGNAME) * 20_000
    ),
    "a name of a megabyte": lambda: broken_tar(pax(path="n" * 2**20 + ".png"), member("n.png", png(7))),
    "a PNG of 100,000 × 100,000 pixels in 200 bytes": lambda: sample(png_of(100_000, 100_000)),
    "a JPEG of 65,000 × 65,000 pixels in 700 bytes": lambda: sample(jpeg_of(65_000, 65_000), "jpg"),
    "a progressive JPEG of a megapixel whose last scan comes 20,000 times": lambda: sample(repeated_scan(20_000), "jpg"),
    "a PNG with a comment that unpacks to 512 MB": lambda: sample(png_of(1, 1, (b"zTXt", b"Comment\0\0" + unpacking_to(512)))),
    "an EPS file, which Pillow would give to Ghostscript, under the name .png": lambda: sample(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(canary) (w) file closefile\n"
    ),
    "a caption of 5 MB": lambda: sample(png(7), txt=b"word " * 2**20),
    "a caption that is not UTF-8": lambda: sample(png(7), txt=b"\xff\xfe\x00"),
    "a .json of 100,000 nested lists": lambda: sample(png(7), json=b"[" * 100_000),
    "a .json of 20 MB": lambda: sample(png(7), json=b'{"caption": "' + b"x" * 20_000_000 + b'"}'),
    "a .json with a number of a million digits": lambda: sample(png(7), json=b'{"caption": ' + b"9" * 1_000_000 + b"}"),
}
