"""Training through Ray Data, Ray Train and DeepSpeed against one plain torch loop, and against itself after a resume."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from diffdis.objective import Draws
from diffdis.pipeline import DiffDisPipeline
from ray_platform.contracts import ConfigError
from ray_platform.data.catalog import build_catalog
from ray_platform.data.ledger import Ledger
from ray_platform.data.plan import Reader
from ray_platform.data.stream import stream
from ray_platform.train.optimizer import learning_rate_factor
from ray_platform.train.worker import step_seed
from tests.end_to_end.conftest import write_shards

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("ray_cluster")

# fp32; ranks sum in another order than one process does, and Adam's first steps divide small numbers by small ones.
TOLERANCE = {"rtol": 2e-3, "atol": 2e-4}


def plain_loop(run):
    """The same batches in one process: AdamW and clipping by hand; no DeepSpeed, no process group."""
    config = run.train
    torch.manual_seed(config.seed)
    task = run.build_task()
    module = task.module
    optimizer = torch.optim.AdamW(task.parameter_groups(), betas=(0.9, 0.999))
    rates = [group["lr"] for group in optimizer.param_groups]
    catalog = build_catalog(run.data)
    nothing = Ledger(catalog.num_units)
    readers = [Reader(config.seed, rank, config.num_workers, nothing, nothing) for rank in range(config.num_workers)]
    streams = [
        stream(catalog, run.data, reader, batch_size=config.micro_batch_size, num_batches=config.num_steps) for reader in readers
    ]
    losses = {}
    for step, batches in enumerate(zip(*streams, strict=True)):
        inputs = [task.inputs(batch, torch.device("cpu")) for batch in batches]
        drawn = [module.draw(part, step_seed(config.seed, step, rank, 0)) for rank, part in enumerate(inputs)]
        draws = Draws(*(torch.cat(values) for values in zip(*drawn, strict=True)))
        whole = {name: torch.cat([i[name] for i in inputs]) for name in inputs[0]} | {"null_states": inputs[0]["null_states"]}
        generation = module.generation(whole, draws).mean()
        alignment, _ = module.alignment(whole, draws)
        losses[step + 1] = (generation.item(), alignment.item())
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * learning_rate_factor(config, step)
        optimizer.zero_grad()
        (generation + module.objective.lambda_alignment * alignment).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.gradient_clipping)
        optimizer.step()
    return losses


def assert_equal_curves(ours, expected, **tolerance):
    assert ours.keys() == expected.keys()
    for step, values in expected.items():
        torch.testing.assert_close(ours[step], values, **tolerance, msg=lambda m, s=step: f"step {s}: {m}")


@pytest.fixture(scope="module")
def zero_3_run(make_run, tmp_path_factory, ray_cluster):
    """Six steps of two workers, with an EMA and checkpoints of steps 3 and 6."""
    run = make_run(tmp_path_factory.mktemp("zero_3"), zero_stage=3, ema_decay=0.5, checkpoint_every=3)
    run.fit()
    return run


@pytest.fixture(scope="module")
def expected(make_run, tmp_path_factory):
    return plain_loop(make_run(tmp_path_factory.mktemp("unused")))


def test_two_workers_under_zero_3_follow_the_plain_loop(zero_3_run, losses, expected):
    assert_equal_curves(losses(Path(zero_3_run.output_dir)), expected, **TOLERANCE)


@pytest.mark.slow  # fast tests of the engine alone cover every stage: tests/ray_platform/test_engine.py
@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_two_workers_at_every_zero_stage_follow_the_plain_loop(make_run, losses, expected, tmp_path, zero_stage):
    make_run(tmp_path, zero_stage=zero_stage).fit()
    assert_equal_curves(losses(tmp_path), expected, **TOLERANCE)
    DiffDisPipeline.from_pretrained(tmp_path / "export")


def job(*arguments):
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    said = done.stderr if done.returncode else done.stdout
    return done.returncode, said.strip().splitlines()[-1]


def test_a_checkpoint_of_zero_3_exports_as_the_run_itself_did_and_draws(zero_3_run, tmp_path):
    """jobs/export.py and jobs/generate.py on what a run with an EMA left."""
    folder, out, raw = zero_3_run.output_dir, tmp_path / "exported", tmp_path / "raw"
    status, said = job("jobs/export.py", "--checkpoint", folder, "--output_dir", str(out))
    assert (status, said.startswith("done: the EMA of step 6")) == (0, True), said
    for part in ("unet/diffusion_pytorch_model.safetensors", "alignment/model.safetensors"):
        ours, theirs = load_file(out / part), load_file(Path(folder) / "export" / part)
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    status, said = job("jobs/export.py", "--checkpoint", folder, "--output_dir", str(raw), "--weights", "weights")
    assert status == 0, said
    part = "alignment/model.safetensors"
    assert not torch.equal(load_file(raw / part)["head.query_out.weight"], load_file(out / part)["head.query_out.weight"])
    arguments = ("--model", str(out), "--output_dir", str(tmp_path / "images"), "--num_steps", "2")
    status, said = job("jobs/generate.py", *arguments, "--captions", '["red heart", "blue star"]')
    assert (status, said) == (0, f"done: 2 images, captions.json and grid.png in {tmp_path / 'images'}")
    assert Image.open(tmp_path / "images" / "000001.png").size == (16, 16)


def test_a_resumed_run_continues_with_the_losses_of_one_never_stopped(zero_3_run, make_run, losses, tmp_path):
    """Step 3 of 6 is inside a shard; the resumed run's last steps are compared to the last bit."""
    whole = Path(zero_3_run.output_dir)
    checkpoint = next((whole / "checkpoints").glob("*/step_00000003"))
    make_run(tmp_path, zero_stage=3, ema_decay=0.5, resume=str(checkpoint)).fit()
    resumed = losses(tmp_path)
    assert sorted(resumed) == [4, 5, 6]
    assert resumed == {step: values for step, values in losses(whole).items() if step > 3}
    with pytest.raises(ConfigError, match="already holds a run"):
        make_run(whole).fit()


@pytest.mark.slow
def test_two_launches_with_a_stop_between_them_are_one(zero_3_run, make_run, losses, tmp_path):
    """Schedule, data and randomness go on as if nothing had been, in the same MLflow run; the stop leaves a model."""
    fields = {"zero_stage": 3, "ema_decay": 0.5, "resume": "auto"}
    tracked = make_run(tmp_path, stop_at_step=4, **fields).fit()
    assert json.loads((tmp_path / "train_summary.json").read_text())["num_steps"] == 4
    DiffDisPipeline.from_pretrained(tmp_path / "export")
    assert sorted(losses(tmp_path)) == [1, 2, 3, 4]
    assert make_run(tmp_path, stop_at_step=6, **fields).fit() == tracked
    assert losses(tmp_path) == losses(Path(zero_3_run.output_dir))
    with pytest.raises(ConfigError, match=r"train\.stop_at_step: 7 is not from 0 to train\.num_steps, 6"):
        make_run(tmp_path, stop_at_step=7)


@pytest.mark.slow  # tests/ray_platform/test_stream.py has the counting alone
def test_an_undecodable_image_and_an_unreadable_caption_are_skipped_and_counted(make_run, tmp_path):
    import webdataset

    folder = write_shards(tmp_path / "data", num_shards=2, samples_a_shard=60)
    with webdataset.TarWriter(str(folder / "00002.tar")) as tar:
        tar.write({"__key__": "a", "png": b"not an image", "txt": b"red heart"})
        tar.write({"__key__": "b", "png": b"not an image either", "txt": b"\xff\xfe"})
    make_run(tmp_path / "out", sources=folder, num_workers=1, num_steps=35).fit()
    skipped = json.loads((tmp_path / "out" / "train_summary.json").read_text())["skipped"]
    assert sum(skipped.values()) >= 2
    assert "image_undecodable" in skipped
