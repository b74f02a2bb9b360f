import gzip
import io
import random
import tarfile

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_platform.data.causes import RejectedSample
from ray_platform.data.tar import Record, read_part, read_tar
from tests.ray_platform.conftest import samples_of, tar_of

TRUNCATED = RejectedSample("s.tar/", "tar_truncated")
EMPTY = RejectedSample("s.tar/", "shard_empty")
NOT_A_TAR = RejectedSample("s.tar/", "shard_not_a_tar")
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
    causes = [record.cause for record in read_tar(tar_of([(name, b"x") for name in names]), "s.tar")]
    assert causes == ["key_repeated", "key_repeated", ""]


def test_a_name_that_is_not_utf8_becomes_a_printable_key():
    tar = tar_of([("aaa.jpg", b"x")])
    header = tar[:148].replace(b"aaa.", b"a\xffa.") + b" " * 8 + tar[156:BLOCK]
    signed = header[:148] + b"%06o\0 " % sum(header) + header[156:]
    assert [record.key for record in read_tar(signed + tar[BLOCK:], "s.tar")] == ["s.tar/a\\udcffa"]


@pytest.mark.parametrize(
    ("data", "rejected"),
    [
        (b"", EMPTY),
        (b"\0" * 100, TRUNCATED),
        (b"\xab" * 5000, NOT_A_TAR),
        (tar_of(samples_of(0, 1))[:300], NOT_A_TAR),
        (tar_of(samples_of(0, 1))[:600], TRUNCATED),
        (b"\n<html>" + b" " * 1000, RejectedSample("s.tar/ (HTML or XML)", "shard_not_a_tar")),
        (gzip.compress(tar_of(samples_of(0, 2))), RejectedSample("s.tar/ (gzip)", "shard_not_a_tar")),
        (b"version https://git-lfs.github.com/spec/v1\noid", RejectedSample("s.tar/ (a git-lfs pointer)", "shard_not_a_tar")),
    ],
)
def test_a_file_without_a_member_is_rejected_by_what_it_is(data, rejected):
    assert read_tar(data, "s.tar") == [rejected]
    if data:
        assert read_part(data, "s.tar", len(data), first=True, last=True) == [rejected]


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
        assert last == (EMPTY if not length else NOT_A_TAR if length < BLOCK else TRUNCATED)
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


def test_dots_in_names_belong_to_the_key_unless_a_shorter_key_is_a_sample():
    """By webdataset's rule, all of `v1.5_007.jpg` behind the first dot is the extension, and such files disappear."""
    names = ["v1.5_007.jpg", "v1.5_007.txt", "v1.5_007.cls", "a.b/v2.0.1.PNG", "a.b/v2.0.1.json", "7.jpg", "7.txt", "7.seg.png"]
    names += ["8.jpg", "8.txt", "8.b.jpg", "8.b.txt", "._7.jpg", "README"]
    *records, hidden, readme = read_tar(tar_of([(name, b"x") for name in names]), "s.tar")
    keys = {record.key.removeprefix("s.tar/"): list(record.members) for record in records if not record.cause}
    assert keys == {"7": ["jpg", "txt"], "8": ["jpg", "txt"], "v1.5_007": ["jpg", "txt"], "a.b/v2.0.1": ["png", "json"]}
    assert [(record.key, record.cause) for record in records if record.cause] == [("s.tar/8.b", "name_ambiguous")]
    assert {hidden, readme} == {RejectedSample(f"s.tar/{name}", "ignored_file") for name in ("._7.jpg", "README")}
    dotted = [(f"v1.5_{number:03}.{suffix}", b"x" * 600) for number in range(20) for suffix in ("jpg", "txt")]
    assert len(contents(read_parts(tar_of(dotted), 10 * BLOCK, BLOCK))) == 20


def unusual_member(name: str, kind: str) -> bytes:
    """Return a member that is not stored as a file of this name with this content."""
    info = tarfile.TarInfo(name)
    if kind == "link":
        info.type, info.linkname = tarfile.SYMTYPE, "other.jpg"
        return info.tobuf()
    if kind == "posix sparse":
        fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(2**40), "GNU.sparse.name": name}
        info.size, info.pax_headers = 2 * BLOCK, fields
        return info.tobuf(tarfile.PAX_FORMAT) + b"1\n0\n512\n".ljust(BLOCK, b"\0") + b"x" * BLOCK
    info.type, info.size = tarfile.GNUTYPE_SPARSE, BLOCK
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (2**20, BLOCK)  # one piece, after a hole of a megabyte
    header[483:495] = b"%011o\0" % (2**20 + BLOCK)
    header[148:156] = b"%06o\0 " % sum(header[:148] + b" " * 8 + header[156:])
    return bytes(header) + b"x" * BLOCK


@pytest.mark.parametrize("kind", ["link", "gnu sparse", "posix sparse"])
def test_a_member_whose_content_is_not_stored_is_counted_and_costs_no_other(kind):
    before, after = without_end(tar_of(samples_of(0, 2))), tar_of([("7.txt", b"x"), *samples_of(10, 3)])
    tar = before + unusual_member("7.jpg", kind) + after
    for records in (read_tar(tar, "s.tar"), read_parts(tar, 4 * BLOCK, BLOCK)):
        causes = {record.key: record.cause for record in records if record.key != "s.tar/"}  # parts without a sample
        assert causes == dict.fromkeys([f"s.tar/{key}" for key in ("00000", "00001", "00010", "00011", "00012")], "") | {
            "s.tar/7": "file_not_stored"
        }


NAMES = st.lists(
    st.tuples(
        st.sampled_from(("7", "a.b", "v1.5_7", "8.b.c", ".h", "d/x.1")),
        st.sampled_from(("jpg", "TXT", "json", "seg.png", "cls", "")),
    ),
    max_size=12,
    unique=True,
)


@given(NAMES, st.booleans())
def test_every_member_is_delivered_counted_or_a_side_file_of_a_sample(names, as_part):
    tar = tar_of([(".".join(filter(None, name)), b"x" * number) for number, name in enumerate(names, 1)])
    records = read_part(tar, "s.tar", len(tar), first=True, last=True) if as_part else read_tar(tar, "s.tar")
    delivered = {len(content) for record in records if isinstance(record, Record) for content in record.members.values()}
    keys = {record.key.removeprefix("s.tar/") for record in records}
    for number, name in enumerate(names, 1):
        full = ".".join(filter(None, name))
        folder, _, base = full.rpartition("/")
        stem = f"{folder}/{base.partition('.')[0]}".lstrip("/")
        assert number in delivered or keys & {full, stem} or any(key.startswith(f"{stem}.") for key in keys) or records == [EMPTY]


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 2**32))
@example(seed=11787)  # two cuts remove exactly one file
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
    # The decoder detects changed content and samples without an image or a text. The reader must report what else is missing.
    samples = [record for record in records if isinstance(record, Record)]
    rejected = {record for record in records if isinstance(record, RejectedSample)}
    if not {TRUNCATED, NOT_A_TAR} & rejected and not any(record.is_half for record in samples):
        assert sum(len(record.members) for record in samples) == len(six_samples)


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
    if state == "whole":
        assert rejected <= {EMPTY, RejectedSample("s.tar/", "ignored_part")}  # of parts in which no sample begins
    elif state == "cut":
        assert rejected & {TRUNCATED, NOT_A_TAR} or not tar


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
    *records, last = read_tar(tar, "s.tar")
    assert (len(records), last) == (4, RejectedSample("s.tar/big.tar", "ignored_file"))
    assert TRUNCATED in read_parts(tar, 40 * BLOCK, 20 * BLOCK)
