"""The generation loss and its options equal the papers' formulas, with diffusers' own noise schedule as the reference."""

import dataclasses
import itertools

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

from diffdis.config import ObjectiveConfig, ScheduleConfig, tiny
from diffdis.model import DiffDis
from diffdis.objective import Objective
from diffdis.preflight import describe_training
from diffdis.schedule import LOSS_WEIGHTINGS

CPU = torch.device("cpu")
CHANNEL_WEIGHTS = tuple(float(channel) for channel in range(1, 13))


def scheduler_of(config: ScheduleConfig) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=config.zero_terminal_snr
    )


def reference_loss(module: Objective, inputs, noise) -> torch.Tensor:
    """Return L_IG by diffusers' scheduler and signal-to-noise ratios, one sample and one channel at a time."""
    config, objective = module.model.config.schedule, module.objective
    scheduler, z, t = scheduler_of(config), inputs["latent"], noise.timesteps
    states = [inputs["null_states"][0] if d else s for d, s in zip(noise.drop_caption, inputs["token_states"], strict=True)]
    out = module.model.unet(scheduler.add_noise(z, noise.noise, t), t, torch.stack(states)).sample
    targets = {"epsilon": noise.noise, "v_prediction": scheduler.get_velocity(z, noise.noise, t), "sample": z}
    error = (out - targets[config.prediction_type]) ** 2
    snr, total = compute_snr(scheduler, t), 0.0
    weights = objective.channel_weights or (1.0,) * 12
    for i in range(len(z)):
        if objective.generation_weighting == "min_snr":
            divisor = {"epsilon": snr[i], "v_prediction": snr[i] + 1, "sample": 1.0}[config.prediction_type]
            weight = min(snr[i].item(), objective.min_snr_gamma) / divisor
        elif objective.generation_weighting == "inverse_noise":
            of_x0 = 1 / max(1 - scheduler.alphas_cumprod[t[i]].item(), 0.1)
            weight = of_x0 / {"epsilon": snr[i], "v_prediction": snr[i] + 1, "sample": 1.0}[config.prediction_type]
        else:
            weight = 1.0
        for channel in range(12):
            total = total + weight * weights[channel] * 12 / sum(weights) * error[i, channel].mean()
    return total / (12 * len(z))


def gradients(module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.model.unet.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("prediction_type", "weighting", "channel_weights", "zero_snr"),
    [
        *itertools.product(("epsilon", "v_prediction", "sample"), ("min_snr",), ((),), (False,)),
        ("v_prediction", "none", CHANNEL_WEIGHTS, False),
        ("v_prediction", "inverse_noise", (), False),
        ("sample", "none", (), False),
        ("sample", "inverse_noise", CHANNEL_WEIGHTS, False),
        ("v_prediction", "none", (), True),
        ("v_prediction", "inverse_noise", CHANNEL_WEIGHTS, True),
        ("sample", "inverse_noise", (), True),
    ],
)
@pytest.mark.parametrize("task_name", ["generation", "joint"])
def test_value_and_gradient_equal_the_formula(make_task, batch, prediction_type, weighting, channel_weights, zero_snr, task_name):
    objective = ObjectiveConfig(
        task=task_name, lambda_alignment=0.0, generation_weighting=weighting, channel_weights=channel_weights, noise_offset=0.1
    )
    spacing = "trailing" if zero_snr else "leading"
    schedule = ScheduleConfig(prediction_type=prediction_type, zero_terminal_snr=zero_snr, timestep_spacing=spacing)
    task = make_task(objective, schedule=schedule)
    module, inputs = task.module, task.inputs(batch, CPU)
    loss, metrics = module(inputs, 3)
    loss.backward()
    found = gradients(module)
    module.zero_grad()
    expected = reference_loss(module, inputs, module.sample_noise(inputs, 3))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    difference = torch.linalg.vector_norm(found - gradients(module))
    assert difference < 2e-5 * torch.linalg.vector_norm(found)
    total, weight = metrics.get("loss_generation_weighted", metrics["loss_generation"])
    torch.testing.assert_close(total / weight, loss.detach())


def test_the_logged_loss_has_no_weights_and_its_bins_sum_to_it(make_task, batch):
    logged = {}
    for weighting in ("none", "min_snr"):
        task = make_task(ObjectiveConfig(generation_weighting=weighting))
        _, metrics = task.module(task.inputs(batch, CPU), 3)
        logged[weighting] = metrics["loss_generation"]
        bins = torch.stack([value for name, value in metrics.items() if name.startswith("generation/loss_t")])
        torch.testing.assert_close(bins.sum(dim=0), metrics["loss_generation"])
        assert ("loss_generation_weighted" in metrics) == (weighting != "none")
    assert torch.equal(logged["none"], logged["min_snr"])
    timesteps = task.module.sample_noise(task.inputs(batch, CPU), 3).timesteps
    assert bins[:, 1].tolist() == [((timesteps // 250) == k).sum() for k in range(4)]


def sampled(size=20_000, **fields):
    module = Objective(DiffDis(tiny()), ObjectiveConfig(**fields))
    inputs = {"latent": torch.zeros(size, 2, 1, 1), "query": torch.zeros(size, 2)}
    return module.sample_noise(inputs, seed=5)


def test_timesteps_have_their_distribution_and_leave_the_other_numbers_as_they_are():
    uniform, normal = sampled(), sampled(timestep_sampling="logit_normal", logit_normal_mean=0.5, logit_normal_std=0.8)
    for name, value in uniform._asdict().items():
        assert torch.equal(value, getattr(normal, name)) == (name != "timesteps"), name
    assert abs(uniform.timesteps.float().mean() - 499.5) < 8
    position = (normal.timesteps + 0.5) / 1000
    logit = torch.log(position / (1 - position))
    assert abs(logit.mean() - 0.5) < 0.02
    assert abs(logit.std() - 0.8) < 0.02
    assert 0 <= normal.timesteps.min() < normal.timesteps.max() < 1000


def test_the_noise_offset_is_one_number_per_image_and_channel():
    plain, shifted = sampled(100), sampled(100, noise_offset=0.3)
    module = Objective(DiffDis(tiny()), ObjectiveConfig(noise_offset=0.3))
    inputs = {"latent": torch.zeros(100, 12, 8, 8), "query": torch.zeros(100, 2)}
    offset = module.sample_noise(inputs, 5).noise - Objective(DiffDis(tiny()), ObjectiveConfig()).sample_noise(inputs, 5).noise
    assert offset.std(dim=(2, 3)).max() < 1e-6
    assert abs(offset.mean(dim=(2, 3)).std() - 0.3) < 0.03
    assert all(torch.equal(getattr(plain, name), getattr(shifted, name)) for name in plain._fields if name != "noise")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"generation_weighting": "min_snrr"}, r"objective\.generation_weighting: 'min_snrr'.*min_snr"),
        ({"timestep_sampling": "cosine"}, r"objective\.timestep_sampling: 'cosine'.*logit_normal"),
        ({"channel_weights": (1.0, 2.0)}, r"objective\.channel_weights: 2 .*12"),
        ({"channel_weights": (1.0, -2.0)}, r"objective\.channel_weights"),
        ({"channel_weights": (0.0, 0.0)}, r"objective\.channel_weights"),
        ({"min_snr_gamma": 0.0}, r"objective\.min_snr_gamma: 0"),
        ({"noise_offset": -0.1}, r"objective\.noise_offset: -0\.1"),
        ({"logit_normal_std": 0.0}, r"objective\.logit_normal_std: 0"),
        ({"logit_normal_mean": float("nan")}, r"objective\.logit_normal_mean: nan"),
    ],
)
def test_wrong_options_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Objective(DiffDis(tiny()), ObjectiveConfig(**fields))


def test_zero_terminal_snr_needs_a_prediction_that_exists_without_signal_and_the_last_timestep():
    with pytest.raises(ValueError, match=r"model\.schedule\.zero_terminal_snr: .*sample"):
        tiny(schedule=ScheduleConfig(zero_terminal_snr=True, timestep_spacing="trailing"))
    for prediction_type in ("v_prediction", "sample"):
        schedule = ScheduleConfig(zero_terminal_snr=True, prediction_type=prediction_type)
        with pytest.raises(ValueError, match=r"model\.schedule\.timestep_spacing: leading .*trailing"):
            tiny(schedule=schedule)
        tiny(schedule=dataclasses.replace(schedule, timestep_spacing="trailing"))


@pytest.mark.parametrize("weighting", ["none", *LOSS_WEIGHTINGS])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_the_timestep_without_any_signal_is_trained(make_task, batch, prediction_type, weighting):
    schedule = ScheduleConfig(zero_terminal_snr=True, prediction_type=prediction_type, timestep_spacing="trailing")
    if weighting == "min_snr":
        task = make_task(ObjectiveConfig(generation_weighting=weighting), schedule=schedule)  # a checkpoint can be exported
        with pytest.raises(ValueError, match=r"^objective\.generation_weighting: min_snr .*last timestep.*use none"):
            describe_training(task.config, task.objective)
        describe_training(task.config, ObjectiveConfig(task="alignment", generation_weighting=weighting))
        return
    task = make_task(ObjectiveConfig(generation_weighting=weighting, lambda_alignment=0.0), schedule=schedule)
    inputs = task.inputs(batch, CPU)
    noise = task.module.sample_noise(inputs, 0)
    task.module.sample_noise = lambda *_: noise._replace(timesteps=torch.full_like(noise.timesteps, 999))
    loss, metrics = task.module(inputs, 0)
    loss.backward()
    assert gradients(task.module).isfinite().all()
    assert gradients(task.module).abs().max() > 0, "sampling starts at this timestep"
    assert metrics["loss_generation"][0] > 0
