"""Checkpoints are complete or not listed, whatever happens to uploads; which one a run resumes from; which ones are kept."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ray_platform import retry, storage
from ray_platform.contracts import ConfigError, ConsumedRange
from ray_platform.data.ledger import Ledger
from ray_platform.train import checkpoint_format, checkpointing
from ray_platform.train.checkpoint_format import (
    COMPLETE,
    CorruptCheckpoint,
    Manifest,
    RetentionPolicy,
    candidates,
    list_checkpoints,
    read_manifest,
    read_rank_state,
    read_tensors,
    read_weights,
    tensor_files,
)
from ray_platform.train.checkpointing import AsyncUploader, RankState, TensorAssignment, TrainState, find_checkpoint
from ray_platform.train.config import TrainConfig
from ray_platform.train.fault_tolerance import LossHistory

TENSORS = {f"weights/p{i}": torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(6)}
HISTORY = LossHistory(1.5, 30, 4, 1)
STATE = RankState.capture({"image_undecodable": 2}, HISTORY)
LEDGER = Ledger([3])
LEDGER.add([ConsumedRange(0, 0, 1, 0, 5, 9)])


@pytest.fixture(autouse=True)
def no_retries(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)


def manifest(step, token="aa", world_size=2, **fields):
    plain = Manifest(
        token=token, step=step, num_updates=step, samples_seen=0, loss_scale={}, world_size=world_size, zero_stage=1,
        global_batch_size=4, seed=0, source_digest="d", metrics={}, code_version="c", config={}, files={},
    )  # fmt: skip
    return replace(plain, **fields)


def save(output, step, *, launch="a", token="aa", world_size=2, retention=None, tensors=TENSORS, **fields):
    """Save a checkpoint as the ranks do together. Return its URL and the uploaders."""
    folder = storage.join(checkpoint_format.checkpoints_dir(str(output)), launch)
    written = []
    uploaders = [AsyncUploader(folder, rank, token, lambda: written.append(1)) for rank in range(world_size)]
    assignment, parts = TensorAssignment(world_size), [{} for _ in uploaders]
    for name, tensor in tensors.items():
        parts[assignment.owner(tensor)][name] = tensor.clone()
    for rank, uploader in enumerate(uploaders):
        ledgers = dict.fromkeys((checkpoint_format.BASE, checkpoint_format.CONSUMED), LEDGER.to_bytes()) if rank == 0 else {}
        uploader.upload(step, parts[rank], ledgers, STATE)
    for uploader in uploaders:
        uploader.wait()
    failed = any(uploader.failure for uploader in uploaders)
    complete = None if failed else manifest(step, token, world_size, **fields)
    uploaders[0].finalize(complete, retention or RetentionPolicy(str(output), 10))
    uploaders[0].wait()
    assert failed or len(written) >= 3 * world_size, "uploads report progress to the hang detector"
    return uploaders[0].url, uploaders


def read(url):
    manifest = read_manifest(url)
    return read_tensors(url, manifest, tensor_files(manifest))


def test_what_was_saved_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "FILE_BYTES", 300)  # several files a rank
    url, _ = save(tmp_path, 10)
    found = read(url)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert len(tensor_files(read_manifest(url))) == 6
    assert read_rank_state(url, read_manifest(url), 1) == STATE


def test_without_its_manifest_there_is_no_checkpoint(tmp_path):
    url, _ = save(tmp_path, 10)
    storage.delete(storage.join(url, COMPLETE))
    assert list_checkpoints(str(tmp_path)) == []
    assert candidates("auto", str(tmp_path), "a") == []
    with pytest.raises(ConfigError, match="is not a complete checkpoint"):
        candidates(url, str(tmp_path), "b")


@pytest.mark.parametrize("change", ["damaged", "cut", "missing"])
def test_a_file_that_is_not_what_was_written_is_named(tmp_path, change):
    url, _ = save(tmp_path, 10)
    name = tensor_files(read_manifest(url))[1]
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
    url, uploaders = save(tmp_path, 20)
    assert "No space left" in uploaders[1].failure
    assert list_checkpoints(str(tmp_path)) == [before]
    assert not storage.list_files(storage.join(url, "*")), "the files of the failed checkpoint are removed"


def test_storage_that_comes_back_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 30.0)
    monkeypatch.setattr(retry, "_FIRST_WAIT_S", 0.01)
    resolve, calls = storage._resolve, []

    def unavailable(url):
        calls.append(url)
        if len(calls) <= 3:
            raise TimeoutError
        return resolve(url)

    monkeypatch.setattr(storage, "_resolve", unavailable)
    url, _ = save(tmp_path, 10)
    assert read(url).keys() == TENSORS.keys()


def test_a_rank_thought_dead_cannot_get_into_a_later_checkpoint(tmp_path):
    """Its files of the same step have another token in their names."""
    url, _ = save(tmp_path, 10, token="bb")
    zombie = AsyncUploader(url.rsplit("/", 1)[0], 1, "aa", lambda: None)
    zombie.upload(10, {"weights/p0": torch.zeros(50)}, {}, STATE)
    zombie.wait()
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read(url).items())


def test_older_ones_that_cannot_be_removed_do_not_fail_the_new_one(tmp_path, monkeypatch, caplog):
    old, _ = save(tmp_path, 10)

    def refuse(url):
        raise storage.StorageError(f"{url}: permission denied", "forbidden")

    monkeypatch.setattr(storage, "delete", refuse)
    url, uploaders = save(tmp_path, 20, retention=RetentionPolicy(str(tmp_path), 1))
    assert uploaders[0].failure == ""
    assert list_checkpoints(str(tmp_path)) == [url, old]
    assert [r.getMessage() for r in caplog.records if "could not be removed" in r.getMessage()]
    assert not [r for r in caplog.records if "not completed" in r.getMessage()]


def test_the_order_of_what_a_run_goes_on_from(tmp_path):
    """This launch's own before a later launch's, and that before an earlier one's, however far that got: who began again from an
    earlier step had a reason. A path instead of the run's; none: only its own."""
    other, _ = save(tmp_path, 30, launch="a")
    old, _ = save(tmp_path, 10, launch="b")
    own, _ = save(tmp_path, 20, launch="b")
    elsewhere, _ = save(tmp_path / "elsewhere", 5)
    assert candidates("auto", str(tmp_path), "b") == [own, old, other]
    assert candidates("auto", str(tmp_path), "c") == [own, old, other]
    assert candidates("auto", str(tmp_path), "a") == [other, own, old]
    assert candidates(elsewhere + "/", str(tmp_path), "c") == [elsewhere]
    assert candidates(elsewhere, str(tmp_path), "b") == [own, old, elsewhere]
    assert candidates("none", str(tmp_path), "c") == []
    assert candidates("none", str(tmp_path), "b") == [own, old]


def test_a_path_that_was_removed_after_the_launch_began_is_not_missed(tmp_path):
    """It may be in the same folder, and go as any other that is no longer the newest."""
    began_from, _ = save(tmp_path, 10, launch="a")
    own, _ = save(tmp_path, 20, launch="b")
    assert candidates(began_from, str(tmp_path), "b") == [own, began_from]
    storage.delete(began_from)
    assert candidates(began_from, str(tmp_path), "b") == [own]
    with pytest.raises(ConfigError, match="is not a complete checkpoint"):
        candidates(began_from, str(tmp_path), "c")


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "init"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_what_is_found_is_all_that_is_needed(tmp_path, one_rank):
    url, _ = save(tmp_path, 10)
    found = find_checkpoint("auto", str(tmp_path), "b", "d")
    assert (found.url, found.rank_0, found.rank_states) == (url, STATE, [STATE, STATE])
    assert found.ledgers[1].to_bytes() == LEDGER.to_bytes()
    assert find_checkpoint("auto", str(tmp_path), "b", "other shards").ledgers is None
    assert find_checkpoint("none", str(tmp_path), "b", "d") is None


@pytest.mark.parametrize(
    ("what", "how"),
    [
        ("complete", "gone"), ("complete", "cut"), ("complete", "no JSON"), ("base", "cut"), ("consumed", "gone"),
        ("rank_00000", "no JSON"), ("rank_00001", "cut"), ("rank_00000_000", "no JSON"),
    ],
)  # fmt: skip
def test_the_one_before_is_taken_whatever_is_damaged(tmp_path, one_rank, caplog, what, how):
    old, _ = save(tmp_path, 10)
    save(tmp_path, 20)
    (file,) = (tmp_path / "checkpoints/a/step_00000020").glob(f"{what}.*")
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-20] if how == "cut" else b"[1]")
    assert find_checkpoint("auto", str(tmp_path), "b", "d").url == old
    if (what, how) != ("complete", "gone"):  # then it is no checkpoint
        assert file.name.split(".")[0] in caplog.text
        storage.delete(old)
        with pytest.raises(CorruptCheckpoint, match=r"step_00000020: .*--resume PATH"):
            find_checkpoint("auto", str(tmp_path), "b", "d")


def test_the_one_before_is_taken_when_the_newest_goes_meanwhile(tmp_path, one_rank, monkeypatch):
    old, _ = save(tmp_path, 10)
    new, _ = save(tmp_path, 20)

    def then_prune(*arguments):
        listed = candidates(*arguments)
        storage.delete(new)
        return listed

    monkeypatch.setattr(checkpointing, "candidates", then_prune)
    assert find_checkpoint("auto", str(tmp_path), "b", "d").url == old


def test_usual_losses_are_those_of_this_run_and_this_objective(tmp_path, one_rank):
    """Another run's, or another objective's, would make every step unusual."""
    objective = {"task": "joint", "freeze": ("unet.*",)}  # a tuple comes back as a list
    save(tmp_path, 10, config={"objective": objective})
    found = find_checkpoint("auto", str(tmp_path), "b", "d")
    assert found.loss_history(str(tmp_path), {"objective": objective}) == HISTORY
    assert found.loss_history(str(tmp_path) + "/", {"objective": objective}) == HISTORY
    assert found.loss_history(str(tmp_path), {"objective": objective | {"task": "clip"}}) == LossHistory()
    assert found.loss_history(str(tmp_path / "elsewhere"), {"objective": objective}) == LossHistory()
    save(tmp_path / "plain", 10, config={"recipe": "test"})
    assert (
        find_checkpoint("auto", str(tmp_path / "plain"), "b", "d").loss_history(str(tmp_path / "plain"), {"recipe": "test"})
        == HISTORY
    )


def test_a_state_is_restored_with_the_same_seed_only(tmp_path, one_rank):
    """The ledger counts a shard's samples in the order that the seed determines. Two saved ranks become one."""
    url, _ = save(tmp_path, 10, seed=3)
    loaded, catalog = find_checkpoint("auto", str(tmp_path), "b", "d"), SimpleNamespace(num_units=[3])
    state = TrainState.from_checkpoint(loaded, catalog, TrainConfig(seed=3))
    assert (state.step, state.url, state.skipped) == (10, url, {"image_undecodable": 4})
    assert state.base.to_bytes() == state.consumed.to_bytes() == LEDGER.to_bytes()
    with pytest.raises(ConfigError, match=r"train\.seed: 4, but the checkpoint .*step_00000010 was written with 3"):
        TrainState.from_checkpoint(loaded, catalog, TrainConfig(seed=4))


def test_the_newest_and_the_best_stay(tmp_path):
    keep = RetentionPolicy(str(tmp_path), 2, "heldout/acc1", "max")
    for step, accuracy in ((10, 0.1), (20, 0.5), (30, 0.2), (40, 0.3)):
        save(tmp_path, step, retention=keep, metrics={"heldout/acc1": accuracy})
    assert [url[-2:] for url in list_checkpoints(str(tmp_path))] == ["40", "30", "20"]


def test_the_best_is_the_first_of_equal_ones_and_has_a_value(tmp_path):
    """One without a value of its own step, or with none that is a number, is no candidate."""
    keep = RetentionPolicy(str(tmp_path), 1, "heldout/loss", "min")
    logged = {10: {}, 20: {"heldout/loss": 0.5}, 30: {"heldout/loss": 0.5}, 40: {"heldout/loss": float("nan")}}
    for step, metrics in logged.items():
        save(tmp_path, step, retention=keep, metrics=metrics)
    assert [url[-2:] for url in list_checkpoints(str(tmp_path))] == ["40", "20"]


def test_a_damaged_manifest_does_not_keep_the_others_from_going(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    (tmp_path / "checkpoints/a/step_00000020/complete.json").write_text("{")
    save(tmp_path, 40, retention=RetentionPolicy(str(tmp_path), 1, "heldout/loss"))
    assert [url[-2:] for url in list_checkpoints(str(tmp_path))] == ["40"]


def test_what_never_became_complete_goes_but_not_what_may_still_become_it(tmp_path):
    """That of a later launch, or beyond the newest of this one, may be under way."""
    for url in [save(tmp_path, step, launch=launch)[0] for launch, step in (("a", 50), ("b", 10), ("b", 30), ("c", 5))]:
        storage.delete(storage.join(url, COMPLETE))
    save(tmp_path, 20, launch="b", retention=RetentionPolicy(str(tmp_path), 2))
    left = sorted(f"{path.parent.name}{int(path.name[-8:])}" for path in (tmp_path / "checkpoints").glob("*/step_*"))
    assert left == ["b20", "b30", "c5"]


def test_an_abandoned_branch_gives_way_to_the_launch_that_began_again(tmp_path):
    """From an earlier step of it: the newest ones are those of the later launch."""
    keep = RetentionPolicy(str(tmp_path), 2)
    for launch, step in (("a", 10), ("a", 20), ("b", 12), ("b", 14)):
        save(tmp_path, step, launch=launch, retention=keep)
    assert [url.rsplit("/", 2)[1:] for url in list_checkpoints(str(tmp_path))] == [
        ["b", "step_00000014"], ["b", "step_00000012"],
    ]  # fmt: skip


def test_weights_are_read_without_ranks_and_fall_back_where_there_is_no_ema(tmp_path):
    tensors = {
        "weights/a": torch.zeros(3),
        "ema/a": torch.ones(3),
        "exp_avg/a": torch.ones(3) * 2,
        "weights/frozen": torch.ones(1) * 5,
    }
    url, _ = save(tmp_path, 10, tensors=tensors)
    assert {n: t.tolist() for n, t in read_weights(url, "ema")} == {"a": [1, 1, 1], "frozen": [5]}
    assert {n: t.tolist() for n, t in read_weights(url, "weights")} == {"a": [0, 0, 0], "frozen": [5]}
    plain, _ = save(tmp_path, 20, tensors={"weights/a": torch.zeros(3)})
    with pytest.raises(ConfigError, match="has no ema"):
        dict(read_weights(plain, "ema"))


def test_the_manifest_is_plain_json(tmp_path):
    url, _ = save(tmp_path, 10, metrics={"loss": 1.5}, config={"train": {"seed": 0}})
    content = json.loads((tmp_path / "checkpoints/a/step_00000010/complete.json").read_text())
    assert content["metrics"] == {"loss": 1.5}
    assert all(len(digest) == 64 for _, digest in content["files"].values())
    assert url.endswith("step_00000010")
