import io
import json
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ray_platform.data.decode import CAUSES, Record, Reject, Sample, decode, fit, read_tar

SIZE = 8


def encode(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size: all that a decompression bomb needs for a start."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.fixture
def decode_all(build_tar):
    """decode_all([(name, content), …]) -> what a shard "s.tar" of these members gives."""

    def run(members) -> list[Sample | Reject]:
        return [decode(record, SIZE) for record in read_tar(build_tar(members), "s.tar")]

    return run


def test_members_make_samples(decode_all, build_png):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    samples = decode_all(
        [
            ("000.jpg", encode(picture, "JPEG")),
            ("000.json", b'{"caption": "from json", "url": "x"}'),
            ("000.txt", "größe ✓\n".encode()),
            ("001.JPEG", encode(picture, "JPEG")),
            ("001.json", b'{"caption": "from json"}'),
            ("stats.json.parquet", b"a sidecar"),
            ("002.webp", encode(picture, "WEBP")),
            ("./sub/000.png", build_png(1)),
            ("002.txt", b"\xef\xbb\xbfnot beside its image"),
            ("sub/000.txt", b"below a folder"),
        ]
    )
    assert [(sample.key, sample.caption) for sample in samples] == [
        ("s.tar/000", "größe ✓"),
        ("s.tar/001", "from json"),
        ("s.tar/002", "not beside its image"),
        ("s.tar/sub/000", "below a folder"),
    ]
    for sample in samples:
        assert sample.image.shape == (SIZE, SIZE, 3)
        assert sample.image.dtype == np.uint8


GOOD = encode(Image.new("RGB", (9, 9), "red"), "PNG")


@pytest.mark.parametrize(
    ("members", "cause"),
    [
        ({"txt": b"a caption"}, "image_missing"),
        ({"gif": b"GIF89a", "txt": b"a caption"}, "image_missing"),
        ({"jpg": b"", "txt": b"a caption"}, "image_undecodable"),
        ({"jpg": b"<html>404</html>", "txt": b"a caption"}, "image_undecodable"),
        ({"png": GOOD[:-30], "txt": b"a caption"}, "image_undecodable"),
        ({"png": GOOD[:40] + b"\xff" * 8 + GOOD[48:], "txt": b"a caption"}, "image_undecodable"),
        ({"jpg": encode(Image.new("RGB", (9, 9)), "GIF"), "txt": b"a caption"}, "image_undecodable"),
        ({"png": png_header(12_000, 12_000), "txt": b"a caption"}, "image_too_large"),
        ({"png": png_header(60_000, 60_000), "txt": b"a caption"}, "image_too_large"),
        ({"png": GOOD}, "caption_missing"),
        ({"png": GOOD, "json": b'{"url": "x"}'}, "caption_missing"),
        ({"png": GOOD, "json": b'{"caption": null}'}, "caption_missing"),
        ({"png": GOOD, "txt": b""}, "caption_empty"),
        ({"png": GOOD, "txt": b" \n\t", "json": b'{"caption": "not asked"}'}, "caption_empty"),
        ({"png": GOOD, "json": b'{"caption": ""}'}, "caption_empty"),
        ({"png": GOOD, "txt": "größe".encode("latin-1")}, "caption_not_utf8"),
        ({"png": GOOD, "json": b'{"caption": "\xff"}'}, "caption_not_utf8"),
        ({"png": GOOD, "json": b'{"caption": "\\ud800"}'}, "caption_not_utf8"),
        ({"png": GOOD, "json": b"{"}, "caption_json_invalid"),
        ({"png": GOOD, "json": b"[" * 100_000}, "caption_json_invalid"),
        ({"png": GOOD, "json": b'["a caption"]'}, "caption_json_invalid"),
        ({"png": GOOD, "json": b'{"caption": 3}'}, "caption_json_invalid"),
    ],
)
def test_what_cannot_be_used_is_rejected_alone(decode_all, members, cause):
    between = [("0.png", GOOD), ("0.txt", b"before"), *((f"1.{suffix}", content) for suffix, content in members.items())]
    before, reject, after = decode_all([*between, ("2.png", GOOD), ("2.txt", b"after")])
    assert reject == Reject("s.tar/1", cause)
    assert (before.caption, after.caption) == ("before", "after")


def test_a_file_name_that_comes_twice(decode_all):
    samples = decode_all([("0.png", GOOD), ("0.txt", b"one"), ("0.png", GOOD), ("0.txt", b"two")])
    assert samples == [Reject("s.tar/0", "key_repeated")]


def test_two_images_of_one_key_are_one_sample(decode_all):
    # The first of IMAGE_SUFFIXES counts, wherever it stands in the tar.
    (sample,) = decode_all([("0.png", GOOD), ("0.jpg", b"broken"), ("0.txt", b"one")])
    assert sample == Reject("s.tar/0", "image_undecodable")


def test_names_that_are_not_utf8_can_still_be_written_down(build_tar):
    data = build_tar([("aaa.png", GOOD), ("aaa.txt", b"x")]).replace(b"aaa.", b"a\xffa.")
    # The header's checksum has to follow the change of the name.
    fixed = bytearray(data)
    for offset in range(0, len(data), 512):
        if data[offset : offset + 4] == b"a\xffa.":
            fixed[offset + 148 : offset + 156] = b" " * 8
            fixed[offset + 148 : offset + 156] = b"%06o\0 " % sum(fixed[offset : offset + 512])
    (record,) = read_tar(bytes(fixed), "s.tar")
    assert record.key == "s.tar/a\\udcffa"
    assert record.key.encode()


@pytest.mark.parametrize("missing", [100, 1024 * 9 + 1, 512 * 21, 10240])
def test_a_truncated_tar_gives_what_was_readable(build_tar, build_samples, missing):
    whole = build_tar(build_samples(0, 10))
    end = len(whole.rstrip(b"\0"))
    cut = whole[: end - missing]
    *records, last = read_tar(cut, "s.tar")
    assert last == Reject("s.tar/", "tar_truncated")
    samples = [decode(record, SIZE) for record in records]
    good = [sample for sample in samples if isinstance(sample, Sample)]
    assert [sample.caption for sample in good] == [f"sample {number}" for number in range(len(good))]
    assert 0 < len(good) < 10
    assert len(samples) - len(good) <= 1


def test_a_tar_without_its_end_is_truncated_too(build_tar, build_samples):
    whole = build_tar(build_samples(0, 2))
    headers_and_blocks = whole[: -(-len(whole.rstrip(b"\0")) // 512) * 512]
    assert [type(record) for record in read_tar(headers_and_blocks, "s.tar")] == [Record, Record, Reject]
    assert len(read_tar(whole, "s.tar")) == 2


def test_garbage_after_good_members(build_tar, build_samples):
    whole = build_tar(build_samples(0, 3))
    content = whole[: -(-len(whole.rstrip(b"\0")) // 512) * 512]
    *records, last = read_tar(content + b"\xab" * 2048, "s.tar")
    assert (len(records), last) == (3, Reject("s.tar/", "tar_truncated"))


@pytest.mark.parametrize("data", [b"", b"\xab" * 5000, b"<html>" + b" " * 1000, b"\x1f\x8b" + b"\0" * 600])
def test_a_file_that_is_no_tar(data):
    assert read_tar(data, "s.tar") == [Reject("s.tar/", "tar_truncated")]


def test_a_tar_without_samples(build_tar):
    for members in ([], [("README", b"x"), ("stats.parquet", b"x")]):
        assert read_tar(build_tar(members), "s.tar") == [Reject("s.tar/", "shard_empty")]


@given(st.data())
def test_flipped_bytes_never_raise(data):
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("0.png", GOOD), ("0.json", json.dumps({"caption": "x"}).encode()), ("1.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    broken = bytearray(buffer.getvalue())
    for position in data.draw(st.lists(st.integers(0, 5 * 512 - 1), min_size=1, max_size=20)):
        broken[position] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for record in read_tar(bytes(broken), "s.tar"):
            sample = decode(record, SIZE)
            assert isinstance(sample, Sample) or sample.cause in CAUSES


def test_fit_crops_the_centre():
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 200
    assert (fit(Image.fromarray(stripes), 10) == 200).all()
    assert (fit(Image.fromarray(stripes).transpose(Image.Transpose.ROTATE_90), 10) == 200).all()


def test_fit_equals_resizing_the_whole_and_cropping():
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    whole = Image.fromarray(noise).resize((48, 32), Image.Resampling.BICUBIC).crop((8, 0, 40, 32))
    np.testing.assert_array_equal(fit(Image.fromarray(noise), 32), np.asarray(whole))


def test_fit_puts_transparency_on_white():
    clear = Image.new("RGBA", (9, 9), (255, 0, 0, 0))
    half = Image.new("LA", (9, 9), (0, 128))
    assert (fit(clear, 4) == 255).all()
    assert (fit(half, 4) == 127).all()
    palette = Image.open(io.BytesIO(encode(Image.new("P", (9, 9), 0), "PNG", transparency=0)))
    assert (fit(palette, 4) == 255).all()


def test_fit_turns_images_upright():
    picture = Image.fromarray(np.concatenate([np.zeros((4, 8, 3), np.uint8), np.full((4, 8, 3), 255, np.uint8)]))
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    turned = Image.open(io.BytesIO(encode(picture, "PNG", exif=exif)))
    np.testing.assert_array_equal(fit(turned, 8), np.asarray(picture)[::-1])


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "RGBA", "I;16"])
def test_fit_takes_every_mode(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((9, 9), 0x8000, np.uint16))
        assert (fit(image, 4) == 0x80).all()
    else:
        assert fit(Image.new("RGB", (9, 9), "white").convert(mode), 4).min() >= 250


def test_extreme_shapes_stay_cheap():
    assert fit(Image.new("RGB", (1, 1_000_000)), 256).shape == (256, 256, 3)
    assert fit(Image.new("RGB", (1, 1)), 256).shape == (256, 256, 3)
