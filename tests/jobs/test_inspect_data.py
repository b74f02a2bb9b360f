"""The job: what it writes and prints, and how it ends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffdis_platform.commands.inspect import inspect
from diffdis_platform.commands.inspect import parse_arguments as parse
from ray_platform.contracts import ConfigError, DataError
from tests.ray_platform.conftest import samples_of, tar_of
from tests.support.commands import error_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards with 5 good samples each; the last one also has 2 captions without images."""
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(3):
        lonely = [(f"lonely{i}.txt", b"a caption") for i in range(2)] if number == 2 else []
        (folder / f"{number}.tar").write_bytes(tar_of([*samples_of(10 * number, 5), *lonely]))
    return folder


def arguments(shards: Path, *more: str) -> list[str]:
    return ["--data.sources", str(shards), "--output_dir", str(shards.parent / "out"), "--data.image_size", "16", *more]


def shape(value):
    """The keys of nested dicts; causes, examples and counts are what differs from one source to the next."""
    return {key: shape(inner) for key, inner in value.items()} if isinstance(value, dict) else type(value).__name__


def test_the_report_has_all_numbers(ray_cluster, shards, capsys):
    summary = inspect(parse(arguments(shards)).config).as_dict()
    assert json.loads((shards.parent / "out" / "inspection.json").read_text()) == summary
    html = (shards.parent / "out" / "inspection.html").read_text()
    assert html.count("<figure") == 15
    printed = capsys.readouterr().out
    assert "3 of 3 shards inspected" in printed
    assert "image_missing 2" in printed
    assert str(shards.parent / "out" / "inspection.html") in printed
    histogram = {"edges": "list", "counts": "list", "least": "int", "most": "int", "p10": "float", "p50": "float", "p90": "float"}
    names = ("width", "height", "aspect_ratio", "image_bytes", "caption_words", "caption_characters")
    assert shape(summary) == {
        "sources": "list",
        "shards": dict.fromkeys(("in_source", "inspected", "unusable", "bytes_in_source", "bytes_inspected"), "int"),
        "samples": {
            **dict.fromkeys(("inspected", "used", "filtered", "bad", "upscaled"), "int"),
            **dict.fromkeys(("bad_share", "max_skipped_share"), "float"),
        },
        "rejects": {
            "image_missing": {
                "samples": "int", "share": "float", "shards_of_unknown_count": "int", "examples": "list", "meaning": "str",
            },
        },
        "shapes": {"16x16": "int"},
        "histograms": {
            name: histogram | ({"least": "float", "most": "float"} if name == "aspect_ratio" else {}) for name in names
        },
        "epoch": {
            **dict.fromkeys(("measured_samples", "cpus", "samples", "used"), "int"),
            **dict.fromkeys(("decode_cpu_seconds", "read_seconds", "samples_per_cpu_second"), "float"),
            **dict.fromkeys(("bytes_per_reader_second", "seconds", "samples_per_second"), "float"),
        },
    }  # fmt: skip
    assert summary["samples"] | {"bad_share": 0} == {
        "inspected": 17, "used": 15, "filtered": 0, "bad": 2, "bad_share": 0, "max_skipped_share": 0.05, "upscaled": 0,
    }  # fmt: skip


def test_an_epoch_is_estimated_for_the_whole_source(ray_cluster, shards):
    summary = inspect(parse(arguments(shards, "--max_shards", "1")).config).as_dict()
    source = sum(path.stat().st_size for path in shards.iterdir())
    counted = summary["samples"]["inspected"]
    assert summary["shards"]["bytes_in_source"] == source
    assert summary["epoch"]["measured_samples"] == counted in (5, 7)
    assert summary["epoch"]["samples"] == round(counted * source / summary["shards"]["bytes_inspected"])
    assert summary["epoch"]["cpus"] == 4


def run_script(monkeypatch, *command: str) -> str | None:
    """Return the error that the command reports; None if it succeeds."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # not used: this process is attached to a cluster
    return error_of("inspect", *command)


def test_too_many_bad_samples_are_an_error_after_the_report(ray_cluster, shards, monkeypatch):
    assert run_script(monkeypatch, *arguments(shards)) == (
        "error: 2 of 17 samples are bad (image_missing 11.8%), more than data.max_skipped_share = 5.0%; "
        "a run would stop: correct the shards or raise data.max_skipped_share"
    )
    assert (shards.parent / "out" / "inspection.html").exists()
    assert run_script(monkeypatch, *arguments(shards, "--data.max_skipped_share", "0.2")) is None


def test_filtered_samples_are_not_bad(ray_cluster, shards, monkeypatch):
    (shards / "2.tar").unlink()
    (shards / "3.tar").write_bytes(tar_of(samples_of(30, 9, size=8)))
    assert run_script(monkeypatch, *arguments(shards, "--data.filters.min_size", "10")) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.image_siz", "64"], r"--data.image_siz: no such field; did you mean --data.image_size\?"),
        (["--output_dir", "outputs/x"], "output_dir: outputs/x; give an absolute folder or an s3:// URL"),
        ([], "output_dir: empty; give an absolute folder"),
        (["--output_dir", "/x", "--max_shards", "-1"], "max_shards: -1 is negative"),
        (["--output_dir", "/x", "--max_shards", "some"], "max_shards.*some"),
        (["--output_dir", "/x", "--data.image_size", "0"], "data.image_size: 0 is below 1"),
    ],
)
def test_bad_fields_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        parse(options)
    assert "\n" not in str(raised.value)


def test_a_missing_source_is_one_line(ray_cluster, tmp_path):
    with pytest.raises(DataError, match="none: no such file or folder"):
        inspect(parse(["--data.sources", str(tmp_path / "none"), "--output_dir", str(tmp_path)]).config)


def test_the_script_ends_with_the_line(monkeypatch):
    assert run_script(monkeypatch, "--outputdir", "/x") == "error: --outputdir: no such field; did you mean --output_dir?"


@pytest.mark.slow
def test_without_a_cluster_this_machine_does_it(shards):
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    command = [sys.executable, "jobs/inspect_data.py", *arguments(shards)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: 2 of 17 samples are bad")
    assert "3 of 3 shards inspected" in done.stdout
