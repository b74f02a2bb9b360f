import io
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_platform.data.causes import RejectedSample
from ray_platform.data.tar import Record, read_part, read_tar

TRUNCATED = RejectedSample("s.tar/", "tar_truncated")
EMPTY = RejectedSample("s.tar/", "shard_empty")
BLOCK = tarfile.BLOCKSIZE


def contents(records) -> dict[str, dict[str, bytes]]:
    return {
        record.key: {suffix: bytes(content) for suffix, content in record.members.items()}
        for record in records
        if isinstance(record, Record)
    }


def without_end(tar: bytes) -> bytes:
    """A tar up to the zeros that end it."""
    return tar[: -(-len(tar.rstrip(b"\0")) // BLOCK) * BLOCK]


def sign(header: bytes) -> bytes:
    """A header with the checksum that its other fields ask for."""
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def test_members_of_a_key_make_a_record_and_sidecars_do_not_count(build_tar):
    members = [
        ("00000.jpg", b"image"),
        ("00000.json", b"{}"),
        ("00000.txt", b"text"),
        ("00001.JPEG", b"other"),
        ("00001.seg.png", b"a sidecar"),
        ("stats.json.parquet", b"a sidecar"),
        ("README", b"a sidecar"),
        (".txt.swp", b"a sidecar"),
    ]
    assert contents(read_tar(build_tar(members), "s.tar")) == {
        "s.tar/00000": {"jpg": b"image", "json": b"{}", "txt": b"text"},
        "s.tar/00001": {"jpeg": b"other"},
    }


def test_members_out_of_order_find_each_other(build_tar):
    images = [(f"{number}.jpg", b"image %d" % number) for number in range(3)]
    texts = [(f"{number}.txt", b"text %d" % number) for number in (2, 0, 1)]
    expected = {f"s.tar/{number}": {"jpg": b"image %d" % number, "txt": b"text %d" % number} for number in range(3)}
    found = contents(read_tar(build_tar(images + texts), "s.tar"))
    assert found == expected
    assert list(found) == list(expected)


def test_a_file_name_that_comes_twice_is_told(build_tar):
    members = [
        ("0.jpg", b"a"),
        ("0.txt", b"a"),
        ("1.jpg", b"a"),
        ("1.txt", b"a"),
        ("0.txt", b"b"),
        ("1.JPG", b"b"),
        ("2.jpg", b"a"),
    ]
    assert [record.repeated for record in read_tar(build_tar(members), "s.tar")] == [True, True, False]


def test_folders_are_part_of_a_key(build_tar):
    members = [
        ("./a/0.jpg", b"1"),
        ("b/0.jpg", b"2"),
        ("a//0.txt", b"3"),
        ("/b/0.txt", b"4"),
        ("0.jpg", b"5"),
        ("a.b/0.jpg", b"6"),
    ]
    assert contents(read_tar(build_tar(members), "s.tar")) == {
        "s.tar/a/0": {"jpg": b"1", "txt": b"3"},
        "s.tar/b/0": {"jpg": b"2", "txt": b"4"},
        "s.tar/0": {"jpg": b"5"},
        "s.tar/a.b/0": {"jpg": b"6"},
    }


def test_what_is_no_file_is_passed_over():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, kind in (("0.jpg", tarfile.DIRTYPE), ("1.jpg", tarfile.SYMTYPE), ("2.jpg", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("3.jpg"))
    assert contents(read_tar(buffer.getvalue(), "s.tar")) == {"s.tar/3": {"jpg": b""}}


def test_names_that_are_not_utf8_can_still_be_written_down(build_tar):
    tar = build_tar([("aaa.jpg", b"x"), ("größe ✓.jpg", b"y"), ("long" * 50 + ".jpg", b"z")])
    named = sign(tar[:BLOCK].replace(b"aaa.", b"a\xffa.")) + tar[BLOCK:]
    keys = [record.key for record in read_tar(named, "s.tar")]
    assert keys == ["s.tar/a\\udcffa", "s.tar/größe ✓", "s.tar/" + "long" * 50]
    assert all(key.encode() for key in keys)


@pytest.mark.parametrize("data", [b"", b"\xab" * 5000, b"<html>" + b" " * 1000, b"\x1f\x8b" + b"\0" * 600, b"\0" * 100])
def test_a_file_that_is_no_tar(data):
    assert read_tar(data, "s.tar") == [TRUNCATED]


@pytest.mark.parametrize("members", [[], [("README", b"x"), ("stats.parquet", b"x")]])
def test_a_tar_without_samples(build_tar, members):
    assert read_tar(build_tar(members), "s.tar") == [EMPTY]


def test_a_cut_tar_gives_what_precedes_the_cut(build_tar, build_samples):
    members = build_samples(0, 8)
    tar = build_tar(members)
    whole = contents(read_tar(tar, "s.tar"))
    end, ends, at = len(without_end(tar)), [], 0
    for _, content in members:
        at += BLOCK + len(content)
        ends.append(at)
        at += -len(content) % BLOCK
    for length in (*range(0, end, 97), *range(0, end, BLOCK), *ends, *(last - 1 for last in ends), end, end + BLOCK - 1):
        *records, last = read_tar(tar[:length], "s.tar")
        intact = sum(last <= length for last in ends)
        assert last == TRUNCATED
        assert sum(len(record.members) for record in records) == intact
        assert list(contents(records).items())[: intact // 2] == list(whole.items())[: intact // 2]


def test_garbage_after_good_members(build_tar, build_samples):
    tar = build_tar(build_samples(0, 3))
    for garbage in (b"\xab" * 2048, b"\xab" * 100, b"ustar" * 500):
        *records, last = read_tar(without_end(tar) + garbage, "s.tar")
        assert (len(records), last) == (3, TRUNCATED)


def test_a_hole_in_the_file_is_not_taken_for_its_end(build_tar, build_samples):
    # What a broken copy leaves, or `cat a.tar b.tar`: a block of zeros ends a tar, yet there is more.
    tar, more = build_tar(build_samples(0, 3)), build_tar(build_samples(3, 3))
    for data in (tar + more, without_end(tar) + b"\0" * BLOCK + without_end(more)):
        *records, last = read_tar(data, "s.tar")
        assert (len(records), last) == (3, TRUNCATED)
    assert len(read_tar(tar + b"\0" * 50_000, "s.tar")) == 3


@pytest.mark.parametrize("seed", range(200))
def test_damage_never_raises_and_never_passes_unnoticed(build_tar, build_samples, seed):
    rng = random.Random(seed)
    members = build_samples(0, 6)
    tar = build_tar(members)
    # Not in the last sample: where only its header goes, zeros are left, as at the end of every tar.
    end = len(without_end(build_tar(members[:-2])))
    broken = bytearray(tar)
    for _ in range(rng.randint(1, 4)):
        at, junk = rng.randrange(end), rng.randbytes(rng.choice((1, 1, 2, 511, 512, 700)))
        match rng.choice(("flip", "cut", "insert", "zero")):
            case "flip":
                broken[at] ^= 1 << rng.randrange(8)
            case "cut":
                del broken[at : at + len(junk)]
            case "insert":
                broken[at:at] = junk
            case "zero":
                broken[at : at + BLOCK] = b"\0" * BLOCK
    records = read_tar(bytes(broken), "s.tar")
    assert records
    # A changed content is the decoder's to find. Here, what is missing or misnamed must come with a word about it.
    if TRUNCATED not in records:
        assert sum(len(record.members) for record in records if isinstance(record, Record)) == len(members)


# ---------------------------------------------------------------------------------------------------------------- parts


def read_parts(tar: bytes, part: int, behind: int) -> list[Record | RejectedSample]:
    """All parts of a tar, each read as data/source.py does."""
    found = []
    for start in range(0, len(tar), part):
        stop, more = min(start + part, len(tar)), behind
        while True:
            until = min(stop + more, len(tar))
            last = stop == len(tar) or until == len(tar)
            records = read_part(tar[start:until], "s.tar", stop - start, first=start == 0, last=last)
            if records is not None:
                break
            assert until < len(tar)
            more *= 8
        assert records
        found += records
    return found


@st.composite
def tars(draw) -> bytes:
    rng = random.Random(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    name = draw(st.sampled_from(("{:05d}", "größe {:05d}", "name " * 30 + "{:05d}", "folder/" * 15 + "{:05d}")))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for number, sizes in enumerate(draw(st.lists(st.lists(st.integers(0, 6000), min_size=1, max_size=4), max_size=12))):
            for suffix, size in zip(("jpg", "txt", "json", "cls"), sizes, strict=False):
                info = tarfile.TarInfo(name.format(number) + f".{suffix}")
                if kind == tarfile.USTAR_FORMAT:
                    info.name = f"{number:05d}.{suffix}"
                if kind == tarfile.PAX_FORMAT:
                    info.mtime = 0.5  # as `tar --format=posix` writes it: one more header before each
                content = rng.randbytes(size)
                if rng.random() < 0.3:
                    content = (tarfile.TarInfo("fake.jpg").tobuf()[:-1] + b"!") * (size // BLOCK)  # but for its checksum
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@settings(max_examples=150, deadline=None)
@given(tars(), st.integers(1, 24), st.integers(1, 40))
def test_parts_have_each_sample_once_wherever_the_cuts_are(tar, part, behind):
    whole = read_tar(tar, "s.tar")
    records = read_parts(tar, part * BLOCK, behind * BLOCK)
    assert len(contents(records)) == sum(isinstance(record, Record) for record in records)  # no key twice
    assert list(contents(records).items()) == list(contents(whole).items())
    # A part in which no sample begins has nothing else to give.
    assert {record for record in records if isinstance(record, RejectedSample)} <= {EMPTY}


@settings(max_examples=80, deadline=None)
@given(tars(), st.integers(1, 24), st.integers(1, 40), st.data())
def test_parts_of_a_cut_tar_have_what_precedes_the_cut(tar, part, behind, data):
    cut = tar[: data.draw(st.integers(0, len(without_end(tar)) + BLOCK - 1))]
    records = read_parts(cut, part * BLOCK, behind * BLOCK)
    assert list(contents(records).items()) == list(contents(read_tar(cut, "s.tar")).items())
    assert TRUNCATED in records or not cut


@settings(max_examples=80, deadline=None)
@given(tars(), st.integers(1, 24), st.integers(1, 40), st.data())
def test_parts_of_a_damaged_tar_give_no_sample_twice(tar, part, behind, data):
    broken = bytearray(tar)
    for at in data.draw(st.lists(st.integers(0, len(tar) - 1), min_size=1, max_size=3)):
        broken[at : at + 700] = random.Random(at).randbytes(700)
    records = read_parts(bytes(broken), part * BLOCK, behind * BLOCK)
    assert len(contents(records)) == sum(isinstance(record, Record) for record in records)


def test_garbage_in_a_part_does_not_make_it_read_on(build_tar, build_samples):
    tar = build_tar(build_samples(0, 200))
    broken = tar[: 20 * BLOCK] + b"\xab" * 10 * BLOCK + tar[30 * BLOCK :]
    length = 100 * BLOCK
    *records, last = read_part(broken[: 2 * length + 2**16], "s.tar", length, first=True, last=False)
    assert last == TRUNCATED
    assert 1 < len(records) < 8
    # The parts behind it are as good as ever.
    rest = read_part(broken[length:], "s.tar", length, first=False, last=False)
    assert all(isinstance(record, Record) for record in rest)


def test_a_tar_in_a_tar_is_noticed_where_a_part_begins_in_it(build_tar, build_samples):
    inner = build_tar(build_samples(0, 20))
    tar = build_tar([*build_samples(100, 2), ("big.tar", inner), *build_samples(200, 2)])
    assert len(read_tar(tar, "s.tar")) == 4
    assert TRUNCATED in read_parts(tar, 40 * BLOCK, 20 * BLOCK)
