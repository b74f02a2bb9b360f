"""Power-function averages and their reconstruction equal averages that are computed from all weights of a run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_platform.contracts import ConfigError
from ray_platform.train.checkpoint_format import list_checkpoints, read_manifest, read_weights
from ray_platform.train.config import TrainConfig
from ray_platform.train.posthoc_ema import power_decay_at, power_of, reconstruct, snapshot_weights
from tests.ray_platform.engine_runs import BASE
from tests.ray_platform.small_task import SmallTask, samples
from tests.ray_platform.test_checkpointing import Launch
from tests.ray_platform.test_engine import checkpoint_manager, save_checkpoint

WIDTHS = (0.05, 0.1)


def profile(num_updates, width):
    """Return the factor of the weights after each update in their average, from the definition of the average."""
    factors = np.zeros(num_updates + 1)
    for n in range(1, num_updates + 1):
        decay = power_decay_at(width, n)
        factors[: n + 1] *= decay
        factors[n] += 1 - decay
    return factors[1:]


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2])
def test_the_average_has_the_width(width):
    factors, times = profile(4000, width), np.arange(1, 4001)
    assert factors.sum() == pytest.approx(1)
    mean = (factors * times).sum()
    assert np.sqrt((factors * (times - mean) ** 2).sum()) / 4000 == pytest.approx(width, rel=0.01)
    gamma = power_of(width)
    assert (gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)) == pytest.approx(width**2)


@pytest.mark.parametrize("width", [0.03, 0.05, 0.08, 0.15])
def test_a_reconstructed_average_is_close_to_the_exact_one(width):
    num_updates = 2000
    snapshots = [(n, each) for n in range(250, num_updates + 1, 250) for each in WIDTHS]
    factors = snapshot_weights(snapshots, num_updates, width)
    found = np.zeros(num_updates)
    for (n, each), factor in zip(snapshots, factors, strict=True):
        found[:n] += factor * profile(n, each)
    exact = profile(num_updates, width)
    curve = np.cumsum(np.random.default_rng(0).normal(size=num_updates))  # weights on a random walk
    nearest = min(abs(profile(num_updates, each) - exact).sum() for each in WIDTHS)
    assert abs(found - exact).sum() < (1e-6 if width in WIDTHS else 0.15)
    if width not in WIDTHS:
        assert abs(found - exact).sum() < 0.5 * nearest
        assert abs((found - exact) @ curve) < 0.02 * curve.std()


def trained_on_a_rank(rank, output, fields, num_steps):
    """Train with a checkpoint after every fourth step; return the weights after each step."""
    from ray_platform.train.engine import Engine

    engine = Engine(SmallTask(), TrainConfig(**BASE | fields), 4, 1)
    manager = checkpoint_manager(engine, output, keep_checkpoints=100)
    weights = []
    for step in range(num_steps):
        engine.backward([samples(10 * step + rank, 4)], [step])
        engine.update(step)
        state = {key: tensor.clone() for key, tensor, _ in engine.local_state()}
        weights.append(state["weights/first.weight"])
        if (step + 1) % 4 == 0:
            assert save_checkpoint(manager, step + 1) == ""
    return weights


@pytest.mark.ranks
def test_checkpoints_have_several_averages_from_which_another_one_is_reconstructed(two_ranks, tmp_path):
    fields = {"ema_decays": (0.5,), "ema_widths": WIDTHS, "num_steps": 40, "eval_weights": "ema_0.5"}
    weights, _ = two_ranks.run(trained_on_a_rank, str(tmp_path), fields, 40)
    newest = list_checkpoints(str(tmp_path))[0]
    stored = {state: dict(read_weights(newest, state))["first.weight"] for state in ("ema", "ema_0.5", "ema_width_0.1")}
    expected = torch.zeros_like(weights[0])
    for n, each in enumerate(weights, 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * each  # the initial weights are forgotten
    assert not torch.equal(stored["ema"], stored["ema_0.5"])
    torch.testing.assert_close(stored["ema_0.5"], expected, rtol=1e-5, atol=1e-6)
    stacked = torch.stack(weights).double()
    for width, tolerance in ((0.1, 1e-5), (0.07, 1e-3)):
        exact = torch.einsum("n,nij->ij", torch.from_numpy(profile(40, width)), stacked).float()
        found = stored["ema_width_0.1"] if width == 0.1 else reconstruct(newest, WIDTHS, width)["first.weight"]
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)
    assert read_manifest(newest).num_updates == 40
    with pytest.raises(ConfigError, match=r"^weights: an EMA of the width 0\.4 .*between 0 and 0\.28"):
        reconstruct(newest, WIDTHS, 0.4)
    with pytest.raises(ConfigError, match=r"^weights: .*train\.ema_widths"):
        reconstruct(newest, (), 0.1)


def saved(launch, *steps, abandoned=0.0, widths=WIDTHS):
    """Save checkpoints of a launch with averages that depend on the step, and return their URLs."""
    urls = []
    for step in steps:
        tensors = {f"ema_width_{width:g}/a": torch.tensor([step * step * width + abandoned]) for width in WIDTHS}
        config = {"train": {"ema_widths": list(widths)}}
        urls.append(launch.save(step, tensors=tensors | {"weights/a": torch.zeros(1)}, config=config))
    return urls


def average(url):
    return reconstruct(url, WIDTHS, 0.07)["a"].item()


def change_manifest(url, change):
    file = Path(url, "complete.json")
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_only_checkpoints_on_the_way_to_the_last_one_count(tmp_path, caplog):
    """Step 25 is not left, which alone names the step at which the launch branched, as with train.keep_every."""
    main, elsewhere = tmp_path / "main", tmp_path / "elsewhere"
    expected = average(saved(Launch(tmp_path / "plain", "p"), 10, 20, 30, 40)[-1])
    diverged = Launch(main, "a")
    _, origin = saved(diverged, 10, 20)
    saved(diverged, 30, 35, abandoned=100.0)
    branch = Launch(main, "b", origin)
    unlinked, later, newest = saved(branch, 25, 30, 40)
    Path(unlinked, "complete.json").unlink()
    assert average(newest) == expected
    assert average(saved(Launch(main, "c", later), 40)[0]) == expected, "a launch that resumed the branch"

    cooled = saved(Launch(elsewhere, "d", later), 40)[0]
    assert average(cooled) == expected, "of checkpoints in two folders"
    assert not caplog.messages
    own = average(saved(Launch(tmp_path / "short", "s"), 40)[0])
    assert own != pytest.approx(expected, abs=1e-3)
    assert average(saved(Launch(main, "e", later, weights_only=True), 40)[0]) == own
    main.rename(tmp_path / "moved")
    assert average(cooled) == own
    assert len(caplog.messages) == 1
    assert f"{main}/checkpoints/b up to step 30" in caplog.text


def test_checkpoints_of_releases_before_and_of_other_widths(tmp_path):
    """Before the step of a branch was recorded, the later launch counts where two launches have a step."""
    expected = average(saved(Launch(tmp_path / "plain", "p"), 10, 20, 30, 40)[-1])
    diverged = Launch(tmp_path / "main", "a")
    _, origin = saved(diverged, 10, 20)
    saved(diverged, 30, 40, abandoned=100.0)
    urls = saved(Launch(tmp_path / "main", "b", origin), 30, 40)
    for url in urls:
        change_manifest(url, lambda values: values.pop("branched_at"))
    assert average(urls[-1]) == expected
    short = saved(Launch(tmp_path / "plain", "q"), 5, 10, widths=())[-1]
    widened = average(saved(Launch(tmp_path / "plain", "r", short), 30, 40)[-1])
    assert widened == average(saved(Launch(tmp_path / "other", "s"), 30, 40)[-1])


def test_fields_that_name_no_average_are_rejected():
    with pytest.raises(ConfigError, match=r"^train\.eval_weights: ema_0\.9 is none of best, weights, ema, ema_0\.99,"):
        TrainConfig(ema_decay=0.999, ema_decays=(0.99,), eval_weights="ema_0.9")
    with pytest.raises(ConfigError, match=r"^train\.ema_widths: \(0\.3,\) are not in"):
        TrainConfig(ema_widths=(0.3,))
    assert TrainConfig(ema_decays=(0.99,)).eval_state == "weights", "`best` is the main EMA only"
