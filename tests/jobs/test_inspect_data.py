"""`diffdis inspect`: its files, output and exit status."""

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


def names(value):
    """Return the keys of nested dicts."""
    return {key: names(inner) for key, inner in value.items()} if isinstance(value, dict) else None


def test_the_report_has_all_numbers(ray_cluster, shards, capsys):
    summary = inspect(parse(arguments(shards)).config).as_dict()
    assert json.loads((shards.parent / "out" / "inspection.json").read_text()) == summary
    assert (shards.parent / "out" / "inspection.html").read_text().count("<figure") == 15
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("3 of 3 shards inspected", "image_missing 2", str(shards.parent / "out")))
    histogram = dict.fromkeys(("edges", "counts", "minimum", "maximum", "p10", "p50", "p90"))
    measured = ("width", "height", "aspect_ratio", "image_bytes", "caption_words", "caption_characters")
    assert names(summary) == {
        "format_version": None,
        "sources": None,
        "shards": dict.fromkeys(("in_source", "inspected", "unusable", "bytes_in_source", "bytes_inspected")),
        "samples": dict.fromkeys(("inspected", "used", "filtered", "bad", "bad_fraction", "max_skipped_fraction", "upscaled")),
        "rejects": {"image_missing": dict.fromkeys(("samples", "fraction", "shards_of_unknown_count", "examples", "meaning"))},
        "shapes": {"16x16": None},
        "histograms": dict.fromkeys(measured, histogram),
        "epoch": dict.fromkeys((
            "measured_samples", "decode_cpu_seconds", "read_seconds", "samples_per_cpu_second", "bytes_per_reader_second",
            "cpus", "samples", "used", "seconds", "samples_per_second",
        )),
    }  # fmt: skip
    assert summary["samples"] | {"bad_fraction": 0} == {
        "inspected": 17, "used": 15, "filtered": 0, "bad": 2, "bad_fraction": 0, "max_skipped_fraction": 0.05, "upscaled": 0,
    }  # fmt: skip
    # An epoch is estimated for the entire source.
    summary = inspect(parse(arguments(shards, "--max_shards", "1")).config).as_dict()
    source, counted = sum(path.stat().st_size for path in shards.iterdir()), summary["samples"]["inspected"]
    assert summary["shards"]["bytes_in_source"] == source
    assert summary["epoch"]["measured_samples"] == counted in (5, 7)
    assert summary["epoch"]["samples"] == round(counted * source / summary["shards"]["bytes_inspected"])
    assert summary["epoch"]["cpus"] == 4


def test_bad_samples_are_an_error_after_the_report_but_filtered_ones_are_not(ray_cluster, shards, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # not used: this process is attached to a cluster
    assert error_of("inspect", *arguments(shards)) == (
        "error: 2 of 17 samples are bad (image_missing 11.8%), more than data.max_skipped_fraction = 5.0%; "
        "a run would stop: correct the shards or raise data.max_skipped_fraction"
    )
    assert (shards.parent / "out" / "inspection.html").exists()
    assert error_of("inspect", *arguments(shards, "--data.max_skipped_fraction", "0.2")) is None
    (shards / "2.tar").write_bytes(tar_of(samples_of(30, 9, size=8)))
    assert error_of("inspect", *arguments(shards, "--data.filters.min_size", "10")) is None
    with pytest.raises(DataError, match="none: no such file or folder"):
        inspect(parse(["--data.sources", str(shards / "none"), "--output_dir", str(shards)]).config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--outputdir", "/x"], r"--outputdir: no such field; did you mean --output_dir\?"),
        (["--output_dir", "outputs/x"], "output_dir: outputs/x; give an absolute folder or an s3:// URL"),
        (["--output_dir", "/x", "--max_shards", "-1"], "max_shards: -1 is negative"),
        (["--output_dir", "/x", "--data.image_size", "0"], "data.image_size: 0 is below 1"),
    ],
)
def test_bad_fields_are_one_line(options, message):
    with pytest.raises(ConfigError, match=message) as raised:
        parse(options)
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_without_a_cluster_this_machine_does_it(shards):
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    command = [sys.executable, "jobs/inspect_data.py", *arguments(shards)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: 2 of 17 samples are bad")
    assert "3 of 3 shards inspected" in done.stdout
