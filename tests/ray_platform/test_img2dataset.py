"""Shards written by the real img2dataset from a web server on loopback, with dead links and files that are not images."""

import csv
import functools
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig, FilterConfig
from ray_platform.data.inspection import inspect_unit
from ray_platform.data.stream import stream
from tests.support.streams import reader_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers"  # a separate environment, because img2dataset needs an older pyarrow
GOOD, SHARD = 50, 20


@pytest.fixture(scope="module")
def img2dataset() -> Path:
    command = PEERS / "bin" / "img2dataset"
    if not command.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        pip = [str(PEERS / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", "img2dataset"]
        subprocess.run(pip, check=True)
    return command


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """URL of a folder of images."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(GOOD):
        height, width = rng.integers(40, 120, 2)
        low = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(low).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")

    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def shards(img2dataset, served, tmp_path_factory) -> Path:
    """Shards of 20 samples from 50 images, a dead link and a link to a file that is not an image."""
    folder = tmp_path_factory.mktemp("img2dataset")
    with (folder / "urls.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption", "similarity"])
        for number in range(GOOD):
            writer.writerow([f"{served}/{number}.jpg", f"image {number}, with a comma", number / GOOD])
        writer.writerow([f"{served}/dead.jpg", "dead", 0.5])
        writer.writerow([f"{served}/broken.jpg", "broken", 0.5])
    command = [
        str(img2dataset), f"--url_list={folder}/urls.csv", "--input_format=csv", "--url_col=url", "--caption_col=caption",
        "--save_additional_columns=[similarity]", "--output_format=webdataset", f"--output_folder={folder}/out",
        "--image_size=64", "--resize_mode=keep_ratio", f"--number_sample_per_shard={SHARD}",
        "--processes_count=1", "--thread_count=4",
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1"})
    return folder / "out"


def test_the_catalog_has_its_counts_and_every_sample_is_good(shards):
    config = DataConfig(sources=(str(shards),), image_size=32)
    catalog = build_catalog(config)
    stats = [json.loads(path.read_text())["successes"] for path in sorted(shards.glob("*_stats.json"))]
    assert [shard.num_samples for shard in catalog.shards] == stats
    assert (len(catalog.shards), catalog.num_samples) == (3, GOOD)
    inspected = [inspect_unit(unit, config) for unit in catalog.pools[0]]
    assert sum(statistics.used for statistics in inspected) == sum(statistics.num_samples for statistics in inspected) == GOOD


@pytest.mark.parametrize(("min_similarity", "first"), [(None, 0), (0.4, 20)])
def test_an_epoch_has_every_image_that_passes_the_filter_once(ray_cluster, shards, min_similarity, first):
    config = DataConfig(sources=(str(shards),), image_size=32, filters=FilterConfig(min_similarity=min_similarity))
    catalog = build_catalog(config)
    (batch,) = stream(catalog, config, reader_of(catalog), batch_size=GOOD - first, num_batches=1)
    assert set(batch.captions) == {f"image {number}, with a comma" for number in range(first, GOOD)}
