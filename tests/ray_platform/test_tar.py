import io
import random
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_platform.data.causes import RejectedSample
from ray_platform.data.tar import Record, read_part, read_tar
from tests.ray_platform.conftest import samples_of, tar_of

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
    """Return a tar without the zeros at its end."""
    return tar[: -(-len(tar.rstrip(b"\0")) // BLOCK) * BLOCK]


@pytest.mark.parametrize(
    ("names", "records"),
    [
        (["0.jpg", "0.json", "0.txt", "1.JPEG"], {"0": ["jpg", "json", "txt"], "1": ["jpeg"]}),
        (["0.jpg", "0.seg.png", "stats.json.parquet", "README", ".txt.swp"], {"0": ["jpg"]}),  # sidecar files are ignored
        (["0.jpg", "1.jpg", "2.jpg", "2.txt", "0.txt"], {"0": ["jpg", "txt"], "1": ["jpg"], "2": ["jpg", "txt"]}),
        (["./a/0.jpg", "b/0.jpg", "a//0.txt", "/b/0.txt"], {"a/0": ["jpg", "txt"], "b/0": ["jpg", "txt"]}),
        (["0.jpg", "a.b/0.jpg"], {"0": ["jpg"], "a.b/0": ["jpg"]}),
        (["größe ✓.jpg", "long" * 50 + ".jpg"], {"größe ✓": ["jpg"], "long" * 50: ["jpg"]}),
    ],
)
def test_members_are_grouped_by_key_in_the_order_of_their_first_members(names, records):
    found = contents(read_tar(tar_of([(name, name.encode()) for name in names]), "s.tar"))
    assert {key: list(members) for key, members in found.items()} == {f"s.tar/{key}": kinds for key, kinds in records.items()}
    assert list(found) == [f"s.tar/{key}" for key in records]
    for key, members in found.items():
        stem = key.rpartition("/")[2]
        assert all(content.decode().lower().endswith(f"{stem}.{suffix}") for suffix, content in members.items())


def test_a_file_name_that_comes_twice_is_reported():
    names = ("0.jpg", "0.txt", "1.jpg", "1.txt", "0.txt", "1.JPG", "2.jpg")
    assert [record.repeated for record in read_tar(tar_of([(name, b"x") for name in names]), "s.tar")] == [True, True, False]


def test_a_name_that_is_not_utf8_becomes_a_printable_key():
    tar = tar_of([("aaa.jpg", b"x")])
    header = tar[:148].replace(b"aaa.", b"a\xffa.") + b" " * 8 + tar[156:BLOCK]
    signed = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    assert [record.key for record in read_tar(signed + tar[BLOCK:], "s.tar")] == ["s.tar/a\\udcffa"]


@pytest.mark.parametrize("data", [b"", b"\xab" * 5000, b"<html>" + b" " * 1000, b"\x1f\x8b" + b"\0" * 600, b"\0" * 100])
def test_a_file_that_is_not_a_tar_is_truncated(data):
    assert read_tar(data, "s.tar") == [TRUNCATED]


@pytest.mark.parametrize("members", [[], [("README", b"x"), ("stats.parquet", b"x")]])
def test_a_tar_without_samples(members):
    assert read_tar(tar_of(members), "s.tar") == [EMPTY]


def test_a_cut_tar_gives_what_precedes_the_cut():
    members = samples_of(0, 8)
    tar = tar_of(members)
    whole = list(contents(read_tar(tar, "s.tar")).items())
    end, ends, at = len(without_end(tar)), [], 0
    for _, content in members:
        ends.append(at + BLOCK + len(content))
        at = -(-ends[-1] // BLOCK) * BLOCK
    for length in (*range(0, end, 97), *range(0, end, BLOCK), *ends, *(last - 1 for last in ends), end, end + BLOCK - 1):
        *records, last = read_tar(tar[:length], "s.tar")
        intact = sum(last <= length for last in ends)
        assert last == TRUNCATED
        assert sum(len(record.members) for record in records) == intact
        assert list(contents(records).items())[: intact // 2] == whole[: intact // 2]


def test_what_follows_the_members_decides_whether_a_tar_is_whole():
    tar, more = tar_of(samples_of(0, 3)), tar_of(samples_of(3, 3))
    garbage = [without_end(tar) + behind for behind in (b"\xab" * 2048, b"\xab" * 100, b"ustar" * 500)]
    # A broken copy, or `cat a.tar b.tar`, has more data after the block of zeros that ends a tar.
    for data in (*garbage, tar + more, without_end(tar) + b"\0" * BLOCK + without_end(more)):
        *records, last = read_tar(data, "s.tar")
        assert (len(records), last) == (3, TRUNCATED)
    assert len(read_tar(tar + b"\0" * 50_000, "s.tar")) == 3


@pytest.fixture(scope="module")
def six_samples():
    return samples_of(0, 6)


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_damage_never_raises_and_never_passes_unnoticed(six_samples, seed):
    rng = random.Random(seed)
    # The last sample stays intact: if only its header is lost, the remaining zeros look like the end of any tar.
    end = len(without_end(tar_of(six_samples[:-2])))
    broken = bytearray(tar_of(six_samples))
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
    # The decoder detects changed content. The reader must report missing or misnamed members.
    if TRUNCATED not in records:
        assert sum(len(record.members) for record in records if isinstance(record, Record)) == len(six_samples)


# ---------------------------------------------------------------------------------------------------------------- parts


def read_parts(tar: bytes, part: int, behind: int) -> list[Record | RejectedSample]:
    """Read all parts of a tar, each in the same way as `read_tar_slice`."""
    found = []
    for start in range(0, len(tar), part):
        stop, more, records = min(start + part, len(tar)), behind, None
        while records is None:
            until = min(stop + more, len(tar))
            records = read_part(tar[start:until], "s.tar", stop - start, first=start == 0, last=until == len(tar))
            assert records or until < len(tar)
            more *= 8
        found += records
    return found


@st.composite
def tars(draw) -> bytes:
    rng = random.Random(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))
    name = draw(st.sampled_from(("{:05d}", "größe {:05d}", "name " * 30 + "{:05d}", "folder/" * 15 + "{:05d}")))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for number, sizes in enumerate(draw(st.lists(st.lists(st.integers(0, 4000), min_size=1, max_size=4), max_size=8))):
            for suffix, size in zip(("jpg", "txt", "json", "cls"), sizes, strict=False):
                info = tarfile.TarInfo((f"{number:05d}" if kind == tarfile.USTAR_FORMAT else name.format(number)) + f".{suffix}")
                if kind == tarfile.PAX_FORMAT:
                    info.mtime = 0.5  # like `tar --format=posix`, which adds an extra header before each member
                content = rng.randbytes(size)
                if rng.random() < 0.3:
                    content = (tarfile.TarInfo("fake.jpg").tobuf()[:-1] + b"!") * (size // BLOCK)  # valid except its checksum
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@settings(max_examples=100, deadline=None)
@given(tars(), st.sampled_from(("whole", "cut", "damaged")), st.integers(1, 24), st.integers(1, 40), st.data())
def test_parts_have_each_sample_once_wherever_the_cuts_are(tar, state, part, behind, data):
    if state == "cut":
        tar = tar[: data.draw(st.integers(0, len(without_end(tar)) + BLOCK - 1))]
    elif state == "damaged":
        broken = bytearray(tar)
        for at in data.draw(st.lists(st.integers(0, len(tar) - 1), min_size=1, max_size=3)):
            broken[at : at + 700] = random.Random(at).randbytes(700)
        tar = bytes(broken)
    records = read_parts(tar, part * BLOCK, behind * BLOCK)
    assert len(contents(records)) == sum(isinstance(record, Record) for record in records)  # keys are unique
    if state != "damaged":
        assert list(contents(records).items()) == list(contents(read_tar(tar, "s.tar")).items())
    rejected = {record for record in records if isinstance(record, RejectedSample)}
    if state == "whole":  # a part in which no sample begins yields only EMPTY
        assert rejected <= {EMPTY}
    elif state == "cut":
        assert TRUNCATED in rejected or not tar


def test_garbage_in_a_part_does_not_make_it_read_on():
    tar = tar_of(samples_of(0, 200))
    broken = tar[: 20 * BLOCK] + b"\xab" * 10 * BLOCK + tar[30 * BLOCK :]
    length = 100 * BLOCK
    *records, last = read_part(broken[: 2 * length + 2**16], "s.tar", length, first=True, last=False)
    assert last == TRUNCATED
    assert 1 < len(records) < 8
    # The parts after it are not affected.
    rest = read_part(broken[length:], "s.tar", length, first=False, last=False)
    assert all(isinstance(record, Record) for record in rest)


def test_a_tar_in_a_tar_is_noticed_where_a_part_begins_in_it():
    tar = tar_of([*samples_of(100, 2), ("big.tar", tar_of(samples_of(0, 20))), *samples_of(200, 2)])
    assert len(read_tar(tar, "s.tar")) == 4
    assert TRUNCATED in read_parts(tar, 40 * BLOCK, 20 * BLOCK)
