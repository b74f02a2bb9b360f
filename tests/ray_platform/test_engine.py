"""The DeepSpeed engine equals a plain torch loop, on ranks without Ray."""

import inspect
import logging
import math
from types import SimpleNamespace

import pytest
import torch

from ray_platform import storage
from ray_platform.contracts import ConfigError, MixtureState
from ray_platform.train import checkpoint_format
from ray_platform.train.checkpoint_format import LossHistory, RankState
from ray_platform.train.config import BatchPlan, TrainConfig
from ray_platform.train.optimizer import ema_decay_at
from ray_platform.train.tensor_parts import TensorJoiner
from tests.ray_platform.small_task import PictureTask, PixelTask, SmallTask, samples
from tests.support.ranks import shared_ranks, whole_state

GLOBAL_BATCH, STEPS = 16, 6
# Otherwise ZeRO 3 keeps full copies of small parameters on every rank and does not shard a small model at all.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
BASE = {"num_steps": 12, "warmup_steps": 3, "gradient_clipping": 0.5, "ema_decay": 0.9, "zero_stage": 0}
STAGES = (0, 1, 2, 3)

pytestmark = pytest.mark.ranks


def rank_loop(rank, fields, world_size, num_micro, start, stop, state, bad_at):
    """Run steps start..stop of one rank, from a state or from the beginning.

    Returns:
        (losses, full state, whether each step changed it, last gradient norm).
    """
    from ray_platform.train.engine import Engine

    task = SmallTask()
    size = GLOBAL_BATCH // world_size // num_micro
    engine = Engine(task, TrainConfig(**fields, deepspeed=SHARDED if fields["zero_stage"] == 3 else {}), size, num_micro)
    assert not fields["zero_stage"] or hasattr(engine.optimizer, "clip_grad"), "`deepspeed_internals.set_clipping` sets it"
    if state is not None:
        engine.load_state(start, lambda name, shape: state.get(name))
    losses, changed = [], []
    for step in range(start, stop):
        batch = samples(step, GLOBAL_BATCH)
        if step == bad_at and rank == 0:
            batch["y"][0] = math.inf
        parts = [{k: v[(rank * num_micro + m) * size :][:size] for k, v in batch.items()} for m in range(num_micro)]
        loss, _ = engine.backward(parts, [step * 100 + rank * num_micro + m for m in range(num_micro)])
        torch.distributed.all_reduce(loss)
        losses.append(loss.item() / world_size)
        update = engine.update(step)
        changed.append(update.updated)
        if fields["zero_stage"] == 3:
            assert not [name for name, p in task.module.named_parameters() if p.numel()], "every rank holds them whole"
        if engine.config.compile and step == start:
            task.compile()
    return losses, whole_state(engine), changed, update.grad_norm if start < stop else 0.0


def train(world_size=2, *, num_micro=2, start=0, stop=STEPS, state=None, bad_at=-1, **fields):
    results = shared_ranks(world_size).run(rank_loop, BASE | fields, world_size, num_micro, start, stop, state, bad_at)
    for _, tensors, *_ in results[1:]:
        assert_equal(tensors, results[0][1])
    return results[0]


def assert_equal(tensors, expected):
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.fixture(scope="module")
def whole_runs():
    """Results of all steps on two ranks with two micro-batches each, by ZeRO stage."""
    return {stage: train(zero_stage=stage) for stage in STAGES}


@pytest.fixture(scope="module")
def states():
    """State after three steps, by ZeRO stage."""
    return {stage: train(zero_stage=stage, stop=3)[1] for stage in STAGES}


def test_a_host_that_trains_for_the_first_time_compiles_nothing(whole_runs):
    assert not shared_ranks(2).extensions.exists()


@pytest.fixture(scope="module")
def reference():
    """Losses, weights and EMA of a plain loop with AdamW, clipping, schedule and EMA written out."""
    task = SmallTask()
    module, config = task.module, TrainConfig(**BASE)
    trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
    ema = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(task.parameter_groups(), betas=(0.9, 0.999))
    rates = [group["lr"] for group in optimizer.param_groups]
    losses = []
    for step in range(STEPS):
        batch, size = samples(step, GLOBAL_BATCH), GLOBAL_BATCH // 4
        optimizer.zero_grad()
        parts = [module({k: v[i * size :][:size] for k, v in batch.items()}, step * 100 + i)[0] for i in range(4)]
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


@pytest.mark.parametrize("zero_stage", STAGES)
def test_losses_weights_and_ema_equal_those_of_a_plain_loop(reference, whole_runs, zero_stage):
    """Covers clipping, warm-up, the cosine schedule, a frozen layer and a buffer."""
    losses, tensors, _, _ = whole_runs[zero_stage]
    expected_losses, weights, ema = reference
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)
    assert {n.partition("/")[2] for n in tensors} == set(weights)
    assert {tensors[n].item() for n in tensors if n.startswith("step/")} == {STEPS}
    for name, value in weights.items():
        torch.testing.assert_close(tensors[f"weights/{name}"], value, rtol=1e-5, atol=1e-5, msg=name)
    for name, value in ema.items():
        torch.testing.assert_close(tensors[f"ema/{name}"], value, rtol=1e-5, atol=1e-5, msg=name)
        assert not torch.equal(value, weights[name]), "this EMA never changed"


@pytest.mark.parametrize(("first", "then"), [(3, (1, 1)), (2, (2, 0)), (0, (1, 2)), (None, (2, 3))])
def test_a_state_continues_at_another_world_size_and_zero_stage(reference, states, first, then):
    state = train(1, num_micro=4, zero_stage=1, stop=3)[1] if first is None else states[first]
    losses, tensors, *_ = train(then[0], num_micro=4 // then[0], zero_stage=then[1], start=3, state=state)
    torch.testing.assert_close(losses, reference[0][3:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tensors["ema/first.weight"], reference[2]["first.weight"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_a_state_of_any_stage_is_loaded_to_the_last_bit(states, zero_stage):
    assert_equal(train(zero_stage=zero_stage, start=3, stop=3, state=states[3])[1], states[3])


@pytest.mark.parametrize("zero_stage", STAGES)
def test_the_same_ranks_continue_to_the_last_bit(whole_runs, states, zero_stage):
    losses, tensors, *_ = train(zero_stage=zero_stage, start=3, state=states[zero_stage])
    assert losses == whole_runs[zero_stage][0][3:]
    assert_equal(tensors, whole_runs[zero_stage][1])


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_parameter_that_is_trained_from_a_resume_on_starts_with_its_own_step_count(states, zero_stage):
    """Adam's first update is as large as the learning rate; with the run's step count it would be several times larger."""
    new, old = "first.weight", {name: t for name, t in states[zero_stage].items() if not name.startswith("step/")}
    state = {name: tensor for name, tensor in old.items() if name in (f"weights/{new}", f"ema/{new}") or not name.endswith(new)}
    tensors = train(zero_stage=zero_stage, start=3, stop=4, state=state)[1]
    assert {name: tensors[name].item() for name in tensors if name.startswith("step/")} == {
        f"step/{name}": 1 if name == new else 4 for name in ("first.weight", "first.bias", "last.weight", "last.bias")
    }
    update = (tensors[f"weights/{new}"] - state[f"weights/{new}"]).abs().max()
    assert update == pytest.approx(1e-2, rel=0.1), "the rate of this step, and a little weight decay"


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_step_with_an_infinite_gradient_changes_nothing(states, zero_stage):
    """The gradient is infinite on one of two ranks; both skip the step."""
    losses, tensors, changed, *_ = train(zero_stage=zero_stage, stop=4, bad_at=3)
    assert changed == [True, True, True, False]
    assert math.isinf(losses[3])
    assert_equal(tensors, states[zero_stage])


@pytest.mark.parametrize("fields", [{"offload_optimizer": True}, {"channels_last": True}])
@pytest.mark.parametrize("zero_stage", [1, 3])
def test_offload_and_another_layout_train_as_well(reference, zero_stage, fields):
    losses, *_ = train(zero_stage=zero_stage, **fields)
    torch.testing.assert_close(losses, reference[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_micro", [1, 2])
@pytest.mark.parametrize("zero_stage", STAGES)
def test_weights_in_half_precision_have_float32_copies(reference, zero_stage, num_micro):
    """They train about as well, and a checkpoint has what is not rounded, of the frozen weights, too."""
    losses, tensors, *_ = train(num_micro=num_micro, zero_stage=zero_stage, precision="bf16")
    if num_micro == 2:  # the batches of the reference
        torch.testing.assert_close(losses, reference[0], rtol=0.03, atol=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    trained = tensors["weights/first.weight"]
    assert not torch.equal(trained, trained.bfloat16().float())
    for name in ("frozen.weight", "frozen.bias"):
        assert torch.equal(tensors[f"weights/{name}"], reference[1][name]), name


@pytest.mark.parametrize(("first", "then"), [(0, 2), (2, 3), (3, 0)])
def test_a_state_of_half_precision_is_loaded_to_the_last_bit(first, then):
    state = train(zero_stage=first, precision="bf16", stop=3)[1]
    for precision in ("bf16", "fp32"):
        assert_equal(train(zero_stage=then, precision=precision, start=3, stop=3, state=state)[1], state)


class ScaledTask(SmallTask):
    """With a parameter that stays float32, and with the type in which the module uses each parameter."""

    def __init__(self):
        super().__init__()
        self.module.log_scale = torch.nn.Parameter(torch.zeros(1))
        forward = self.module.forward

        def scaled(inputs, seed):
            loss, metrics = forward(inputs, seed)
            self.used = {name: parameter.dtype for name, parameter in self.module.named_parameters()}
            return loss * self.module.log_scale.exp().squeeze(), metrics

        self.module.forward = scaled

    def parameter_groups(self):
        own = self.module.log_scale
        others = [group | {"params": [p for p in group["params"] if p is not own]} for group in super().parameter_groups()]
        return [*others, {"name": "scale", "params": [own], "lr": 1e-3, "weight_decay": 0.0, "float32": True}]


def scaled_step(rank, zero_stage):
    from ray_platform.train.engine import Engine

    task = ScaledTask()
    shards = SHARDED if zero_stage == 3 else {}
    engine = Engine(task, TrainConfig(zero_stage=zero_stage, precision="bf16", warmup_steps=0, deepspeed=shards), 4, 1)
    for step in range(2):
        engine.backward([samples(step, 8) | {}], [step])
        assert engine.update(step).updated
    return task.used, whole_state(engine)


@pytest.mark.parametrize("zero_stage", STAGES)
def test_a_group_stays_in_float32_except_under_zero_3(two_ranks, zero_stage):
    (used, state), (_, other) = two_ranks.run(scaled_step, zero_stage)
    assert {name for name, dtype in used.items() if dtype == torch.float32} == ({"log_scale"} if zero_stage < 3 else set())
    assert state["weights/log_scale"].item() == pytest.approx(-2e-3, rel=0.01), "two steps down, at the rate of its group"
    assert_equal(other, state)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_fp16_scales_its_loss_and_finds_a_scale(reference, zero_stage):
    """The initial scale overflows; those steps are skipped."""
    losses, tensors, changed, grad_norm = train(zero_stage=zero_stage, precision="fp16", gpus_per_worker=1, stop=16)
    assert changed.count(True) >= 4
    first = changed.index(True)
    torch.testing.assert_close(losses[: first + 1], [reference[0][0]] * (first + 1), rtol=0.3, atol=0)
    assert losses[-1] < losses[first]
    assert 0 < grad_norm < 10, "as if there were no scale"
    assert all(tensor.isfinite().all() for tensor in tensors.values())


@pytest.mark.slow
def test_a_compiled_module_trains_as_well(reference):
    losses, *_ = train(zero_stage=2, compile=True)
    torch.testing.assert_close(losses, reference[0], rtol=1e-4, atol=1e-5)


def save_checkpoint(manager, step, **metrics):
    """Save a checkpoint. Returns the reason for a failure, or an empty string."""
    manifest = checkpoint_format.Manifest(
        token="", step=step, num_updates=step, samples_seen=0, loss_scale={}, world_size=2, zero_stage=0, global_batch_size=4,
        seed=0, source_digest="d", metrics=metrics, code_version="c", config={}, files={},
    )  # fmt: skip
    manager.save(manifest, [], RankState.capture({}, LossHistory(), MixtureState()))
    return manager.wait()


def checkpoint_manager(engine, output, **fields):
    from ray_platform.train.checkpointing import CheckpointManager, TrainState
    from ray_platform.train.hang_detector import HeartbeatThread

    train = TrainConfig(**fields)
    state = TrainState.initial(SimpleNamespace(num_units=[3]), train)
    retention = checkpoint_format.RetentionPolicy(output, train.keep_checkpoints, train.keep_best)
    lineage = checkpoint_format.Lineage("a")
    return CheckpointManager(lineage, engine, state, retention, HeartbeatThread(None, torch.distributed.get_rank()))


def pictures_saved(rank, output, fields):
    """Save a checkpoint after a step, and restore it at other ZeRO stages."""
    from ray_platform.train.checkpointing import find_checkpoint, restore
    from ray_platform.train.engine import Engine

    engine = Engine(PictureTask(), TrainConfig(**fields), 2, 1)
    engine.backward([{"x": torch.arange(48.0).view(2, 2, 6, 2)}], [0])
    engine.update(0)
    strided = [name for name, tensor, _ in engine.local_state() if not tensor.is_contiguous()]
    failure = save_checkpoint(checkpoint_manager(engine, output, **fields), 1)
    restored = []
    for zero_stage in (0, 2, 3):
        other = Engine(PictureTask(), TrainConfig(**fields | {"zero_stage": zero_stage}), 2, 1)
        for _, tensor, _ in other.local_state():
            tensor.detach().fill_(7)
        restore(find_checkpoint("auto", output, "b", "d"), other)
        restored.append(whole_state(other))
    return failure, strided, whole_state(engine), restored


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_checkpoint_of_channels_last_weights_is_restored_at_any_stage(two_ranks, tmp_path, zero_stage):
    """Trained weights are channels-last at stage 0, frozen weights at every stage."""
    fields = {"channels_last": True, "zero_stage": zero_stage, "ema_decay": 0.9}
    (failure, strided, state, restored), _ = two_ranks.run(pictures_saved, str(tmp_path), fields)
    assert failure == ""
    assert ("weights/frozen.weight" in strided) == (zero_stage < 3)
    assert ("ema/first.weight" in strided) == (zero_stage == 0)
    (url,) = checkpoint_format.list_checkpoints(str(tmp_path))
    manifest = checkpoint_format.read_manifest(url)
    joiner, files = TensorJoiner(), checkpoint_format.tensor_files(manifest)
    parts = checkpoint_format.read_tensors(url, manifest, files)
    assert_equal(dict(filter(None, (joiner.add(key, part) for key, part in parts.items()))), state)
    for other in restored:
        assert_equal(other, state)


def saved_on_a_full_disk(rank, output):
    """Save three checkpoints: the second's upload fails on rank 1, the third's manifest on rank 0. Returns the failures."""
    from ray_platform.train.engine import Engine

    manager = checkpoint_manager(Engine(SmallTask(), TrainConfig(), 2, 1), output, keep_best="heldout/acc1")
    write = storage.write_bytes

    def full(url, data):
        if "step_00000002/rank_00001_000" in url or "step_00000003/complete" in url:
            raise storage.StorageError(f"{url}: No space left on device", "forbidden")
        write(url, data)

    storage.write_bytes = full
    try:
        failures = [
            save_checkpoint(manager, 1, **{"heldout/acc1": 0.5}),
            save_checkpoint(manager, 2),
            save_checkpoint(manager, 3),
        ]
    finally:
        storage.write_bytes = write
    return failures, manager._warned_of_metric, manager.heartbeat.progress


def test_all_ranks_know_which_checkpoint_failed_and_why(two_ranks, tmp_path):
    (failures, warned, progress), (failures_of_rank_1, *_) = two_ranks.run(saved_on_a_full_disk, str(tmp_path))
    assert failures == failures_of_rank_1
    assert failures[0] == ""
    assert "step_00000002/rank_00001_000" in failures[1]
    assert "step_00000003/complete" in failures[2]
    assert warned, "a metric of keep_best that is not logged is reported"
    assert progress > 0, "uploads report progress to the hang detector"
    (url,) = checkpoint_format.list_checkpoints(str(tmp_path))
    assert url.endswith("step_00000001")
    assert not list(tmp_path.glob("checkpoints/a/step_00000002/*")), "the files of a failed checkpoint are removed"


class FailingPreview(PixelTask):
    """Task whose previews, or the page that shows them, fail on some ranks."""

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


def previews_generated(rank, cases):
    from ray_platform.train.engine import Engine
    from ray_platform.train.heldout import generate_previews

    return [generate_previews(Engine(FailingPreview(*case), TrainConfig(), 2, 1), 10) for case in cases]


def test_previews_that_fail_on_some_ranks_are_left_out(two_ranks):
    cases = {((), "works"): b"[0, 1, 2]", ((1,), "works"): b"[0, 2]", ((0, 1), "works"): None, ((0,), "fails"): None}
    assert two_ranks.run(previews_generated, list(cases)) == [list(cases.values()), [None] * 4]


def test_a_trace_that_cannot_be_written_does_not_stop_training(tmp_path, caplog):
    from ray_platform.train.throughput import start_profiler

    (tmp_path / "profile").write_text("no folder")
    profiler = start_profiler(str(tmp_path))
    for _ in range(8):
        profiler.step()
    profiler.stop()
    assert "could not be written; training continues" in caplog.text


def stalled(rank):
    """Record two steps of 3 s per rank, half of it waiting, then 1 s for a checkpoint on one rank and 3 s on the other."""
    from ray_platform.train.throughput import ThroughputMeter

    meter = ThroughputMeter(0.0)
    for _ in range(2):
        meter.add({"loss": torch.tensor([6.0, 2.0])}, captions=["a b", "c"], waited=1.5, worked=1.5)
    meter.stalled += 1 + 2 * rank
    metrics = meter.reduce(torch.device("cpu"))
    return [round(metrics[name], 4) for name in ("train/share_stalled", "data/share_waiting", "loss")] + [meter.stalled]


def test_what_stalls_a_run_is_a_fraction_of_its_own(two_ranks):
    assert two_ranks.run(stalled) == [[0.25, 0.5, 3.0, 0.0]] * 2


def test_deepspeed_does_not_warn_of_our_optimizer():
    from deepspeed.runtime import engine
    from deepspeed.utils import logger

    from ray_platform.train.engine import deepspeed_internals  # the engine sets the filter

    untested = deepspeed_internals.UNTESTED
    assert untested in inspect.getsource(engine), "DeepSpeed has another text; change the filter"
    shown: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = shown.append
    logger.addHandler(handler)
    for text in (f"You are using {untested}", "another warning"):
        logger.warning(text)
    logger.removeHandler(handler)
    assert [record.getMessage() for record in shown] == ["another warning"]


@pytest.mark.parametrize(("fields", "steps"), [({"log_every": 4}, [4, 8, 12]), ({"log_every": 4, "control_every": 6}, [6, 12])])
def test_control_metrics_are_computed_with_the_log_or_at_their_own_interval(fields, steps):
    config = TrainConfig(**fields)
    assert [step for step in range(1, 13) if config.is_control_due(step)] == steps


def test_the_configuration_of_deepspeed_can_be_extended():
    from ray_platform.train.engine import deepspeed_config

    more = {"zero_optimization": {"reduce_bucket_size": 7}, "wall_clock_breakdown": True}
    config = deepspeed_config(TrainConfig(zero_stage=2, deepspeed=more), 4, 2)
    assert (config["zero_optimization"]["stage"], config["zero_optimization"]["reduce_bucket_size"]) == (2, 7)
    assert config["wall_clock_breakdown"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((128, 8, 16), (16, 1)), ((128, 4, 16), (16, 2)), ((128, 7, 16), (9, 2)), ((8, 1, 4), (4, 2)), ((3, 4, 4), (1, 1)),
        # The smallest number of micro-batches would lose samples; slightly more do not. A prime number of samples must lose some.
        ((50, 1, 16), (10, 5)), ((25, 1, 10), (5, 5)), ((37, 1, 16), (12, 3)),
    ],
)  # fmt: skip
def test_a_global_batch_is_divided_into_micro_batches(arguments, expected):
    plan = BatchPlan.of(*arguments)
    assert (plan.micro_batch_size, plan.num_micro_batches) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"num_workers": (4, 2)}, {"num_workers": 0}, {"global_batch_size": 1, "num_workers": 2}, {"precision": "fp16"},
        {"offload_optimizer": True, "zero_stage": 0}, {"ema_decay": 1.0}, {"max_loss_factor": 1.0}, {"stop_at_step": -1},
        {"checkpoint_minutes": -1.0}, {"heldout_every": 0, "heldout_sources": ("a",)}, {"log_every": 0},
        {"zero_stage": 0, "deepspeed": {"wall_clock_breakdown": True}}, {"zero_stage": 3, "compile": True},
    ],
)  # fmt: skip
def test_invalid_fields_are_named(fields):
    with pytest.raises(ConfigError, match=f"train.{next(iter(fields))}"):
        TrainConfig(**fields)
