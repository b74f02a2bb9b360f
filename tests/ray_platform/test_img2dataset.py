"""Shards of the real img2dataset, from a web server on loopback, with links that are dead and files that are no images."""

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
from ray_platform.data.inspection import Statistics, inspect_unit
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader
from ray_platform.data.stream import stream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
PEERS = ROOT / ".venv-peers"  # img2dataset needs an older pyarrow than ours, hence an environment of its own
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
    """The URL of a folder of pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for number in range(GOOD):
        height, width = rng.integers(40, 120, 2)
        low = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(low).resize((int(width), int(height)), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.fixture(scope="module")
def shards(img2dataset, served, tmp_path_factory) -> Path:
    """50 pictures, a link that is dead and one that is no picture, in shards of 20."""
    folder = tmp_path_factory.mktemp("img2dataset")
    with (folder / "urls.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["url", "caption", "similarity"])
        for number in range(GOOD):
            writer.writerow([f"{served}/{number}.jpg", f"picture {number}, with a comma", number / GOOD])
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


def captions(config: DataConfig) -> set[str]:
    catalog = build_catalog(config)
    nothing = Ledger(catalog.num_units)
    batches = stream(catalog, config, Reader(0, 0, 1, nothing, nothing.copy()), batch_size=10, num_batches=5)
    return {caption for batch in batches for caption in batch.captions}


def test_the_catalog_has_img2datasets_counts(shards):
    catalog = build_catalog(DataConfig(sources=(str(shards),)))
    assert len(catalog.shards) == 3
    assert catalog.num_samples == GOOD
    stats = [json.loads(path.read_text())["successes"] for path in sorted(shards.glob("*_stats.json"))]
    assert [shard.num_samples for shard in catalog.shards] == stats


def test_inspection_finds_every_sample_good(shards):
    config = DataConfig(sources=(str(shards),), image_size=32)
    found = Statistics()
    for unit in build_catalog(config).pools[0]:
        found.merge(inspect_unit(unit, config))
    assert (found.used, found.looked_at) == (GOOD, GOOD)


@pytest.mark.usefixtures("ray_cluster")
def test_an_epoch_has_every_picture_once(shards):
    config = DataConfig(sources=(str(shards),), image_size=32)
    assert captions(config) == {f"picture {number}, with a comma" for number in range(GOOD)}


@pytest.mark.usefixtures("ray_cluster")
def test_filters_read_its_json(shards):
    config = DataConfig(sources=(str(shards),), image_size=32, filters=FilterConfig(min_similarity=0.4))
    assert captions(config) == {f"picture {number}, with a comma" for number in range(20, GOOD)}
