"""The DeepSpeed engine equals a plain torch loop, on ranks without Ray."""

import inspect
import logging
import math
import os
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from ray_platform import storage
from ray_platform.contracts import MixtureState
from ray_platform.train import checkpoint_format
from ray_platform.train.checkpoint_format import LossHistory, RankState
from ray_platform.train.config import TrainConfig
from ray_platform.train.retention import RetentionPolicy
from ray_platform.train.tensor_parts import TensorJoiner
from tests.ray_platform.engine_runs import BASE, STAGES, STEPS, assert_equal, train
from tests.ray_platform.small_task import PictureTask, PixelTask, SmallTask, samples
from tests.support.ranks import shared_ranks, whole_state

pytestmark = pytest.mark.ranks


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


WSD = {"lr_schedule": "wsd", "warmup_steps": 2}


@pytest.mark.parametrize(
    "schedule",
    [
        *({"lr_schedule": name, "min_lr_factor": 0.1} for name in ("constant", "linear", "cosine")),
        WSD | {"num_steps": STEPS, "cooldown_steps": 2, "min_lr_factor": 0.1},
    ],
)
def test_every_schedule_continues_to_the_last_bit(schedule):
    losses, tensors, *_ = train(**schedule)
    first, state, *_ = train(stop=5, **schedule)
    then, resumed, *_ = train(start=5, state=state, **schedule)
    assert first + then == losses
    assert_equal(resumed, tensors)


def progress_on_a_rank(rank):
    from ray_platform.train.engine import Engine

    task, seen = SmallTask(), []
    task.precompute_step_loss = lambda inputs, seeds, control, progress: seen.append(progress) or [{} for _ in inputs]
    engine = Engine(task, TrainConfig(**BASE), 4, 1)
    for step in (0, 3):
        engine.backward([samples(step, 4)], [step], step=step)
    return seen


def test_a_task_learns_the_fraction_of_the_run_that_is_done(two_ranks):
    assert two_ranks.run(progress_on_a_rank) == [[0.0, 0.25]] * 2


def rates_on_a_rank(rank):
    from ray_platform.train.engine import Engine
    from ray_platform.train.optimizer import Rewarm

    config = TrainConfig(num_steps=9, warmup_steps=0, lr_schedule="constant", rewarm_steps=2, zero_stage=0)
    engine = Engine(SmallTask(), config, 4, 1, Rewarm(3, 1.0, {"biases": 0.5}))
    engine.backward([samples(0, 4)], [0])
    engine.update(3)
    return engine.learning_rates()


def test_a_group_with_another_peak_rises_to_it_and_the_others_stay(two_ranks):
    assert two_ranks.run(rates_on_a_rank) == [{"matrices": 1e-2, "biases": pytest.approx(1.5e-2)}] * 2


def test_a_branch_cools_down_from_the_constant_phase_and_the_main_run_continues():
    main = WSD | {"num_steps": 100, "cooldown_steps": 10}
    whole, branching = train(**main), train(stop=4, **main)[1]
    cooled = train(start=4, state=branching, **WSD | {"num_steps": STEPS, "cooldown_steps": 2})
    continued = train(start=4, state=branching, **main)
    assert continued[0] == whole[0][4:]
    assert_equal(continued[1], whole[1])
    assert cooled[0][0] == whole[0][4], "the branch starts from the same weights"
    changes = [(run[1]["weights/last.weight"] - branching["weights/last.weight"]).norm() for run in (cooled, continued)]
    assert changes[0] < changes[1], "its second step is smaller"


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


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_an_offloaded_optimizer_trains_as_well(reference, zero_stage):
    losses, *_ = train(zero_stage=zero_stage, offload_optimizer=True)
    torch.testing.assert_close(losses, reference[0], rtol=1e-5, atol=1e-6)


def pictures_trained(rank, fields):
    """Return the losses of three steps, the weights after them, and whether each filter [O, I, h, w] lies as [O, h, w, I]."""
    from ray_platform.train.engine import Engine

    task, losses = PictureTask(), []
    engine = Engine(task, TrainConfig(**BASE | fields), 2, 1)
    for step in range(3):
        images = torch.randn(2, 2, 6, 2, generator=torch.Generator().manual_seed(2 * step + rank))
        losses.append(engine.backward([{"x": images}], [0])[0])
        engine.update(step)
    filters = [p for p in task.module.parameters() if p.ndim == 4]
    return losses, whole_state(engine), [p.is_contiguous(memory_format=torch.channels_last) for p in filters]


def test_channels_last_weights_train_as_well(two_ranks):
    (contiguous, other), *_ = zip(*(two_ranks.run(pictures_trained, {"channels_last": c}) for c in (False, True)), strict=True)
    assert (contiguous[2], other[2]) == ([False, False], [True, True])
    torch.testing.assert_close(other[:2], contiguous[:2], rtol=1e-4, atol=1e-6)
    assert contiguous[0][0] > contiguous[0][2]


@pytest.mark.slow
def test_a_compiled_module_trains_as_well(reference):
    losses, *_ = train(zero_stage=2, compile=True)
    torch.testing.assert_close(losses, reference[0], rtol=1e-4, atol=1e-5)


def compilations_on_a_rank(rank):
    """Return the number of compilations after a step, after inference with other batch sizes, and after another step."""
    from ray_platform.train.engine import Engine

    task, compiled, counts = SmallTask(), [], []
    engine = Engine(task, TrainConfig(**BASE, compile=True), 4, 1)
    task.module.compile(dynamic=False, backend=lambda graph, inputs: compiled.append(graph) or graph.forward)
    for step in range(2):
        engine.backward([samples(step, 4)], [0])
        engine.update(step)
        counts.append(len(compiled))
        with engine.inference():
            for size in (2, 3):
                task.module(samples(step, size), 0)
        counts.append(len(compiled))
    return counts


def test_validation_and_previews_compile_nothing():
    assert shared_ranks(1).run(compilations_on_a_rank) == [[1, 1, 1, 1]]


def save_checkpoint(manager, step, **metrics):
    """Save a checkpoint. Returns the reason for a failure, or an empty string."""
    manifest = checkpoint_format.Manifest(
        token="", step=step, num_updates=step, samples_seen=0, loss_scale={}, world_size=2, zero_stage=0, global_batch_size=4,
        seed=0, source_digest="d", metrics=metrics, code_version="c", config={"train": asdict(manager.engine.config)}, files={},
    )  # fmt: skip
    manager.save(manifest, [], RankState.capture({}, LossHistory(), MixtureState()))
    return manager.wait()


def checkpoint_manager(engine, output, **fields):
    from ray_platform.train.checkpointing import CheckpointManager, TrainState
    from ray_platform.train.hang_detector import HeartbeatThread

    train = TrainConfig(**fields)
    state = TrainState.initial(SimpleNamespace(num_units=[3]), train)
    retention = RetentionPolicy(output, train.keep_checkpoints, train.keep_best, train.keep_best_mode)
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
        stage = {"zero_stage": zero_stage, "channels_last": zero_stage == 0}
        other = Engine(PictureTask(), TrainConfig(**fields | stage), 2, 1)
        for _, tensor, _ in other.local_state():
            tensor.detach().fill_(7)
        restore(find_checkpoint("auto", output, "b", "d"), other)
        restored.append(whole_state(other))
    return failure, strided, whole_state(engine), restored


@pytest.mark.parametrize("zero_stage", [0, 2, 3])
def test_a_checkpoint_of_filters_is_restored_at_any_stage(two_ranks, tmp_path, zero_stage):
    """They are channels-last at stage 0."""
    fields = {"channels_last": zero_stage == 0, "zero_stage": zero_stage, "ema_decay": 0.9}
    (failure, strided, state, restored), _ = two_ranks.run(pictures_saved, str(tmp_path), fields)
    assert failure == ""
    assert ("weights/frozen.weight" in strided) == (zero_stage == 0)
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


def stalled(rank):
    """Record two steps of 3 s per rank, half of it waiting, then 1 s for a checkpoint on one rank and 3 s on the other."""
    from ray_platform.train.statistics import ThroughputMeter

    meter = ThroughputMeter(0.0)
    for _ in range(2):
        meter.add({"loss": torch.tensor([6.0, 2.0])}, captions=["a b", "c"], waited=1.5, worked=1.5)
    meter.stalled += 1 + 2 * rank
    metrics = meter.reduce(torch.device("cpu"))
    return [round(metrics[name], 4) for name in ("train/stalled_fraction", "data/waiting_fraction", "loss")] + [meter.stalled]


def test_what_stalls_a_run_is_a_fraction_of_its_own(two_ranks):
    assert two_ranks.run(stalled) == [[0.25, 0.5, 3.0, 0.0]] * 2


def test_deepspeed_does_not_warn_of_our_optimizer():
    from ray_platform.train import zero

    zero.import_deepspeed()  # sets the filter
    from deepspeed.runtime import engine
    from deepspeed.utils import logger

    untested = zero.UNTESTED
    assert untested in inspect.getsource(engine), "DeepSpeed has another text; change the filter"
    shown: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = shown.append
    logger.addHandler(handler)
    for text in (f"You are using {untested}", "another warning"):
        logger.warning(text)
    logger.removeHandler(handler)
    assert [record.getMessage() for record in shown] == ["another warning"]


def test_zero_stage_0_does_not_spend_time_on_deepspeed():
    code = "import sys; from ray_platform.train import engine; assert 'deepspeed' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": "platform"})
