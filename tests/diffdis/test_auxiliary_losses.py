"""The losses beyond Algorithm 1 equal independent references in value and gradient, and change nothing while they are off."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from diffdis import schedule
from diffdis.config import ObjectiveConfig
from diffdis.encoder import FrozenEncoder
from diffdis.feature_networks import PooledFeatures
from diffdis.image_branch import down_path
from diffdis.losses import caption_contrast_loss, dispersive_loss, noised_alignment_loss, repa_loss
from diffdis.model import CachingSelfAttention, ImageKVCache
from diffdis.schedule import lambda_factor

CPU = torch.device("cpu")
NETWORK = f"{__name__}:build_color_network"
OPTIONS = {
    "caption_contrast": {"caption_contrast_weight": 0.25, "caption_contrast_temperature": 0.05},
    "dispersive": {"dispersive_weight": 0.5, "dispersive_temperature": 0.5},
    "noised_alignment": {"noised_alignment_weight": 2.0, "noised_alignment_limit": 900, "num_draws": 2},
    "repa": {"repa_weight": 0.5, "repa_network": NETWORK},
}
CASES = [
    (task, name) for name in OPTIONS for task in ("joint", "generation") if (task, name) != ("generation", "noised_alignment")
]


def build_color_network(device, options):
    def to_input(images, device):
        return torch.from_numpy(images).to(device).float() / 255

    return PooledFeatures(lambda x: torch.cat([x.mean(dim=(1, 2)), x.amax(dim=(1, 2))], dim=1), to_input, device, "fd_color", {})


def assert_same(value, reference, *inputs):
    """Compare two scalars and their gradients."""
    torch.testing.assert_close(value, reference)
    for found, expected in zip(torch.autograd.grad(value, inputs), torch.autograd.grad(reference, inputs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def test_the_direction_from_image_to_text_is_a_cross_entropy_over_the_other_captions():
    predicted, texts, scale = random(3, 2, 5), F.normalize(random(6, 5, seed=1).detach(), dim=1), torch.tensor(7.0)
    ids, own = torch.tensor([0, 1, 2, 1, 4, 5]), torch.tensor([1, 4, 0])
    loss = noised_alignment_loss(predicted.float(), own, texts, ids, scale).sum()
    total = 0.0
    for row, text in enumerate(own.tolist()):
        candidates = [text] + [j for j in range(6) if ids[j] != ids[text]]
        logits = 7 * predicted[row] @ texts[candidates].T
        total = total + F.cross_entropy(logits, torch.zeros(2, dtype=torch.long))
    assert_same(loss, total.float(), predicted)


def test_the_contrast_is_a_cross_entropy_over_two_captions():
    error, wrong = random(4), random(4, seed=1)
    reference = F.cross_entropy(torch.stack([-error, -wrong], dim=1) / 0.3, torch.zeros(4, dtype=torch.long))
    assert_same(caption_contrast_loss(error, wrong, 0.3).mean(), reference, error, wrong)


def test_the_dispersive_loss_is_that_of_all_pairs():
    features = random(4, 2, 3)
    total = sum(torch.exp(-(one - two).square().sum() / 6 / 0.4) for one in features for two in features)
    assert_same(dispersive_loss(features, 0.4), torch.log(total / 16).float(), features)
    assert dispersive_loss(features[:1], 0.4) == 0
    assert dispersive_loss(100 * features, 0.4).item() == pytest.approx(math.log(1 / 4)), "all are apart"


def test_repa_is_minus_the_cosine():
    projected, features = random(4, 6), random(4, 6, seed=1).detach()
    cosine = (projected * features).sum(dim=1) / projected.square().sum(dim=1).sqrt() / features.square().sum(dim=1).sqrt()
    assert_same(repa_loss(projected, features).sum(), -cosine.sum().float(), projected)


def reference(module, inputs, noise, name):
    """Return the weighted auxiliary loss by the stock U-Net or the alignment pass, one image at a time where possible."""
    model, config = module.model, module.objective
    abar = model.alphas_cumprod[noise.timesteps]
    noisy = schedule.add_noise(inputs["latent"], noise.noise, abar)
    states = torch.where(noise.drop_caption[:, None, None], inputs["null_states"], inputs["token_states"])
    target = schedule.prediction_target(model.config.schedule.prediction_type, inputs["latent"], noise.noise, abar)
    kept = []
    hook = model.unet.mid_block.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    predicted = model.unet(noisy, noise.timesteps, states).sample
    hook.remove()
    if name == "dispersive":
        (flat,) = (features.flatten(1) for features in kept)
        distances = (flat[:, None] - flat[None]).square().mean(dim=2)
        return config.dispersive_weight * (-distances / config.dispersive_temperature).exp().mean().log()
    if name == "repa":
        (pooled,) = (features.mean(dim=(2, 3)) for features in kept)
        return -config.repa_weight * F.cosine_similarity(module.repa(pooled), inputs["image_features"]).mean()
    size = len(noisy)
    if name == "caption_contrast":
        losses = []
        for i in range(size):
            if inputs["caption_ids"][i] != inputs["caption_ids"][i - 1] and not noise.drop_caption[i]:
                other = inputs["token_states"][i - 1][None]
                wrong = model.unet(noisy[i : i + 1], noise.timesteps[i : i + 1], other).sample[0]
                errors = torch.stack([(image - target[i]).square().mean() for image in (predicted[i], wrong)])
                losses.append(-(-errors / config.caption_contrast_temperature).log_softmax(dim=0)[0])
        return config.caption_contrast_weight * torch.stack(losses).mean()
    losses, e_t = [], model.noise_query(inputs["query"], noise.query_noise, noise.query_timesteps)
    for i in range(size):
        if noise.drop_caption[i] and noise.timesteps[i] < config.noised_alignment_limit:
            attend = CachingSelfAttention(model.stream, 1)
            features = down_path(model.unet, noisy[i : i + 1], noise.timesteps[i : i + 1], inputs["null_states"], attend).features
            image = ImageKVCache(attend.cache, model.head.encode_image(features.flatten(2).transpose(1, 2)))
            query = model.predict_query(image, e_t[i : i + 1], noise.query_timesteps[i : i + 1])[0]  # [n, D]
            candidates = [i] + [j for j in range(size) if inputs["caption_ids"][j] != inputs["caption_ids"][i]]
            logits = model.temperature() * query @ inputs["query"][candidates].T
            losses.append(F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long)))
    return config.lambda_alignment * config.noised_alignment_weight * torch.stack(losses).mean()


def run(task, inputs, seed, **arguments):
    """Return loss, metrics, and gradients by name."""
    task.module.zero_grad()
    loss, metrics = task.module(inputs, seed, **arguments)
    loss.backward()
    return loss.detach(), metrics, {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}


def make_pair(make_task, name, task_name, **fields):
    """Return a task with one auxiliary loss, and one with the same weights without it."""
    options = dict(OPTIONS[name])
    common = ObjectiveConfig(
        task=task_name, caption_dropout=0.5, lambda_alignment=0.3, num_draws=options.pop("num_draws", 1), **fields
    )
    task, plain = make_task(dataclasses.replace(common, **options)), make_task(common)
    plain.module.load_state_dict(task.module.state_dict(), strict=False)
    return task, plain


@pytest.mark.parametrize(("task_name", "name"), CASES)
def test_value_and_gradient_in_a_step_equal_the_reference(make_task, batch, task_name, name):
    task, plain = make_pair(make_task, name, task_name)
    inputs, seed = task.inputs(batch, CPU), 3
    noise = task.module.sample_noise(inputs, seed)
    assert 0 < noise.drop_caption.sum() < len(noise.drop_caption)
    loss, metrics, found = run(task, inputs, seed)
    base, _, expected = run(plain, inputs, seed)
    task.module.zero_grad()
    term = reference(task.module, inputs, noise, name)
    term.backward()
    torch.testing.assert_close(loss - base, term.detach(), rtol=1e-4, atol=1e-6)
    total, weight = metrics[f"loss_{name}"]
    assert weight > 0
    scale = task.objective.lambda_alignment if name == "noised_alignment" else 1.0
    torch.testing.assert_close(scale * getattr(task.objective, f"{name}_weight") * total / weight, term.detach())
    of_term = {n: p.grad for n, p in task.module.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() | of_term.keys()
    difference = torch.cat([(found[n] - expected.get(n, torch.zeros_like(g))).flatten() for n, g in found.items()])
    of_reference = torch.cat([of_term.get(n, torch.zeros_like(g)).flatten() for n, g in found.items()])
    assert (difference - of_reference).norm() <= 1e-4 * of_reference.norm()


@pytest.mark.parametrize("name", OPTIONS)
def test_with_gradient_caching_the_term_is_the_same(make_task, batch, name):
    """The cache is about the alignment of the clean images; the other losses run in the step's own pass."""
    changes = []
    for negatives in ("step", "micro_batch"):
        task, plain = make_pair(make_task, name, "joint", negatives=negatives)
        inputs = task.inputs(batch, CPU)
        parts = [{k: v if k == "null_states" else v[rows] for k, v in inputs.items()} for rows in (slice(0, 3), slice(3, 6))]
        of_task = task.precompute_step_loss(parts, [3, 4])[1]
        assert ("grad_cache" in of_task) == (negatives == "step")
        loss, _, found = run(task, parts[1], 4, **of_task)
        base, _, expected = run(plain, parts[1], 4, **plain.precompute_step_loss(parts, [3, 4])[1])
        gradient = torch.cat([(g - expected.get(n, torch.zeros_like(g))).flatten() for n, g in found.items()])
        changes.append((loss - base, gradient))
    (cached, cached_gradient), (alone, gradient) = changes
    torch.testing.assert_close(cached, alone, rtol=1e-4, atol=1e-5)
    assert gradient.norm() > 0
    assert (cached_gradient - gradient).norm() <= 1e-4 * gradient.norm()


def test_a_batch_without_a_dropped_caption_has_no_noised_alignment(make_task, batch):
    task, plain = make_pair(make_task, "noised_alignment", "joint", negatives="micro_batch")
    for each in (task, plain):
        each.module.objective = dataclasses.replace(each.module.objective, caption_dropout=0.0)
    inputs = task.inputs(batch, CPU)
    loss, metrics, _ = run(task, inputs, 3)
    assert loss == run(plain, inputs, 3)[0]
    assert metrics["loss_noised_alignment"].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("name", "factors"),
    [("constant", (1, 1, 1)), ("linear", (1, 0.75, 0)), ("cosine", (1, 0.5 + 0.5 * math.cos(math.pi / 4), 0))],
)
def test_lambda_falls_over_the_run(make_task, batch, name, factors):
    assert [lambda_factor(name, progress) for progress in (0.0, 0.25, 1.0)] == pytest.approx(factors)
    task = make_task(ObjectiveConfig(lambda_alignment=0.4, lambda_schedule=name))
    plain = make_task(ObjectiveConfig(lambda_alignment=0.4 * factors[1]))
    inputs = task.inputs(batch, CPU)
    (arguments,) = task.precompute_step_loss([inputs], [3], progress=0.25)
    loss, metrics, found = run(task, inputs, 3, **arguments)
    expected_loss, _, expected = run(plain, inputs, 3)
    torch.testing.assert_close(loss, expected_loss)
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient)
    if name != "constant":
        assert (metrics["lambda_alignment"][0] / metrics["lambda_alignment"][1]).item() == pytest.approx(0.4 * factors[1])


def test_the_features_for_repa_stay_on_the_device(make_task, batch, monkeypatch):
    task = make_task(ObjectiveConfig(**OPTIONS["repa"]))
    expected = build_color_network(CPU, None).features(batch.tensors["image"])
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: pytest.fail("the host waits for the accelerator"))
    assert torch.equal(task.inputs(batch, CPU)["image_features"], torch.from_numpy(expected))


def test_the_projection_of_repa_is_trained_and_is_not_part_of_the_model(make_task, batch, tmp_path):
    task = make_task(ObjectiveConfig(task="generation", **OPTIONS["repa"]))
    names = {group["name"] for group in task.parameter_groups() for p in group["params"] if p is task.module.repa[0].weight}
    assert names == {"new"}
    task.save_pretrained(task.module.state_dict(), tmp_path)
    encoded = FrozenEncoder(task.config).encode(batch.images, batch.captions)
    with pytest.raises(ValueError, match=r"^objective\.repa_weight: precomputed data has no images[^\n]*$"):
        task.inputs(SimpleNamespace(tensors=encoded, captions=batch.captions), CPU)
    with pytest.raises(ValueError, match=r"objective\.repa_network: .*unknown"):
        make_task(ObjectiveConfig(repa_weight=1.0, repa_network="resnet"))


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"noised_alignment_weight": 1.0}, {"query_visibility": "joint"}, r"objective\.noised_alignment_weight: 1 .*one_way"),
        (
            {"noised_alignment_weight": 1.0, "task": "alignment"},
            {},
            r"objective\.noised_alignment_weight: task alignment .*joint",
        ),
        ({"dispersive_weight": 1.0, "task": "clip"}, {}, r"objective\.dispersive_weight: task clip .*joint or generation"),
        ({"repa_weight": -1.0}, {}, r"objective\.repa_weight: -1 is out of range"),
        ({"caption_contrast_temperature": 0.0}, {}, r"objective\.caption_contrast_temperature: 0 is out of range"),
    ],
)
def test_what_cannot_work_is_rejected_in_one_line(make_task, fields, changes, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        make_task(ObjectiveConfig(**fields), **changes)
