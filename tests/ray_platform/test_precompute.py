"""Precomputing with real actors and a three-line encoder."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from ray_platform import storage
from ray_platform.contracts import ConfigError, DataError
from ray_platform.data import precompute as module
from ray_platform.data import precomputed
from ray_platform.data.catalog import build_catalog
from ray_platform.data.config import DataConfig, FilterConfig
from ray_platform.data.plan import Group, Item
from ray_platform.data.precompute import EncoderPool, check, precompute
from ray_platform.data.source import read_group
from ray_platform.data.stream import stream
from tests.ray_platform.conftest import samples_of, write_shards
from tests.support.streams import reader_of

pytestmark = pytest.mark.usefixtures("ray_cluster")


class MeanColor:
    """Encoder that records its calls in a file and fails on a given caption."""

    def __init__(self, device: str, notes: str = "", fails_at: str = ""):
        assert device == "cpu"
        self.notes, self.fails_at = notes, fails_at

    def encode(self, images, captions):
        if self.fails_at in captions:
            raise RuntimeError("out of memory, say")
        if self.notes:
            with Path(self.notes).open("a") as notes:
                notes.writelines(f"{caption}\n" for caption in captions)
        lengths = np.array([[len(caption)] for caption in captions], np.float16)
        return {"color": images.mean(axis=(1, 2)).astype(np.float16), "length": lengths}


def encoders(notes: Path | str = "", fails_at: str = "nothing", name="mean", **fields) -> EncoderPool:
    build = functools.partial(MeanColor, notes=str(notes), fails_at=fails_at)
    return EncoderPool(build, {"name": name}, batch_size=4, cpus=0.5, **fields)


def run(folder, out, made_by, **fields) -> list[module.PrecomputeProgress]:
    config = DataConfig(sources=(str(folder),), image_size=16, **fields)
    return list(precompute(build_catalog(config), config, made_by, str(out)))


def batches(source, count, size=6):
    config = DataConfig(sources=(str(source),), image_size=16, cpus_per_read=0.5)
    catalog = build_catalog(config)
    return list(stream(catalog, config, reader_of(catalog), batch_size=size, num_batches=count))


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def test_what_was_precomputed_is_streamed(shard_folder, tmp_path):
    out = tmp_path / "out"
    progress = run(shard_folder, out, encoders(count=2))
    assert (progress[-1].shards_done, progress[-1].samples) == (5, 60)
    manifest = manifest_of(out)
    assert (manifest["complete"], manifest["samples"], manifest["rejected"]) == (True, 60, {})
    encoded = {key: (batch, i) for batch in batches(out, 10) for i, key in enumerate(batch.keys)}
    decoded = {key: (batch, i) for batch in batches(shard_folder, 10) for i, key in enumerate(batch.keys)}
    assert len(encoded) == 60
    assert encoded.keys() == decoded.keys()
    for key, (batch, i) in encoded.items():
        original, j = decoded[key]
        assert batch.captions[i] == original.captions[j]
        assert batch.tensors["color"].dtype == np.float16
        mean = original.tensors["image"][j].mean(axis=(0, 1))
        np.testing.assert_array_equal(batch.tensors["color"][i], mean.astype(np.float16))
        assert batch.tensors["length"][i] == len(batch.captions[i])
    config = DataConfig(sources=(str(out),))
    with pytest.raises(ConfigError, match="these shards are precomputed already"):
        check(build_catalog(config), config)


@pytest.mark.slow
def test_files_hold_as_much_as_they_may(shard_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 7 * 16 * 16 * 3)
    run(shard_folder, tmp_path / "out", encoders())
    assert sorted(manifest_of(tmp_path / "out")["shards"].values()) == sorted([7, 7, 6, 5, 7, 6, 1, 7, 7, 7])
    assert sum(len(b.keys) for b in batches(tmp_path / "out", 10)) == 60


def test_complete_shards_are_not_encoded_again(shard_folder, tmp_path):
    """The encoder fails on one sample of the last shard; the second run encodes only the shards without a record."""
    out, notes = tmp_path / "out", tmp_path / "notes"
    with pytest.raises(Exception, match="out of memory, say"):
        run(shard_folder, out, encoders(fails_at="sample 50"))
    done = {path.stem for path in (out / "progress").glob("*")}  # empty if the failing sample came first
    assert "00004" not in done
    with pytest.raises(DataError, match="precomputing it did not finish"):
        build_catalog(DataConfig(sources=(str(out),)))
    run(shard_folder, out, encoders(notes))
    per_shard = {"00000": 20, "00001": 5, "00002": 13, "00003": 1, "00004": 21}
    assert len(notes.read_text().split("\n")) - 1 == sum(n for name, n in per_shard.items() if name not in done)
    manifest = manifest_of(out)
    assert manifest["samples"] == 60
    assert run(shard_folder, out, encoders(notes)) == []
    assert manifest_of(out) == manifest


def test_a_folder_of_something_else_is_rejected(shard_folder, tmp_path):
    small, out = write_shards(tmp_path / "data", {"00000.tar": samples_of(0, 3)}), tmp_path / "out"
    run(small, out, encoders())
    with pytest.raises(DataError, match=r"out: was started with another encoders \(see its manifest.json\)"):
        run(small, out, encoders(name="other"))
    with pytest.raises(DataError, match="was started with another settings"):
        run(small, out, encoders(), decoder="fast")
    with pytest.raises(DataError, match="was started with another source"):
        run(shard_folder, out, encoders())
    (out / "manifest.json").write_text("[]")
    with pytest.raises(DataError, match="is not a manifest"):
        run(small, out, encoders())


@pytest.mark.slow
def test_bad_samples_are_counted_and_too_many_end_it(tmp_path):
    bad = [("bad.png", b"no image"), ("bad.txt", b"x")]
    folder = write_shards(tmp_path / "data", {"0.tar": [*samples_of(0, 60), *bad], "1.tar": samples_of(60, 60)})
    run(folder, tmp_path / "out", encoders())
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["samples"], manifest["rejected"]) == (120, {"image_undecodable": 1})
    with pytest.raises(DataError, match=r"precompute had to skip .*image_undecodable"):
        run(folder, tmp_path / "other", encoders(), max_skipped_fraction=0.001)
    write_shards(folder, {"0.tar": b"garbage", "1.tar": b"garbage"})
    with pytest.raises(DataError, match="no sample can be used"):
        run(folder, tmp_path / "none", encoders())


@pytest.mark.slow
def test_a_lost_shard_is_tried_again_by_the_next_run(tmp_path):
    folder = write_shards(tmp_path / "data", {f"{number}.tar": samples_of(10 * number, 10) for number in range(3)})
    config = DataConfig(sources=(str(folder),), image_size=16, max_skipped_fraction=0.5)
    catalog = build_catalog(config)
    hidden = (folder / "1.tar").rename(tmp_path / "hidden")
    *_, progress = precompute(catalog, config, encoders(), str(tmp_path / "out"))
    assert (progress.shards_done, progress.shards_lost) == (3, 1)
    assert manifest_of(tmp_path / "out")["rejected"].keys() == {"shard_missing"}
    hidden.rename(folder / "1.tar")
    *_, progress = precompute(catalog, config, encoders(), str(tmp_path / "out"))
    assert progress.shards_lost == 0
    manifest = manifest_of(tmp_path / "out")
    assert (manifest["samples"], manifest["rejected"]) == (30, {})


@pytest.mark.parametrize("fields", [{"crop": "random"}, {"aspect_ratios": (1.0, 2.0)}, {"weights": (1.0,)}])
def test_settings_that_precomputed_shards_cannot_have(shard_folder, fields):
    config = DataConfig(sources=(str(shard_folder),), **fields)
    with pytest.raises(ConfigError, match=f"data.{next(iter(fields))}: does not work with precomputed shards"):
        check(build_catalog(config), config)


def test_more_encoders_than_the_cluster_has(shard_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"num_encoders: 90 .* but the cluster has 4"):
        run(shard_folder, tmp_path / "out", encoders(count=90))
    with pytest.raises(ConfigError, match="GPUs, but the cluster has 0"):
        run(shard_folder, tmp_path / "out", encoders(gpus=0.5))


def test_settings_of_the_run_and_of_the_shards():
    manifest = {"settings": {name: getattr(DataConfig(), name) for name in precomputed.SETTINGS}}
    manifest = json.loads(json.dumps(manifest | {"settings": manifest["settings"] | {"decoder": "fast", "filters": {}}}))
    precomputed.check_settings(manifest, DataConfig())  # settings at their defaults are taken from the manifest
    precomputed.check_settings(manifest, DataConfig(decoder="fast"))
    with pytest.raises(DataError, match=r'data\.crop: "random", but the precomputed shards were written with "centre"'):
        precomputed.check_settings(manifest, DataConfig(crop="random"))
    with pytest.raises(DataError, match=r"data.filters: .*leave it out"):
        precomputed.check_settings(manifest, DataConfig(filters=FilterConfig(min_size=9)))


@pytest.mark.s3
def test_precomputing_in_s3(s3_url, ray_cluster, shard_folder):
    """Runs the actor's work in the driver, because the cluster's workers have no credentials."""
    storage.put_folder(shard_folder, f"{s3_url}/raw")
    config = DataConfig(sources=(f"{s3_url}/raw",), image_size=16)
    catalog = build_catalog(config)
    out = f"{s3_url}/encoded"
    unit = catalog.pools[0][0]
    actor = module.EncodeBlock(encoders(), out, [module.stem(unit)], retry_seconds=1.0)
    (block,) = read_group(Group(0, 0, (Item(0, 0, 0, unit, []),)), config, 0)
    record = module.BlockRecord(*json.loads(actor(block)["record"][0].as_py()))
    assert record.samples == 20
    keys, _, tensors = precomputed.from_arrow(storage.read_bytes(storage.join(out, record.shard)))
    assert (len(keys), tensors["color"].shape) == (20, (20, 3))
