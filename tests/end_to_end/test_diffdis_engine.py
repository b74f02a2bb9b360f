"""DiffDis under the engine, on two ranks without Ray, equals one plain process: gradients, scores, previews and FLOPs."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffdis.config import ObjectiveConfig
from diffdis.objective import StepNoise
from diffdis.task import DiffDisTask
from ray_platform.train.config import TrainConfig
from ray_platform.train.profiling import count_flops
from tests.support import step_counts
from tests.support.ranks import whole_state
from tests.support.tiny_checkpoints import draw_query_weights

CPU = torch.device("cpu")
CAPTIONS = ("red heart", "blue circle", "green leaf", "yellow star", "red heart", "black cat", "white tree", "pizza")
# Otherwise ZeRO 3 keeps full copies of small parameters on every rank and does not shard a small model at all.
SHARDED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def build(config, **objective):
    torch.manual_seed(0)
    task = DiffDisTask(config, ObjectiveConfig(**objective), CAPTIONS[:3])
    if task.config.trained_for in ("joint", "alignment"):
        draw_query_weights(task.module.model)
    return task


def batch_of(captions):
    images = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 16, 16, 3), dtype=np.uint8)
    places = [CAPTIONS.index(caption) for caption in captions]
    return SimpleNamespace(tensors={"image": images[places]}, captions=captions)


def parts_of(number):
    size = len(CAPTIONS) // number
    return [CAPTIONS[part * size : (part + 1) * size] for part in range(number)]


def step_on_a_rank(rank, config, objective, fields, num_micro):
    """Run one step of the engine. Returns its loss and AdamW's first moments, which are a tenth of the gradients."""
    from ray_platform.train.engine import Engine

    task = build(config, **objective)
    captions = parts_of(2 * num_micro)[rank * num_micro :][:num_micro]
    inputs = [task.inputs(batch_of(part), CPU) for part in captions]
    train = TrainConfig(**fields, gradient_clipping=0.0, deepspeed=SHARDED if fields["zero_stage"] == 3 else {})
    engine = Engine(task, train, len(captions[0]), num_micro)
    loss, _ = engine.backward(inputs, [rank * num_micro + part for part in range(num_micro)])
    assert engine.update(0).updated
    if fields["zero_stage"] == 3:
        assert not [name for name, p in task.module.named_parameters() if p.numel()], "every rank holds them whole"
    moments = {n.partition("/")[2]: t for n, t in whole_state(engine).items() if n.startswith("exp_avg/")}
    return loss, moments


def scores_on_a_rank(rank, config, objective):
    """Return the rows before and after the first step, which makes ZeRO 3 see a different order of layers."""
    from ray_platform.train.engine import Engine

    task = build(config, **objective)
    inputs = task.inputs(batch_of(parts_of(2)[rank]), CPU)
    engine = Engine(task, TrainConfig(**ZERO_3, deepspeed=SHARDED), len(CAPTIONS) // 2, 1)
    with engine.inference():
        before = task.embed_heldout(inputs)["predicted"]
    engine.backward([inputs], [0])
    engine.update(0, skip=True)  # keep the weights unchanged
    with engine.inference():
        return before, task.embed_heldout(inputs)["predicted"]


def step_of_one_process(config, objective, num_parts):
    """Return (loss, gradients) of all parts in one batch, with the random values of each part."""
    task = build(config, **objective)
    parts = [task.inputs(batch_of(captions), CPU) for captions in parts_of(num_parts)]
    samples = [task.module.sample_noise(part, seed) for seed, part in enumerate(parts)]
    noise = StepNoise(*(torch.cat(values) for values in zip(*samples, strict=True)))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} | {"null_states": parts[0]["null_states"]}
    task.module.sample_noise = lambda inputs, seed: noise
    loss, _ = task.module(whole, 0)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in task.module.named_parameters() if p.grad is not None}


ARMS = [{"task": name} for name in ("joint", "generation", "alignment", "clip")]
ZERO_0, ZERO_2, ZERO_3 = {"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}
CASES = [(arm, ZERO_2, 1) for arm in ARMS]
CASES += [({"task": "joint", "negatives": "step", "num_draws": 2}, ZERO_2, 2)]
CASES += [({"task": "joint"}, ZERO_2 | {"activation_checkpointing": True}, 1), ({"task": "clip"}, ZERO_3, 1)]
SIGLIP_CACHED = {"task": "joint", "alignment_loss": "siglip", "negatives": "step"}
CASES += [(SIGLIP_CACHED, ZERO_0, 2), (SIGLIP_CACHED, ZERO_3 | {"activation_checkpointing": True}, 2)]
CASES += [({"task": "joint", "lora_rank": 2}, fields, 1) for fields in (ZERO_0, ZERO_3)]


@pytest.mark.parametrize(("objective", "fields", "num_micro"), CASES)
def test_a_step_on_two_ranks_has_the_gradients_of_one_process(two_ranks, tiny_model, objective, fields, num_micro):
    found = two_ranks.run(step_on_a_rank, tiny_model, objective, fields, num_micro)
    loss, gradients = step_of_one_process(tiny_model, objective, 2 * num_micro)
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).mean(), loss)
    moments = found[0][1]
    assert moments.keys() == gradients.keys()
    difference = torch.nn.utils.get_total_norm([moments[name] * 10 - value for name, value in gradients.items()])
    assert difference < 1e-5 * torch.nn.utils.get_total_norm(gradients.values())


AUXILIARY = ("noised_alignment_weight", "caption_contrast_weight", "dispersive_weight")


def test_sharded_weights_have_the_same_gradients_with_auxiliary_losses(two_ranks, tiny_model):
    """Also if one of the ranks has no noisy image to align."""
    config = dataclasses.replace(tiny_model, query_visibility="one_way")
    objective = {"task": "joint", "caption_dropout": 0.3} | dict.fromkeys(AUXILIARY, 1.0)
    (whole, _), (sharded, _) = (two_ranks.run(step_on_a_rank, config, objective, fields, 1) for fields in (ZERO_0, ZERO_3))
    torch.testing.assert_close(sharded[0], whole[0])
    difference = torch.nn.utils.get_total_norm([sharded[1][name] - value for name, value in whole[1].items()])
    assert difference < 1e-5 * torch.nn.utils.get_total_norm(whole[1].values())


def steps_on_a_rank(rank, config, fields, start, stop, state):
    """Train adapters from step `start`, with the state of the engine before it, to `stop`.

    Returns the state of all ranks, joined, before the first step and after each.
    """
    from ray_platform.train.engine import Engine

    task = build(config, lora_rank=2)
    inputs = task.inputs(batch_of(parts_of(2)[rank]), CPU)
    deepspeed = SHARDED if fields["zero_stage"] == 3 else {}
    train = TrainConfig(**fields, num_steps=4, warmup_steps=0, ema_decay=0.9, deepspeed=deepspeed)
    engine = Engine(task, train, len(CAPTIONS) // 2, 1)
    if state:
        assert not engine.load_state(start, lambda name, shape: state.get(name))
    states = [whole_state(engine)]
    for step in range(start, stop):
        engine.backward([inputs], [2 * step + rank])
        assert engine.update(step).updated
        states.append(whole_state(engine))
    return states


@pytest.mark.parametrize("fields", [pytest.param(ZERO_0, id="0"), pytest.param(ZERO_3, id="3", marks=pytest.mark.slow)])
def test_a_resumed_run_of_adapters_equals_an_uninterrupted_one(two_ranks, tiny_model, fields):
    [[_, first, _, whole], _] = two_ranks.run(steps_on_a_rank, tiny_model, fields, 0, 3, {})
    [[*_, resumed], _] = two_ranks.run(steps_on_a_rank, tiny_model, fields, 1, 3, first)
    assert resumed.keys() == whole.keys()
    assert not [name for name, value in whole.items() if not torch.equal(resumed[name], value)]
    moved = {name for name in whole if name.startswith("weights/model.unet.") and not torch.equal(first[name], whole[name])}
    assert moved == {name for name in whole if name.startswith("weights/model.unet.") and "lora_" in name}
    assert {name for name in whole if name.startswith("exp_avg/model.unet.")} == {
        n.replace("weights/", "exp_avg/") for n in moved
    }
    other = ZERO_2 if fields is ZERO_0 else ZERO_0
    [[loaded], _] = two_ranks.run(steps_on_a_rank, tiny_model, other, 1, 1, first)
    assert not [name for name, value in first.items() if not torch.equal(loaded[name], value)], "another ZeRO stage loads it"


def test_scores_of_sharded_weights_under_the_joint_mask(two_ranks, tiny_model):
    config = dataclasses.replace(tiny_model, query_visibility="joint")
    found = two_ranks.run(scores_on_a_rank, config, {"task": "alignment"})
    task = build(config, task="alignment")
    with torch.no_grad():
        rows = task.embed_heldout(task.inputs(batch_of(CAPTIONS), CPU))
    for when in (0, 1):
        torch.testing.assert_close(torch.cat([rank[when] for rank in found]), rows["predicted"])


class Counted:
    """FLOPs counted by hand.

    Counts each layer's forward pass and, in the backward pass, the gradients of its weights and its input where they are needed.
    Attention has 2 matrix products forward and 5 backward, because its kernels recompute the scores.
    """

    def __init__(self, module, monkeypatch):
        self.total = 0
        attention = F.scaled_dot_product_attention

        def counted(query, key, value, **more):
            out = attention(query, key, value, **more)
            self._count(out, 2 * query.numel() * key.shape[-2], 2, 5)
            return out

        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.register_forward_hook(self._layer)
        monkeypatch.setattr(F, "scaled_dot_product_attention", counted)

    def _layer(self, layer, arguments, out):
        operations = 2 * out.numel() * layer.weight[0].numel()
        self._count(out, operations, 1, layer.weight.requires_grad + arguments[0].requires_grad)

    def _count(self, out, operations, times, times_backward):
        self.total += times * operations
        if out.requires_grad:
            out.register_hook(lambda _: self.__setattr__("total", self.total + times_backward * operations))


# Tokens and widths of the tiny model's three sites and two head blocks: the context of a query under the one-way mask.
READ = ((64, 16), (16, 32), (16, 32), (16, 32), (16, 32))


@pytest.mark.parametrize(
    ("name", "visibility"),
    [("joint", "joint"), ("alignment", "joint"), ("alignment", "one_way"), ("generation", "one_way"), ("clip", "one_way")],
)
def test_operations_are_those_of_the_models_own_work(tiny_model, visibility, name, monkeypatch):
    """Excludes the shuffled-image control, which is only logged and encodes the images again under the joint mask."""
    config, size = dataclasses.replace(tiny_model, query_visibility=visibility), 3
    task = build(config, task=name)
    inputs = task.inputs(batch_of(CAPTIONS[:size]), CPU)
    forward = []
    with monkeypatch.context() as patch:
        hand = Counted(task.module, patch)
        for control in (True, False):
            hand.total = 0
            loss, metrics = task.module(inputs, 0, control=control)
            forward.append(hand.total)
        loss.backward()
        expected = hand.total
    if name != "generation":
        expected += 3 * 2 * size * size * 32  # InfoNCE: logits, their recomputation in backward, gradient of the queries
    if visibility == "one_way" and name in ("joint", "alignment"):
        expected += 3 * sum(2 * 2 * size * tokens * width for tokens, width in READ)
    assert count_flops(build(config, task=name).module, inputs, 0) == expected
    assert 2.5 * forward[1] < expected < 3.2 * forward[1]
    assert (forward[0] > forward[1]) == (name in ("joint", "alignment"))
    assert "alignment/retrieval_shuffled_images" not in metrics


def counts_on_a_rank(rank, config, precision, zero_stage, num_micro, statistics):
    # transformers reads the mask of captions that are encoded for the first time.
    config = dataclasses.replace(config, text_encoder=dataclasses.replace(config.text_encoder, cache_size=len(CAPTIONS)))
    task, train = build(config), TrainConfig(zero_stage=zero_stage, precision=precision, ema_decay=0.9)
    return step_counts.of_a_step(task, train, [batch_of(CAPTIONS[:2])] * num_micro, statistics)


# (zero_stage, precision, num_micro, statistics): every value with every stage, in as few runs as possible.
COUNTED = [
    (0, "fp32", 1, True), (0, "bf16", 2, False), (1, "fp32", 2, False), (1, "bf16", 1, True), (2, "fp32", 1, True),
    (2, "bf16", 2, False),
]  # fmt: skip


@pytest.mark.parametrize(("zero_stage", "precision", "num_micro", "statistics"), COUNTED)
def test_a_step_communicates_and_waits_as_little_as_possible(two_ranks, tiny_model, zero_stage, precision, num_micro, statistics):
    """Texts, InfoNCE's sums, status and gradients; ZeRO 1 and 2 also gather weights and add up the norm of the gradients.

    Each micro-batch gathers its texts and sums, and ZeRO 2 adds up its gradients. The temperature, which stays float32, has
    its own gradient or weights, and both at ZeRO 1. The host waits for the status, and to know whether the gradients are
    finite. Statistics add no wait and, at ZeRO 1 and 2, one sum over the ranks.
    """
    step, state = two_ranks.run(counts_on_a_rank, tiny_model, precision, zero_stage, num_micro, statistics)[0]
    again, own = num_micro - 1, (precision == "bf16") * (1 + (zero_stage == 1)) + (statistics and zero_stage > 0)
    assert step.collectives <= own + (4 + 2 * again, 6 + 2 * again, 6 + 3 * again)[zero_stage]
    assert step.host_waits <= 2
    assert state == (0, 0), "no rank waits for a checkpoint's tensors"
