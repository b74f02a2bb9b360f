"""Every hostile input gets the answer in docs/safety.md, runs no code, writes nothing outside, and needs little memory."""

import json
import re
import resource
import time
from collections import Counter
from pathlib import Path

import pytest

from diffdis_platform.commands.inspect import inspect
from diffdis_platform.commands.inspect import parse_arguments as parse
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig
from tests.ray_platform.conftest import samples_of, tar_of
from tests.ray_platform.test_stream import reader_of, without_ray
from tests.safety.cases import CANARY, check_answer, documented_answers
from tests.safety.checkpoints import CHECKPOINTS
from tests.safety.configs import CONFIGS
from tests.safety.models import MODELS, SETS
from tests.safety.stores import STORES
from tests.safety.tars import SHARDS, shard

SHARD_FEEDS = {what: shard(build) for what, build in SHARDS.items()}
FEEDS = {**SHARD_FEEDS, **CONFIGS, **STORES, **CHECKPOINTS, **MODELS, **SETS}
ANSWERS = documented_answers()
MAX_MB, MAX_CPU_SECONDS = 1536, 60


def test_the_documentation_lists_exactly_these_inputs():
    assert ANSWERS.keys() == FEEDS.keys()


@pytest.mark.parametrize("what", FEEDS, ids=lambda what: what.replace(" ", "-")[:60])
def test_a_hostile_input_gets_its_answer(what, tmp_path):
    folder, outside = tmp_path / "folder" / "inner", tmp_path / "folder" / "outside"
    folder.mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"secret")
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    check_answer(ANSWERS[what], FEEDS[what](folder))
    assert time.process_time() - start < MAX_CPU_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_MB * 1024
    assert not list(tmp_path.rglob(CANARY)), "code ran"
    assert {path.name for path in outside.iterdir()} == {"secret.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"folder"}
    assert {path.name for path in outside.parent.iterdir()} == {"inner", "outside"}
    assert not Path("/tmp/escaped").exists()


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """All hostile shards alongside a good one."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "good.tar").write_bytes(tar_of(samples_of(100, 40)))
    for number, build in enumerate(SHARDS.values()):
        (folder / f"{number:05d}.tar").write_bytes(build())
    return folder


@pytest.fixture(scope="module")
def expected() -> Counter[str]:
    """Sum of the counts of all answers."""
    counts: Counter[str] = Counter({"used": 40})
    for what in SHARDS:
        counts.update({cause: int(number) for number, cause in re.findall(r"(\d+)(?: ×)? (\w+)", ANSWERS[what])})
    return counts


def test_a_stream_continues_past_all_hostile_shards(shards, expected):
    config = DataConfig(sources=(str(shards),), image_size=16, max_skipped_fraction=0.9)
    catalog = build_catalog(config)
    batches = without_ray(catalog, config, reader_of(catalog), batch_size=1, num_batches=expected["used"])
    assert {batch.tensors["image"].shape for batch in batches} == {(1, 16, 16, 3)}
    assert all(len(batch.captions[0].encode()) < 2**16 and "\n" not in batch.keys[0] for batch in batches)
    assert len({batch.keys[0] for batch in batches}) == len(batches)
    skipped = Counter(batches[-1].skipped)
    assert skipped.pop("tar_truncated") > expected["tar_truncated"]  # each counts for as many samples as the other shards have
    assert skipped <= expected - Counter({"used": expected["used"]})  # the last rejects may come after the last good sample
    assert skipped.total() > 10


def test_an_inspection_counts_all_hostile_shards(ray_cluster, shards, expected, tmp_path):
    arguments = ["--data.sources", str(shards), "--output_dir", str(tmp_path), "--data.image_size", "16"]
    summary = inspect(parse([*arguments, "--max_shards", "0"]).config).as_dict()
    rejects = summary["rejects"].items()
    counted = {cause: reject["shards_of_unknown_count"] or reject["samples"] for cause, reject in rejects if reject["samples"]}
    assert Counter(counted) + Counter(used=summary["samples"]["used"]) == expected
    assert json.loads((tmp_path / "inspection.json").read_text()) == summary
