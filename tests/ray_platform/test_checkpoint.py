"""Checkpoints: complete or not there at all, whatever happens to the uploads; which one is taken; which ones stay."""

import json
from dataclasses import replace

import pytest
import torch

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.train import checkpoint, saver
from ray_platform.train.checkpoint import CorruptCheckpoint, Keep, Manifest
from ray_platform.train.saver import Saver, Shares

TENSORS = {f"weights/p{i}": torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(6)}
STATE = {"skipped": {}, "usual_loss": 1.0, "num_good": 1, "rng": ""}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch):
    monkeypatch.setattr(saver, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "RETRY_SECONDS", 0.0)


def manifest(step, token="aa", world_size=2, **fields):
    plain = Manifest(
        token=token, step=step, num_updates=step, samples_seen=0, loss_scale=1.0, world_size=world_size, zero_stage=1,
        global_batch_size=4, seed=0, source_digest="d", metrics={}, code_version="c", config={}, files={},
    )  # fmt: skip
    return replace(plain, **fields)


def save(output, step, *, launch="a", token="aa", world_size=2, keep=None, tensors=TENSORS, **fields):
    """All ranks of a checkpoint, as the loop does it. Returns its URL and the savers."""
    folder = storage.join(checkpoint.checkpoints_dir(str(output)), launch)
    savers = [Saver(folder, rank, token) for rank in range(world_size)]
    shares, parts = Shares(world_size), [{} for _ in savers]
    for name, tensor in tensors.items():
        parts[shares.owner(tensor)][name] = tensor.clone()
    for rank, one in enumerate(savers):
        files = {checkpoint.BASE: b"{}", checkpoint.CONSUMED: b"{}"} if rank == 0 else {}
        one.begin(step, parts[rank], files, STATE)
    url = savers[0].url
    for one in savers:
        one.wait()
    keep = keep or Keep(str(output), 10)
    for rank, one in enumerate(savers):
        one.end(manifest(step, token, world_size, **fields) if rank == 0 and not any(s.failure for s in savers) else None, keep)
        one.wait()
    return url, savers


def read(url):
    found = checkpoint.read_manifest(url)
    return checkpoint.tensors(url, found, checkpoint.tensor_files(found))


def test_what_was_saved_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "FILE_BYTES", 300)  # several files a rank
    url, _ = save(tmp_path, 10)
    found = read(url)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert len(checkpoint.tensor_files(checkpoint.read_manifest(url))) == 6
    assert checkpoint.load_rank_state(url, checkpoint.read_manifest(url), 1) == STATE


def test_without_its_manifest_there_is_no_checkpoint(tmp_path):
    url, _ = save(tmp_path, 10)
    storage.delete(storage.join(url, checkpoint.COMPLETE))
    assert checkpoint.complete_ones(str(tmp_path)) == []
    assert checkpoint.candidates("auto", str(tmp_path), "a") == []
    with pytest.raises(ConfigError, match="is no complete checkpoint"):
        checkpoint.candidates(url, str(tmp_path), "b")


@pytest.mark.parametrize("change", ["damaged", "cut", "missing"])
def test_a_file_that_is_not_what_was_written_is_named(tmp_path, change):
    url, _ = save(tmp_path, 10)
    name = checkpoint.tensor_files(checkpoint.read_manifest(url))[1]
    file = tmp_path / "checkpoints" / "a" / "step_00000010" / name
    data = bytearray(file.read_bytes())
    if change == "damaged":
        data[-1] ^= 1
    file.write_bytes(data[:-8] if change == "cut" else data)
    if change == "missing":
        file.unlink()
    with pytest.raises(CorruptCheckpoint, match=name):
        read(url)


def test_storage_that_fails_one_rank_fails_the_checkpoint_and_not_the_one_before(tmp_path, monkeypatch):
    before, _ = save(tmp_path, 10)
    real = storage.write_bytes

    def disk_full(url, data):
        if "rank_00001_000" in url:
            raise storage.StorageError(f"{url}: No space left on device", "unavailable")
        real(url, data)

    monkeypatch.setattr(storage, "write_bytes", disk_full)
    url, savers = save(tmp_path, 20)
    assert "No space left" in savers[1].failure
    assert checkpoint.complete_ones(str(tmp_path)) == [before]
    savers[0].url = url
    savers[0].abandon()
    savers[0].wait()
    assert not storage.list_files(storage.join(url, "*"))


def test_storage_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(saver, "RETRY_SECONDS", 30.0)
    real, calls = storage.write_bytes, []

    def away(url, data):
        calls.append(url)
        if len(calls) <= 3:
            raise storage.StorageError(f"{url}: cannot reach", "unavailable")
        real(url, data)

    monkeypatch.setattr(storage, "write_bytes", away)
    url, _ = save(tmp_path, 10)
    assert read(url).keys() == TENSORS.keys()


def test_a_rank_thought_dead_cannot_get_into_a_later_checkpoint(tmp_path):
    """Its files of the same step have another token in their names."""
    url, _ = save(tmp_path, 10, token="bb")
    zombie = Saver(url.rsplit("/", 1)[0], 1, "aa")
    zombie.begin(10, {"weights/p0": torch.zeros(50)}, {}, STATE)
    zombie.wait()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read(url).items())


def test_the_order_of_what_a_run_goes_on_from(tmp_path):
    """This launch's own before another launch's, however far that got; a path instead of the run's; none: only its own."""
    other, _ = save(tmp_path, 30, launch="a")
    old, _ = save(tmp_path, 10, launch="b")
    own, _ = save(tmp_path, 20, launch="b")
    elsewhere, _ = save(tmp_path / "elsewhere", 5)
    assert checkpoint.candidates("auto", str(tmp_path), "b") == [own, old, other]
    assert checkpoint.candidates("auto", str(tmp_path), "c") == [other, own, old]
    assert checkpoint.candidates(elsewhere + "/", str(tmp_path), "c") == [elsewhere]
    assert checkpoint.candidates(elsewhere, str(tmp_path), "b") == [own, old, elsewhere]
    assert checkpoint.candidates("none", str(tmp_path), "c") == []
    assert checkpoint.candidates("none", str(tmp_path), "b") == [own, old]


def test_the_newest_and_the_best_stay(tmp_path):
    keep = Keep(str(tmp_path), 2, "heldout/acc1", "max")
    for step, accuracy in ((10, 0.1), (20, 0.5), (30, 0.2), (40, 0.3)):
        save(tmp_path, step, keep=keep, metrics={"heldout/acc1": accuracy})
    assert [url[-2:] for url in checkpoint.complete_ones(str(tmp_path))] == ["40", "30", "20"]


def test_what_never_became_complete_goes(tmp_path):
    url, _ = save(tmp_path, 10)
    storage.delete(storage.join(url, checkpoint.COMPLETE))
    save(tmp_path, 20, keep=Keep(str(tmp_path), 2))
    assert sorted(path.name for path in (tmp_path / "checkpoints" / "a").iterdir()) == ["step_00000020"]


def test_weights_are_read_without_ranks_and_fall_back_where_there_is_no_ema(tmp_path):
    tensors = {
        "weights/a": torch.zeros(3),
        "ema/a": torch.ones(3),
        "exp_avg/a": torch.ones(3) * 2,
        "weights/frozen": torch.ones(1) * 5,
    }
    url, _ = save(tmp_path, 10, tensors=tensors)
    assert {n: t.tolist() for n, t in checkpoint.weights_of(url, "ema")} == {"a": [1, 1, 1], "frozen": [5]}
    assert {n: t.tolist() for n, t in checkpoint.weights_of(url, "weights")} == {"a": [0, 0, 0], "frozen": [5]}
    plain, _ = save(tmp_path, 20, tensors={"weights/a": torch.zeros(3)})
    with pytest.raises(ConfigError, match="has no ema"):
        dict(checkpoint.weights_of(plain, "ema"))


def test_the_manifest_is_plain_json(tmp_path):
    url, _ = save(tmp_path, 10, metrics={"loss": 1.5}, config={"train": {"seed": 0}})
    content = json.loads((tmp_path / "checkpoints/a/step_00000010/complete.json").read_text())
    assert content["metrics"] == {"loss": 1.5}
    assert all(len(digest) == 64 for _, digest in content["files"].values())
    assert url.endswith("step_00000010")
