"""The tasks: which parameters each of them trains, and the interface that a trainer uses."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffdis.config import DiffDisConfig, ObjectiveConfig, ScheduleConfig, sd_v1
from diffdis.pipeline import DiffDisPipeline
from diffdis.task import query_leak

CPU = torch.device("cpu")
TASKS = ("joint", "generation", "alignment", "clip")


def gradients(task):
    return {name: p.grad.clone() for name, p in task.module.named_parameters() if p.grad is not None}


def assert_gradients_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", TASKS)
def test_a_task_trains_all_that_it_lists_and_can_do_what_it_was_trained_for(make_task, batch, tmp_path, name):
    task = make_task(ObjectiveConfig(task=name))
    listed = [p for group in task.parameter_groups() for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in task.module.parameters() if p.requires_grad}
    loss, metrics = task.module(task.inputs(batch, CPU), 3)
    loss.backward()
    assert all(p.grad is not None for p in listed)
    assert ("loss_generation" in metrics, "loss_alignment" in metrics) == (
        name in ("joint", "generation"), name != "generation",
    )  # fmt: skip
    task.save_pretrained(task.module.state_dict(), tmp_path)
    opened = DiffDisPipeline.from_pretrained(tmp_path)
    if name == "generation":
        with pytest.raises(ValueError, match="trained for generation alone"):
            opened.classify(batch.images, ["cat", "tree"])
    else:
        assert opened.classify(batch.images, ["cat", "tree"], num_steps=2).shape == (6, 2)
    if name in ("alignment", "clip"):
        with pytest.raises(ValueError, match=f"trained for {name} alone"):
            opened.generate(["cat"])
    else:
        assert len(opened.generate(["cat"], num_inference_steps=2)) == 1


def test_the_joint_loss_is_the_sum_of_its_halves(make_task, batch):
    """With equal weights and seeds, a single-task model differs from the joint one only in its task."""
    losses = {}
    for name in ("joint", "generation", "alignment"):
        task = make_task(ObjectiveConfig(task=name, lambda_alignment=0.5))
        losses[name] = task.module(task.inputs(batch, CPU), 3)[0]
    torch.testing.assert_close(losses["joint"], losses["generation"] + 0.5 * losses["alignment"])


def test_the_unet_is_the_same_at_first_whatever_the_task(make_task):
    weights = [make_task(ObjectiveConfig(task=name)).module.model.unet.state_dict() for name in TASKS]
    assert all(torch.equal(value, other[name]) for other in weights[1:] for name, value in weights[0].items())


def test_frozen_parameters_stay(make_task):
    task = make_task(ObjectiveConfig(freeze=("unet.down_blocks.*", "unet.conv_in.*")))
    frozen = {name for name, p in task.module.model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(("unet.down_blocks.", "unet.conv_in.")) for name in frozen)
    assert task.describe()["parameters"]["unet"]["frozen"] > 0
    with pytest.raises(ValueError, match=r"objective\.freeze: no parameter is called unet\.dwn\.\*; there are unet\."):
        make_task(ObjectiveConfig(freeze=("unet.dwn.*",)))
    with pytest.raises(ValueError, match="nothing is left to train"):
        make_task(ObjectiveConfig(freeze=("*",)))


def test_learning_rates_and_weight_decays_by_pattern(make_task):
    """The last pattern that matches applies; parameters of the loss are called alignment.*."""
    rates = {"unet.*": 1e-6, "unet.mid_block.*": 2e-6, "alignment.*": 3e-3}
    decays = {"*": 0.1, "*.bias": 0.2}
    task = make_task(ObjectiveConfig(alignment_loss="siglip", lr_overrides=rates, weight_decay_overrides=decays))
    names = {id(parameter): name for name, parameter in task.module.named_parameters()}
    groups = task.parameter_groups()
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found.keys() == {name for name, p in task.module.named_parameters() if p.requires_grad}
    for name, (rate, decay) in found.items():
        expected = 2e-6 if ".mid_block." in name else 1e-6 if name.startswith("model.unet.") else 1e-4
        assert rate == (3e-3 if name.startswith("alignment.") else expected), name
        assert decay == (0.2 if name.endswith(".bias") else 0.1), name
    rates_by_name = {group["name"]: group["lr"] for group in groups}
    assert rates_by_name["unet_unet.mid_block"] == 2e-6, "the name under which the rate is logged"
    (temperature,) = (group for group in groups if "max_value" in group)
    assert (temperature["name"], temperature["lr"]) == ("temperature", 1e-4)
    for field in ("lr_overrides", "weight_decay_overrides"):
        frozen = {"freeze": ("unet.conv_in.*",), field: {"unet.conv_in.*": 0.1}}
        with pytest.raises(ValueError, match=rf"objective\.{field}: no trained parameter is called unet\.conv_in\.\*"):
            make_task(ObjectiveConfig(**frozen))
        with pytest.raises(ValueError, match=rf"objective\.{field}: -1 .*unet"):
            ObjectiveConfig(**{field: {"unet.*": -1.0}})


@pytest.mark.parametrize("name", TASKS)
def test_activations_that_are_computed_again_give_the_same_gradients(make_task, batch, visibility, name):
    found, kept = [], []
    for checkpointing in (False, True):
        task = make_task(ObjectiveConfig(task=name), query_visibility=visibility)
        if checkpointing:
            task.enable_activation_checkpointing()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: (sizes.append(x.numel()), x)[1], lambda x: x):
            loss, _ = task.module(task.inputs(batch, CPU), 3)
        loss.backward()
        found.append(gradients(task))
        kept.append(sum(sizes))
    assert_gradients_equal(found[1], found[0])
    assert kept[1] < 0.7 * kept[0]


def to_bfloat16(task):
    """Convert the weights as the trainer does."""
    for group in task.parameter_groups():
        for parameter in group["params"] if not group.get("float32") else ():
            parameter.data = parameter.data.bfloat16()


def test_scores_and_previews_of_weights_in_bfloat16_are_about_the_same(make_task, batch, visibility):
    whole, half = (make_task(query_visibility=visibility) for _ in range(2))
    to_bfloat16(half)
    with torch.no_grad():
        rows = [task.embed_heldout(task.inputs(batch, CPU))["predicted"] for task in (whole, half)]
        images = [task.preview(0, 1) for task in (whole, half)]
    assert torch.nn.functional.cosine_similarity(*rows).min() > 0.99
    for place, image in images[0].items():
        assert np.abs(image.astype(int) - images[1][place]).mean() < 4


@pytest.mark.parametrize("name", TASKS)
def test_bfloat16_computes_about_the_same(make_task, batch, visibility, name):
    losses, found = [], []
    for half in (False, True):
        task = make_task(ObjectiveConfig(task=name), query_visibility=visibility)
        if half:
            to_bfloat16(task)
        loss, metrics = task.module(task.inputs(batch, CPU), 3, control=True)
        loss.backward()
        assert loss.dtype == torch.float32
        assert all(value.isfinite().all() for value in metrics.values())
        losses.append(loss)
        found.append(torch.cat([gradient.float().flatten() for gradient in gradients(task).values()]))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.01, atol=0)
    assert found[1].isfinite().all()
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.999
    torch.testing.assert_close(found[1].norm(), found[0].norm(), rtol=0.05, atol=0)


def test_a_wrong_image_is_one_of_another_caption(make_task, batch):
    """Otherwise the shuffled-image control could be correct legitimately; here, all captions are equal or there is only one."""
    task = make_task()
    inputs = task.inputs(batch, CPU)
    alike = inputs | {"caption_ids": torch.zeros_like(inputs["caption_ids"])}
    alone = {k: v if k == "null_states" else v[:1] for k, v in inputs.items()}
    control = "alignment/retrieval_shuffled_images"
    counts = [task.module(part, 0, control=True)[1][control].tolist()[1] for part in (inputs, alike, alone)]
    assert counts == [2.0, 0.0, 0.0]
    guessing = task.module(alike, 0, control=True)[1]["alignment/retrieval_chance"]
    assert guessing[0] == guessing[1], "a text whose caption all others share is always retrieved"


@pytest.mark.parametrize("name", ["joint", "clip"])
def test_the_held_out_score_does_not_depend_on_the_batch(make_task, batch, name):
    task = make_task(ObjectiveConfig(task=name))
    inputs = task.inputs(batch, CPU)
    with torch.no_grad():
        whole = task.embed_heldout(inputs)
        parts = [task.embed_heldout({k: v if k == "null_states" else v[i : i + 2] for k, v in inputs.items()}) for i in (4, 0, 2)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
    torch.testing.assert_close(joined["predicted"][2:], whole["predicted"][:4], rtol=1e-4, atol=1e-5)
    assert task.score(joined) == task.score(whole)
    assert set(task.score(whole)) == {f"heldout/{n}" for n in ("acc1", "acc5", "image_to_text_r1", "text_to_image_r1")}


def test_a_perfect_prediction_scores_one_and_equal_captions_are_one_class(make_task, batch):
    task = make_task()
    inputs = task.inputs(batch, CPU)
    rows = {"predicted": inputs["query"], "query": inputs["query"], "caption_ids": inputs["caption_ids"]}
    assert set(task.score(rows).values()) == {1.0}
    wrong = rows | {"predicted": inputs["query"].roll(1, dims=0)}
    assert task.score(wrong)["heldout/acc1"] == 0.0


def test_previews_do_not_depend_on_the_number_of_ranks(make_task):
    task = make_task()
    with torch.no_grad():
        alone = task.preview(0, 1)
        shared = [task.preview(rank, 3) for rank in range(3)]
    assert [sorted(part) for part in shared] == [[0], [1], []]
    for part in shared:
        for place, image in part.items():
            assert np.abs(image.astype(int) - alone[place]).max() <= 1
    page = Image.open(io.BytesIO(task.preview_page(alone)))
    assert page.format == "PNG"
    assert make_task(ObjectiveConfig(task="clip")).preview(0, 1) == {}


def test_a_model_that_was_exported_starts_another_one(make_task, batch, tmp_path):
    first = make_task()
    with torch.no_grad():
        for parameter in first.module.parameters():
            parameter.add_(0.01)
    first.save_pretrained(first.module.state_dict(), tmp_path)
    second = make_task(warm_start=str(tmp_path))
    for name, value in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value), name
    report = second.describe()["warm_start"]
    assert (report["new"], report["ignored"]) == ({}, [])
    assert report["loaded"]["unet"]["parameters"] == second.describe()["parameters"]["unet"]["trained"]
    clip = make_task(ObjectiveConfig(task="clip"), warm_start=str(tmp_path)).describe()["warm_start"]
    assert clip["new"] == {"pooled": {"tensors": 4, "parameters": 2 * 32 + 32 * 32 + 32}}
    assert "temperature" in clip["loaded"]
    assert any(name.startswith("stream.") for name in clip["ignored"])
    with pytest.raises(ValueError, match=r"model\.unet\.block_out_channels: \(24, 32\), but .* has \(16, 32\)"):
        make_task(warm_start=str(tmp_path), unet=dataclasses.replace(first.config.unet, block_out_channels=(24, 32)))


def test_a_temperature_above_the_limit_returns(make_task):
    """Like CLIP's: ten steps of gradients that raise the scale, then fifty that lower it, with AdamW at 0.1."""
    from ray_platform.train.config import TrainConfig
    from ray_platform.train.optimizer import AdamW, Fragment

    task = make_task(ObjectiveConfig(temperature=0.02, lr_new=0.1))
    temperature = task.module.model.temperature
    optimizer = AdamW([group for group in task.parameter_groups() if group["name"] == "temperature"], TrainConfig())
    optimizer.init_state([Fragment(temperature.log_scale, 0, temperature.log_scale, 0, 1)])
    reference = nn.Parameter(temperature.log_scale.detach().clone())
    clip = torch.optim.AdamW([reference], lr=0.1, weight_decay=0.0)
    scales = []
    for step in range(60):
        for scale, adam in ((temperature(), optimizer), (reference.exp().squeeze(), clip)):
            adam.zero_grad()
            (scale if step >= 10 else -scale).backward()
            adam.step()
        reference.data.clamp_(max=np.log(100.0))
        scales.append(temperature().item())
    assert max(scales[:15]) == pytest.approx(100.0, rel=1e-5)
    assert scales[-1] < 75
    assert scales[-1] == pytest.approx(reference.exp().item(), rel=1e-5)


def test_samples_without_their_image_do_not_count_as_retrieval(make_task, batch):
    """Such samples can only copy the query: here the network is untrained, and the query's noise is small enough to copy."""
    task = make_task(image_dropout=0.5)
    inputs = task.inputs(batch, CPU)
    noise = task.module.sample_noise(inputs, 4)
    kept = (~noise.drop_image).sum().item()
    assert 0 < kept < len(batch.captions)
    task.module.sample_noise = lambda *_: noise
    _, metrics = task.module(inputs, 0)
    assert metrics["alignment/retrieval"][1] == kept
    assert sum(value[1] for name, value in metrics.items() if name.startswith("alignment/retrieval_t")) == kept
    assert metrics["loss_alignment"][1] == len(batch.captions)


@pytest.mark.parametrize(("snr", "floor", "answerable"), [(27.7, 0, 0.91), (2.77, 0, 0.34), (0.83, 0, 0.11), (1.5, 250, 0.045)])
def test_how_much_of_the_query_leaks(snr, floor, answerable, caplog):
    """192 texts of D = 768 with a mean cosine of 0.3; the first three are gamma 1, 0.1 and 0.03."""
    generator = torch.Generator().manual_seed(0)
    common, own = (nn.functional.normalize(torch.randn(n, 768, generator=generator), dim=1) for n in (1, 192))
    config = sd_v1(schedule=ScheduleConfig(query_snr=snr))
    leak = query_leak(0.3**0.5 * common + 0.7**0.5 * own, config, ObjectiveConfig(query_timestep_min=floor))
    assert leak.answerable == pytest.approx(answerable, abs=0.03)
    assert leak.chance == 1 / 192
    assert ("without the image" in caplog.text) == (leak.answerable > 0.11)


def test_a_run_is_described_with_what_its_captions_show(make_task, batch):
    described = make_task().describe(batch.captions)["query_leak"]
    assert described["num_texts"] == len(set(batch.captions))
    assert 0 <= described["answerable"] <= 1
    assert "query_leak" not in make_task(ObjectiveConfig(task="clip")).describe(batch.captions)


def test_an_old_gamma_is_read_as_query_snr():
    with pytest.warns(FutureWarning, match="query_snr"):
        config = DiffDisConfig.from_dict({"schedule": {"gamma": 0.1}})
    assert config.schedule.query_snr == pytest.approx(0.1 * 768**0.5)
    assert config.gamma == pytest.approx(0.1)
