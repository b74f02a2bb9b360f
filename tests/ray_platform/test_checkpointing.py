"""Only complete checkpoints are listed, even if uploads fail; also covers which checkpoint a run resumes from and retention."""

import json
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from ray_platform import object_store, retry, storage
from ray_platform.contracts import ConfigError, ConsumedRange, DataError, MixtureState
from ray_platform.data.ledger import Ledger
from ray_platform.formats import NewerFormatError
from ray_platform.train import checkpoint_format, checkpointing
from ray_platform.train.checkpoint_format import (
    COMPLETE,
    CorruptCheckpoint,
    Lineage,
    LossHistory,
    Manifest,
    RankState,
    candidates,
    list_checkpoints,
    read_manifest,
    read_rank_state,
    read_tensors,
    read_weights,
    tensor_files,
)
from ray_platform.train.checkpointing import AsyncUploader, TensorAssignment, TrainState, find_checkpoint
from ray_platform.train.config import TrainConfig
from ray_platform.train.retention import RetentionPolicy
from ray_platform.train.tensor_parts import part_key
from tests.support.messages import check_message

TENSORS = {f"weights/p{i}": torch.randn(50, generator=torch.Generator().manual_seed(i)) for i in range(6)}
HISTORY = LossHistory(1.5, 30, 4, 1)
STATE = RankState.capture({"image_undecodable": 2}, HISTORY, MixtureState((0.25, -0.25), (1, 0)))
LEDGER = Ledger([3])
LEDGER.add([ConsumedRange(0, 0, 1, 0, 5, 9)])


@pytest.fixture(autouse=True)
def no_retries(monkeypatch):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.0)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    file = tmp_path_factory.mktemp("group") / "init"
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def manifest(step, token="aa", world_size=2, **fields):
    plain = Manifest(
        token=token, step=step, num_updates=step, samples_seen=0, loss_scale={}, world_size=world_size, zero_stage=1,
        global_batch_size=4, seed=0, source_digest="d", metrics={}, code_version="c", config={}, files={},
    )  # fmt: skip
    return replace(plain, **fields)


def save(output, step, *, launch="a", token="aa", world_size=2, retention=None, tensors=TENSORS, lineage=None, **fields):
    """Save a checkpoint as all ranks do together, in format 1 without a lineage. Returns its URL and the uploader of rank 0."""
    folder = storage.join(checkpoint_format.checkpoints_dir(str(output)), launch)
    uploaders = [AsyncUploader(folder, rank, token, lambda: None) for rank in range(world_size)]
    assignment, parts = TensorAssignment(world_size), [{} for _ in uploaders]
    for name, tensor in tensors.items():
        parts[assignment.owner(tensor)][name] = tensor.clone()
    for rank, uploader in enumerate(uploaders):
        ledgers = dict.fromkeys((checkpoint_format.BASE, checkpoint_format.CONSUMED), LEDGER.to_bytes()) if rank == 0 else {}
        uploader.upload(step, parts[rank], ledgers, STATE)
    for uploader in uploaders:
        uploader.wait()
    complete, policy = manifest(step, token, world_size, **fields), retention or RetentionPolicy(str(output), 10)
    complete = lineage.place(complete) if lineage else complete
    uploaders[0].finalize(complete, policy, lineage or Lineage(launch))
    uploaders[0].wait()
    return uploaders[0].url, uploaders[0]


class Launch:
    """A launch that resumes from a checkpoint, or from the beginning, and saves checkpoints with their lineage."""

    def __init__(self, output, name, origin="", weights_only=False):
        self.output, self.name = output, name
        self.lineage = Lineage.read(str(output), name, origin, read_manifest(origin) if origin else None, weights_only)

    def save(self, step, **fields):
        url, _ = save(self.output, step, launch=self.name, lineage=self.lineage, **fields)
        self.lineage = self.lineage.after(checkpoint_format.checkpoint_name(step))
        return url


def read(url):
    manifest = read_manifest(url)
    return read_tensors(url, manifest, tensor_files(manifest))


def kept(output):
    """Return [launch and step] of the complete checkpoints, newest first."""
    return [f"{url.rsplit('/', 2)[1]}{int(url[-8:])}" for url in list_checkpoints(str(output))]


def test_what_was_saved_comes_back_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointing, "FILE_BYTES", 300)  # several files per rank
    url, _ = save(tmp_path, 10, metrics={"loss": 1.5})
    tensors = read(url)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert len(tensor_files(read_manifest(url))) == 6
    assert read_rank_state(url, read_manifest(url), 1) == STATE
    content = json.loads((tmp_path / "checkpoints/a/step_00000010/complete.json").read_text())
    assert content["metrics"] == {"loss": 1.5}


def test_without_its_manifest_there_is_no_checkpoint(tmp_path):
    url, _ = save(tmp_path, 10)
    storage.delete(storage.join(url, COMPLETE))
    assert list_checkpoints(str(tmp_path)) == candidates("auto", str(tmp_path), "a") == []
    with pytest.raises(ConfigError, match="is not a complete checkpoint"):
        candidates(url, str(tmp_path), "b")


def test_files_of_a_rank_that_was_thought_dead_are_not_part_of_a_later_checkpoint(tmp_path):
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
    url, uploader = save(tmp_path, 20, retention=RetentionPolicy(str(tmp_path), 1))
    assert uploader.failure == ""
    assert list_checkpoints(str(tmp_path)) == [url, old]
    assert "could not be removed" in caplog.text


def test_the_order_of_checkpoints_to_resume_from(tmp_path):
    """Checkpoints of this launch come first, then those of later and of earlier launches, regardless of their steps."""
    output = str(tmp_path)
    other, _ = save(tmp_path, 30, launch="a")
    old, _ = save(tmp_path, 10, launch="b")
    own, _ = save(tmp_path, 20, launch="b")
    elsewhere, _ = save(tmp_path / "elsewhere", 5)
    expected = {
        ("auto", "b"): [own, old, other], ("auto", "c"): [own, old, other], ("auto", "a"): [other, own, old],
        (elsewhere + "/", "c"): [own, old, other, elsewhere], (elsewhere, "a"): [other, own, old, elsewhere],
        (old, "c"): [old], (other, "b"): [own, old, other],
        ("none", "c"): [], ("none", "b"): [own, old],
    }  # fmt: skip
    assert {(resume, launch): candidates(resume, output, launch) for resume, launch in expected} == expected
    storage.delete(other)  # retention may delete it after a launch started from it
    assert candidates(other, output, "b") == [own, old]
    with pytest.raises(ConfigError, match="is not a complete checkpoint"):
        candidates(other, output, "c")


def test_a_checkpoint_is_loaded_with_all_that_a_run_needs(tmp_path, one_rank):
    """Two saved ranks are loaded by one. The loss history must match run and objective, or every step would be an outlier."""
    objective = {"task": "joint", "freeze": ("unet.*",)}  # a tuple is read back as a list
    url, _ = save(tmp_path, 10, seed=3, config={"objective": objective})
    loaded = find_checkpoint("auto", str(tmp_path), "b", "d")
    assert (loaded.url, loaded.rank_0, loaded.rank_states) == (url, STATE, [STATE, STATE])
    assert find_checkpoint("auto", str(tmp_path), "b", "other shards").ledgers is None
    assert find_checkpoint("none", str(tmp_path), "b", "d") is None
    for output, config, history in (
        (tmp_path, objective, HISTORY),
        (f"{tmp_path}/", objective, HISTORY),
        (tmp_path, objective | {"task": "clip"}, LossHistory()),
        (tmp_path / "elsewhere", objective, LossHistory()),
    ):
        assert loaded.loss_history(str(output), {"objective": config}) == history
    catalog = SimpleNamespace(num_units=[3])
    state = TrainState.from_checkpoint(loaded, catalog, TrainConfig(seed=3))
    assert (state.step, state.url, state.skipped) == (10, url, {"image_undecodable": 4})
    assert state.base.to_bytes() == state.consumed.to_bytes() == LEDGER.to_bytes()
    other = find_checkpoint("auto", str(tmp_path), "b", "other shards")
    with pytest.raises(DataError, match=r"data\.sources: .*step_00000010.*resume_weights_only"):
        TrainState.from_checkpoint(other, catalog, TrainConfig(seed=3))
    with pytest.raises(ConfigError, match=r"train\.seed: 4, but the checkpoint .*step_00000010 was written with 3"):
        TrainState.from_checkpoint(loaded, catalog, TrainConfig(seed=4))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("complete", "missing"), ("complete", "cut"), ("complete", "no JSON"), ("base", "cut"), ("consumed", "missing"),
        ("rank_00000", "no JSON"), ("rank_00001", "cut"), ("rank_00000_000", "no JSON"), ("rank_00001_000", "flipped"),
    ],
)  # fmt: skip
def test_the_one_before_is_taken_whatever_is_damaged(tmp_path, one_rank, caplog, name, damage):
    old, _ = save(tmp_path, 10)
    save(tmp_path, 20)
    (file,) = (tmp_path / "checkpoints/a/step_00000020").glob(f"{name}.*")
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"cut": data[:-20], "no JSON": b"[1]", "flipped": data[:-1] + bytes([data[-1] ^ 1])}[damage])
    assert find_checkpoint("auto", str(tmp_path), "b", "d").url == old
    if (name, damage) != ("complete", "missing"):  # without this file, the folder is not a checkpoint
        assert name in caplog.text
        line = caplog.messages[-1]
        storage.delete(old)
        with pytest.raises(CorruptCheckpoint, match=rf"step_00000020: .*{name}.*--resume PATH") as none_left:
            find_checkpoint("auto", str(tmp_path), "b", "d")
        if damage == "flipped":
            check_message("the newest checkpoint is damaged, in the log", line, OUTPUT_DIR=tmp_path)
            check_message("the only checkpoint is damaged", none_left.value, OUTPUT_DIR=tmp_path)


def test_the_one_before_is_taken_when_the_newest_is_deleted_meanwhile(tmp_path, one_rank, monkeypatch):
    old, _ = save(tmp_path, 10)
    new, _ = save(tmp_path, 20)

    def then_prune(*arguments):
        listed = candidates(*arguments)
        storage.delete(new)
        return listed

    monkeypatch.setattr(checkpointing, "candidates", then_prune)
    assert find_checkpoint("auto", str(tmp_path), "b", "d").url == old


@pytest.mark.parametrize(
    ("policy", "saved", "left"),
    [
        ((2, "score", "max"), [("a", 10, 0.1), ("a", 20, 0.5), ("a", 30, 0.2), ("a", 40, 0.3)], ["a40", "a30", "a20"]),
        # The earliest of equal checkpoints wins; checkpoints without a value, or with NaN, are not candidates.
        ((1, "score", "min"), [("a", 10, None), ("a", 20, 0.5), ("a", 30, 0.5), ("a", 40, float("nan"))], ["a40", "a20"]),
        # The newest checkpoints are those of the later launch, which resumed from an earlier step.
        ((2,), [("a", 10, None), ("a", 20, None), ("b", 12, None), ("b", 14, None)], ["b14", "b12"]),
        # One every 20 steps is permanent, also of the earlier launch.
        (
            (1, "", "max", 20),
            [("a", step, None) for step in (10, 20, 30)] + [("b", step, None) for step in (40, 50)],
            ["b50", "b40", "a20"],
        ),
        # Permanent ones are kept in addition to the newest and the best, and the best may be one of them.
        (
            (1, "score", "max", 20),
            [("a", step, score) for step, score in ((10, 0.1), (20, 0.2), (30, 0.5), (40, 0.3), (50, 0.1), (60, 0.2))],
            ["a60", "a40", "a30", "a20"],
        ),
        ((1, "score", "max", 20), [("a", 10, 0.1), ("a", 20, 0.5), ("a", 30, 0.2), ("a", 35, 0.1)], ["a35", "a20"]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path, policy, saved, left):
    launches = {}
    for name, step, score in saved:
        if name not in launches:
            launches[name] = Launch(tmp_path, name, *list_checkpoints(str(tmp_path))[:1])
        metrics = {} if score is None else {"score": score}
        launches[name].save(step, retention=RetentionPolicy(str(tmp_path), *policy), metrics=metrics)
    assert kept(tmp_path) == left


def test_a_branch_keeps_what_it_passed_through_and_resumes_from_that_first(tmp_path):
    output, retention = str(tmp_path), RetentionPolicy(str(tmp_path), 2)
    first = Launch(tmp_path, "a")
    urls = [first.save(step) for step in (10, 20, 30, 40)]
    newest = Launch(tmp_path, "b", urls[1]).save(25, retention=retention)
    assert kept(tmp_path) == ["b25", "a40", "a20"]
    assert candidates("auto", output, "c") == [newest, urls[1], urls[3]], "the run left the path to step 40"


def test_an_abandoned_step_does_not_replace_the_best_one_of_the_branch(tmp_path):
    first, retention = Launch(tmp_path, "a"), RetentionPolicy(str(tmp_path), 1, "score")
    urls = [first.save(step, metrics={"score": score}) for step, score in ((10, 0.1), (20, 0.2), (30, 0.9))]
    branch = Launch(tmp_path, "b", urls[1])
    for step, score in ((25, 0.5), (30, 0.3), (35, 0.4)):
        branch.save(step, metrics={"score": score}, retention=retention)
    assert kept(tmp_path) == ["b35", "b25", "a30"]


def test_the_requests_in_a_row_do_not_grow_with_the_number_of_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setitem(object_store.PACKAGES, "memory", ("fsspec", "fsspec"))
    output, thread, requests, inside = f"memory://{tmp_path}/run", threading.get_ident(), [], []

    def count(name):  # `find` is one request, as on S3
        original = getattr(MemoryFileSystem, name)

        def call(*arguments, **options):
            if threading.get_ident() != thread or inside:
                return original(*arguments, **options)
            requests.append(name)
            inside.append(name)
            try:
                return original(*arguments, **options)
            finally:
                inside.clear()

        monkeypatch.setattr(MemoryFileSystem, name, call)

    for name in ("ls", "info", "find", "cat_file"):
        count(name)
    policy, numbers = RetentionPolicy(output, 1, "score", keep_every=10), []
    for step in (10, 20, 30):
        url, _ = save(output, step, metrics={"score": 1.0})
        requests.clear()
        policy.prune(url, Lineage("a"))
        numbers.append(len(requests))
    assert len(list_checkpoints(output)) == 3
    assert len(set(numbers)) == 1, requests


def test_the_lineage_and_no_clock_orders_checkpoints(tmp_path):
    """Launches are named by their hosts' clocks: `b` and `a` ran one after the other. `c` goes back to the first checkpoint."""
    output, retention = str(tmp_path), RetentionPolicy(str(tmp_path), 1)
    old = [save(tmp_path, step, launch=launch)[0] for launch, step in (("0", 90), ("1", 5))]  # of format 1
    first = Launch(tmp_path, "b", candidates("auto", output, "b")[0])
    urls = [first.save(step) for step in (10, 20)]
    second = Launch(tmp_path, "a", candidates("auto", output, "a")[0])
    newest = second.save(15)
    assert list_checkpoints(output) == candidates("auto", output, "z") == [newest, *reversed(urls), *reversed(old)]
    manifests = [read_manifest(url) for url in (*urls, newest)]
    assert [(m.parent, m.counter) for m in manifests] == [("1/step_00000005", 1), ("b/step_00000010", 2), ("b/step_00000020", 3)]
    assert [m.ancestors for m in manifests[1:]] == [["0", "1"], ["0", "1", "b"]]

    branched = Launch(tmp_path, "c", urls[0]).save(11, retention=retention)
    assert list_checkpoints(output) == [branched, newest], "the other branch stays"
    second.save(16, retention=retention)  # of a launch that another one has replaced
    assert branched in list_checkpoints(output)


def test_incomplete_and_damaged_ones_are_removed_unless_they_may_be_in_progress(tmp_path):
    """Checkpoints of another launch that started later, or newer than the newest one of this launch, may be in progress."""
    earlier = [save(tmp_path, step, launch=launch)[0] for launch, step in (("a", 50), ("d", 5))]
    current = Launch(tmp_path, "b")
    others = [save(tmp_path, step, launch=launch)[0] for launch, step in (("b", 10), ("b", 15), ("b", 30), ("c", 5))]
    for url in earlier + others:
        storage.delete(storage.join(url, COMPLETE))
    (tmp_path / "checkpoints/b/step_00000015/complete.json").write_text("{")
    current.save(20, retention=RetentionPolicy(str(tmp_path), 1, "score"))
    left = sorted(f"{path.parent.name}{int(path.name[-8:])}" for path in (tmp_path / "checkpoints").glob("*/step_*"))
    assert left == ["b20", "b30", "c5"]


def test_a_manifest_of_another_version(tmp_path, caplog):
    """Unknown fields are ignored. A newer version is not damaged: no older checkpoint may replace it silently."""
    url, _ = save(tmp_path, 10)
    file = tmp_path / "checkpoints/a/step_00000010/complete.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"of_the_future": 1}))
    assert read_manifest(url) == Manifest.from_bytes(json.dumps(values).encode(), url)
    assert "of_the_future" in caplog.text
    check_message("a checkpoint has a field of a newer version, in the log", caplog.messages[-1], OUTPUT_DIR=tmp_path)
    file.write_text(json.dumps(values | {"format_version": 99}))
    with pytest.raises(NewerFormatError, match=r"complete\.json: .*newer version.*99") as newer:
        read_manifest(url)
    check_message("a checkpoint was written by a newer version", newer.value, OUTPUT_DIR=tmp_path)


def test_weights_are_read_without_ranks_and_replace_a_missing_ema(tmp_path):
    values = {"weights/a": [0.0], "ema/a": [1.0], "exp_avg/a": [2.0], "weights/frozen": [5.0]}
    url, _ = save(tmp_path, 10, tensors={name: torch.tensor(value) for name, value in values.items()})
    assert {n: t.tolist() for n, t in read_weights(url, "ema")} == {"a": [1], "frozen": [5]}
    assert {n: t.tolist() for n, t in read_weights(url, "weights")} == {"a": [0], "frozen": [5]}
    plain, _ = save(tmp_path, 20, tensors={"weights/a": torch.zeros(3)})
    with pytest.raises(ConfigError, match="has no ema"):
        dict(read_weights(plain, "ema"))


@pytest.mark.parametrize("lost", [None, 0, 1])
def test_parts_of_a_tensor_are_joined_by_their_positions(tmp_path, lost):
    whole, cuts = torch.arange(12.0).view(3, 4), [(5, 12), (0, 5)]  # in any order, on two ranks
    keys = [part_key("weights/a", whole.shape, start, whole.flatten()[start:stop]) for start, stop in cuts]
    whole_ones = [part_key("weights/b", whole.shape, 0, whole.flatten())]
    url, _ = save(tmp_path, 10, tensors=dict([key for i, key in enumerate(keys) if i != lost] + whole_ones))
    if lost is None:
        assert {name: tensor.tolist() for name, tensor in read_weights(url, "weights")} == dict.fromkeys("ab", whole.tolist())
    else:
        with pytest.raises(CorruptCheckpoint, match="weights/a"):
            dict(read_weights(url, "weights"))


@pytest.mark.parametrize("key", ["weights/a@1", "weights/a@x@4", "weights/a@3@2x2", "weights/a@-1@2x2", "weights/a@0@2x2@1"])
def test_a_damaged_name_of_a_part_is_rejected(tmp_path, key):
    url, _ = save(tmp_path, 10, tensors={key: torch.zeros(2)})
    with pytest.raises(CorruptCheckpoint, match="damaged"):
        dict(read_weights(url, "weights"))
