"""All hostile shards at once, beside good ones, through the doors that a run has: the stream, and jobs/inspect_data.py."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from diffdis_platform.commands.inspect import inspect
from diffdis_platform.commands.inspect import parse_arguments as parse
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from tests.ray_platform.conftest import samples_of, tar_of
from tests.ray_platform.test_stream import reader_of, without_ray
from tests.safety.tars import IMAGES, SHARDS, TARS
from tests.support.html_page import Page


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "good.tar").write_bytes(tar_of(samples_of(100, 40)))
    for number, (build, _) in enumerate(SHARDS):
        (folder / f"{number:05d}.tar").write_bytes(build())
    return folder


@pytest.fixture(scope="module")
def expected() -> Counter[str]:
    """Of all answers together."""
    counts: Counter[str] = Counter({"used": 40})
    for _, answer in SHARDS:
        for number, what in re.findall(r"(\d+)(?: ×)? (\w+)", answer):
            counts[what] += int(number)
    return counts


def test_a_stream_goes_on_beside_all_of_them(shards, expected):
    config = DataConfig(sources=(str(shards),), image_size=16, max_skipped_share=0.9)
    catalog = build_catalog(config)
    batches = without_ray(catalog, config, reader_of(catalog), batch_size=1, num_batches=expected["used"])
    assert {batch.tensors["image"].shape for batch in batches} == {(1, 16, 16, 3)}
    assert all(len(batch.captions[0].encode()) < 2**16 and "\n" not in batch.keys[0] for batch in batches)
    assert len({batch.keys[0] for batch in batches}) == len(batches)
    skipped = Counter(batches[-1].skipped)
    assert skipped <= expected - Counter({"used": expected["used"]})  # the last ones may come behind the last good sample
    assert skipped.total() > 10


def test_an_inspection_counts_all_of_them(ray_cluster, shards, expected, tmp_path, capsys):
    arguments = ["--data.sources", str(shards), "--output_dir", str(tmp_path), "--data.image_size", "16"]
    summary = inspect(parse([*arguments, "--max_shards", "0"]).config).as_dict()
    counted = {cause: reject["samples"] for cause, reject in summary["rejects"].items() if reject["samples"]}
    assert counted == {cause: count for cause, count in expected.items() if cause != "used"}
    assert summary["samples"]["used"] == expected["used"]
    assert json.loads((tmp_path / "inspection.json").read_text()) == summary
    Page((tmp_path / "inspection.html").read_text())
    assert len(TARS) + len(IMAGES) >= len(SHARDS)
