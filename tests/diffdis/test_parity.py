"""The method matches diffusers and an independent implementation in plain torch."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from diffdis import schedule
from diffdis.attention import image_attention
from diffdis.config import ObjectiveConfig, ScheduleConfig
from diffdis.image_branch import down_path, up_path
from diffdis.schedule import named_noise
from diffdis.task import DiffDisTask


def test_generation_pass_is_the_stock_unet_bit_for_bit(make_task, batch):
    model = make_task().module.model
    z, t, c = torch.randn(3, 12, 8, 8), torch.tensor([0, 500, 999]), torch.randn(3, 8, 32)
    found = model.predict_image(z, t, c)
    model.unet.set_attn_processor(AttnProcessor2_0())
    assert torch.equal(found, model.unet(z, t, c).sample)


@pytest.mark.parametrize("size", [8, 6])
def test_the_two_halves_of_the_unet_are_the_stock_one_bit_for_bit(make_task, size):
    unet = make_task().module.model.unet
    z, t, c = torch.randn(3, 12, size, size), torch.tensor([0, 500, 999]), torch.randn(3, 8, 32)
    seen = []
    unet.mid_block.register_forward_hook(lambda module, args, output: seen.append(output))
    expected = unet(z, t, c).sample
    down = down_path(unet, z, t, c, lambda index, layer, attention, x: image_attention(attention, x)[0])
    assert torch.equal(down.features, seen[0])
    assert torch.equal(up_path(unet, down, c), expected)


def test_an_option_of_the_unet_that_would_be_ignored_is_rejected(make_task, tiny_model):
    with pytest.raises(ValueError, match="center_input_sample"):
        make_task(unet=dataclasses.replace(tiny_model.unet, options={"center_input_sample": True}))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_walk_for_both_passes_equals_two(make_task, batch, visibility, checkpointing):
    task = make_task(query_visibility=visibility)
    module = task.module.double()
    if checkpointing:
        task.enable_activation_checkpointing()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in task.inputs(batch, torch.device("cpu")).items()}
    noise, model = module.sample_noise(inputs, seed=0), module.model
    latent, null_states, states = inputs["latent"], inputs["null_states"], inputs["token_states"]
    e_t = model.noise_query(inputs["query"], noise.query_noise, noise.query_timesteps)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def results(image, query, _):
        gradients = torch.autograd.grad(image.square().sum() + (query * e_t).sum(), parameters, allow_unused=True)
        return [image, query, *(g for g in gradients if g is not None)]

    condition = model.encode_condition(latent, null_states)
    apart = results(
        model.predict_image(noise.noise, noise.timesteps, states),
        model.predict_query(condition, e_t, noise.query_timesteps),
        condition,
    )
    both = model.predict_image_and_query(noise.noise, noise.timesteps, states, latent, null_states, e_t, noise.query_timesteps)
    together = results(*both[:3])
    assert len(together) == len(apart) > 50
    for one, two in zip(together, apart, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)  # `.float()` of an image is exact to float32's digits


def test_exported_unet_opens_in_diffusers_with_the_same_output(make_task, tmp_path):
    task = make_task()
    task.save_pretrained(task.module.state_dict(), tmp_path)
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    z, t, c = torch.randn(3, 12, 8, 8), torch.tensor([0, 500, 999]), torch.randn(3, 8, 32)
    assert torch.equal(unet(z, t, c).sample, task.module.model.predict_image(z, t, c))


# The losses of Algorithm 1 from METHOD's equations. Of diffdis, they use only the submodules that hold the weights.

ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)


def _reference_generation(module, inputs, noise):
    """Return the mean squared error of v."""
    z, eps = inputs["latent"], noise.noise
    a = ALPHA_BAR[noise.timesteps].view(-1, 1, 1, 1)
    c = torch.stack(
        [inputs["null_states"][0] if d else s for d, s in zip(noise.drop_caption, inputs["token_states"], strict=True)]
    )
    out = module.model.unet(a.sqrt() * z + (1 - a).sqrt() * eps, noise.timesteps, c).sample
    return ((out - (a.sqrt() * eps - (1 - a).sqrt() * z)) ** 2).mean()


def _attend(attention, tokens, visibility):
    """Plain softmax attention; with the one-way mask, only the last token itself can attend to the last token."""
    q, k, v = (
        p(tokens).unflatten(2, (attention.heads, -1)).transpose(1, 2) for p in (attention.to_q, attention.to_k, attention.to_v)
    )
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if visibility == "one_way":
        scores[:, :, :-1, -1] = -torch.inf
    return attention.to_out[0]((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def _reference_queries(module, inputs, noise, visibility):
    """Return the predicted queries [B, D]."""
    unet, stream, head = module.model.unet, module.model.stream, module.model.head
    z, e, a = inputs["latent"], inputs["query"], ALPHA_BAR[noise.query_timesteps]  # a: [B, 1]
    e_t = module.model.config.gamma * a.sqrt() * e.shape[1] ** 0.5 * e + (1 - a).sqrt() * noise.query_noise[:, 0]  # [B, D]
    noised = e_t + stream.time.embedding(stream.time.sinusoid(noise.query_timesteps[:, 0]))
    null = inputs["null_states"].expand(len(z), -1, -1)

    def site(transformer, block, x, h):
        q = block.fc_in(h + noised)
        tokens = transformer.proj_in(transformer.norm(x)).flatten(2).transpose(1, 2)
        for layer, query in zip(transformer.transformer_blocks, block.layers, strict=True):
            update = _attend(layer.attn1, torch.cat([layer.norm1(tokens), query.norm_attention(q)[:, None]], 1), visibility)
            tokens, q = tokens + update[:, :-1], q + update[:, -1]
            tokens = tokens + layer.attn2(layer.norm2(tokens), encoder_hidden_states=null)
            tokens = tokens + layer.ff(layer.norm3(tokens))
            q = q + query.feed_forward(query.norm_feed_forward(q))
        return x + transformer.proj_out(tokens.transpose(1, 2).reshape(x.shape)), block.fc_out(q)

    temb = unet.time_embedding(unet.time_proj(torch.zeros(len(z), dtype=torch.long)))
    x, h, blocks = unet.conv_in(z), torch.zeros_like(e_t), iter(stream.blocks)
    for down in unet.down_blocks:
        for resnet, transformer in zip(down.resnets, down.attentions, strict=True):
            x, h = site(transformer, next(blocks), resnet(x, temb), h)
        for downsampler in down.downsamplers or []:
            x = downsampler(x)
    x, h = site(unet.mid_block.attentions[0], next(blocks), unet.mid_block.resnets[0](x, temb), h)
    x = unet.mid_block.resnets[1](x, temb)
    tokens = torch.cat([head.image_in(head.norm_image(x.flatten(2).transpose(1, 2))), head.query_in(h + noised)[:, None]], 1)
    for block in head.blocks:
        tokens = tokens + _attend(block.attention, block.norm_attention(tokens), visibility)
        tokens = tokens + block.feed_forward(block.norm_feed_forward(tokens))
    return F.normalize(head.query_out(head.norm_out(tokens[:, -1])), dim=-1)


def _reference_alignment(module, inputs, predicted):
    """Return the mean cross entropy of both directions, without other images of the same caption."""
    logits = predicted @ inputs["query"].T * module.model.temperature.log_scale.exp()  # [B, B]
    ids, losses = inputs["caption_ids"].tolist(), []
    for matrix in (logits, logits.T):
        for i, row in enumerate(matrix):
            others = [row[j] for j in range(len(ids)) if j == i or ids[j] != ids[i]]
            losses.append(torch.logsumexp(torch.stack(others), 0) - row[i])
    return torch.stack(losses).mean()


def test_sum_of_losses_and_gradients_equal_plain_torch(make_task, batch, visibility):
    task = make_task(ObjectiveConfig(lambda_alignment=0.7, caption_dropout=0.5), query_visibility=visibility)
    inputs = task.inputs(batch, torch.device("cpu"))
    loss, _ = task.module(inputs, 3)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in task.module.named_parameters()}
    task.module.zero_grad()
    noise = task.module.sample_noise(inputs, 3)
    predicted = _reference_queries(task.module, inputs, noise, visibility)
    reference = _reference_generation(task.module, inputs, noise) + 0.7 * _reference_alignment(task.module, inputs, predicted)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for name, parameter in task.module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 7, 50])
def test_ddim_steps_equal_diffusers(prediction_type, spacing, num_steps):
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=spacing == "trailing",
        steps_offset=1 if spacing == "leading" else 0,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
    )
    theirs.set_timesteps(num_steps)
    abar = schedule.alphas_cumprod(ScheduleConfig())
    steps = schedule.inference_timesteps(num_steps, 1000, spacing)
    assert steps == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    x = expected = torch.randn(2, 4, 8, 8, generator=generator)
    for t, previous in zip(steps, schedule.previous_alphas_cumprod(abar, steps, spacing), strict=True):
        out = torch.randn(x.shape, generator=generator)
        x0 = schedule.predicted_x0(prediction_type, x, out, abar[t])
        x = schedule.ddim_step(x, x0, abar[t], previous)
        expected = theirs.step(out, t, expected).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_one_way_features_do_not_change_with_the_query_and_joint_ones_do(make_task, batch, visibility):
    """The image features depend on e_t only under the joint mask."""
    task = make_task(query_visibility=visibility)
    model, inputs = task.module.model, task.inputs(batch, torch.device("cpu"))
    features = []
    model.unet.mid_block.resnets[1].register_forward_hook(lambda module, args, output: features.append(output))
    time = torch.full((len(batch.captions), 1), 999)
    for seed in range(2):
        e_t = torch.randn(len(batch.captions), 1, 32, generator=torch.Generator().manual_seed(seed))
        model.predict_query(model.encode_condition(inputs["latent"], inputs["null_states"]), e_t, time)
    assert torch.equal(*features) == (visibility == "one_way")


def test_one_way_inference_from_kept_keys_equals_the_uncached_path(make_task, batch):
    """K = 1: cached image keys and values give the same result as one pass over [image tokens; query] with an explicit mask."""
    task = make_task(ObjectiveConfig(caption_dropout=0.0))
    pipeline = task.pipeline(task.module.state_dict())
    cached = pipeline.embed_image(batch.images, keys=list("abcdef"), num_steps=1)

    model = pipeline.model
    inputs = task.inputs(batch, torch.device("cpu"))
    e_t = torch.stack([named_noise(f"embed/{key}/0", (32,)) for key in "abcdef"])[:, None]
    uncached = torch.cat(
        [  # every image is encoded separately, without a cache
            model.predict_query(
                model.encode_image(inputs["latent"][i : i + 1], inputs["null_states"]), e_t[i : i + 1], torch.tensor([[999]])
            )
            for i in range(len(e_t))
        ]
    )[:, 0]
    torch.testing.assert_close(cached, uncached, rtol=1e-4, atol=1e-6)


def test_query_noise_samples_of_one_image_do_not_see_each_other(make_task, batch):
    task = make_task()
    model, inputs = task.module.model, task.inputs(batch, torch.device("cpu"))
    memory = model.encode_image(inputs["latent"], inputs["null_states"])
    e_t, time = torch.randn(len(batch.captions), 3, 32), torch.randint(0, 1000, (len(batch.captions), 3))
    together = model.predict_query(memory, e_t, time)
    for draw in range(3):
        alone = model.predict_query(memory, e_t[:, draw : draw + 1], time[:, draw : draw + 1])
        torch.testing.assert_close(together[:, draw : draw + 1], alone, rtol=1e-4, atol=1e-6)


def test_noise_of_an_image_depends_on_its_key_not_on_its_batch(make_task, batch):
    task = make_task()
    pipeline = task.pipeline(task.module.state_dict())
    whole = pipeline.embed_image(batch.images, num_steps=3, num_draws=2)
    parts = [pipeline.embed_image(np.ascontiguousarray(batch.images[i : i + 1]), num_steps=3, num_draws=2) for i in range(6)]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=1e-6)


def test_an_untrained_query_knows_the_image_and_not_its_own_noise(tiny_model, batch, visibility):
    torch.manual_seed(0)
    config = dataclasses.replace(tiny_model, query_visibility=visibility)
    task = DiffDisTask(config, ObjectiveConfig())
    with torch.no_grad():
        inputs = task.inputs(batch, torch.device("cpu"))
        queries = [task.module.predict_queries(inputs, seed)[0] for seed in (1, 2)]
    assert torch.equal(*queries)
    assert not torch.allclose(queries[0][0], queries[0][1])


@pytest.mark.parametrize("num_steps", [1, 3, 7, 10, 50, 600])
def test_any_number_of_steps_follows_the_equations_of_algorithm_3(make_task, batch, num_steps):
    """Each step ends at the timestep at which the next one starts; the last one ends without noise."""
    task = make_task()
    pipeline = task.pipeline(task.module.state_dict())
    model, inputs = pipeline.model, task.inputs(batch, torch.device("cpu"))
    clean = torch.nn.functional.normalize(torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(1)), dim=-1)
    seen = []

    def perfect(condition, e_t, timestep):
        seen.append((int(timestep), e_t))
        return clean.expand_as(e_t)

    model.predict_query = perfect
    e_T = named_noise("embed/a/0", (32,))
    pipeline.embed_latent(inputs["latent"][:1], ["a"], num_steps)
    steps = [round(1000 - i * 1000 / num_steps) - 1 for i in range(num_steps)]
    assert [t for t, _ in seen] == steps
    # With a perfect prediction, e_t is gamma sqrt(abar_t) sqrt(D) e + sqrt(1 - abar_t) eps with the same noise eps at every step.
    abar = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
    signal = model.config.schedule.query_snr * clean[0, 0].double()
    first = abar[999]
    noise = (e_T.double() - first.sqrt() * signal) / (1 - first).sqrt()
    for t, e_t in seen:
        expected = abar[t].sqrt() * signal + (1 - abar[t]).sqrt() * noise
        torch.testing.assert_close(e_t[0, 0].double(), expected, rtol=0, atol=2e-3)
