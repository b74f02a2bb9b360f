"""The DeepSpeed engine against a plain torch loop, on ranks without Ray."""

import math

import pytest
import torch

from ray_platform import storage
from ray_platform.contracts import ConfigError
from ray_platform.train import checkpoint_format
from ray_platform.train.config import BatchPlan, TrainConfig
from ray_platform.train.optimizer import ema_decay_at
from tests.ray_platform.small_task import PictureTask, PixelTask, SmallTask, samples
from tests.support.ranks import Ranks, shared_ranks

GLOBAL_BATCH, STEPS = 16, 6
# Else ZeRO 3 keeps small parameters whole on every rank, and a small model is not sharded at all.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
BASE = {"num_steps": 12, "warmup_steps": 3, "gradient_clipping": 0.5, "ema_decay": 0.9, "zero_stage": 0}

pytestmark = pytest.mark.ranks


def rank_loop(rank, fields, world_size, num_micro, start, stop, state, bad_at):
    """Steps start..stop of one rank, from a state or the beginning: losses, the whole state and what was skipped."""
    from ray_platform.train.engine import Engine

    task = SmallTask()
    size = GLOBAL_BATCH // world_size // num_micro
    engine = Engine(task, TrainConfig(**fields, deepspeed=SHARDED if fields["zero_stage"] == 3 else {}), size, num_micro)
    if state is not None:
        engine.load_state(start, lambda name, shape: state.get(name))
    losses, changed = [], []
    for step in range(start, stop):
        batch = samples(step, GLOBAL_BATCH)
        if step == bad_at and rank == 0:
            batch["y"][0] = math.inf
        mine = [{k: v[(rank * num_micro + m) * size :][:size] for k, v in batch.items()} for m in range(num_micro)]
        loss, _ = engine.backward(mine, [step * 100 + rank * num_micro + m for m in range(num_micro)])
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world_size)
        update = engine.update(step)
        changed.append(update.updated)
        if fields["zero_stage"] == 3:
            assert not [name for name, p in task.module.named_parameters() if p.numel()], "every rank holds them whole"
        if engine.config.compile and step == start:
            engine.compile()
    found = {name: tensor.detach().clone() for name, tensor in engine.state()}
    return losses, found, changed, engine.weights(), update.grad_norm if start < stop else 0.0


def on_two_ranks(function, *arguments):
    return shared_ranks(2).run(function, *arguments)


def train(world_size, *, num_micro=1, start=0, stop=STEPS, state=None, bad_at=-1, **fields):
    results = shared_ranks(world_size).run(rank_loop, BASE | fields, world_size, num_micro, start, stop, state, bad_at)
    for _, found, *_ in results[1:]:
        for name, tensor in results[0][1].items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    return results[0]


def test_a_host_that_trains_for_the_first_time_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    group = Ranks(1)
    try:
        group.run(rank_loop, BASE | {"zero_stage": 2}, 1, 1, 0, 1, None, -1)
    finally:
        group.stop()
    assert not list(tmp_path.iterdir())


def plain_loop(num_seeds, num_steps=STEPS):
    """AdamW, clipping, the schedule and the EMA by hand."""
    task = SmallTask()
    module, config = task.module, TrainConfig(**BASE)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(task.parameter_groups(), betas=(0.9, 0.999))
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(num_steps):
        batch, size = samples(step, GLOBAL_BATCH), GLOBAL_BATCH // num_seeds
        optimizer.zero_grad()
        parts = [module({k: v[i * size :][:size] for k, v in batch.items()}, step * 100 + i)[0] for i in range(num_seeds)]
        loss = torch.stack(parts).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        progress = (step - 3) / (config.num_steps - 3)
        factor = (step + 1) / 3 if step < 3 else 0.5 * (1 + math.cos(math.pi * progress))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        optimizer.step()
        losses.append(loss.item())
        for name, parameter in trained.items():
            ema[name].lerp_(parameter.detach(), 1 - ema_decay_at(0.9, step + 1))
    return losses, module.state_dict(), ema


@pytest.fixture(scope="module")
def reference():
    return plain_loop(num_seeds=4)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_losses_weights_and_ema_equal_those_of_a_plain_loop(reference, zero_stage):
    """Two ranks with two micro-batches each; clipping, warm-up, cosine, a frozen layer and a buffer."""
    losses, found, _, exported, _ = train(2, num_micro=2, zero_stage=zero_stage)
    expected_losses, weights, ema = reference
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert {n.partition("/")[2] for n in found} == set(weights)
    for name, value in weights.items():
        torch.testing.assert_close(found[f"weights/{name}"], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, value in ema.items():
        torch.testing.assert_close(found[f"ema/{name}"], value, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(value, weights[name]), "this EMA never changed"
        torch.testing.assert_close(exported[name], found[f"ema/{name}"], rtol=0, atol=0)
    assert torch.equal(exported["frozen.weight"], weights["frozen.weight"])


@pytest.mark.parametrize(("first", "then"), [((2, 3), (1, 1)), ((1, 1), (2, 3)), ((2, 2), (2, 0)), ((2, 0), (1, 2))])
def test_a_state_goes_on_at_another_world_size_and_zero_stage(reference, first, then):
    _, state, *_ = train(first[0], num_micro=4 // first[0], zero_stage=first[1], stop=3)
    losses, found, *_ = train(then[0], num_micro=4 // then[0], zero_stage=then[1], start=3, state=state)
    torch.testing.assert_close(losses, reference[0][3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["ema/first.weight"], reference[2]["first.weight"], rtol=1e-5, atol=1e-5)


def test_whatever_stage_a_state_is_at_it_exports_the_same_weights():
    """To the last bit, EMA and plain."""
    _, state, *_ = train(2, zero_stage=3, stop=3)
    for stage in (0, 1, 2):
        _, found, _, exported, _ = train(2, zero_stage=stage, start=3, stop=3, state=state)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
        assert torch.equal(exported["first.weight"], state["ema/first.weight"])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_the_same_ranks_go_on_to_the_last_bit(zero_stage):
    whole = train(2, zero_stage=zero_stage)
    _, state, *_ = train(2, zero_stage=zero_stage, stop=3)
    losses, found, *_ = train(2, zero_stage=zero_stage, start=3, state=state)
    assert losses == whole[0][3:]
    for name, tensor in whole[1].items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_step_with_an_infinite_gradient_changes_nothing(zero_stage):
    """On one rank of two: both leave the step out, and go on."""
    losses, found, changed, *_ = train(2, zero_stage=zero_stage, stop=3, bad_at=2)
    assert changed == [True, True, False]
    assert math.isinf(losses[2])
    before = train(2, zero_stage=zero_stage, stop=2)
    for name, tensor in before[1].items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("fields", [{"precision": "bf16"}, {"offload_optimizer": True}, {"channels_last": True}])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_precision_and_offload_train_as_well(reference, zero_stage, fields):
    losses, found, *_ = train(2, num_micro=2, zero_stage=zero_stage, **fields)
    torch.testing.assert_close(losses, reference[0], rtol=0.03 if "precision" in fields else 1e-5, atol=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in found.values())


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_fp16_scales_its_loss_and_finds_a_scale(reference, zero_stage):
    """From a scale that overflows at first: those steps are left out, and then it trains."""
    losses, found, changed, _, grad_norm = train(2, num_micro=2, zero_stage=zero_stage, precision="fp16", gpus_per_worker=1)
    assert changed.count(True) >= 4
    first = changed.index(True)
    torch.testing.assert_close(losses[: first + 1], [reference[0][0]] * (first + 1), rtol=0.3, atol=0)
    assert losses[-1] < losses[first]
    assert 0 < grad_norm < 10, "as if there were no scale"
    assert all(tensor.isfinite().all() for tensor in found.values())


def nested_passes(rank):
    """Of which the autocast is on behind each of them."""
    from ray_platform.train.engine import Engine

    task = SmallTask()
    engine = Engine(task, TrainConfig(precision="bf16", zero_stage=0), 4, 1)
    is_on = [torch.is_autocast_enabled("cpu")]
    for _ in range(2):
        with engine.inference():
            task.module(samples(0, 4), 0)
            is_on.append(torch.is_autocast_enabled("cpu"))
        is_on.append(torch.is_autocast_enabled("cpu"))
    engine.backward([samples(0, 4)], [0])
    return [*is_on, torch.is_autocast_enabled("cpu")]


def test_half_precision_ends_with_the_pass_that_it_is_for():
    """A score runs the module, which switches it on, inside of a block that does so too."""
    assert on_two_ranks(nested_passes) == [[False, True, False, True, False, False]] * 2


def checkpoint_manager(engine, output, **fields):
    from types import SimpleNamespace

    from ray_platform.train.checkpointing import CheckpointManager, TrainState
    from ray_platform.train.hang_detector import HeartbeatThread

    train = TrainConfig(**fields)
    state = TrainState.initial(SimpleNamespace(num_units=[3]), train)
    retention = checkpoint_format.RetentionPolicy(output, train.keep_checkpoints, train.keep_best)
    launch_dir = storage.join(checkpoint_format.checkpoints_dir(output), "a")
    return CheckpointManager(launch_dir, engine, state, retention, HeartbeatThread(None, torch.distributed.get_rank()))


def manifest_of(step, metrics=()):
    return checkpoint_format.Manifest(
        token="", step=step, num_updates=step, samples_seen=0, loss_scale={}, world_size=2, zero_stage=0, global_batch_size=4,
        seed=0, source_digest="d", metrics=dict(metrics), code_version="c", config={}, files={},
    )  # fmt: skip


def rank_state():
    from ray_platform.train.checkpointing import RankState
    from ray_platform.train.fault_tolerance import LossHistory

    return RankState.capture({}, LossHistory())


def pictures_saved(rank, output, fields):
    from ray_platform.train.engine import Engine

    engine = Engine(PictureTask(), TrainConfig(**fields), 2, 1)
    engine.backward([{"x": torch.arange(48.0).view(2, 2, 6, 2)}], [0])
    engine.update(0)
    strided = [name for name, tensor in engine.state() if not tensor.is_contiguous()]
    manager = checkpoint_manager(engine, output, **fields)
    manager.save(manifest_of(1), [], rank_state())
    return manager.wait(), strided, {name: checkpoint_format.contiguous_on_cpu(tensor) for name, tensor in engine.state()}


@pytest.mark.parametrize("zero_stage", [0, 2])
def test_weights_that_lie_channels_last_are_kept_too(tmp_path, zero_stage):
    """Trained ones at stage 0; frozen ones at every stage."""
    found = on_two_ranks(pictures_saved, str(tmp_path), {"channels_last": True, "zero_stage": zero_stage, "ema_decay": 0.9})
    (failure, strided, state), _ = found
    assert failure == ""
    assert "weights/frozen.weight" in strided
    assert ("ema/first.weight" in strided) == (zero_stage == 0)
    (url,) = checkpoint_format.list_checkpoints(str(tmp_path))
    manifest = checkpoint_format.read_manifest(url)
    saved = checkpoint_format.read_tensors(url, manifest, checkpoint_format.tensor_files(manifest))
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in state.items())


def saved_on_a_full_disk(rank, output):
    """Failures of three checkpoints: the second's upload fails on rank 1, the third's manifest on rank 0."""
    from ray_platform.train.checkpointing import Phase
    from ray_platform.train.engine import Engine

    manager = checkpoint_manager(Engine(SmallTask(), TrainConfig(), 2, 1), output, keep_best="heldout/acc1")
    write, failures, phases = storage.write_bytes, [], []

    def full(url, data):
        if "step_00000002/rank_00001_000" in url or "step_00000003/complete" in url:
            raise storage.StorageError(f"{url}: No space left on device", "forbidden")
        write(url, data)

    storage.write_bytes = full
    try:
        for step in (1, 2, 3):
            manager.save(manifest_of(step, {"heldout/acc1": 0.5} if step == 1 else {}), [], rank_state())
            phases.append(manager.phase)
            failures.append(manager.wait())
            phases.append(manager.phase)
    finally:
        storage.write_bytes = write
    assert phases == [Phase.UPLOADING, Phase.IDLE] * 3
    return failures, manager._warned_of_metric, manager.heartbeat.progress


def test_all_ranks_know_which_checkpoint_failed_and_why(tmp_path):
    (failures, warned, progress), (failures_of_rank_1, *_) = on_two_ranks(saved_on_a_full_disk, str(tmp_path))
    assert failures == failures_of_rank_1
    assert failures[0] == ""
    assert "step_00000002/rank_00001_000" in failures[1]
    assert "step_00000003/complete" in failures[2]
    assert warned, "a metric of keep_best that is not logged is reported"
    assert progress > 0
    assert [url[-1] for url in checkpoint_format.list_checkpoints(str(tmp_path))] == ["1"]


class FailingPreview(PixelTask):
    """Whose previews fail on some ranks, or whose page does."""

    def __init__(self, ranks, page):
        super().__init__()
        self.failing, self.page = ranks, page

    def preview(self, rank, world_size):
        if rank in self.failing:
            raise RuntimeError("out of memory")
        return super().preview(rank, world_size)

    def preview_page(self, images):
        if self.page == "fails":
            raise ValueError("no font")
        return repr(sorted(images)).encode()


def previews_generated(rank, ranks, page):
    from ray_platform.train.engine import Engine
    from ray_platform.train.heldout import generate_previews

    return generate_previews(Engine(FailingPreview(ranks, page), TrainConfig(), 2, 1), 10)


@pytest.mark.parametrize(
    ("ranks", "page", "expected"),
    [((), "works", b"[0, 1, 2]"), ((1,), "works", b"[0, 2]"), ((0, 1), "works", None), ((0,), "fails", None)],
)
def test_previews_that_fail_on_some_ranks_are_left_out(ranks, page, expected):
    assert on_two_ranks(previews_generated, ranks, page) == [expected, None]


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path, caplog):
    from ray_platform.train.throughput import start_profiler

    (tmp_path / "profile").write_text("no folder")
    profiler = start_profiler(str(tmp_path))
    for _ in range(8):
        profiler.step()
    profiler.stop()
    assert "could not be written; training continues" in caplog.text


def test_what_stalls_a_run_is_a_share_of_its_own():
    assert on_two_ranks(stalled) == [[("train/share_stalled", 0.25), ("data/share_waiting", 0.5), ("loss", 3.0)]] * 2


def stalled(rank):
    """Two steps of 3 s on each rank, half of which it waited, then 1 s of a checkpoint on one rank and 3 s on the other."""
    from ray_platform.train.throughput import ThroughputMeter

    meter = ThroughputMeter(0.0)
    for _ in range(2):
        meter.add({"loss": torch.tensor([6.0, 2.0])}, samples=2, waited=1.5, worked=1.5)
    with meter.stalled_time():
        pass
    meter.stalled += 1 + 2 * rank
    found = meter.reduce(torch.device("cpu"))
    again = meter.stalled
    return [(n, round(found[n], 4)) for n in ("train/share_stalled", "data/share_waiting", "loss")] + [again] * (again != 0)


@pytest.mark.slow
def test_a_compiled_module_trains_as_well(reference):
    losses, *_ = train(2, num_micro=2, zero_stage=2, compile=True)
    torch.testing.assert_close(losses, reference[0], rtol=1e-4, atol=1e-5)


def test_deepspeeds_own_configuration_can_be_extended():
    from ray_platform.train.engine import deepspeed_config

    config = TrainConfig(zero_stage=2, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True})
    made = deepspeed_config(config, 4, 2)
    assert made["zero_optimization"]["stage"] == 2
    assert made["zero_optimization"]["reduce_bucket_size"] == 7
    assert made["wall_clock_breakdown"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ((128, 8, 16), (16, 1)), ((128, 4, 16), (16, 2)), ((128, 7, 16), (9, 2)), ((8, 1, 4), (4, 2)), ((3, 4, 4), (1, 1)),
        # The fewest micro-batches would lose samples; a few more do not. A prime number of samples has to lose some.
        ((50, 1, 16), (10, 5)), ((25, 1, 10), (5, 5)), ((37, 1, 16), (12, 3)),
    ],
)  # fmt: skip
def test_a_global_batch_is_shared_out(asked, expected):
    plan = BatchPlan.of(*asked)
    assert (plan.micro_batch_size, plan.num_micro_batches) == expected
    assert plan.micro_batch_size <= asked[2]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_workers": (4, 2)}, "num_workers"),
        ({"num_workers": 0}, "num_workers"),
        ({"global_batch_size": 1, "num_workers": 2}, "global_batch_size"),
        ({"precision": "fp16"}, "precision"),
        ({"offload_optimizer": True, "zero_stage": 0}, "offload_optimizer"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"max_loss_factor": 1.0}, "max_loss_factor"),
    ],
)
def test_what_cannot_work_is_refused_by_its_field(fields, named):
    with pytest.raises(ConfigError, match=f"train.{named}"):
        TrainConfig(**fields)
